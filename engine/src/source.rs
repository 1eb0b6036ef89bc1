//! Sources of snapshots: anything with random reads and a map of its holes.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{Advice, SeekFrom, fadvise, seek};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::format::leaf::Extent;
use crate::id::SnapshotId;
use crate::name::Name;

/// A volume to snapshot. Methods may block; they are called from worker threads.
pub trait Source: Send + Sync + fmt::Debug {
    /// The length of the volume.
    fn len_bytes(&self) -> u64;

    /// About how many bytes will have to be read, for progress.
    fn data_bytes_hint(&self) -> u64 {
        self.len_bytes()
    }

    /// Fills `buf` from `offset`. The range is within the volume.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// The first range at or after `from` that may hold data; all before it are zeros. `None` at the end.
    fn next_data(&self, from: u64) -> Result<Option<Range<u64>>>;

    /// Says that this range will be read soon.
    fn will_read(&self, _range: Range<u64>) {}

    /// Which bytes of a segment may differ from the same segment of `parent`, the snapshot that is compared with: all
    /// outside of these ranges are certainly the same. `None` where that is not known, and all is read; with no ranges
    /// nothing is.
    fn changed(&self, _segment: Range<u64>, _parent: SnapshotId) -> Option<Vec<Range<u64>>> {
        None
    }

    /// The volume of `parent` that [`changed`](Self::changed) compares with, if it is not the one of the same name.
    fn parent_volume(&self, _parent: SnapshotId) -> Option<&Name> {
        None
    }

    /// What a segment is made of, where that is known without reading it, cut and named as the repository of the new
    /// snapshot does it. `frame` and `offset` of the chunks mean nothing. Only chunks that the repository lacks are
    /// then read, by [`read_chunks`](Self::read_chunks).
    fn extents(&self, _segment: Range<u64>) -> Result<Option<Vec<Extent>>> {
        Ok(None)
    }

    /// Gives the bytes of some chunks, by address and length, one after the other. Their addresses ascend, within one
    /// segment.
    fn read_chunks(
        &self,
        chunks: &[(u64, u32)],
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut buf = Vec::new();
        for (at, len) in chunks {
            buf.resize(*len as usize, 0);
            self.read_at(&mut buf, *at)?;
            take(&buf)?;
        }
        Ok(())
    }

    /// Checks, after all was read, that nothing has changed since the source was opened.
    fn check_unchanged(&self) -> Result<()>;
}

/// A regular file or block device.
///
/// Read with `pread`, never mapped: a file that shrinks gives an error instead of a signal.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    path: PathBuf,
    len_bytes: u64,
    /// Size and modification time of a regular file. A device has neither.
    version: Option<(u64, i64, i64)>,
    allocated_bytes: u64,
    /// Ranges of data that were found last. To find where one ends the kernel goes through all extents up to there,
    /// and every few blocks of a fragmented file are looked for.
    found: Mutex<VecDeque<Range<u64>>>,
}

/// Ranges of data to keep: as many as there are threads, mostly.
const FOUND_RANGES: usize = 16;

impl FileSource {
    /// Opens a source.
    pub fn open(path: &Path) -> Result<Self> {
        let refuse =
            || Error::Request(format!("{} is neither a file nor a block device", path.display()));
        // Looked at first, since to open a pipe is to wait for its writer, and some devices act when opened.
        let kind = path.metadata().map_err(Error::io("open", path))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(refuse());
        }
        let file = File::open(path).map_err(Error::io("open", path))?;
        let metadata = file.metadata().map_err(Error::io("read the size of", path))?;
        let kind = metadata.file_type();
        let (len_bytes, version) = if kind.is_file() {
            (metadata.len(), Some(version(&metadata)))
        } else if kind.is_block_device() {
            let end = seek(&file, SeekFrom::End(0));
            (end.map_err(|e| Error::io("read the size of", path)(e.into()))?, None)
        } else {
            return Err(refuse());
        };
        if len_bytes > crate::format::MAX_VOLUME_BYTES {
            return Err(Error::Request(format!("{} is larger than 1 PiB", path.display())));
        }
        // A hint only: what it fails on is read all the same.
        let _ = fadvise(&file, 0, None, Advice::Sequential);
        let allocated_bytes = if version.is_some() { metadata.blocks() * 512 } else { len_bytes };
        let found = Mutex::default();
        Ok(Self { file, path: path.to_owned(), len_bytes, version, allocated_bytes, found })
    }

    fn changed(&self, detail: impl Into<String>) -> Error {
        Error::SourceChanged { path: self.path.clone(), detail: detail.into() }
    }
}

