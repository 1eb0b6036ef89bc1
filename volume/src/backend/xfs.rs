//! XFS: copies by reflink, of which most is done before the freeze (see [`precopy`](super::precopy)).
//!
//! A copy's image is immutable (`chattr +i`), so that neither people nor `xfs_fsr` change it or where it lies. Until it is
//! whole and durable it is called `image.partial`.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::IFlags;

use super::precopy::Precopy;
use super::{Backend, BackendKind, IMAGE, PendingCopy, new_file, open_image};
use crate::error::{Error, Result};
use crate::sys::{files, reflink};

const PARTIAL: &str = "image.partial";

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

    fn reclaim(&self, pool: &Path) -> Result<()> {
        // What is unlinked is freed in the background; a sync waits for that.
        let top = File::open(pool).map_err(Error::io("open", pool))?;
        rustix::fs::syncfs(&top).map_err(Error::io("sync", pool))
    }

    fn delete(&self, dir: &Path) -> Result<()> {
        for name in [IMAGE, PARTIAL] {
            let path = dir.join(name);
            match File::open(&path) {
                Ok(image) => files::clear_flag(&image, IFlags::IMMUTABLE)
                    .map_err(Error::io("make deletable", &path))?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(Error::io("open", path)(error)),
            }
        }
        match std::fs::remove_dir_all(dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io("delete", dir)(error))
            }
            _ => Ok(()),
        }
    }
}

#[derive(Debug)]
struct Pending {
    precopy: Precopy,
    copy: PathBuf,
    published: bool,
}

impl PendingCopy for Pending {
    fn finish(&mut self) -> Result<()> {
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
