//! Publishing files: under its name an object is whole and durable, or not there.
//!
//! The body goes to a file without a name, is synced, and only then linked. A link fails where the name exists,
//! so a create has one winner on any filesystem, and a crash leaves nothing to clean up. An object is
//! acknowledged when every directory from it up to the repository's is synced. That holds for an answer "exists"
//! too: the winner may not have got so far yet, and what one caller was told must not vanish in a crash. (Syncing
//! a directory that did not change takes some 50 microseconds.)

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, CWD, FallocateFlags, OFlags, StatxFlags};
use rustix::io::Errno;

use super::{Creation, Directory, TMP, is_any};

/// Bodies from this size on bypass the page cache, which on fast disks more than doubles the throughput and
/// leaves the cache to the applications. Smaller ones are not worth the extra system calls.
const DIRECT_FROM_BYTES: usize = 1 << 20;
/// What every disk accepts as alignment of offsets, lengths and memory in direct I/O.
const BLOCK: usize = 4096;
/// The size of the buffer for bodies whose memory is not aligned.
const BOUNCE_BYTES: usize = 4 << 20;
/// How often a directory may vanish under a writer before it gives up.
const ATTEMPTS: usize = 64;

/// Distinguishes the named files that this process has in the making.
static NEXT_NAME: AtomicU64 = AtomicU64::new(0);

/// A file that is not published yet. Dropping it removes it.
struct Draft {
    file: File,
    /// Its name in `tmp/`, where the filesystem has no unnamed files.
    name: Option<PathBuf>,
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            // A file that stays behind takes room but can't be taken for an object.
            let _ = fs::remove_file(name);
        }
    }
}

impl Directory {
    /// Makes the object if there is none of this name.
    pub(super) fn create(&self, key: &str, body: &[u8]) -> io::Result<Creation> {
        let path = self.path(key)?;
        let folder = path.parent().unwrap_or(&self.root);
        let draft = self.with_folder(folder, || self.draft(folder))?;
        write(&draft.file, body)?;
        draft.file.sync_all()?;
        let linked = self.with_folder(folder, || draft.link(&path));
        let creation = match linked {
            Ok(()) => Creation::Created,
            Err(error) if is_any(&error, &[Errno::EXIST]) => Creation::Exists,
            Err(error) => return Err(error),
        };
        drop(draft);
        self.sync_up_from(folder)?;
        Ok(creation)
    }

    /// Makes the object, or finds that it is there already with the same bytes.
    pub(super) fn put(&self, key: &str, body: &[u8]) -> io::Result<()> {
        if self.create(key, body)? == Creation::Created || same(&self.path(key)?, body)? {
            return Ok(());
        }
        // Replacing it could change what a reader of the first object was promised.
        Err(io::Error::other("another object has this name, and objects never change"))
    }

    fn draft(&self, folder: &Path) -> io::Result<Draft> {
        // Without /proc a file without a name can't be given one.
        if self.unnamed_files && Path::new("/proc/self/fd").exists() {
            let flags = OFlags::TMPFILE.bits().cast_signed();
            match OpenOptions::new().write(true).custom_flags(flags).open(folder) {
                Ok(file) => return Ok(Draft { file, name: None }),
                // How filesystems and old kernels say that they don't know unnamed files; and with PERM, ext4 that the
                // folder was deleted since it was looked up. Whoever really may not write finds out below.
                Err(error)
                    if is_any(
                        &error,
                        &[Errno::OPNOTSUPP, Errno::ISDIR, Errno::INVAL, Errno::PERM],
                    ) => {}
                Err(error) => return Err(error),
            }
        }
        let folder = self.root.join(TMP);
        self.with_folder(&folder, || named_draft(&folder))
    }

    /// Runs `action`, making `folder` when it is missing. A delete may remove a folder that it has emptied at any
    /// moment, so making it once is not enough.
    fn with_folder<T>(
        &self,
        folder: &Path,
        mut action: impl FnMut() -> io::Result<T>,
    ) -> io::Result<T> {
        for _ in 0..ATTEMPTS {
            match action() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => self.make(folder)?,
                done => return done,
            }
        }
        Err(io::Error::other("its directory vanished again and again"))
    }

    /// Makes a directory and those above it.
    fn make(&self, folder: &Path) -> io::Result<()> {
        for _ in 0..ATTEMPTS {
            match fs::create_dir(folder) {
                // Publishing syncs everything up to the repository's directory, but not what is above.
                Ok(()) if !folder.starts_with(&self.root) || folder == self.root => {
                    return sync(parent(folder));
                }
                Err(error)
                    if error.kind() == io::ErrorKind::NotFound && folder != parent(folder) =>
                {
                    self.make(parent(folder))?;
                }
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => return Ok(()),
            }
        }
        Ok(())
    }

    fn sync_up_from(&self, folder: &Path) -> io::Result<()> {
        for folder in folder.ancestors().take_while(|folder| folder.starts_with(&self.root)) {
            match sync(folder) {
                // The object and then its folder were deleted meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                done => done?,
            }
        }
        Ok(())
    }
}