/// The first range of a file at or after `from` that may hold data, up to `end`. [`Errno::NXIO`] when the file became
/// shorter meanwhile.
pub(crate) fn next_data(file: &File, from: u64, end: u64) -> Result<Option<Range<u64>>, Errno> {
    if from >= end {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(from)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        // Devices and some file systems know no holes: all is data.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(from..end)),
        Err(error) => return Err(error),
    };
    if start >= end {
        return Ok(None);
    }
    Ok(Some(start..seek(file, SeekFrom::Hole(start))?.min(end)))
}

fn version(metadata: &std::fs::Metadata) -> (u64, i64, i64) {
    (metadata.len(), metadata.mtime(), metadata.mtime_nsec())
}

impl Source for FileSource {
    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn data_bytes_hint(&self) -> u64 {
        self.allocated_bytes.min(self.len_bytes)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(buf, offset).map_err(|cause| {
            if cause.kind() == std::io::ErrorKind::UnexpectedEof {
                self.changed(format!("it ended within the {} bytes at offset {offset}", buf.len()))
            } else {
                Error::Io { action: "read", path: self.path.clone(), cause }
            }
        })
    }

    fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        // Locked while the kernel looks, which does not let in two of them at once either.
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(data) = found.iter().find(|data| data.contains(&from)) {
            return Ok(Some(from..data.end));
        }
        match next_data(&self.file, from, self.len_bytes) {
            Ok(data) => {
                if found.len() >= FOUND_RANGES {
                    found.pop_front();
                }
                found.extend(data.clone());
                Ok(data)
            }
            Err(Errno::NXIO) => Err(self.changed("it became shorter")),
            Err(error) => Err(Error::io("find data in", &self.path)(error.into())),
        }
    }

    fn will_read(&self, range: Range<u64>) {
        if let Some(len) = std::num::NonZeroU64::new(range.end.saturating_sub(range.start)) {
            let _ = fadvise(&self.file, range.start, Some(len), Advice::WillNeed);
        }
    }

    fn check_unchanged(&self) -> Result<()> {
        let Some(before) = self.version else { return Ok(()) };
        let metadata = self.file.metadata().map_err(Error::io("read the size of", &self.path))?;
        let now = version(&metadata);
        if now.0 != before.0 {
            return Err(self.changed(format!("it had {} bytes, now it has {}", before.0, now.0)));
        }
        if now != before {
            return Err(self.changed("its modification time moved"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_that_was_found_before_is_what_the_kernel_tells() {
        let file = tempfile::NamedTempFile::new().unwrap();
        // More ranges than are kept.
        let ranges: Vec<Range<u64>> =
            (0..40).map(|n| n << 20..(n << 20) + (n % 5 + 1) * 4096).collect();
        for range in &ranges {
            let data = vec![1; (range.end - range.start) as usize];
            file.as_file().write_all_at(&data, range.start).unwrap();
        }
        file.as_file().set_len(50 << 20).unwrap();
        let source = FileSource::open(file.path()).unwrap();
        for step in 0..3000_u64 {
            // All over the file, and some places again and again.
            let from = step * step * 7919 % (51 << 20) / (1 + step % 3);
            let found = source.next_data(from).unwrap();
            assert_eq!(found, next_data(file.as_file(), from, 50 << 20).unwrap(), "from {from}");
            let expected = ranges.iter().find(|range| range.end > from);
            let expected = expected.map(|range| range.start.max(from)..range.end);
            assert_eq!(found, expected, "from {from}");
        }
        assert!(source.found.lock().unwrap().len() <= FOUND_RANGES);
    }
}
