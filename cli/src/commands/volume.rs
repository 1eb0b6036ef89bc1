//! `petra volume`.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use jiff::Timestamp;
use petra_engine::{Name, SnapshotId};
use petra_volume::Space;
use petra_volume::pool::{CreateRequest, Filesystem};
use petra_volume::volume::{Stats, Usage};
use serde::Serialize;

use super::clone;
use super::pool::PoolOption;
use super::volume_snapshot;
use crate::failure::Failure;
use crate::node::{self, Patience};
use crate::session::Session;
use crate::text::{Fields, Side, Table, bytes, quoted, size, time};

/// Options of `petra volume`.
#[derive(Debug, clap::Args)]
pub struct Volume {
    #[command(subcommand)]
    action: Action,
}

/// What to do with volumes.
#[derive(Debug, Subcommand)]
enum Action {
    /// Make a volume with an empty file system
    Create {
        #[command(flatten)]
        pool: PoolOption,
        /// Its name
        name: String,
        /// Its size, such as 10G; it takes room as it is filled
        #[arg(long, value_name = "SIZE", value_parser = size)]
        size: u64,
        /// What it holds: ext4, xfs, btrfs, or raw for a block device as it is
        #[arg(long, value_name = "FS", default_value = "ext4")]
        filesystem: Filesystem,
    },
    /// List the volumes of a pool
    Ls {
        #[command(flatten)]
        pool: PoolOption,
    },
    /// Show everything about a volume
    Info(Named),
    /// Give a volume a block device, and print its path
    Attach {
        #[command(flatten)]
        volume: Named,
        /// Let nobody write to it
        #[arg(long)]
        read_only: bool,
        #[command(flatten)]
        patience: Patience,
    },
    /// Take a volume's block device away
    Detach(Named),
    /// Mount a volume, which is attached if it is not
    Mount {
        #[command(flatten)]
        volume: Named,
        /// Where; made if it is missing
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// Let nobody write to it
        #[arg(long)]
        read_only: bool,
        #[command(flatten)]
        patience: Patience,
    },
    /// Unmount a volume and detach it
    Unmount(Named),
    /// Make a volume larger, also while it is used
    Grow {
        #[command(flatten)]
        volume: Named,
        /// Its new size, such as 20G
        #[arg(value_name = "SIZE", value_parser = size)]
        size: u64,
    },
    /// Take a snapshot of one or more volumes at one point in time, and print its URL
    Snapshot(volume_snapshot::Snapshot),
    /// Go on with uploads of snapshots that ended early, and print their URLs
    Upload(volume_snapshot::GoOn),
    /// Delete a volume and its copies
    #[command(alias = "delete")]
    Rm {
        #[command(flatten)]
        volume: Named,
        /// Also when some of its copies are not uploaded yet
        #[arg(long)]
        force: bool,
    },
}

/// A volume of a pool.
#[derive(Debug, clap::Args)]
struct Named {
    #[command(flatten)]
    pool: PoolOption,
    /// The volume
    #[arg(value_name = "NAME")]
    name: String,
}

impl Named {
    fn find(&self) -> Result<petra_volume::Volume, Failure> {
        Ok(self.pool.open()?.volume(&name(&self.name)?)?)
    }

    fn lock(&self, session: &Session) -> Result<petra_volume::LockedVolume, Failure> {
        let pool = self.pool.open_to_change(session)?;
        Ok(pool.volume(&name(&self.name)?)?.lock()?)
    }
}

fn name(text: &str) -> Result<Name, Failure> {
    Ok(Name::new("volume", text)?)
}

/// A volume as a document.
#[derive(Serialize)]
struct View<'a> {
    name: &'a Name,
    id: SnapshotId,
    size_bytes: u64,
    sector_bytes: u32,
    filesystem: Filesystem,
    created: Timestamp,
    /// The URL of the snapshot that it was made from.
    origin: Option<&'a str>,
    /// Some of its data is not here yet.
    lazy: bool,
    /// The snapshot that the next one is compared with.
    base: Option<SnapshotId>,
    copies: usize,
    allocated_bytes: u64,
    device: Option<&'a Path>,
    read_only: Option<bool>,
    direct_io: Option<bool>,
    mounts: &'a [PathBuf],
    filesystem_space: Option<Space>,
}

impl<'a> View<'a> {
    fn new(stats: &'a Stats) -> Self {
        let (state, attachment) = (&stats.state, stats.attachment.as_ref());
        Self {
            name: &state.name,
            id: state.id,
            size_bytes: state.size_bytes,
            sector_bytes: state.sector_bytes,
            filesystem: state.filesystem,
            created: state.created,
            origin: state.origin.as_deref(),
            lazy: state.lazy.as_ref().is_some_and(|lazy| !lazy.hydrated),
            base: state.base.as_ref().map(|base| base.snapshot),
            copies: state.copies.len(),
            allocated_bytes: stats.allocated_bytes,
            device: attachment.map(|found| found.device.as_path()),
            read_only: attachment.map(|found| found.read_only),
            direct_io: attachment.map(|found| found.direct_io),
            mounts: &stats.mounts,
            filesystem_space: stats.filesystem_space,
        }
    }
}

#[derive(Serialize)]
struct List<'a> {
    volumes: Vec<View<'a>>,
    unreadable: Vec<Unreadable>,
}

/// A volume that could not be looked at.
#[derive(Serialize)]
struct Unreadable {
    name: Name,
    error: String,
}

#[derive(Serialize)]
struct Info<'a> {
    #[serde(flatten)]
    volume: View<'a>,
    usage: Usage,
    image: PathBuf,
}

#[derive(Serialize)]
struct Deleted {
    deleted: Name,
}

