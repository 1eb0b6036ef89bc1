//! A live volume of a pool: its image, its device, its mount, its copies.
//!
//! [`Volume`] reads; [`LockedVolume`] changes, one process at a time.

mod attach;
mod copies;
mod grow;
mod health;
mod mount;
pub(crate) mod served;
mod stats;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use petra_engine::Name;

pub use attach::Attachment;
pub use copies::NewCopy;
pub use served::{DEFAULT_PATIENCE, Serving};
pub use stats::{Stats, Usage};

use crate::backend::IMAGE;
use crate::error::{Error, Result};
use crate::pool::Pool;
use crate::pool::lock::{self, Lock};
use crate::pool::state::{self, VolumeState};
use crate::sys::files;

/// A volume, which may be changed or deleted by others at any moment.
#[derive(Clone, Debug)]
pub struct Volume {
    pool: Pool,
    name: Name,
    directory: PathBuf,
}

impl Volume {
    /// The volume of this name, whether it is there or not.
    pub(crate) fn at(pool: Pool, name: Name) -> Self {
        let directory = pool.volumes_directory().join(name.as_str());
        Self { pool, name, directory }
    }

    /// The pool that it is in.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Its name.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Its directory: `POOL/volumes/NAME`.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The directory of its image.
    pub fn live(&self) -> PathBuf {
        self.directory.join("live")
    }

    /// Its image: all its bytes, except what a lazy clone has not fetched yet.
    pub fn image(&self) -> PathBuf {
        self.live().join(IMAGE)
    }

    /// The mount point of the image server's file system, for a lazy clone.
    pub fn lazy_directory(&self) -> PathBuf {
        self.directory.join("lazy")
    }

    /// Which blocks of a lazy clone are here.
    pub fn presence(&self) -> PathBuf {
        self.directory.join("presence")
    }

    /// What `volume.json` says.
    pub fn state(&self) -> Result<VolumeState> {
        let path = self.state_path();
        match state::read::<VolumeState>(&path)? {
            Some(state) if state.name == self.name => Ok(state),
            Some(state) => {
                let detail = format!("it is that of volume {}", state.name);
                Err(Error::Damaged { path, detail })
            }
            None if self.directory.is_dir() => {
                Err(Error::Damaged { path, detail: "there is no such file".to_owned() })
            }
            None => Err(self.unknown()),
        }
    }

    /// Takes the volume for changes. Waits a while for others, then says who has it.
    pub fn lock(&self) -> Result<LockedVolume> {
        self.lock_for(lock::WAIT)
    }

    /// The same with another patience.
    pub fn lock_for(&self, wait: Duration) -> Result<LockedVolume> {
        let path = self.directory.join("lock");
        let lock = match Lock::acquire(&path, &self.to_string(), wait) {
            Err(Error::Io { cause, .. }) if cause.kind() == std::io::ErrorKind::NotFound => {
                return Err(self.unknown());
            }
            lock => lock?,
        };
        let state = self.state()?;
        Ok(LockedVolume { volume: self.clone(), state, _lock: lock })
    }

    fn state_path(&self) -> PathBuf {
        self.directory.join("volume.json")
    }

    fn unknown(&self) -> Error {
        Error::Unknown {
            what: "volume",
            name: self.name.to_string(),
            within: self.pool.to_string(),
            known: vec![],
        }
    }
}

impl fmt::Display for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "volume {}", self.name)
    }
}

/// A volume that no other process changes until this is dropped.
#[derive(Debug)]
pub struct LockedVolume {
    volume: Volume,
    state: VolumeState,
    _lock: Lock,
}

impl LockedVolume {
    /// The volume.
    pub fn volume(&self) -> &Volume {
        &self.volume
    }

    /// Its state.
    pub fn state(&self) -> &VolumeState {
        &self.state
    }

    /// Changes its state: durable when this returns, and as it was after an error.
    pub fn change(&mut self, change: impl FnOnce(&mut VolumeState)) -> Result<()> {
        let mut state = self.state.clone();
        change(&mut state);
        if state != self.state {
            state::write(&self.volume.state_path(), &state)?;
            self.state = state;
        }
        Ok(())
    }

    /// Deletes the volume with its copies. Refused while it is attached, and while copies are kept that are not its base
    /// (uploads that have not ended), unless they don't matter. Gives its last state: who had it pinned must be told.
    pub fn delete(self, copies_matter: bool) -> Result<VolumeState> {
        if let Some(attachment) = self.volume.attachment()? {
            let by = format!("attached to {}", attachment.device.display());
            return Err(self.volume.in_use(by));
        }
        let Self { volume, state, .. } = &self;
        let base = state.base.as_ref().map(|base| base.copy);
        let needed = state.copies.iter().filter(|copy| Some(**copy) != base).count();
        if copies_matter && needed > 0 {
            let by = format!("{needed} of its copies, which are not uploaded yet");
            return Err(volume.in_use(by));
        }
        // One that fills it, or that a crash has left.
        self.end_server()?;
        let Self { volume, state, _lock } = self;
        let trash = volume.pool.trash();
        {
            let _list = volume.pool.lock_list()?;
            files::rename_new(&volume.directory, &trash)
                .map_err(Error::io("delete", &volume.directory))?;
        }
        // It is in memory, and nobody would ever delete it.
        let _ = volume.server_log(state.id).map(std::fs::remove_file);
        volume.pool.remove_volume_directory(&trash)?;
        Ok(state)
    }
}

impl Volume {
    fn in_use(&self, by: String) -> Error {
        Error::InUse { what: self.to_string(), by }
    }
}