fn named_draft(folder: &Path) -> io::Result<Draft> {
    loop {
        // Unique by O_EXCL alone, so that machines which share the directory need not know of each other.
        let number = NEXT_NAME.fetch_add(1, Ordering::Relaxed);
        let name = folder.join(format!("{}-{number}", std::process::id()));
        match OpenOptions::new().write(true).create_new(true).open(&name) {
            Ok(file) => return Ok(Draft { file, name: Some(name) }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}

impl Draft {
    fn link(&self, path: &Path) -> io::Result<()> {
        match &self.name {
            Some(name) => match fs::hard_link(name, path) {
                // FAT and some FUSE filesystems; renaming could replace another's object there.
                Err(error) if is_any(&error, &[Errno::PERM]) => Err(Errno::OPNOTSUPP.into()),
                done => done,
            },
            None => {
                let name = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                Ok(rustix::fs::linkat(CWD, name, CWD, path, AtFlags::SYMLINK_FOLLOW)?)
            }
        }
    }
}

/// The directory that holds `path`.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    }
}

fn sync(folder: &Path) -> io::Result<()> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    File::open(folder)?.sync_all()
}

fn write(file: &File, body: &[u8]) -> io::Result<()> {
    let mut written = 0;
    if body.len() >= DIRECT_FROM_BYTES {
        preallocate(file, body.len())?;
        let flags = rustix::fs::fcntl_getfl(file)?;
        if rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT).is_ok() {
            written = write_direct(file, body)?;
            rustix::fs::fcntl_setfl(file, flags)?;
        }
    }
    // What is less than a block, or all of it, through the page cache.
    let (_, rest) = body.split_at(written);
    file.write_all_at(rest, written as u64)
}

/// Takes the room at once, so that a full disk is found before time is spent on it.
fn preallocate(file: &File, len: usize) -> io::Result<()> {
    loop {
        match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, len as u64) {
            Err(Errno::INTR) => {}
            // Not every filesystem can; then the writes find out.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(()),
            done => return Ok(done?),
        }
    }
}

/// Writes the whole blocks of `body`, or as much as the filesystem takes in this way; returns how much that is.
fn write_direct(file: &File, body: &[u8]) -> io::Result<usize> {
    let (body, _) = body.split_at(body.len() - body.len() % BLOCK);
    let aligned = body.as_ptr().addr().is_multiple_of(memory_alignment(file));
    let mut bounce = if aligned { None } else { Some(Bounce::new()) };
    let mut written = 0;
    while written < body.len() {
        let (_, rest) = body.split_at(written);
        let part = bounce.as_mut().map_or(rest, |bounce| bounce.fill(rest));
        match file.write_at(part, written as u64) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => written += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Also after a write that ended inside a block.
            Err(error) if is_any(&error, &[Errno::INVAL]) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(written)
}

/// Which alignment of memory direct I/O needs here: often much less than a block.
fn memory_alignment(file: &File) -> usize {
    let known = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
    known
        .filter(|statx| statx.stx_mask & StatxFlags::DIOALIGN.bits() != 0)
        .and_then(|statx| usize::try_from(statx.stx_dio_mem_align).ok())
        .filter(|alignment| alignment.is_power_of_two())
        .unwrap_or(BLOCK)
}

/// Aligned memory to copy through.
struct Bounce {
    memory: Vec<u8>,
    /// Where in it the first block begins.
    start: usize,
}

impl Bounce {
    fn new() -> Self {
        let memory = vec![0; BOUNCE_BYTES + BLOCK];
        let start = memory.as_ptr().addr().next_multiple_of(BLOCK) - memory.as_ptr().addr();
        Self { memory, start }
    }

    /// A copy of the beginning of `body`.
    fn fill(&mut self, body: &[u8]) -> &[u8] {
        let len = body.len().min(BOUNCE_BYTES);
        let (_, aligned) = self.memory.split_at_mut(self.start);
        let (aligned, _) = aligned.split_at_mut(len);
        aligned.copy_from_slice(body.split_at(len).0);
        aligned
    }
}

/// True when the file holds these bytes.
fn same(path: &Path, body: &[u8]) -> io::Result<bool> {
    let mut file = File::open(path)?;
    if file.metadata()?.len() != body.len() as u64 {
        return Ok(false);
    }
    let mut buffer = vec![0; body.len().min(DIRECT_FROM_BYTES)];
    for part in body.chunks(DIRECT_FROM_BYTES) {
        let (there, _) = buffer.split_at_mut(part.len());
        file.read_exact(there)?;
        if there != part {
            return Ok(false);
        }
    }
    Ok(true)
}
