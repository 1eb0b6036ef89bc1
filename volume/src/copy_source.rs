//! A copy of a volume as the source of a snapshot.
//!
//! It is read past the page cache, so that an upload does not evict what the application has there: with direct I/O
//! where the file system has it, else through the cache, which then is told to drop what was read. The test
//! `reading_a_copy_leaves_the_page_cache_alone` shows that both leave nothing behind.
//!
//! What has changed since the copy before is known from the extent maps of both (see [`crate::extents`]). The older
//! map is read before and after the newer one: where it moved meanwhile, as by a balance or defragmentation, all
//! counts as changed. An older copy that is deleted meanwhile, since another upload of the volume has ended, tells nothing
//! any more: on XFS its blocks are taken from it while it is open.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::MmapMut;
use petra_engine::source::{FileSource, Source};
use petra_engine::{Error as EngineError, Name, Result as EngineResult, SnapshotId};
use rustix::fs::{Advice, OFlags, fadvise};

use crate::error::{Error, Result};
use crate::extents::{ExtentMap, differing};
use crate::idle::Rate;
use crate::sys::btrfs;

/// What direct I/O is aligned to: a page, which is enough for every device.
const ALIGN: u64 = 4096;
/// Bytes read at once.
const BUFFER_BYTES: usize = 1 << 20;

/// An image that is not written any more, with the copy before it.
#[derive(Debug)]
pub struct CopySource {
    /// The same file through the page cache: length, holes, and whether someone wrote to it.
    cached: FileSource,
    file: File,
    path: PathBuf,
    direct: bool,
    base: Option<Base>,
    rate: Option<Arc<Rate>>,
    /// Aligned memory, as much as was ever needed at one time.
    buffers: Mutex<Vec<MmapMut>>,
}

/// The copy before, which shares extents with the new one.
#[derive(Debug)]
struct Base {
    file: File,
    path: PathBuf,
    len_bytes: u64,
    snapshot: SnapshotId,
    volume: Name,
    /// Held while maps are read, except on btrfs. FIEMAP asks XFS of each extent whether it is shared, under one lock for
    /// all: eight at once took twice as long as one after the other.
    alone: Option<Mutex<()>>,
}

