//! btrfs: the kernel does everything.
//!
//! Images have no copy on write (`chattr +C`, set before there is any data): writes stay in place, so that an image has as
//! few extents as its writer makes and is as fast as on any other file system. Only the first write to what a copy shares
//! goes to a new place. A snapshot of a subvolume is one transaction whatever the image's size, and on disk when the call
//! returns.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::IFlags;

use super::{Backend, BackendKind, IMAGE, PendingCopy, new_file};
use crate::error::{Error, Result};
use crate::sys::{btrfs, files};

/// Between two looks whether the cleaner has ended.
const SETTLE_STEP: Duration = Duration::from_millis(20);

/// See the module.
#[derive(Clone, Copy, Debug)]
pub struct Btrfs;

impl Backend for Btrfs {
    fn kind(&self) -> BackendKind {
        BackendKind::Btrfs
    }

    fn create(&self, live: &Path, len_bytes: u64) -> Result<()> {
        btrfs::create_subvolume(live).map_err(Error::io("create subvolume", live))?;
        let path = live.join(IMAGE);
        let image = new_file(&path)?;
        files::set_flag(&image, IFlags::NOCOW).map_err(Error::io("set nodatacow on", &path))?;
        if !files::has_flag(&image, IFlags::NOCOW).map_err(Error::io("look at", &path))? {
            let detail = "the file system did not take the flag nodatacow (chattr +C)".to_owned();
            return Err(Error::Unsupported { path, detail });
        }
        image.set_len(len_bytes).map_err(Error::io("set the length of", &path))?;
        image.sync_all().map_err(Error::io("sync", &path))?;
        files::sync_directory(live).map_err(Error::io("sync", live))
    }

    fn begin_copy(&self, live: &Path, copy: &Path) -> Result<Box<dyn PendingCopy>> {
        let top = File::open(live).map_err(Error::io("open", live))?;
        Ok(Box::new(Pending { live: top, copy: copy.to_owned(), published: false }))
    }

    fn clone_from_copy(&self, copy: &Path, live: &Path) -> Result<()> {
        let top = File::open(copy).map_err(Error::io("open", copy))?;
        btrfs::snapshot(&top, live, false).map_err(Error::io("make a snapshot as", live))
    }

    fn settle(&self, pool: &Path, limit: Duration) -> Result<()> {
        let top = File::open(pool).map_err(Error::io("open", pool))?;
        let begun = Instant::now();
        while begun.elapsed() < limit
            && btrfs::is_cleaning(&top)
                .map_err(Error::io("look for deleted subvolumes in", pool))?
        {
            thread::sleep(SETTLE_STEP);
        }
        Ok(())
    }

    fn reclaim(&self, pool: &Path) -> Result<()> {
        let top = File::open(pool).map_err(Error::io("open", pool))?;
        btrfs::sync(&top).map_err(Error::io("sync", pool))
    }

    fn delete(&self, dir: &Path) -> Result<()> {
        match btrfs::is_subvolume(dir) {
            Ok(true) => {
                match btrfs::delete_subvolume(dir) {
                    // Recovery, in another process, was faster.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    deleted => deleted.map_err(Error::io("delete subvolume", dir))?,
                }
                // Wakes the cleaner, which gives the room back: else it begins at any time in the next 30 seconds, in the
                // midst of a freeze maybe.
                self.reclaim(files::parent(dir))
            }
            // A creation that ended before there was a subvolume.
            Ok(false) => match std::fs::remove_dir_all(dir) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                deleted => deleted.map_err(Error::io("delete", dir)),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(Error::io("look at", dir)(error)),
        }
    }
}

#[derive(Debug)]
struct Pending {
    live: File,
    copy: PathBuf,
    published: bool,
}

impl PendingCopy for Pending {
    fn refresh(&self) -> Result<()> {
        // A snapshot is taken by the commit of a transaction, with all else that is in it: what has gathered is committed
        // now rather than in the freeze. Not by BTRFS_IOC_SYNC, which wakes the cleaner.
        rustix::fs::syncfs(&self.live).map_err(Error::io("sync", &self.copy))
    }

    fn finish(&self) -> Result<()> {
        btrfs::snapshot(&self.live, &self.copy, true)
            .map_err(Error::io("make a snapshot as", &self.copy))
    }

    fn publish(mut self: Box<Self>) -> Result<()> {
        self.published = true;
        Ok(())
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.published {
            // What stays is found by the next recovery.
            let _ = Btrfs.delete(&self.copy);
        }
    }
}
