//! Targets of restores: new files, existing files and block devices.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{
    Advice, FallocateFlags, FlockOperation, RenameFlags, SeekFrom, fadvise, fallocate, flock, seek,
};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::source::next_data;

/// Takes the bytes of a volume, in any order, from worker threads.
pub trait Sink: Send + Sync + fmt::Debug {
    /// Stores bytes.
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()>;

    /// Stores all of a decoded frame, whose memory is left to whoever can use it.
    fn take(&self, frame: &mut Vec<u8>, offset: u64) -> Result<()> {
        self.write_at(frame, offset)
    }

    /// Nothing will be stored before this offset any more. A hint.
    fn settled(&self, _before: u64) {}
}

/// Takes everything and keeps nothing.
#[derive(Debug)]
pub(crate) struct Nowhere;

impl Sink for Nowhere {
    fn write_at(&self, _: &[u8], _: u64) -> Result<()> {
        Ok(())
    }
}

/// How much is settled between two starts of writing out.
const WRITEBACK_BYTES: u64 = 128 << 20;

/// A file or block device that a volume is restored to.
#[derive(Debug)]
pub struct FileTarget {
    file: File,
    /// Where the bytes go until they are whole.
    path: PathBuf,
    /// Where a new file appears at the end.
    final_path: Option<PathBuf>,
    finished: bool,
    /// Nothing will be written before this offset any more.
    settled: AtomicU64,
    /// What lies before this offset is on its way to the disk.
    written_out: AtomicU64,
    /// Holds old data: zeros must be written, and a comparison makes sense.
    holds_data: bool,
}

impl FileTarget {
    /// A new sparse file. It has its name only when it is whole: until then it is `PATH.partial`.
    pub fn create(path: &Path, len_bytes: u64) -> Result<Self> {
        if path.symlink_metadata().is_ok() {
            return Err(refuse(path, "it exists already"));
        }
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let file = lock_partial(path, &partial)?;
        file.set_len(0)
            .and_then(|()| file.set_len(len_bytes))
            .map_err(Error::io("resize", &partial))?;
        let final_path = Some(path.to_owned());
        Ok(Self {
            file,
            path: partial,
            final_path,
            finished: false,
            settled: AtomicU64::new(0),
            written_out: AtomicU64::new(0),
            holds_data: false,
        })
    }

    /// An existing file, which takes the volume's length, or a block device that is large enough and not in use.
    pub fn open_existing(path: &Path, len_bytes: u64) -> Result<Self> {
        let metadata = path.metadata().map_err(Error::io("open", path))?;
        let is_device = metadata.file_type().is_block_device();
        if !is_device && !metadata.is_file() {
            return Err(refuse(path, "it is neither a file nor a block device"));
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if is_device {
            // On a block device O_EXCL means: not while it is mounted or otherwise claimed.
            options.custom_flags(rustix::fs::OFlags::EXCL.bits().cast_signed());
        }
        let file = options.open(path).map_err(|cause| {
            if cause.raw_os_error() == Some(Errno::BUSY.raw_os_error()) {
                refuse(path, "the device is mounted or otherwise in use")
            } else {
                Error::Io { action: "open", path: path.to_owned(), cause }
            }
        })?;
        if is_device {
            let len = seek(&file, SeekFrom::End(0));
            let len = len.map_err(|e| Error::io("read the size of", path)(e.into()))?;
            if len < len_bytes {
                let reason = format!("the device has {len} bytes, the volume {len_bytes}");
                return Err(Error::Target { path: path.to_owned(), reason });
            }
        } else {
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
                return Err(refuse(path, "another restore is writing it"));
            }
            file.set_len(len_bytes).map_err(Error::io("resize", path))?;
        }
        Ok(Self {
            file,
            path: path.to_owned(),
            final_path: None,
            finished: false,
            settled: AtomicU64::new(0),
            written_out: AtomicU64::new(0),
            holds_data: true,
        })
    }

    /// True when the target may hold other data than zeros.
    pub fn holds_data(&self) -> bool {
        self.holds_data
    }

