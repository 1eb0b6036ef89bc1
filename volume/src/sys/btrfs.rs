//! Subvolumes of btrfs, and where the bytes of its files lie.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::ops::{ControlFlow, Range};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::fstatfs;
use rustix::io::Errno;
use rustix::ioctl::{NoArg, Opcode, Setter, Updater, ioctl, opcode};

use super::fiemap::{self, FiemapExtent, fiemap, flag};

const SUBVOL_CREATE: Opcode = opcode::write::<Arguments>(0x94, 14);
const SNAP_DESTROY: Opcode = opcode::write::<Arguments>(0x94, 15);
const SNAP_CREATE_V2: Opcode = opcode::write::<ArgumentsV2>(0x94, 23);
const SYNC: Opcode = opcode::none(0x94, 8);
const TREE_SEARCH: Opcode = opcode::read_write::<Search>(0x94, 17);
const TREE_SEARCH_V2: Opcode = opcode::read_write::<(SearchKey, u64)>(0x94, 17);
const RESIZE: Opcode = opcode::write::<Arguments>(0x94, 3);

const READ_ONLY: u64 = 1 << 1;
/// The tree that lists all other trees.
const ROOT_TREE: u64 = 1;
/// The key of what is to be cleaned up: here, of deleted subvolumes.
const ORPHANS: (u64, u32) = (-5_i64 as u64, 48);
/// `BTRFS_SUPER_MAGIC`.
const MAGIC: u64 = 0x9123_683E;
/// The tree of the subvolume that a descriptor is in.
const OWN_TREE: u64 = 0;
/// The key of an extent of a file (`BTRFS_EXTENT_DATA_KEY`). Its offset is that in the file.
const EXTENT_DATA: u32 = 108;
/// Kinds of extents: within the item, written, and allocated only.
const INLINE: u8 = 0;
const REGULAR: u8 = 1;
const PREALLOCATED: u8 = 2;
/// Room for the items of one search: some 770 extents.
const FOUND_BYTES: usize = 64 << 10;
/// The inode number of every subvolume's top directory.
const TOP_INODE: u64 = 256;

/// `struct btrfs_ioctl_vol_args`.
#[repr(C)]
struct Arguments {
    fd: i64,
    name: [u8; 4088],
}

/// `struct btrfs_ioctl_vol_args_v2`.
#[repr(C)]
struct ArgumentsV2 {
    fd: i64,
    transid: u64,
    flags: u64,
    unused: [u64; 4],
    name: [u8; 4040],
}

/// `struct btrfs_ioctl_search_key`.
#[repr(C)]
struct SearchKey {
    tree: u64,
    objects: [u64; 2],
    offsets: [u64; 2],
    transactions: [u64; 2],
    kinds: [u32; 2],
    /// How many items at most, then how many there are.
    items: u32,
    unused: [u32; 9],
}

/// `struct btrfs_ioctl_search_args`.
#[repr(C)]
struct Search {
    key: SearchKey,
    found: [u8; 3992],
}

/// `struct btrfs_ioctl_search_args_v2`, with its room.
#[repr(C)]
struct LargeSearch {
    key: SearchKey,
    room_bytes: u64,
    found: [u8; FOUND_BYTES],
}

/// A name with zeros behind it, as the kernel takes it.
fn name<const N: usize>(name: &OsStr) -> io::Result<[u8; N]> {
    let bytes = name.as_bytes();
    let mut array = [0; N];
    // The last byte stays zero.
    let room = array.get_mut(..bytes.len()).filter(|_| bytes.len() < N);
    room.ok_or(Errno::NAMETOOLONG)?.copy_from_slice(bytes);
    Ok(array)
}

/// The directory that holds `path`, open, and the name in it.
fn split(path: &Path) -> io::Result<(File, &OsStr)> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::INVAL.into());
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    Ok((File::open(parent)?, name))
}

/// Makes an empty subvolume.
pub(crate) fn create_subvolume(path: &Path) -> io::Result<()> {
    let (parent, last) = split(path)?;
    let arguments = Arguments { fd: 0, name: name(last)? };
    // SAFETY: the opcode takes this structure, whose name ends with a zero.
    Ok(unsafe { ioctl(&parent, Setter::<SUBVOL_CREATE, _>::new(arguments)) }?)
}