impl Volume {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        match self.action {
            Action::Snapshot(command) => command.run(session).await,
            Action::Upload(command) => command.run(session).await,
            Action::Create { pool, name: text, size, filesystem } => {
                let pool = pool.open_to_change(session)?;
                let volume = pool.create(CreateRequest::new(name(&text)?, size, filesystem))?;
                report(&volume, session, |_| format!("{}\n", volume.name()))?;
                let word = quoted(volume.name().as_str());
                session.out.say(&format!("next: petra volume mount {word} DIR"));
                Ok(())
            }
            Action::Ls { pool } => list(&pool, session),
            Action::Info(volume) => info(&volume.find()?, session),
            Action::Attach { volume, read_only, patience } => {
                let mut locked = volume.lock(session)?;
                let serving = node::serving(session, patience)?;
                let attachment = locked.attach_served(&serving, read_only)?;
                report(locked.volume(), session, |_| format!("{}\n", attachment.device.display()))
            }
            Action::Detach(volume) => {
                let mut locked = volume.lock(session)?;
                locked.detach()?;
                report(locked.volume(), session, |_| String::new())
            }
            Action::Mount { volume, directory, read_only, patience } => {
                let mut locked = volume.lock(session)?;
                locked.attach_served(&node::serving(session, patience)?, read_only)?;
                locked.mount(&directory, read_only)?;
                report(locked.volume(), session, |_| String::new())
            }
            Action::Unmount(volume) => {
                let mut locked = volume.lock(session)?;
                locked.unmount()?;
                locked.detach()?;
                report(locked.volume(), session, |_| String::new())
            }
            Action::Grow { volume, size } => {
                let mut locked = volume.lock(session)?;
                locked.grow(size)?;
                report(locked.volume(), session, |stats| {
                    format!("{}\n", bytes(stats.state.size_bytes))
                })
            }
            Action::Rm { volume, force } => {
                let locked = volume.lock(session)?;
                let name = locked.state().name.clone();
                clone::remove(session, locked, !force).await?;
                let document = Deleted { deleted: name };
                session.out.report(&document, || format!("{}\n", document.deleted))
            }
        }
    }
}

/// Prints a volume as JSON, or a text.
fn report(
    volume: &petra_volume::Volume,
    session: &Session,
    text: impl FnOnce(&Stats) -> String,
) -> Result<(), Failure> {
    let stats = volume.stats()?;
    session.out.report(&View::new(&stats), || text(&stats))
}

fn list(pool: &PoolOption, session: &Session) -> Result<(), Failure> {
    let (mut found, mut unreadable) = (vec![], vec![]);
    for volume in pool.open()?.volumes()? {
        match volume.stats() {
            Ok(stats) => found.push(stats),
            // Deleted since it was listed.
            Err(petra_volume::Error::Unknown { .. }) => {}
            Err(error) => {
                let error = error.to_string();
                unreadable.push(Unreadable { name: volume.name().clone(), error });
            }
        }
    }
    let document = List { volumes: found.iter().map(View::new).collect(), unreadable };
    session.out.report(&document, || {
        let mut table = Table::new(&[
            ("NAME", Side::Left),
            ("SIZE", Side::Right),
            ("TAKES", Side::Right),
            ("FS", Side::Left),
            ("DEVICE", Side::Left),
            ("MOUNTED AT", Side::Left),
        ]);
        for stats in &found {
            table.row([
                stats.state.name.to_string(),
                bytes(stats.state.size_bytes),
                bytes(stats.allocated_bytes),
                stats.state.filesystem.to_string(),
                device(stats),
                mounts(stats),
            ]);
        }
        table.render()
    })?;
    for Unreadable { name, error } in &document.unreadable {
        session.out.warn(&format!("volume {name}: {error}"));
    }
    Ok(())
}

fn device(stats: &Stats) -> String {
    stats.attachment.as_ref().map_or(String::new(), |found| found.device.display().to_string())
}

fn mounts(stats: &Stats) -> String {
    let all = stats.mounts.iter().map(|at| at.display().to_string());
    all.collect::<Vec<_>>().join(", ")
}

fn info(volume: &petra_volume::Volume, session: &Session) -> Result<(), Failure> {
    let (stats, usage, image) = (volume.stats()?, volume.usage()?, volume.image());
    let document = Info { volume: View::new(&stats), usage, image };
    session.out.report(&document, || {
        let Info { usage, image, .. } = &document;
        let state = &stats.state;
        let mut fields = Fields::default();
        fields
            .add("name", state.name.to_string())
            .add("id", state.id.to_string())
            .add("created", time(state.created))
            .add("size", bytes(state.size_bytes))
            .add("file system", state.filesystem.to_string())
            .add("takes", bytes(stats.allocated_bytes))
            .add("of that alone", bytes(usage.exclusive_bytes))
            .add("extents", usage.extents.to_string())
            .add("copies", state.copies.len().to_string())
            .add("image", image.to_string_lossy())
            .add_some("origin", state.origin.as_deref())
            .add_some("base", state.base.as_ref().map(|base| base.snapshot.to_string()));
        if let Some(attachment) = &stats.attachment {
            let read_only = if attachment.read_only { ", read-only" } else { "" };
            let cached = if attachment.direct_io { "" } else { ", through the page cache" };
            fields.add("device", format!("{}{read_only}{cached}", attachment.device.display()));
        }
        if let Some(space) = &stats.filesystem_space {
            fields.add("mounted at", mounts(&stats)).add(
                "free in it",
                format!("{} of {}", bytes(space.free_bytes), bytes(space.total_bytes)),
            );
            if space.inodes > 0 {
                fields.add("free inodes", format!("{} of {}", space.free_inodes, space.inodes));
            }
        }
        fields.render()
    })
}
