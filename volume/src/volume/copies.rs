//! Copies by reference of a volume: points in time that are uploaded, compared with, and cloned from.

use std::path::PathBuf;

use petra_engine::SnapshotId;

use super::{LockedVolume, Volume};
use crate::backend::{IMAGE, PendingCopy};
use crate::error::{Error, Result};
use crate::pool::state::{BaseState, VolumeState};

/// A copy that is being taken of a locked volume. Dropping it removes what there is of it.
#[derive(Debug)]
pub struct NewCopy {
    id: SnapshotId,
    pending: Box<dyn PendingCopy>,
}

impl NewCopy {
    /// The copy's id.
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// See [`PendingCopy::refresh`].
    pub fn refresh(&self) -> Result<()> {
        self.pending.refresh()
    }

    /// See [`PendingCopy::finish`].
    pub fn finish(&self) -> Result<()> {
        self.pending.finish()
    }

    /// Makes a finished copy whole and durable, without noting that it is needed: to recovery it is rubbish.
    pub fn publish(self) -> Result<SnapshotId> {
        self.pending.publish().map(|()| self.id)
    }
}

impl Volume {
    /// The directory of a copy: `copies/ULID`.
    pub fn copy(&self, id: SnapshotId) -> PathBuf {
        self.copies_directory().join(id.to_string())
    }

    /// The image of a copy.
    pub fn copy_image(&self, id: SnapshotId) -> PathBuf {
        self.copy(id).join(IMAGE)
    }

    pub(crate) fn copies_directory(&self) -> PathBuf {
        self.directory.join("copies")
    }
}

impl LockedVolume {
    /// Begins to copy the volume's image: the part that may take long, and during which it may be written. Then follow
    /// [`NewCopy::finish`], while its file system is frozen, and [`keep_copy`](Self::keep_copy).
    pub fn begin_copy(&self) -> Result<NewCopy> {
        if self.state.lazy.as_ref().is_some_and(|lazy| !lazy.hydrated) {
            return Err(Error::Hydrating { what: self.volume.to_string() });
        }
        let pool = &self.volume.pool;
        pool.check_free()?;
        let id = pool.host().new_id();
        let pending = pool.backend().begin_copy(&self.volume.live(), &self.volume.copy(id))?;
        Ok(NewCopy { id, pending })
    }

    /// Makes a finished copy durable, and notes that it is needed. `also` may note in the same step what it is for.
    pub fn keep_copy(
        &mut self,
        copy: NewCopy,
        also: impl FnOnce(&mut VolumeState),
    ) -> Result<SnapshotId> {
        let id = copy.publish()?;
        // After a crash before this, the copy is rubbish.
        let noted = self.change(|state| {
            state.copies.insert(id);
            also(state);
        });
        if noted.is_err() {
            let _ = self.volume.pool.backend().delete(&self.volume.copy(id));
        }
        noted.map(|()| id)
    }

    /// Makes a copy that is kept the base of the next snapshot, and deletes the base before it.
    pub fn set_base(&mut self, base: BaseState) -> Result<()> {
        if !self.state.copies.contains(&base.copy) {
            return Err(Error::Internal("a copy that is not kept was to be the base"));
        }
        let before = self.state.base.as_ref().map(|base| base.copy);
        let before = before.filter(|before| *before != base.copy);
        // In one step: after a crash, the copy before is one that nothing names, which recovery deletes.
        self.change(|state| {
            state.base = Some(base);
            state.copies.retain(|copy| Some(*copy) != before);
        })?;
        match before {
            Some(before) => {
                let copy = self.volume.copy(before);
                self.volume.pool.backend().delete(&copy)
            }
            None => Ok(()),
        }
    }

    /// Deletes a copy. If it is the base, the next snapshot reads everything. Can be repeated.
    pub fn delete_copy(&mut self, id: SnapshotId) -> Result<()> {
        let forget = |state: &mut VolumeState| {
            state.copies.remove(&id);
            if state.base.as_ref().is_some_and(|base| base.copy == id) {
                state.base = None;
            }
        };
        let (pool, copy) = (self.volume.pool.clone(), self.volume.copy(id));
        let delete = || pool.backend().delete(&copy);
        // Noted first: a copy that is not noted is rubbish. In a full pool there is no room for the note before the copy is
        // gone; then recovery forgets it if a crash comes between.
        match self.change(forget) {
            Err(error) if error.is_full() => {
                delete()?;
                self.change(forget)
            }
            noted => noted.and_then(|()| delete()),
        }
    }
}