/// Makes `path` a snapshot of the subvolume `of`: of all its files at one point in time, on disk when this returns.
pub(crate) fn snapshot(of: &File, path: &Path, read_only: bool) -> io::Result<()> {
    let (parent, last) = split(path)?;
    let flags = if read_only { READ_ONLY } else { 0 };
    let arguments = ArgumentsV2 {
        fd: of.as_raw_fd().into(),
        transid: 0,
        flags,
        unused: [0; 4],
        name: name(last)?,
    };
    // SAFETY: the opcode takes this structure, whose name ends with a zero; `of` keeps its descriptor open.
    Ok(unsafe { ioctl(&parent, Setter::<SNAP_CREATE_V2, _>::new(arguments)) }?)
}

/// Deletes a subvolume with all that is in it, also a read-only one. Its name is gone at once, its data in the background.
pub(crate) fn delete_subvolume(path: &Path) -> io::Result<()> {
    let (parent, last) = split(path)?;
    let arguments = Arguments { fd: 0, name: name(last)? };
    // SAFETY: the opcode takes this structure, whose name ends with a zero.
    Ok(unsafe { ioctl(&parent, Setter::<SNAP_DESTROY, _>::new(arguments)) }?)
}

/// True for the top of a subvolume. Says nothing sensible about directories of other file systems.
pub(crate) fn is_subvolume(path: &Path) -> io::Result<bool> {
    let metadata = path.symlink_metadata()?;
    Ok(metadata.is_dir() && metadata.ino() == TOP_INODE)
}

/// Writes everything, and wakes who frees the data of deleted subvolumes: else he looks every 30 seconds.
pub(crate) fn sync(top: &File) -> io::Result<()> {
    // SAFETY: the opcode takes nothing.
    Ok(unsafe { ioctl(top, NoArg::<SYNC>::new()) }?)
}

/// True while subvolumes that were deleted still take room.
pub(crate) fn is_cleaning(top: &File) -> io::Result<bool> {
    let (object, kind) = ORPHANS;
    let key = SearchKey::new(ROOT_TREE, object, kind, 0..=u64::MAX, 1);
    let mut search = Search { key, found: [0; 3992] };
    // SAFETY: the opcode takes this structure and writes no more than its length.
    unsafe { ioctl(top, Updater::<TREE_SEARCH, _>::new(&mut search)) }?;
    Ok(search.key.items > 0)
}

/// Makes a mounted btrfs on one device as large as the device.
pub(crate) fn grow_to_device(top: &File) -> io::Result<()> {
    let arguments = Arguments { fd: 0, name: name(OsStr::new("1:max"))? };
    // SAFETY: the opcode takes this structure, whose name ends with a zero.
    Ok(unsafe { ioctl(top, Setter::<RESIZE, _>::new(arguments)) }?)
}

impl SearchKey {
    fn new(
        tree: u64,
        object: u64,
        kind: u32,
        offsets: std::ops::RangeInclusive<u64>,
        items: u32,
    ) -> Self {
        Self {
            tree,
            objects: [object; 2],
            offsets: [*offsets.start(), *offsets.end()],
            transactions: [0, u64::MAX],
            kinds: [kind; 2],
            items,
            unused: [0; 9],
        }
    }
}

/// True for a file on btrfs.
pub(crate) fn is_on(file: &File) -> io::Result<bool> {
    Ok(u64::try_from(fstatfs(file)?.f_type) == Ok(MAGIC))
}

/// Gives the extents of a file on btrfs that overlap a range, in the order of the file and not clipped to it, as
/// [`fiemap`](fiemap()) with [`SYNC`](fiemap::SYNC) does, but without the flags `LAST` and `SHARED`. To find out what is shared, FIEMAP looks through
/// all that refers to an extent, and takes several times as long. Needs `CAP_SYS_ADMIN`.
pub(crate) fn file_extents(
    file: &File,
    range: Range<u64>,
    mut each: impl FnMut(FiemapExtent),
) -> io::Result<()> {
    // FIEMAP writes out what has no place in the tree as yet, and tells the extent in which the range begins, which may be
    // far before it; the search then finds those that begin within.
    let mut from = range.start;
    fiemap(file, from..from.saturating_add(1), fiemap::SYNC, |extent| {
        from = extent.logical.saturating_add(extent.length).max(from);
        each(extent);
        ControlFlow::Continue(())
    })?;
    ExtentSearch::new(file)?.each(from..range.end, &mut each)
}

