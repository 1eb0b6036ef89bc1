//! Small things with files: replace them atomically, lock them, flag them, and the room that is left for them.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

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

/// File systems give room in blocks of so many bytes, and keep shorter files elsewhere.
const BLOCK_BYTES: usize = 4096;

/// Gives a file a new text: after a crash it has the old or the new, never a part. One process at a time may do this to one
/// file, which a lock sees to. Spaces fill its last block.
///
/// Works also where no block is left, unless the text needs more of them than before: the old file stays beside the new one
/// as `.new`, and the text after that is written over it.
pub(crate) fn replace(path: &Path, text: &str) -> io::Result<()> {
    let spare = spare_of(path);
    // Who exchanged the two before may have been killed then: on the disk the spare would still be the file itself.
    sync_directory(parent(path))?;
    fill(&spare, text)?.sync_all()?;
    match rustix::fs::renameat_with(CWD, &spare, CWD, path, RenameFlags::EXCHANGE) {
        // The first one.
        Err(Errno::NOENT) => {
            std::fs::rename(&spare, path)?;
            fill(&spare, text)?;
        }
        exchanged => exchanged?,
    }
    sync_directory(parent(path))
}

/// `PATH.new`: where the next content of a file is made.
pub(crate) fn spare_of(path: &Path) -> PathBuf {
    let mut spare = path.as_os_str().to_owned();
    spare.push(".new");
    spare.into()
}

fn fill(spare: &Path, text: &str) -> io::Result<File> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(spare)?;
    if file.metadata()?.len() == 0 {
        // btrfs takes new room for whatever is written, unless told so. Others don't know the attribute, or need it not.
        let _ = set_flag(&file, IFlags::NOCOW);
    }
    let mut block = text.as_bytes().to_vec();
    block.resize((text.len() + 1).next_multiple_of(BLOCK_BYTES) - 1, b' ');
    block.push(b'\n');
    file.write_all_at(&block, 0)?;
    file.set_len(block.len() as u64)?;
    Ok(file)
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
        let text = || String::from_utf8(read_small(&path, 1 << 20).unwrap()).unwrap();
        for n in 0..5 {
            // Also where a crash has left a part, or none.
            match n {
                1 => std::fs::write(spare_of(&path), "half of a long one").unwrap(),
                2 => std::fs::write(spare_of(&path), "long".repeat(5_000)).unwrap(),
                3 => std::fs::remove_file(spare_of(&path)).unwrap(),
                _ => {}
            }
            let len = [0, 3, 4095, 4096, 5][n];
            let next = n.to_string().repeat(len);
            replace(&path, &next).unwrap();
            assert_eq!(text().trim_end(), next);
            assert_eq!(text().len(), if len == 4096 { 8192 } else { 4096 });
            assert!(std::fs::read_dir(dir.path()).unwrap().count() <= 2);
        }
        assert!(read_small(&path, 4095).is_err());
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
