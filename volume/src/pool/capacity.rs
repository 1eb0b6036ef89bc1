//! How much a pool may promise, and what it holds back.
//!
//! Volumes are thin: a pool may promise more than it has (`overcommit_percent` of what is usable). When it runs full, an
//! application's writes fail, so the pool stops early to begin anything that would need room: a reserve is kept for what
//! attached volumes still write, since an overwrite of blocks that a copy shares needs new room too.

use std::thread::sleep;
use std::time::Duration;

use serde::Serialize;

use super::{Pool, VolumeState, entries, state};
use crate::error::{Error, Result};
use crate::sys::files;

/// The default of [`PoolState::overcommit_percent`](super::PoolState::overcommit_percent): most volumes are half empty, and
/// clones share most of their data.
pub const DEFAULT_OVERCOMMIT_PERCENT: u32 = 400;

/// The least that is held back, in bytes, except in small pools.
const MIN_RESERVE_BYTES: u64 = 1 << 30;

/// How long a full pool is given to free what was deleted.
const RECLAIM_WAIT: Duration = Duration::from_secs(3);
const RECLAIM_STEP: Duration = Duration::from_millis(200);

/// The room of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Status {
    /// The size of its file system, in bytes.
    pub total_bytes: u64,
    /// What can still be written.
    pub free_bytes: u64,
    /// What is held back for writes to volumes that are there.
    pub reserve_bytes: u64,
    /// The sizes of all volumes together, also of those in the making.
    pub promised_bytes: u64,
    /// The most that may be promised.
    pub limit_bytes: u64,
    /// How many volumes there are.
    pub volumes: u64,
}

impl Status {
    /// What can still be promised to volumes.
    pub fn available_bytes(&self) -> u64 {
        self.limit_bytes.saturating_sub(self.promised_bytes)
    }
}

/// The reserve of a file system of this size.
fn default_reserve(total_bytes: u64) -> u64 {
    MIN_RESERVE_BYTES.max(total_bytes / 20).min(total_bytes / 10)
}

impl Pool {
    /// True when only the reserve is left, as far as can be told.
    pub fn is_short(&self) -> bool {
        let space = files::space(self.root());
        space.is_ok_and(|space| space.free_bytes <= self.reserve_bytes(space.total_bytes))
    }

    fn reserve_bytes(&self, total_bytes: u64) -> u64 {
        self.state().reserve_bytes.unwrap_or_else(|| default_reserve(total_bytes))
    }

    /// The pool's room. Volumes whose state can't be read count as nothing; [`volumes`](Self::volumes) shows them.
    pub fn status(&self) -> Result<Status> {
        let root = self.root();
        let space = files::space(root).map_err(Error::io("look at", root))?;
        let reserve_bytes = self.reserve_bytes(space.total_bytes);
        let usable = u128::from(space.total_bytes.saturating_sub(reserve_bytes));
        let limit = usable * u128::from(self.state().overcommit_percent) / 100;
        let mut promised_bytes: u64 = 0;
        let mut volumes = 0;
        for directory in [self.volumes_directory(), self.new_directory()] {
            for name in entries(&directory)? {
                let state = state::read::<VolumeState>(&directory.join(name).join("volume.json"));
                if let Ok(Some(state)) = state {
                    promised_bytes = promised_bytes.saturating_add(state.size_bytes);
                    volumes += 1;
                }
            }
        }
        Ok(Status {
            total_bytes: space.total_bytes,
            free_bytes: space.free_bytes,
            reserve_bytes,
            promised_bytes,
            limit_bytes: u64::try_from(limit).unwrap_or(u64::MAX),
            volumes,
        })
    }

    /// Fails unless volumes may be promised so much more. The caller has the pool's lock.
    pub(crate) fn check_promise(&self, more_bytes: u64) -> Result<()> {
        let status = self.check_free()?;
        if more_bytes <= status.available_bytes() {
            return Ok(());
        }
        let detail = format!(
            "{more_bytes} bytes are asked for, {} of {} that may be promised are left",
            status.available_bytes(),
            status.limit_bytes
        );
        Err(Error::NoRoom { pool: self.root().to_owned(), detail })
    }

    /// Fails when only the reserve is left: then nothing may begin that needs room. Waits a while for the room of what was
    /// just deleted, which comes back in the background.
    pub fn check_free(&self) -> Result<Status> {
        let mut status = self.status()?;
        let mut waited = Duration::ZERO;
        while status.free_bytes <= status.reserve_bytes && waited < RECLAIM_WAIT {
            // Again each time: what btrfs frees can be used after the transaction after that.
            self.backend().reclaim(self.root())?;
            sleep(RECLAIM_STEP);
            waited += RECLAIM_STEP;
            status = self.status()?;
        }
        if status.free_bytes > status.reserve_bytes {
            return Ok(status);
        }
        let detail = format!(
            "{} of {} bytes are free, and {} are held in reserve for the volumes that are there",
            status.free_bytes, status.total_bytes, status.reserve_bytes
        );
        Err(Error::NoRoom { pool: self.root().to_owned(), detail })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserves() {
        const GIB: u64 = 1 << 30;
        assert_eq!(default_reserve(GIB), GIB / 10, "a small pool is not all reserve");
        assert_eq!(default_reserve(15 * GIB), GIB);
        assert_eq!(default_reserve(1000 * GIB), 50 * GIB);
    }
}