/// Searches for extents of a file.
struct ExtentSearch<'a> {
    file: &'a File,
    inode: u64,
    search: Box<LargeSearch>,
}

impl<'a> ExtentSearch<'a> {
    fn new(file: &'a File) -> io::Result<Self> {
        let inode = file.metadata()?.ino();
        let key = SearchKey::new(OWN_TREE, inode, EXTENT_DATA, 0..=0, 0);
        let search = LargeSearch { key, room_bytes: FOUND_BYTES as u64, found: [0; FOUND_BYTES] };
        Ok(Self { file, inode, search: Box::new(search) })
    }

    /// Gives the extents that begin in a range.
    fn each(&mut self, range: Range<u64>, each: &mut dyn FnMut(FiemapExtent)) -> io::Result<()> {
        let mut from = range.start;
        while from < range.end {
            let offsets = from..=range.end - 1;
            self.search.key = SearchKey::new(OWN_TREE, self.inode, EXTENT_DATA, offsets, u32::MAX);
            // SAFETY: the opcode takes a key and the number of bytes behind it, and writes no more than these.
            unsafe {
                ioctl(self.file, Updater::<TREE_SEARCH_V2, LargeSearch>::new(&mut self.search))
            }?;
            let mut found = self.search.found.as_slice();
            for _ in 0..self.search.key.items {
                let (extent, rest) = item(found).ok_or(Errno::IO)?;
                // It must go on, or this would never end.
                if extent.logical < from {
                    return Err(Errno::IO.into());
                }
                from = extent.logical.saturating_add(1);
                found = rest;
                each(extent);
            }
            if self.search.key.items == 0 {
                break;
            }
        }
        Ok(())
    }
}

/// The first of some items that were found: a `struct btrfs_ioctl_search_header`, and a `struct btrfs_file_extent_item`,
/// which is little-endian as on disk.
fn item(found: &[u8]) -> Option<(FiemapExtent, &[u8])> {
    let native =
        |bytes: &[u8], at: usize| Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk::<8>()?));
    let stored =
        |bytes: &[u8], at: usize| Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk::<8>()?));
    let logical = native(found, 16)?;
    let len = u32::from_ne_bytes(*found.get(28..)?.first_chunk()?) as usize;
    let (item, rest) = found.get(32..)?.split_at_checked(len)?;
    let is_encoded = item.get(16..20)?.iter().any(|byte| *byte != 0);
    let kind = *item.get(20)?;
    if kind == INLINE {
        let length = stored(item, 8)?.checked_next_multiple_of(4096)?;
        return Some((FiemapExtent::new(logical, 0, length, flag::INLINE), rest));
    }
    let (place, start, length) = (stored(item, 21)?, stored(item, 37)?, stored(item, 45)?);
    let flags = match kind {
        _ if is_encoded => flag::ENCODED,
        // A hole that is written down: it reads as zeros, too.
        REGULAR if place == 0 => flag::UNWRITTEN,
        REGULAR => 0,
        PREALLOCATED => flag::UNWRITTEN,
        _ => flag::UNKNOWN,
    };
    Some((FiemapExtent::new(logical, place.checked_add(start)?, length, flags), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_size() {
        let sizes = [size_of::<Arguments>(), size_of::<ArgumentsV2>(), size_of::<Search>()];
        assert_eq!(sizes, [4096; 3]);
        assert_eq!(size_of::<SearchKey>(), 104);
        assert_eq!(std::mem::offset_of!(LargeSearch, found), 112);
        assert_eq!(size_of::<(SearchKey, u64)>(), 112);
    }

    #[test]
    fn names_end_with_a_zero() {
        assert_eq!(name::<4>(OsStr::new("abc")).unwrap(), *b"abc\0");
        assert!(name::<4>(OsStr::new("abcd")).is_err());
    }
}
