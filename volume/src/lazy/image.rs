//! The local image of a lazy volume: a sparse file some of whose blocks are there.
//!
//! Whoever changes blocks that are absent holds the lock of their region, so that a fill never overwrites what the
//! application wrote meanwhile: it looks which blocks are absent, writes those, and sets their bits under the lock.
//! Blocks that are there need no lock, since no fill touches them: a fill sets the bit only when it is done.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use petra_engine::target::begin_writeback;
use rustix::fs::{FallocateFlags, OFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use super::presence::{BLOCK_BYTES, Presence};
use crate::error::{Error, Result};
use crate::fuse::Zeroing;

/// Bytes that one lock is for.
const REGION_BYTES: u64 = 1 << 20;
/// After so much that was filled in, the system begins to write it out: the disk has work while more comes, and a flush
/// has little left to do.
const WRITEBACK_BYTES: u64 = 32 << 20;
/// Locks. Regions that share one only wait for each other.
const LOCKS: u64 = 64;

/// The image file and what of it is there.
#[derive(Debug)]
pub(super) struct LocalImage {
    file: File,
    path: PathBuf,
    len_bytes: u64,
    /// All reads and writes go past the page cache, and are aligned to blocks.
    direct: bool,
    presence: Presence,
    locks: Vec<Mutex<()>>,
    /// Bytes of data that fills brought.
    filled: AtomicU64,
    /// The system lost writes: nothing may be called durable any more.
    broken: AtomicBool,
}

impl LocalImage {
    /// Opens the image of a presence map.
    pub(super) fn open(
        path: &Path,
        len_bytes: u64,
        direct: bool,
        presence: Presence,
    ) -> Result<Self> {
        if direct && !len_bytes.is_multiple_of(BLOCK_BYTES) {
            return Err(Error::Request(format!(
                "{} of {len_bytes} bytes can't be used with sectors of {BLOCK_BYTES} bytes",
                path.display()
            )));
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if direct {
            options.custom_flags(OFlags::DIRECT.bits().cast_signed());
        }
        let file = options.open(path).map_err(Error::io("open", path))?;
        let metadata = file.metadata().map_err(Error::io("read the size of", path))?;
        if !metadata.is_file() || metadata.len() != len_bytes {
            let detail = format!("a file of {len_bytes} bytes expected, {} found", metadata.len());
            return Err(Error::Damaged { path: path.to_owned(), detail });
        }
        let locks = (0..LOCKS).map(|_| Mutex::new(())).collect();
        let (path, broken) = (path.to_owned(), AtomicBool::new(false));
        let filled = AtomicU64::new(0);
        Ok(Self { file, path, len_bytes, direct, presence, locks, filled, broken })
    }

    pub(super) fn presence(&self) -> &Presence {
        &self.presence
    }

    /// The blocks that a range touches.
    pub(super) fn blocks(&self, range: &Range<u64>) -> Range<u64> {
        range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES)
    }

    /// The blocks that lie within a range; the last of the volume may be short.
    fn whole_blocks(&self, range: &Range<u64>) -> Range<u64> {
        let end = if range.end == self.len_bytes {
            range.end.div_ceil(BLOCK_BYTES)
        } else {
            range.end / BLOCK_BYTES
        };
        let start = range.start.div_ceil(BLOCK_BYTES);
        start..end.max(start)
    }

    /// The first block of a range that must come before it can be read.
    pub(super) fn missing_for_read(&self, range: &Range<u64>) -> Option<u64> {
        self.presence.first_absent(self.blocks(range))
    }

    /// The first block that must come before a range can be overwritten: one that keeps some of its bytes.
    pub(super) fn missing_for_write(&self, range: &Range<u64>) -> Option<u64> {
        let (all, whole) = (self.blocks(range), self.whole_blocks(range));
        let absent = |block: u64| self.presence.first_absent(block..block + 1);
        let first = (all.start < whole.start).then(|| absent(all.start)).flatten();
        first.or_else(|| {
            let last = all.end.checked_sub(1)?;
            (all.end > whole.end && last >= all.start).then(|| absent(last)).flatten()
        })
    }

    /// Reads a range that is there. `buffer` has room for two blocks more.
    pub(super) fn read<'b>(
        &self,
        range: &Range<u64>,
        buffer: &'b mut [u8],
    ) -> Result<&'b [u8], Errno> {
        let aligned = if self.direct {
            range.start / BLOCK_BYTES * BLOCK_BYTES..range.end.next_multiple_of(BLOCK_BYTES)
        } else {
            range.clone()
        };
        let place = buffer.get_mut(..(aligned.end - aligned.start) as usize).ok_or(Errno::INVAL)?;
        self.file.read_exact_at(place, aligned.start).map_err(|error| {
            self.report("read", &error);
            errno(&error)
        })?;
        let skipped = (range.start - aligned.start) as usize;
        buffer.get(skipped..skipped + (range.end - range.start) as usize).ok_or(Errno::INVAL)
    }

    /// True where this is not aligned as the image needs it.
    pub(super) fn refuses(&self, range: &Range<u64>) -> bool {
        let aligned = |at: u64| at.is_multiple_of(BLOCK_BYTES);
        self.direct && !(aligned(range.start) && aligned(range.end))
    }

    /// Writes what the application gave, for which nothing is [missing](Self::missing_for_write).
    pub(super) fn write(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let range = offset..offset + data.len() as u64;
        if self.presence.first_absent(self.blocks(&range)).is_none() {
            return self.write_file(data, offset);
        }
        let mut rest = data;
        for part in regions(&range) {
            let (now, later) = rest.split_at((part.end - part.start) as usize);
            rest = later;
            let _lock = self.lock(part.start);
            self.write_file(now, part.start)?;
            self.presence.set(self.whole_blocks(&part));
        }
        Ok(())
    }

    /// Makes a range zeros, for which nothing is [missing](Self::missing_for_write).
    pub(super) fn zero(&self, range: &Range<u64>, how: Zeroing) -> Result<(), Errno> {
        if self.presence.first_absent(self.blocks(range)).is_none() {
            return self.zero_file(range, how);
        }
        if range.end - range.start > LOCKS * REGION_BYTES {
            // In order, and all others hold one at most, so that nobody waits in a circle.
            let _locks: Vec<_> = (0..LOCKS).map(|n| self.lock(n * REGION_BYTES)).collect();
            self.zero_file(range, how)?;
            self.presence.set(self.whole_blocks(range));
            return Ok(());
        }
        for part in regions(range) {
            let _lock = self.lock(part.start);
            self.zero_file(&part, how)?;
            self.presence.set(self.whole_blocks(&part));
        }
        Ok(())
    }

    /// Takes in data of the volume, for blocks that are still absent.
    pub(super) fn fill(&self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        let range = self.checked(offset..offset.saturating_add(bytes.len() as u64))?;
        for part in regions(&range) {
            let blocks = self.blocks(&part);
            let _lock = self.lock(part.start);
            let mut at = blocks.start;
            while let Some(run) = self.presence.absent_run(at..blocks.end) {
                let start = run.start * BLOCK_BYTES;
                let end = (run.end * BLOCK_BYTES).min(self.len_bytes);
                let piece = bytes.get((start - offset) as usize..(end - offset) as usize);
                self.write_file(piece.ok_or(Errno::INVAL)?, start)?;
                self.presence.set(run.clone());
                at = run.end;
            }
        }
        let len_bytes = bytes.len() as u64;
        let before = self.filled.fetch_add(len_bytes, Ordering::Relaxed);
        if before / WRITEBACK_BYTES != (before + len_bytes) / WRITEBACK_BYTES && !self.direct {
            begin_writeback(&self.file, 0..self.len_bytes);
        }
        Ok(())
    }

    /// Takes in zeros of the volume, for blocks that are still absent.
    pub(super) fn fill_zeros(&self, range: Range<u64>) -> Result<(), Errno> {
        let range = self.checked(range)?;
        let mut at = range.start;
        while at < range.end {
            let data = match seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) => data.min(range.end),
                Err(Errno::NXIO) => range.end,
                Err(error) => return Err(error),
            };
            // A hole reads as zeros already. A write that comes at this moment was not acknowledged yet, so its blocks
            // may count as there already; what it leaves is right either way.
            self.presence.set(self.whole_blocks(&(at..data)));
            if data == range.end {
                break;
            }
            // Something that was never acknowledged: from before a crash.
            let start = data / BLOCK_BYTES * BLOCK_BYTES;
            let hole = seek(&self.file, SeekFrom::Hole(data))?;
            let end = hole.next_multiple_of(BLOCK_BYTES).min(range.end);
            for part in regions(&(start..end)) {
                let blocks = self.blocks(&part);
                let _lock = self.lock(part.start);
                let mut next = blocks.start;
                while let Some(run) = self.presence.absent_run(next..blocks.end) {
                    let end = (run.end * BLOCK_BYTES).min(self.len_bytes);
                    self.zero_file(&(run.start * BLOCK_BYTES..end), Zeroing::Punch)?;
                    self.presence.set(run.clone());
                    next = run.end;
                }
            }
            at = end;
        }
        Ok(())
    }

    /// Fills are whole blocks within the image.
    fn checked(&self, range: Range<u64>) -> Result<Range<u64>, Errno> {
        let whole = range.start.is_multiple_of(BLOCK_BYTES)
            && (range.end.is_multiple_of(BLOCK_BYTES) || range.end == self.len_bytes);
        if whole && range.start <= range.end && range.end <= self.len_bytes {
            Ok(range)
        } else {
            Err(Errno::INVAL)
        }
    }

    /// Makes durable all that was written, and then the record of it.
    pub(super) fn sync(&self) -> Result<()> {
        self.presence.sync(|| self.sync_file(), &self.path)
    }

    /// The same, for good: the volume is not in use any more.
    pub(super) fn close(&self) -> Result<()> {
        self.presence.close(|| self.sync_file(), &self.path)
    }

    fn sync_file(&self) -> io::Result<()> {
        // After a failed sync the kernel forgets what it could not write, and the next one succeeds.
        if self.broken.load(Ordering::Acquire) {
            return Err(io::Error::other("an earlier sync failed, so that writes may be lost"));
        }
        let synced = self.file.sync_data();
        if synced.is_err() {
            self.broken.store(true, Ordering::Release);
        }
        synced
    }

    fn write_file(&self, data: &[u8], offset: u64) -> Result<(), Errno> {
        self.file.write_all_at(data, offset).map_err(|error| {
            self.report("write", &error);
            errno(&error)
        })
    }

    fn zero_file(&self, range: &Range<u64>, how: Zeroing) -> Result<(), Errno> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let keep = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        let len = range.end - range.start;
        let zeroed = match how {
            Zeroing::Punch => fallocate(&self.file, punch, range.start, len),
            Zeroing::Keep => match fallocate(&self.file, keep, range.start, len) {
                // The space is not kept then, but the zeros are there.
                Err(Errno::OPNOTSUPP) => fallocate(&self.file, punch, range.start, len),
                zeroed => zeroed,
            },
        };
        zeroed.inspect_err(|error| self.report("zero", &(*error).into()))
    }

    fn lock(&self, at: u64) -> MutexGuard<'_, ()> {
        let place = (at / REGION_BYTES % LOCKS) as usize;
        #[expect(clippy::indexing_slicing, reason = "there are LOCKS of them")]
        let lock = &self.locks[place];
        lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self, action: &'static str, error: &io::Error) {
        tracing::warn!(path = %self.path.display(), %error, "cannot {action} the local image");
    }
}

/// The parts of a range that lie in one region each.
fn regions(range: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let (mut at, end) = (range.start, range.end);
    std::iter::from_fn(move || {
        let part = at..((at / REGION_BYTES + 1) * REGION_BYTES).min(end);
        at = part.end;
        (!part.is_empty()).then_some(part)
    })
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
