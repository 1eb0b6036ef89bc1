//! The commands: one module each, with its options, what it does and what it prints.

mod agent;
mod clone;
mod copy;
mod demo;
mod diff;
mod doctor;
mod du;
mod gc;
mod image_server;
mod info;
mod init;
mod key;
mod ls;
mod manual;
mod policy;
mod pool;
mod prune;
mod repair;
mod restore;
mod rm;
mod snapshot;
mod undelete;
mod verify;
mod volume;
mod volume_snapshot;

use clap::Subcommand;

use crate::failure::Failure;
use crate::session::Session;

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a repository in a bucket or directory
    Init(init::Init),
    /// Take a snapshot of one or more volumes and print its URL
    Snapshot(snapshot::Snapshot),
    /// Write a volume of a snapshot to a file, block device or standard output
    Restore(restore::Restore),
    /// List experiments, runs, snapshots or volumes
    Ls(ls::Ls),
    /// Show everything about a repository, snapshot or volume
    Info(info::Info),
    /// Show which ranges differ between two snapshots, without reading their data
    Diff(diff::Diff),
    /// Show what each experiment, run and snapshot holds alone
    Du(du::Du),
    /// Delete snapshots; their data goes with a later gc
    #[command(alias = "delete")]
    Rm(rm::Rm),
    /// Bring back deleted snapshots that no gc has freed
    Undelete(undelete::Undelete),
    /// Delete the snapshots that no rule keeps
    Prune(prune::Prune),
    /// Show or set the rules that prune goes by
    Policy(policy::Policy),
    /// Free what no snapshot needs any more
    Gc(gc::Gc),
    /// Check that everything snapshots need is there and undamaged
    Verify(verify::Verify),
    /// List, add, remove and change the keys of an encrypted repository
    Key(key::Key),
    /// Copy snapshots to another repository, as far as it lacks them
    Copy(copy::Copy),
    /// Repair what can be repaired, and tell what is lost
    Repair(repair::Repair),
    /// Make a volume of a pool from a snapshot, which starts before its data is here
    Clone(clone::Clone),
    /// Mount a snapshot, at once
    Mount(clone::Mount),
    /// Unmount what petra mount has mounted
    Unmount(clone::Unmount),
    /// Make and look after pools, which hold the live volumes of a machine
    Pool(pool::Pool),
    /// Make, attach, mount, grow and delete live volumes
    Volume(volume::Volume),
    /// Show what this machine's kernel and tools can do for live volumes
    Doctor(doctor::Doctor),
    /// Serve the image of a lazy clone; started by whoever attaches one
    #[command(hide = true)]
    ImageServer(image_server::ImageServer),
    /// Thaw file systems if the process that froze them dies; started by whoever freezes
    #[command(hide = true, name = volume_snapshot::FREEZE_GUARD)]
    FreezeGuard,
    /// Show it all on a small volume in a temporary directory
    Demo(demo::Demo),
    /// Print a completion script for a shell
    Completions(manual::Completions),
    /// Print the manual page, or write the pages of all commands to a directory
    Man(manual::Man),
}

impl Command {
    /// Does it.
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::Init(command) => command.run(session).await,
            Self::Snapshot(command) => command.run(session).await,
            Self::Restore(command) => command.run(session).await,
            Self::Ls(command) => command.run(session).await,
            Self::Info(command) => command.run(session).await,
            Self::Diff(command) => command.run(session).await,
            Self::Du(command) => command.run(session).await,
            Self::Rm(command) => command.run(session).await,
            Self::Undelete(command) => command.run(session).await,
            Self::Prune(command) => command.run(session).await,
            Self::Policy(command) => command.run(session).await,
            Self::Gc(command) => command.run(session).await,
            Self::Verify(command) => command.run(session).await,
            Self::Key(command) => command.run(session).await,
            Self::Copy(command) => command.run(session).await,
            Self::Repair(command) => command.run(session).await,
            Self::Clone(command) => command.run(session).await,
            Self::Mount(command) => command.run(session).await,
            Self::Unmount(command) => command.run(session).await,
            Self::ImageServer(command) => command.run(session).await,
            Self::Pool(command) => command.run(session).await,
            Self::Volume(command) => command.run(session).await,
            // It never comes here: a guard is started without all that commands need.
            Self::FreezeGuard => Ok(()),
            Self::Doctor(command) => command.run(session),
            Self::Demo(command) => command.run(session).await,
            Self::Completions(command) => command.run(session),
            Self::Man(command) => command.run(session),
        }
    }
}
