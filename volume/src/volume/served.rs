//! Devices of lazy clones: with an image server between image and device, as long as data is missing.
//!
//! ```text
//! lazy      live/image <- image server -> lazy/image (FUSE) <- loop device
//! hydrated  live/image <- loop device                                      from the next time it is attached
//! filled    live/image <- image server                                     nobody uses it, and somebody waits for its data
//! ```

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use petra_engine::SnapshotId;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use super::{Attachment, LockedVolume, Volume};
use crate::backend::IMAGE;
use crate::error::{Error, Result};
use crate::lazy::presence::VolumeIdentity;
use crate::lazy::server::{Inheritance, ServerOptions};
use crate::pool::LARGEST_SECTOR_BYTES;
use crate::pool::state::{VolumeState, Wanted};
use crate::programs::{Programs, has_agent};
use crate::sys::{files, mounts};

/// How long a server that was told to end may take to make durable what it has.
const END_WAIT: Duration = Duration::from_secs(60);
const END_STEP: Duration = Duration::from_millis(2);
/// How often is looked for the successor of an image server.
const SUCCESSOR_STEP: Duration = Duration::from_millis(50);
/// Threads of an image server.
const THREADS: usize = 4;

/// How long a read of a lazy clone waits for a repository that is away, unless it is told.
pub const DEFAULT_PATIENCE: Duration = Duration::from_secs(600);

/// What serving a lazy clone needs.
#[derive(Clone, Debug)]
pub struct Serving {
    /// How processes are started.
    pub programs: Programs,
    /// How long a read waits for data while the repository is away: [`DEFAULT_PATIENCE`] or another time, in whole seconds.
    pub patience: Duration,
}

impl Volume {
    /// False for a volume whose image server died: its device answers nothing but errors. Waits so long for a successor,
    /// which only an agent can start, and only while nobody has the volume locked.
    pub fn is_alive(&self, patience: Duration) -> Result<bool> {
        let mut waited = Duration::ZERO;
        loop {
            if self.state()?.lazy.is_none() || self.has_server()? || self.attachment()?.is_none() {
                return Ok(true);
            }
            if waited >= patience || !has_agent(&self.pool)? {
                return Ok(false);
            }
            sleep(SUCCESSOR_STEP);
            waited += SUCCESSOR_STEP;
        }
    }

    /// Starts an image server, or a successor of one, as it is wanted.
    pub(crate) fn start_server(
        &self,
        state: &VolumeState,
        programs: &Programs,
        inherited: Option<Inheritance>,
    ) -> Result<()> {
        let mount = self.lazy_directory();
        match std::fs::create_dir(&mount) {
            // Also while a dead server is mounted there.
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::io("create", mount)(error));
            }
            _ => {}
        }
        let id = state.id;
        let run = self.pool().run_directory()?;
        let options = ServerOptions {
            volume: VolumeIdentity { id, len_bytes: state.size_bytes },
            image: self.image(),
            presence: self.presence(),
            working: run.join(format!("{id}.presence")),
            mount,
            socket: run.join(SOCKET),
            // Smaller blocks than the pool's can only be written through the page cache.
            direct: state.sector_bytes == LARGEST_SECTOR_BYTES,
            read_only: state.wanted.read_only,
            patience: state.wanted.patience(),
            threads: THREADS,
        };
        let log = self.server_log(id)?;
        programs.start_image_server(&self.pool, &options, inherited, &log)
    }

    /// What its image servers say.
    pub(super) fn server_log(&self, id: SnapshotId) -> Result<PathBuf> {
        Ok(self.pool().run_directory()?.join(format!("{id}.log")))
    }

    /// True while a process serves the volume. Its file is not asked: a server that hangs would not answer.
    pub(crate) fn has_server(&self) -> Result<bool> {
        let path = self.presence();
        match File::open(&path) {
            // Every server has it locked as long as it lives. One that starts tries again where this is in the way.
            Ok(file) => files::is_locked(&file).map_err(Error::io("lock", &path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Error::io("open", path)(error)),
        }
    }
}

