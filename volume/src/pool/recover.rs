//! Cleaning up after crashes.
//!
//! Everything that is made or deleted passes through `new` or `trash`, and a copy counts once the volume's state names it.
//! So recovery deletes what is there, and what no state names. A lock says that someone is still at work: then it leaves
//! his things alone. Whatever it can't do it reports, and goes on.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use petra_engine::SnapshotId;
use serde::Serialize;

use super::{Pool, entries};
use crate::error::{Error, Result};
use crate::freeze;
use crate::snapshot;
use crate::sys::loops::LoopDevice;
use crate::sys::{files, mounts};
use crate::volume::{LockedVolume, Volume};

/// One thing that recovery did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "did")]
pub enum Recovered {
    /// Deleted a volume that was being made or deleted, or an upload whose copies were not all taken.
    Deleted {
        /// Where it was.
        path: PathBuf,
    },
    /// Deleted a copy that its volume's state does not name.
    DeletedCopy {
        /// The volume.
        volume: String,
        /// The copy's directory.
        path: PathBuf,
    },
    /// Forgot a copy that is not there any more.
    ForgotCopy {
        /// The volume.
        volume: String,
        /// The copy.
        copy: SnapshotId,
    },
    /// Detached a device that nobody wants.
    Detached {
        /// The device.
        device: PathBuf,
        /// What it stood on.
        image: PathBuf,
    },
    /// Thawed a file system that was left frozen.
    Thawed {
        /// The volume.
        volume: String,
        /// Where it is mounted.
        at: PathBuf,
    },
}

/// What a recovery did.
#[derive(Debug, Default)]
pub struct Recovery {
    /// In this order.
    pub done: Vec<Recovered>,
    /// What could not be done.
    pub problems: Vec<Error>,
}

impl Recovery {
    /// Notes a problem, if there is one.
    fn note<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.problems.push(error)).ok()
    }
}

impl Pool {
    /// Cleans up what crashes have left. Things that another process works on are passed over.
    pub fn recover(&self) -> Result<Recovery> {
        let mut recovery = Recovery::default();
        self.discard_drafts(&mut recovery)?;
        let mut rubbish = vec![];
        for name in entries(&self.trash_directory())? {
            rubbish.push(self.trash_directory().join(name));
        }
        if !rubbish.is_empty() {
            let detached = self.detach_rubbish(&mut recovery);
            recovery.note(detached);
        }
        for path in rubbish {
            if recovery.note(self.remove_volume_directory(&path)).is_some() {
                recovery.done.push(Recovered::Deleted { path });
            }
        }
        let discarded = snapshot::discard_unfinished(self);
        for path in recovery.note(discarded).unwrap_or_default() {
            recovery.done.push(Recovered::Deleted { path });
        }
        for volume in self.volumes()? {
            match volume.lock_for(Duration::ZERO) {
                Ok(locked) => locked.recover(&mut recovery),
                // Someone works on it, or has just deleted it.
                Err(Error::Busy { .. } | Error::Unknown { .. }) => {}
                Err(error) => recovery.problems.push(error),
            }
        }
        for done in &recovery.done {
            tracing::warn!(pool = %self.root().display(), ?done, "recovered");
        }
        Ok(recovery)
    }

    /// Moves what nobody makes any more from `new` to `trash`.
    fn discard_drafts(&self, recovery: &mut Recovery) -> Result<()> {
        if entries(&self.new_directory())?.is_empty() {
            return Ok(());
        }
        // Makers lock their directory while they have this lock, so none is without that.
        let _list = self.lock_list()?;
        for name in entries(&self.new_directory())? {
            let path = self.new_directory().join(name);
            let discarded = is_abandoned(&path)
                .and_then(|is| if is { files::rename_new(&path, &self.trash()) } else { Ok(()) });
            recovery.note(discarded.map_err(Error::io("delete", path)));
        }
        Ok(())
    }

    /// Detaches devices from images that are being deleted.
    fn detach_rubbish(&self, recovery: &mut Recovery) -> Result<()> {
        let failed = || Error::io("find devices on", self.trash_directory());
        for device in LoopDevice::attached().map_err(failed())? {
            let Some(image) = device.backing_path() else { continue };
            if image.starts_with(self.trash_directory())
                && recovery.note(detach_unused(device)) == Some(true)
            {
                recovery.done.push(Recovered::Detached { device: device.path(), image });
            }
        }
        Ok(())
    }
}

/// True for a directory, or whatever else it is, that no process has locked.
fn is_abandoned(path: &Path) -> io::Result<bool> {
    match File::open(path) {
        Ok(directory) => files::try_lock(&directory),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Detaches a device unless someone has it mounted.
fn detach_unused(device: LoopDevice) -> Result<bool> {
    let all = mounts::all().map_err(Error::io("read", "/proc/self/mountinfo"))?;
    if all.iter().any(|mount| mount.is_on(device.number())) {
        return Ok(false);
    }
    device.detach().map_err(Error::io("detach", device.path()))?;
    Ok(true)
}

impl LockedVolume {
    fn recover(mut self, recovery: &mut Recovery) {
        let volume = self.volume().clone();
        let thawed = thaw(&volume, recovery);
        recovery.note(thawed);
        let detached = self.detach_unwanted(recovery);
        recovery.note(detached);
        let copies = self.compare_copies(recovery);
        recovery.note(copies);
    }

    fn detach_unwanted(&self, recovery: &mut Recovery) -> Result<()> {
        if self.state().wanted.attached {
            return Ok(());
        }
        for (device, _) in self.volume().attachments()? {
            if detach_unused(device)? {
                let image = self.volume().image();
                recovery.done.push(Recovered::Detached { device: device.path(), image });
            }
        }
        Ok(())
    }

    fn compare_copies(&mut self, recovery: &mut Recovery) -> Result<()> {
        let volume = self.volume().clone();
        let named = self.state().copies.clone();
        let backend = volume.pool().backend();
        for name in entries(&volume.copies_directory())? {
            let id = name.to_str().and_then(|name| name.parse::<SnapshotId>().ok());
            if id.is_some_and(|id| named.contains(&id)) {
                continue;
            }
            let path = volume.copies_directory().join(name);
            backend.delete(&path)?;
            recovery.done.push(Recovered::DeletedCopy { volume: volume.name().to_string(), path });
        }
        for copy in named {
            if !backend.is_whole(&volume.copy(copy))? {
                self.delete_copy(copy)?;
                let volume = volume.name().to_string();
                recovery.done.push(Recovered::ForgotCopy { volume, copy });
            }
        }
        Ok(())
    }
}

/// Thaws the volume's file system if it is frozen: whoever freezes has the volume's lock until it is thawed.
fn thaw(volume: &Volume, recovery: &mut Recovery) -> Result<()> {
    // All mounts of a file system are frozen together.
    let any = volume.mounts()?.into_iter().next();
    for at in freeze::thaw_all(any.as_deref())? {
        recovery.done.push(Recovered::Thawed { volume: volume.name().to_string(), at });
    }
    Ok(())
}