impl Base {
    /// True while its path leads to the file that is open.
    fn is_in_place(&self) -> io::Result<bool> {
        let opened = self.file.metadata()?;
        match std::fs::metadata(&self.path) {
            Ok(there) => Ok((there.dev(), there.ino()) == (opened.dev(), opened.ino())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl CopySource {
    /// Opens a copy. Its bytes must not change any more.
    pub fn open(path: &Path) -> Result<Self> {
        let cached = FileSource::open(path)?;
        let (file, direct) = match open_direct(path) {
            Some(file) => (file, true),
            None => (File::open(path).map_err(Error::io("open", path))?, false),
        };
        Ok(Self {
            cached,
            file,
            path: path.to_owned(),
            direct,
            base: None,
            rate: None,
            buffers: Mutex::default(),
        })
    }

    /// Compares with an older copy of the same image, which was stored as `volume` of `snapshot`. Both must be on one file
    /// system, and stay as they are for as long as this is used; the older one may be deleted.
    pub fn with_base(mut self, path: &Path, snapshot: SnapshotId, volume: Name) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let len_bytes = file.metadata().map_err(Error::io("read the size of", path))?.len();
        let is_btrfs = btrfs::is_on(&file).map_err(Error::io("look at", path))?;
        let alone = (!is_btrfs).then(Mutex::default);
        self.base = Some(Base { file, path: path.to_owned(), len_bytes, snapshot, volume, alone });
        Ok(self)
    }

    /// Reads no faster than this.
    #[must_use]
    pub fn with_rate(self, rate: Option<Arc<Rate>>) -> Self {
        Self { rate, ..self }
    }

    /// The same, read through the page cache even where direct I/O works.
    #[doc(hidden)]
    pub fn without_direct(mut self) -> Result<Self> {
        self.file = File::open(&self.path).map_err(Error::io("open", &self.path))?;
        self.direct = false;
        Ok(self)
    }

    fn take_buffer(&self) -> EngineResult<MmapMut> {
        let kept = self.buffers.lock().unwrap_or_else(PoisonError::into_inner).pop();
        match kept {
            Some(buffer) => Ok(buffer),
            None => MmapMut::map_anon(BUFFER_BYTES).map_err(self.failure("read")),
        }
    }

    /// Reads at most a buffer's worth from an aligned place.
    fn read_direct(&self, buf: &mut [u8], offset: u64) -> EngineResult<()> {
        let mut buffer = self.take_buffer()?;
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let start = at / ALIGN * ALIGN;
            let skip = (at - start) as usize;
            let want = (skip + rest.len()).next_multiple_of(ALIGN as usize).min(BUFFER_BYTES);
            let place = buffer.get_mut(..want).unwrap_or_default();
            let found = match self.file.read_at(place, start) {
                Ok(found) => found,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.failure("read")(error)),
            };
            let found = place.get(skip..found).unwrap_or_default();
            if found.is_empty() {
                return Err(EngineError::SourceChanged {
                    path: self.path.clone(),
                    detail: format!("it ends before offset {at}"),
                });
            }
            let step = found.len().min(rest.len());
            let (target, after) = rest.split_at_mut(step);
            target.copy_from_slice(found.get(..step).unwrap_or_default());
            (at, rest) = (at + step as u64, after);
        }
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
        Ok(())
    }

    /// Reads through the page cache, and drops there what was read. The cache keeps a large page of which only a part is
    /// to be dropped, so all of the file is.
    fn read_cached(&self, buf: &mut [u8], offset: u64) -> EngineResult<()> {
        self.file.read_exact_at(buf, offset).map_err(self.failure("read"))?;
        // A hint: nothing depends on it.
        let _ = fadvise(&self.file, 0, None, Advice::DontNeed);
        Ok(())
    }

    fn failure(&self, action: &'static str) -> impl FnOnce(io::Error) -> EngineError {
        let path = self.path.clone();
        move |cause| EngineError::Io { action, path, cause }
    }

    fn differing(&self, base: &Base, range: &Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let alone = base.alone.as_ref();
        let _alone = alone.map(|alone| alone.lock().unwrap_or_else(PoisonError::into_inner));
        let before = ExtentMap::read(&base.file, range.clone())?;
        let copy = ExtentMap::read(&self.file, range.clone())?;
        let after = ExtentMap::read(&base.file, range.clone())?;
        let mut ranges = differing(&before, &copy);
        // It loses its place before its blocks.
        if alone.is_some() && !base.is_in_place()? {
            return Err(io::Error::other("the copy before was deleted meanwhile"));
        }
        if after != before {
            ranges.extend(differing(&before, &after));
            ranges.extend(differing(&after, &copy));
        }
        Ok(ranges)
    }
}

/// Opens for direct I/O, if a read in that way works there.
fn open_direct(path: &Path) -> Option<File> {
    let flags = OFlags::DIRECT.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).ok()?;
    let mut buffer = MmapMut::map_anon(ALIGN as usize).ok()?;
    file.read_at(&mut buffer, 0).ok()?;
    Some(file)
}

impl Source for CopySource {
    fn len_bytes(&self) -> u64 {
        self.cached.len_bytes()
    }

    fn data_bytes_hint(&self) -> u64 {
        self.cached.data_bytes_hint()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> EngineResult<()> {
        if let Some(rate) = &self.rate {
            rate.take(buf.len() as u64);
        }
        if self.direct { self.read_direct(buf, offset) } else { self.read_cached(buf, offset) }
    }

    fn next_data(&self, from: u64) -> EngineResult<Option<Range<u64>>> {
        self.cached.next_data(from)
    }

    fn changed(&self, segment: Range<u64>, parent: SnapshotId) -> Option<Vec<Range<u64>>> {
        let is_covered = |base: &&Base| base.snapshot == parent && base.len_bytes >= segment.end;
        let base = self.base.as_ref().filter(is_covered)?;
        match self.differing(base, &segment) {
            Ok(ranges) => Some(ranges),
            Err(error) => {
                tracing::warn!(
                    base = %base.path.display(),
                    copy = %self.path.display(),
                    %error,
                    "no extent map: all of {segment:?} is read",
                );
                None
            }
        }
    }

    fn parent_volume(&self, parent: SnapshotId) -> Option<&Name> {
        self.base.as_ref().filter(|base| base.snapshot == parent).map(|base| &base.volume)
    }

    fn check_unchanged(&self) -> EngineResult<()> {
        self.cached.check_unchanged()
    }
}
