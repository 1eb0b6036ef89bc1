//! XFS: copies by reflink, of which most is done before the freeze (see [`precopy`](super::precopy)).
//!
//! A copy's image is immutable (`chattr +i`), so that neither people nor `xfs_fsr` change it or where it lies. Until it is
//! whole and durable it is called `image.partial`.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FallocateFlags, IFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use super::precopy::Precopy;
use super::{Backend, BackendKind, IMAGE, PendingCopy, new_file, open_image};
use crate::error::{Error, Result};
use crate::sys::{files, reflink};

const PARTIAL: &str = "image.partial";
/// How much is cut out of a file at once.
const EMPTY_STEP_BYTES: u64 = 64 << 20;

/// See the module.
#[derive(Clone, Copy, Debug)]
pub struct Xfs;

impl Backend for Xfs {
    fn kind(&self) -> BackendKind {
        BackendKind::Xfs
    }

    fn create(&self, live: &Path, len_bytes: u64) -> Result<()> {
        std::fs::create_dir(live).map_err(Error::io("create", live))?;
        let path = live.join(IMAGE);
        let image = new_file(&path)?;
        image.set_len(len_bytes).map_err(Error::io("set the length of", &path))?;
        image.sync_all().map_err(Error::io("sync", &path))?;
        files::sync_directory(live).map_err(Error::io("sync", live))
    }

    fn begin_copy(&self, live: &Path, copy: &Path) -> Result<Box<dyn PendingCopy>> {
        let path = live.join(IMAGE);
        let image = open_image(&path, false)?;
        image.sync_data().map_err(Error::io("sync", &path))?;
        std::fs::create_dir(copy).map_err(Error::io("create", copy))?;
        let pending = |precopy| Pending { precopy, copy: copy.to_owned(), published: false };
        let partial = copy.join(PARTIAL);
        let begun = new_file(&partial)
            .and_then(|to| Precopy::begin(image, to).map_err(Error::io("copy to", partial)));
        match begun {
            Ok(precopy) => Ok(Box::new(pending(precopy))),
            Err(error) => {
                let _ = self.delete(copy);
                Err(error)
            }
        }
    }

    fn clone_from_copy(&self, copy: &Path, live: &Path) -> Result<()> {
        std::fs::create_dir(live).map_err(Error::io("create", live))?;
        let from = open_image(&copy.join(IMAGE), false)?;
        let path = live.join(IMAGE);
        let to = new_file(&path)?;
        reflink::clone_file(&from, &to).map_err(Error::io("copy to", &path))?;
        to.sync_all().map_err(Error::io("sync", &path))?;
        files::sync_directory(live).map_err(Error::io("sync", live))
    }

    fn settle(&self, _pool: &Path, _limit: Duration) -> Result<()> {
        // A deletion gives all room back before it returns.
        Ok(())
    }

    fn reclaim(&self, pool: &Path) -> Result<()> {
        let top = File::open(pool).map_err(Error::io("open", pool))?;
        rustix::fs::syncfs(&top).map_err(Error::io("sync", pool))
    }

    fn delete(&self, dir: &Path) -> Result<()> {
        let (path, partial) = (dir.join(IMAGE), dir.join(PARTIAL));
        if let Some(image) = open_if_there(&path)? {
            files::clear_flag(&image, IFlags::IMMUTABLE)
                .map_err(Error::io("make deletable", &path))?;
            // Whoever finds half of it after a crash is not to take it for whole.
            match std::fs::rename(&path, &partial) {
                // Recovery, in another process, was faster.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                renamed => renamed.map_err(Error::io("rename", &path))?,
            }
        }
        if let Some(image) = open_if_there(&partial)? {
            files::clear_flag(&image, IFlags::IMMUTABLE)
                .map_err(Error::io("make deletable", &partial))?;
            empty(&partial).map_err(Error::io("empty", &partial))?;
        }
        match std::fs::remove_dir_all(dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io("delete", dir)(error))
            }
            _ => Ok(()),
        }
    }
}

/// Gives back the room of a file, in steps between which others get their turn. Were the file only unlinked, the kernel
/// would do it in the background and all at once, at any time: in the midst of a freeze maybe.
fn empty(path: &Path) -> io::Result<()> {
    let file = File::options().write(true).open(path)?;
    let mut at = 0;
    loop {
        at = match seek(&file, SeekFrom::Data(at)) {
            Ok(data) => data / EMPTY_STEP_BYTES * EMPTY_STEP_BYTES,
            // There is no more.
            Err(Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&file, hole, at, EMPTY_STEP_BYTES)?;
        at += EMPTY_STEP_BYTES;
    }
}

fn open_if_there(path: &Path) -> Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("open", path)(error)),
    }
}

#[derive(Debug)]
struct Pending {
    precopy: Precopy,
    copy: PathBuf,
    published: bool,
}

impl PendingCopy for Pending {
    fn refresh(&self) -> Result<()> {
        self.precopy.refresh().map_err(Error::io("copy to", self.copy.join(PARTIAL)))
    }

    fn finish(&self) -> Result<()> {
        self.precopy.finish().map_err(Error::io("copy to", self.copy.join(PARTIAL)))
    }

    fn publish(mut self: Box<Self>) -> Result<()> {
        let (partial, path) = (self.copy.join(PARTIAL), self.copy.join(IMAGE));
        let image = self.precopy.copy();
        image.sync_all().map_err(Error::io("sync", &partial))?;
        std::fs::rename(&partial, &path).map_err(Error::io("rename", &partial))?;
        // An immutable file can't be renamed, so this comes last. Until the volume's state names the copy, it counts as
        // one that was never made.
        files::set_flag(image, IFlags::IMMUTABLE).map_err(Error::io("make immutable", &path))?;
        for directory in [&self.copy, files::parent(&self.copy)] {
            files::sync_directory(directory).map_err(Error::io("sync", directory))?;
        }
        self.published = true;
        Ok(())
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.published {
            // What stays is found by the next recovery.
            let _ = Xfs.delete(&self.copy);
        }
    }
}
