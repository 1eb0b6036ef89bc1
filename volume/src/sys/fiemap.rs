//! Where the bytes of a file lie on its file system (FIEMAP).

use std::fs::File;
use std::io;
use std::ops::{ControlFlow, Range};

use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

/// Extents asked for in one call: 28 KiB.
const BATCH: usize = 512;

const FIEMAP: Opcode = opcode::read_write::<Header>(b'f', 11);

/// Write dirty pages first, so that they have a place (`FIEMAP_FLAG_SYNC`).
pub(crate) const SYNC: u32 = 1;

/// Flags of an extent, of which more than one may be set.
pub(crate) mod flag {
    /// The last extent of the file.
    pub(crate) const LAST: u32 = 0x1;
    /// Data without a place as yet, or in several.
    pub(crate) const UNKNOWN: u32 = 0x2;
    /// Data that is only in memory.
    pub(crate) const DELALLOC: u32 = 0x4;
    /// Compressed or encrypted.
    pub(crate) const ENCODED: u32 = 0x8;
    /// Encrypted.
    pub(crate) const ENCRYPTED: u32 = 0x80;
    /// Begins or ends inside a block.
    pub(crate) const NOT_ALIGNED: u32 = 0x100;
    /// In a block of metadata.
    pub(crate) const INLINE: u32 = 0x200;
    /// Shares a block with other files' ends.
    pub(crate) const TAIL: u32 = 0x400;
    /// Allocated, never written: reads as zeros.
    pub(crate) const UNWRITTEN: u32 = 0x800;
    /// The same place belongs to other files or copies too.
    pub(crate) const SHARED: u32 = 0x2000;

    /// The place of such an extent says nothing about its bytes.
    pub(crate) const ODD: u32 =
        UNKNOWN | DELALLOC | ENCODED | ENCRYPTED | NOT_ALIGNED | INLINE | TAIL;
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Header {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
}

/// One extent of a file.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct FiemapExtent {
    /// Where it begins in the file, in bytes.
    pub logical: u64,
    /// Where it lies on the file system, in bytes.
    pub physical: u64,
    /// Its length in bytes.
    pub length: u64,
    reserved64: [u64; 2],
    /// See [`flag`].
    pub flags: u32,
    reserved: [u32; 3],
}

impl FiemapExtent {
    /// An extent.
    pub(crate) fn new(logical: u64, physical: u64, length: u64, flags: u32) -> Self {
        Self { logical, physical, length, flags, ..Self::default() }
    }

    /// True for one whose place says what its bytes are.
    pub(crate) fn is_plain(&self) -> bool {
        self.flags & flag::ODD == 0
    }

    /// True for one that reads as zeros.
    pub(crate) fn is_unwritten(&self) -> bool {
        self.flags & flag::UNWRITTEN != 0
    }

    /// True for one that other files or copies hold as well.
    pub(crate) fn is_shared(&self) -> bool {
        self.flags & flag::SHARED != 0
    }
}

#[repr(C)]
struct Call {
    header: Header,
    extents: [FiemapExtent; BATCH],
}

/// Gives the extents that overlap a range, in the order of the file, as long as `each` wants more. They are not clipped to
/// the range. `flags` is [`SYNC`] or 0. Memory is bounded; a file that changes meanwhile may show some of both states.
pub(crate) fn fiemap(
    file: &File,
    range: Range<u64>,
    flags: u32,
    mut each: impl FnMut(FiemapExtent) -> ControlFlow<()>,
) -> io::Result<()> {
    let header =
        Header { start: 0, length: 0, flags: 0, mapped_extents: 0, extent_count: 0, reserved: 0 };
    let mut call = Box::new(Call { header, extents: [FiemapExtent::default(); BATCH] });
    let mut from = range.start;
    let mut flags = flags;
    while from < range.end {
        call.header = Header {
            start: from,
            length: range.end - from,
            flags,
            mapped_extents: 0,
            extent_count: BATCH as u32,
            reserved: 0,
        };
        // SAFETY: the kernel reads the header and writes at most `extent_count` extents behind it, which is what `Call`
        // has room for.
        unsafe { ioctl(file, Updater::<FIEMAP, Call>::new(&mut call)) }?;
        let mapped = call.header.mapped_extents as usize;
        for extent in call.extents.iter().take(mapped) {
            if each(*extent).is_break() || extent.flags & flag::LAST != 0 {
                return Ok(());
            }
            let end = extent.logical.saturating_add(extent.length);
            if end <= from {
                return Err(io::Error::other("the extent map goes backwards"));
            }
            from = end;
        }
        if mapped == 0 {
            return Ok(());
        }
        // Once is enough: what is written from now on was not there when the caller asked.
        flags &= !SYNC;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn extents_cover_what_was_written() {
        let file = tempfile::tempfile().unwrap();
        for n in 0..2000u64 {
            file.write_all_at(&[1; 4096], n * 16384).unwrap();
        }
        let mut extents = vec![];
        let result = fiemap(&file, 0..u64::MAX, SYNC, |extent| {
            extents.push(extent);
            ControlFlow::Continue(())
        });
        // Not every file system has maps.
        if result.is_err_and(|error| error.raw_os_error() == Some(95)) {
            return;
        }
        assert!(extents.windows(2).all(|pair| pair[0].logical + pair[0].length <= pair[1].logical));
        for n in 0..2000u64 {
            let at = n * 16384;
            assert!(extents.iter().any(|e| e.logical <= at && at < e.logical + e.length), "{at}");
        }
        let mut first = 0;
        fiemap(&file, 0..u64::MAX, 0, |_| {
            first += 1;
            ControlFlow::Break(())
        })
        .unwrap();
        assert_eq!(first, 1);
    }
}
