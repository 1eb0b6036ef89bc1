//! How images are made, copied by reference and deleted on the pool's file system.
//!
//! A *live* directory holds one file, `image`, that someone may be writing to. A *copy* is a directory with an `image`
//! that never changes. btrfs copies at once; XFS takes time that grows with the number of extents. So a copy has two
//! steps: [`Backend::begin_copy`] and [`PendingCopy::refresh`], which may take long, and [`PendingCopy::finish`], which is
//! quick and made while the image's file system is frozen.

mod btrfs;
mod precopy;
mod xfs;

use std::fmt;
use std::fs::File;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use btrfs::Btrfs;
pub use xfs::Xfs;

use crate::error::{Error, Result};
use crate::sys::reflink;

/// The file's name in a live directory or a copy.
pub const IMAGE: &str = "image";

/// The file systems that a pool can be on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendKind {
    /// A subvolume for each volume, images without copy on write, copies by snapshot.
    Btrfs,
    /// Copies by reflink, piece by piece.
    Xfs,
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Btrfs => "btrfs",
            Self::Xfs => "xfs",
        })
    }
}

impl std::str::FromStr for BackendKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "btrfs" => Ok(Self::Btrfs),
            "xfs" => Ok(Self::Xfs),
            _ => Err("a pool is on btrfs or xfs".to_owned()),
        }
    }
}

/// What is done to images, each call on directories of one pool.
pub trait Backend: Send + Sync + fmt::Debug {
    /// Which file system it is for.
    fn kind(&self) -> BackendKind;

    /// Makes a live directory whose image has this length and no data.
    fn create(&self, live: &Path, len_bytes: u64) -> Result<()>;

    /// Begins to copy a live directory's image by reference; `copy` must not exist, and the directory that it is in must.
    /// May take long; the image may be written meanwhile.
    fn begin_copy(&self, live: &Path, copy: &Path) -> Result<Box<dyn PendingCopy>>;

    /// True for a copy that was published, false for what is left of one that was not.
    fn is_whole(&self, copy: &Path) -> Result<bool> {
        let image = copy.join(IMAGE);
        image.try_exists().map_err(Error::io("look at", image))
    }

    /// Makes a live directory from a copy: writable, and by reference.
    fn clone_from_copy(&self, copy: &Path, live: &Path) -> Result<()>;

    /// Waits until the kernel has given back the room of what was deleted before, but at most this long. While it does that,
    /// [`PendingCopy::finish`] takes several times as long.
    fn settle(&self, pool: &Path, limit: Duration) -> Result<()>;

    /// Hurries the kernel on to give back the room of what was deleted.
    fn reclaim(&self, pool: &Path) -> Result<()>;

    /// Deletes a live directory or copy, whole or not. Can be repeated; does nothing where there is none.
    fn delete(&self, dir: &Path) -> Result<()>;
}

/// A copy that is not there yet. Dropping it removes what there is of it.
pub trait PendingCopy: Send + Sync + fmt::Debug {
    /// Does what there has come to do since the copy was begun, so that less of it is left for
    /// [`finish`](Self::finish), which follows at once.
    fn refresh(&self) -> Result<()>;

    /// Takes the copy: its bytes are those of the image at one moment during this call. Writers that are not frozen may
    /// have to wait. The copy may not survive a crash before [`publish`](Self::publish).
    fn finish(&self) -> Result<()>;

    /// Makes the copy durable and guards it against changes. Called once, after [`finish`](Self::finish) and the thaw.
    fn publish(self: Box<Self>) -> Result<()>;
}

/// The backend for a file system.
pub fn backend(kind: BackendKind) -> Box<dyn Backend> {
    match kind {
        BackendKind::Btrfs => Box::new(Btrfs),
        BackendKind::Xfs => Box::new(Xfs),
    }
}

/// Which backend a directory's file system can have, after trying that reflinks work there.
pub fn detect(dir: &Path) -> Result<BackendKind> {
    const BTRFS: i64 = 0x9123_683E;
    const XFS: i64 = 0x5846_5342;
    let statfs = rustix::fs::statfs(dir).map_err(Error::io("look at", dir))?;
    let kind = match statfs.f_type {
        BTRFS => BackendKind::Btrfs,
        XFS => BackendKind::Xfs,
        _ => {
            let filesystem = crate::sys::mounts::containing(dir)
                .ok()
                .flatten()
                .map_or("an unknown file system".to_owned(), |mount| mount.filesystem);
            let detail = format!(
                "a pool needs btrfs, or XFS with reflink, to copy volumes by reference; this is {filesystem}"
            );
            return Err(Error::Unsupported { path: dir.to_owned(), detail });
        }
    };
    try_reflink(dir)?;
    Ok(kind)
}

/// Copies a small file by reference and removes both.
fn try_reflink(dir: &Path) -> Result<()> {
    let directory = tempdir_in(dir)?;
    let path = |name: &str| directory.0.join(name);
    let from = new_file(&path("from"))?;
    rustix::io::pwrite(&from, &[1; 4096], 0).map_err(Error::io("write", path("from")))?;
    let to = new_file(&path("to"))?;
    reflink::clone_file(&from, &to).map_err(|cause| Error::Unsupported {
        path: dir.to_owned(),
        detail: format!(
            "a pool needs a file system that copies by reference, and a trial failed: {cause}"
        ),
    })
}

/// A directory that goes when this is dropped.
struct Trial(std::path::PathBuf);

impl Drop for Trial {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn tempdir_in(dir: &Path) -> Result<Trial> {
    let path = dir.join(format!(".petra-trial-{}", std::process::id()));
    // One of a process that had this number and died.
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir(&path).map_err(Error::io("create", &path))?;
    Ok(Trial(path))
}

fn new_file(path: &Path) -> Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(Error::io("create", path))
}

/// Opens an image.
fn open_image(path: &Path, write: bool) -> Result<File> {
    File::options().read(true).write(write).open(path).map_err(Error::io("open", path))
}