    /// Fills `buf` from `offset`.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(buf, offset).map_err(Error::io("read", &self.path))
    }

    /// The first range at or after `from` that may hold data, up to `end`; all before it reads as zeros.
    pub fn next_data(&self, from: u64, end: u64) -> Result<Option<Range<u64>>> {
        next_data(&self.file, from, end)
            .map_err(|e| Error::io("find data in", &self.path)(e.into()))
    }

    /// Makes a range read as zeros, freeing its space where the target can.
    pub fn zero(&self, offset: u64, len: u64) -> Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, flags, offset, len) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                const ZEROS: &[u8] = &[0; 64 << 10];
                let mut done = 0;
                while done < len {
                    let step = (len - done).min(ZEROS.len() as u64);
                    self.write_at(ZEROS.get(..step as usize).unwrap_or_default(), offset + done)?;
                    done += step;
                }
                Ok(())
            }
            Err(error) => Err(Error::io("punch a hole in", &self.path)(error.into())),
        }
    }

    /// Begins to write out what is settled, so that the disk is busy while more is fetched and verified, and little is left
    /// for the final sync. What was begun before, and is clean by now, leaves the page cache to others. Nothing else may:
    /// chunks end within pages, and a page that is dropped when one half of it is written is read back for the other.
    fn write_out(&self) {
        let settled = self.settled.load(Ordering::Relaxed) / WRITEBACK_BYTES * WRITEBACK_BYTES;
        let begun = self.written_out.fetch_max(settled, Ordering::Relaxed);
        if begun < settled {
            begin_writeback(&self.file, 0..settled);
            if let Some(begun) = NonZeroU64::new(begun) {
                // A hint as well.
                let _ = fadvise(&self.file, 0, Some(begun), Advice::DontNeed);
            }
        }
    }

    /// Makes all durable, and gives a new file its name.
    pub fn finish(&mut self) -> Result<()> {
        self.file.sync_all().map_err(Error::io("sync", &self.path))?;
        if let Some(final_path) = &self.final_path {
            rename_new(&self.path, final_path)?;
            let parent = final_path.parent().filter(|parent| !parent.as_os_str().is_empty());
            let parent = parent.unwrap_or(Path::new("."));
            let directory = File::open(parent).map_err(Error::io("open", parent))?;
            directory.sync_all().map_err(Error::io("sync", parent))?;
        }
        self.finished = true;
        Ok(())
    }
}

/// Begins to write out what is dirty in a range of a file, and does not wait for it. A hint: what goes wrong shows in the
/// next sync.
pub fn begin_writeback(file: &File, range: Range<u64>) {
    let len = range.end.saturating_sub(range.start).cast_signed();
    // SAFETY: the call takes no memory of this process.
    let _ = unsafe {
        let (file, start) = (file.as_raw_fd(), range.start.cast_signed());
        libc::sync_file_range(file, start, len, libc::SYNC_FILE_RANGE_WRITE)
    };
}

/// Opens the file of a restore in progress for this one alone. What an interrupted restore left is overwritten; one
/// that still runs is not.
fn lock_partial(path: &Path, partial: &Path) -> Result<File> {
    loop {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            // Volumes hold whatever their users put there, so only the owner may read them.
            .mode(0o600)
            .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed());
        let file = options.open(partial).map_err(Error::io("create", partial))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(refuse(path, "another restore is writing it"));
        }
        // Another restore may have ended between the two: then this file bears its final name by now, or none.
        let ours = file.metadata().map_err(Error::io("open", partial))?;
        let there = partial.symlink_metadata();
        let is_there =
            there.is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino()));
        if path.symlink_metadata().is_ok() {
            if is_there {
                // Nothing else can be done about a file that can't be removed.
                let _ = std::fs::remove_file(partial);
            }
            return Err(refuse(path, "it exists already"));
        }
        if is_there {
            return Ok(file);
        }
    }
}

/// Renames without replacing a file that appeared in the meantime.
fn rename_new(from: &Path, to: &Path) -> Result<()> {
    use rustix::fs::{CWD, renameat_with};
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) => Err(refuse(to, "it appeared while the volume was restored")),
        // File systems without the flag: a hard link does not replace either.
        Err(Errno::INVAL | Errno::NOSYS) => std::fs::hard_link(from, to)
            .and_then(|()| std::fs::remove_file(from))
            .map_err(Error::io("rename to", to)),
        Err(error) => Err(Error::io("rename to", to)(error.into())),
    }
}

fn refuse(path: &Path, reason: &str) -> Error {
    Error::Target { path: path.to_owned(), reason: reason.to_owned() }
}

impl Sink for FileTarget {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        debug_assert!(self.settled.load(Ordering::Relaxed) <= offset, "it was said to be settled");
        self.file.write_all_at(bytes, offset).map_err(Error::io("write", &self.path))?;
        self.write_out();
        Ok(())
    }

    fn settled(&self, before: u64) {
        self.settled.fetch_max(before, Ordering::Relaxed);
    }
}

impl Drop for FileTarget {
    fn drop(&mut self) {
        if !self.finished && self.final_path.is_some() {
            // Nothing else can be done about a file that can't be removed.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_settled_is_written_out_and_stays_as_it_was() {
        const LEN: u64 = 4 * WRITEBACK_BYTES;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("restored");
        let mut target = FileTarget::create(&path, LEN).unwrap();
        // Pieces that end within pages, and neighbours that come at different times.
        let pieces = (0..LEN).step_by(1 << 20).map(|at| (at + 1_000, at + 3_000));
        for (first, second) in pieces.clone() {
            target.write_at(&[1; 2_000], first).unwrap();
            target.settled(first);
            target.write_at(&[2; 2_000], second).unwrap();
        }
        assert_eq!(target.written_out.load(Ordering::Relaxed), LEN - WRITEBACK_BYTES);
        target.finish().unwrap();
        let restored = File::open(&path).unwrap();
        let mut found = [0; 6_000];
        for (first, _) in pieces {
            restored.read_exact_at(&mut found, first - 1_000).unwrap();
            let (before, rest) = found.split_at(1_000);
            let (ones, rest) = rest.split_at(2_000);
            let (twos, after) = rest.split_at(2_000);
            assert!(before.iter().chain(after).all(|byte| *byte == 0));
            assert!(ones.iter().all(|byte| *byte == 1) && twos.iter().all(|byte| *byte == 2));
        }
    }
}
