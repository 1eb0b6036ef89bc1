//! A store in a directory: the object `KEY` is the file `DIRECTORY/KEY`.
//!
//! Works for any number of processes at once, on any filesystem with hard links, also a shared one. Other files
//! may not be kept there, with two exceptions: `tmp/` holds objects in the making where the filesystem has no
//! unnamed files, and `lost+found` belongs to the filesystem.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use rustix::buffer::spare_capacity;
use rustix::io::{Errno, pread};

use super::{Creation, MAX_OBJECT_BYTES, Page, Store, StoreError, StoreErrorCause};
use crate::key::Key;
use crate::memory;
use crate::url::RepositoryUrl;

mod listing;
mod write;

#[cfg(test)]
mod tests;

/// Objects in the making, where they need a name.
const TMP: &str = "tmp";
/// Names directly in the repository's directory that are no objects.
const RESERVED: [&str; 2] = [TMP, "lost+found"];

/// A directory of this machine, or one that it mounts.
#[derive(Clone, Debug)]
pub struct LocalStore {
    directory: Arc<Directory>,
}

#[derive(Debug)]
struct Directory {
    root: PathBuf,
    /// Whether to try unnamed files. Tests switch them off.
    unnamed_files: bool,
}

impl LocalStore {
    /// A store in `directory`, which the first write makes if it is not there.
    pub fn new(directory: &Path) -> Self {
        Self { directory: Arc::new(Directory { root: directory.to_owned(), unnamed_files: true }) }
    }

    /// Runs blocking work where it does not hold up other tasks, and says in an error what it was for.
    async fn run<T: Send + 'static>(
        &self,
        operation: &'static str,
        key: &str,
        work: impl FnOnce(&Directory) -> io::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let directory = Arc::clone(&self.directory);
        let done = tokio::task::spawn_blocking(move || work(&directory)).await;
        let (cause, detail) = match done {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => self.directory.explain(&error),
            Err(_) => (StoreErrorCause::Other, "the worker thread ended early".to_owned()),
        };
        Err(StoreError { operation, key: key.to_owned(), location: self.location(), cause, detail })
    }
}

impl Directory {
    /// The file of an object.
    fn path(&self, key: &str) -> io::Result<PathBuf> {
        // A key from a damaged record must not lead out of the repository.
        let ordinary = |part: &str| !matches!(part, "" | "." | "..") && !part.contains('\0');
        let reserved = key.split('/').next().is_some_and(|first| RESERVED.contains(&first));
        if reserved || !key.split('/').all(ordinary) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "this can't be an object's key",
            ));
        }
        Ok(self.root.join(key))
    }

    /// Fails if there is no repository directory, which other than a missing object is worth an error always.
    fn check(&self) -> io::Result<()> {
        if fs::metadata(&self.root)?.is_dir() { Ok(()) } else { Err(Errno::NOTDIR.into()) }
    }

    fn read(&self, key: &str, range: Range<u64>) -> io::Result<Vec<u8>> {
        let file = File::open(self.path(key)?)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(Errno::NOENT.into());
        }
        let len = range.end.min(metadata.len()).saturating_sub(range.start);
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let mut body = memory::buffer(len);
        while body.len() < len {
            let at = range.start + body.len() as u64;
            match pread(&file, spare_capacity(&mut body), at) {
                Ok(0) => break,
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        // The buffer may have been larger than it had to be.
        body.truncate(len);
        Ok(body)
    }

    fn delete(&self, key: &str) -> io::Result<()> {
        let path = self.path(key)?;
        match fs::remove_file(&path) {
            // A key that continues an object's or a folder's name is no object either.
            Err(error) if is_any(&error, &[Errno::NOENT, Errno::NOTDIR, Errno::ISDIR]) => {
                return self.check();
            }
            done => done?,
        }
        // Whatever still holds an object can't be removed, and a writer that misses its directory makes it again.
        for parent in path.ancestors().skip(1).take_while(|parent| *parent != self.root) {
            if fs::remove_dir(parent).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// What a failure means to the caller.
    fn explain(&self, error: &io::Error) -> (StoreErrorCause, String) {
        let detail = error.to_string();
        let cause = match Errno::from_io_error(error) {
            Some(Errno::NOENT | Errno::NOTDIR | Errno::ISDIR) => match fs::metadata(&self.root) {
                Ok(root) if root.is_dir() => StoreErrorCause::NotFound,
                Ok(_) => return (StoreErrorCause::NoContainer, "it is not a directory".to_owned()),
                Err(_) => return (StoreErrorCause::NoContainer, "no such directory".to_owned()),
            },
            Some(Errno::ACCESS | Errno::PERM | Errno::ROFS) => StoreErrorCause::Denied,
            Some(Errno::NOSPC | Errno::DQUOT) => StoreErrorCause::Full,
            Some(Errno::OPNOTSUPP | Errno::NOSYS) => StoreErrorCause::Unsupported,
            // Shared filesystems that are away, and shortages of this machine that pass.
            Some(
                Errno::MFILE
                | Errno::NFILE
                | Errno::NOMEM
                | Errno::STALE
                | Errno::TIMEDOUT
                | Errno::HOSTDOWN
                | Errno::NOTCONN,
            ) => StoreErrorCause::Unavailable,
            _ => StoreErrorCause::Other,
        };
        (cause, detail)
    }
}

/// True when the system answered one of `errnos`.
fn is_any(error: &io::Error, errnos: &[Errno]) -> bool {
    Errno::from_io_error(error).is_some_and(|errno| errnos.contains(&errno))
}

/// True for names directly in the repository's directory that are no objects.
fn is_reserved(name: &OsStr) -> bool {
    RESERVED.iter().any(|reserved| name == *reserved)
}

#[async_trait]
impl Store for LocalStore {
    fn location(&self) -> String {
        RepositoryUrl::Directory(self.directory.root.clone()).to_string()
    }

    fn create_is_exclusive(&self) -> bool {
        // A hard link is made once, on whatever filesystem.
        true
    }

    async fn get(&self, key: &Key) -> Result<Bytes, StoreError> {
        let body = self.get_range(key, 0..MAX_OBJECT_BYTES + 1).await?;
        if body.len() as u64 > MAX_OBJECT_BYTES {
            let detail = format!("more than the {MAX_OBJECT_BYTES} bytes of the longest object");
            return Err(StoreError {
                operation: "read",
                key: key.to_string(),
                location: self.location(),
                cause: StoreErrorCause::Other,
                detail,
            });
        }
        Ok(body)
    }

    async fn get_range(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        let name = key.to_string();
        let body = self.run("read", key.as_str(), move |directory| directory.read(&name, range));
        Ok(body.await?.into())
    }

    async fn put(&self, key: &Key, body: Bytes) -> Result<(), StoreError> {
        let name = key.to_string();
        self.run("write", key.as_str(), move |directory| directory.put(&name, &body)).await
    }

    async fn create(&self, key: &Key, body: Bytes) -> Result<Creation, StoreError> {
        let name = key.to_string();
        self.run("create", key.as_str(), move |directory| directory.create(&name, &body)).await
    }

    async fn list(&self, prefix: &str, after: Option<&str>) -> Result<Page, StoreError> {
        let (within, after) = (prefix.to_owned(), after.unwrap_or_default().to_owned());
        self.run("list", prefix, move |directory| directory.list(&within, &after)).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        let name = key.to_string();
        self.run("delete", key.as_str(), move |directory| directory.delete(&name)).await
    }
}