impl LockedVolume {
    /// Attaches the volume, with an image server in between if it needs one, and makes sure that an agent brings it what is
    /// missing.
    pub fn attach_served(&mut self, serving: &Serving, read_only: bool) -> Result<Attachment> {
        let Some(lazy) = self.state.lazy.clone() else { return self.attach(read_only) };
        let agent = || serving.programs.ensure_agent(self.volume.pool());
        if self.volume.attachment()?.is_none() {
            self.end_server()?;
            if lazy.hydrated {
                self.change(|state| state.lazy = None)?;
                remove(self.volume.presence())?;
                return self.attach(read_only);
            }
        } else if self.volume.has_server()? {
            agent()?;
            return self.attach_image(&self.served(), read_only);
        } else {
            let by = "its image server died: detach it and attach it again".to_owned();
            return Err(self.volume.in_use(by));
        }
        agent()?;
        // Noted first: who replaces the server goes by it.
        self.change(|state| {
            let patience_seconds = Some(serving.patience.as_secs());
            state.wanted = Wanted {
                attached: true,
                read_only,
                patience_seconds,
                mounted_at: state.wanted.mounted_at.take(),
            };
        })?;
        self.volume.start_server(&self.state, &serving.programs, None)?;
        self.attach_image(&self.served(), read_only)
    }

    /// Has the data of a lazy clone brought here although nobody uses it: without a device, so that whoever attaches or
    /// deletes the volume meanwhile just ends that. It is remembered, for whoever looks after the pool, until all is here.
    /// Does nothing for other volumes.
    pub fn fill(&mut self, serving: &Serving) -> Result<()> {
        if self.state.lazy.as_ref().is_none_or(|lazy| lazy.hydrated) {
            return Ok(());
        }
        self.change(|state| {
            if let Some(lazy) = &mut state.lazy {
                lazy.fill = true;
            }
        })?;
        serving.programs.ensure_agent(self.volume.pool())?;
        if self.volume.attachment()?.is_some() || self.volume.has_server()? {
            return Ok(());
        }
        // What a dead one left.
        self.end_server()?;
        self.volume.start_server(&self.state, &serving.programs, None)
    }

    /// What the device of a lazy clone stands on.
    pub(crate) fn served(&self) -> PathBuf {
        self.volume.lazy_directory().join(IMAGE)
    }

    /// Ends the image server, if there is one, and waits until it has made all durable. Clears away what a dead one left.
    pub(crate) fn end_server(&self) -> Result<()> {
        let at = self.volume.lazy_directory();
        let all = mounts::all().map_err(Error::io("read", "/proc/self/mountinfo"))?;
        for _ in all.iter().filter(|mount| mount.at == at) {
            let ended = match rustix::mount::unmount(&at, UnmountFlags::NOFOLLOW) {
                // The server is dead, or someone looks at its file: what it serves goes with the last one who does.
                Err(Errno::BUSY | Errno::NOTCONN) => {
                    rustix::mount::unmount(&at, UnmountFlags::DETACH)
                }
                ended => ended,
            };
            ended.map_err(Error::io("unmount", &at))?;
        }
        let path = self.volume.presence();
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            file => file.map_err(Error::io("open", &path))?,
        };
        let mut waited = Duration::ZERO;
        while flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            if waited >= END_WAIT {
                return Err(self.volume.in_use("its image server does not end".to_owned()));
            }
            sleep(END_STEP);
            waited += END_STEP;
        }
        Ok(())
    }
}

/// The agent's socket, in the pool's run directory.
pub(crate) const SOCKET: &str = "agent.sock";

fn remove(path: PathBuf) -> Result<()> {
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("delete", path)(error))
        }
        _ => Ok(()),
    }
}
