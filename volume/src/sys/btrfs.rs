//! Subvolumes of btrfs.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::io::Errno;
use rustix::ioctl::{NoArg, Opcode, Setter, Updater, ioctl, opcode};

const SUBVOL_CREATE: Opcode = opcode::write::<Arguments>(0x94, 14);
const SNAP_DESTROY: Opcode = opcode::write::<Arguments>(0x94, 15);
const SNAP_CREATE_V2: Opcode = opcode::write::<ArgumentsV2>(0x94, 23);
const SYNC: Opcode = opcode::none(0x94, 8);
const TREE_SEARCH: Opcode = opcode::read_write::<Search>(0x94, 17);
const RESIZE: Opcode = opcode::write::<Arguments>(0x94, 3);

const READ_ONLY: u64 = 1 << 1;
/// The tree that lists all other trees.
const ROOT_TREE: u64 = 1;
/// The key of what is to be cleaned up: here, of deleted subvolumes.
const ORPHANS: (u64, u32) = (-5_i64 as u64, 48);
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

/// `struct btrfs_ioctl_search_args`.
#[repr(C)]
struct Search {
    tree: u64,
    objects: [u64; 2],
    offsets: [u64; 2],
    transactions: [u64; 2],
    kinds: [u32; 2],
    /// How many items at most, then how many there are.
    items: u32,
    unused: [u32; 9],
    found: [u8; 3992],
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
    let mut search = Search {
        tree: ROOT_TREE,
        objects: [object; 2],
        offsets: [0, u64::MAX],
        transactions: [0, u64::MAX],
        kinds: [kind; 2],
        items: 1,
        unused: [0; 9],
        found: [0; 3992],
    };
    // SAFETY: the opcode takes this structure and writes no more than its length.
    unsafe { ioctl(top, Updater::<TREE_SEARCH, _>::new(&mut search)) }?;
    Ok(search.items > 0)
}

/// Makes a mounted btrfs on one device as large as the device.
pub(crate) fn grow_to_device(top: &File) -> io::Result<()> {
    let arguments = Arguments { fd: 0, name: name(OsStr::new("1:max"))? };
    // SAFETY: the opcode takes this structure, whose name ends with a zero.
    Ok(unsafe { ioctl(top, Setter::<RESIZE, _>::new(arguments)) }?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_size() {
        let sizes = [size_of::<Arguments>(), size_of::<ArgumentsV2>(), size_of::<Search>()];
        assert_eq!(sizes, [4096; 3]);
    }

    #[test]
    fn names_end_with_a_zero() {
        assert_eq!(name::<4>(OsStr::new("abc")).unwrap(), *b"abc\0");
        assert!(name::<4>(OsStr::new("abcd")).is_err());
    }
}
