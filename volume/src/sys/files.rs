//! Small things with files: replace them atomically, lock them, flag them, and the room that is left for them.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;

use rustix::fs::{CWD, FlockOperation, IFlags, RenameFlags};
use rustix::io::Errno;

/// Makes the names in a directory durable.
pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(if path.as_os_str().is_empty() { Path::new(".") } else { path })?.sync_all()
}

/// The directory that holds `path`.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    }
}

/// Gives a file new content: after a crash it has the old or the new, never a part. One process at a time may do this to
/// one file, which a lock sees to.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().ok_or(Errno::INVAL)?.to_owned();
    name.push(".new");
    let draft = path.with_file_name(name);
    // One that a crash left is overwritten.
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&draft)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&draft, path)?;
    sync_directory(parent(path))
}

/// Reads a small file. More than `max_bytes` is an error, since it can't be ours.
pub(crate) fn read_small(path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![];
    File::open(path)?.take(max_bytes + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max_bytes {
        return Err(io::Error::other(format!("it is longer than {max_bytes} bytes")));
    }
    Ok(bytes)
}

/// Renames; fails where the new name exists. Durable when it returns.
pub(crate) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)?;
    sync_directory(parent(to))?;
    sync_directory(parent(from))
}

/// Takes the lock of an open file or directory unless someone has it. It ends with the file.
pub(crate) fn try_lock(file: &File) -> io::Result<bool> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// True while someone has locked a file. This takes its lock for a moment, together with others who ask the same.
pub(crate) fn is_locked(file: &File) -> io::Result<bool> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => unlock(file).map(|()| false),
        Err(Errno::WOULDBLOCK) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// Gives the lock of an open file back, also on behalf of processes that have inherited it.
pub(crate) fn unlock(file: &File) -> io::Result<()> {
    Ok(rustix::fs::flock(file, FlockOperation::Unlock)?)
}

/// Sets an attribute of a file, as `chattr +` does.
pub(crate) fn set_flag(file: &File, flag: IFlags) -> io::Result<()> {
    let flags = rustix::fs::ioctl_getflags(file)?;
    Ok(rustix::fs::ioctl_setflags(file, flags | flag)?)
}

/// Takes an attribute away, as `chattr -` does.
pub(crate) fn clear_flag(file: &File, flag: IFlags) -> io::Result<()> {
    let flags = rustix::fs::ioctl_getflags(file)?;
    if !flags.contains(flag) {
        return Ok(());
    }
    Ok(rustix::fs::ioctl_setflags(file, flags - flag)?)
}

/// True if the file has an attribute.
pub(crate) fn has_flag(file: &File, flag: IFlags) -> io::Result<bool> {
    Ok(rustix::fs::ioctl_getflags(file)?.contains(flag))
}

/// The room of a file system, in bytes and inodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Space {
    /// All of it.
    pub total_bytes: u64,
    /// What can still be written.
    pub free_bytes: u64,
    /// Inodes in all; 0 where they are not counted.
    pub inodes: u64,
    /// Inodes that are free.
    pub free_inodes: u64,
}

impl Space {
    /// The room of the file system that a path is on.
    pub fn of(path: &Path) -> crate::Result<Self> {
        space(path).map_err(crate::Error::io("look at", path))
    }
}

/// The room of the file system that `path` is on.
pub(crate) fn space(path: &Path) -> io::Result<Space> {
    let statvfs = rustix::fs::statvfs(path)?;
    Ok(Space {
        total_bytes: statvfs.f_blocks.saturating_mul(statvfs.f_frsize),
        free_bytes: statvfs.f_bavail.saturating_mul(statvfs.f_frsize),
        inodes: statvfs.f_files,
        free_inodes: statvfs.f_ffree,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        replace(&path, b"one").unwrap();
        std::fs::write(dir.path().join("state.new"), "half of a long one").unwrap();
        replace(&path, b"two").unwrap();
        assert_eq!(read_small(&path, 3).unwrap(), b"two");
        assert!(read_small(&path, 2).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_lock_ends_with_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let first = File::open(dir.path()).unwrap();
        let second = File::open(dir.path()).unwrap();
        assert!(try_lock(&first).unwrap());
        assert!(!try_lock(&second).unwrap());
        let inherited = first.try_clone().unwrap();
        assert!(is_locked(&second).unwrap());
        unlock(&first).unwrap();
        assert!(!is_locked(&second).unwrap() && !is_locked(&first).unwrap());
        assert!(try_lock(&second).unwrap());
        drop((second, inherited));
        assert!(try_lock(&first).unwrap());
        drop(first);
        assert!(try_lock(&File::open(dir.path()).unwrap()).unwrap());
    }

    #[test]
    fn a_rename_replaces_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir(path("a")).unwrap();
        std::fs::create_dir(path("b")).unwrap();
        assert_eq!(
            rename_new(&path("a"), &path("b")).unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
        rename_new(&path("a"), &path("c")).unwrap();
        assert!(path("c").exists());
    }
}
