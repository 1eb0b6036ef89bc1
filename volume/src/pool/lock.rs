//! Locks between processes: flock of a file, which ends with its holder whatever happens to it.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::sys::files;

/// How long a command waits for another one.
pub(crate) const WAIT: Duration = Duration::from_secs(10);
/// How often it looks.
const STEP: Duration = Duration::from_millis(20);
/// What a holder writes about itself is shorter.
const MAX_HOLDER_BYTES: u64 = 256;

/// A lock that this process has until it is dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing the file would do, if no other thread were just starting a program: until that runs, it has the file open
        // as well.
        let _ = files::unlock(&self.file);
    }
}

impl Lock {
    /// Takes the lock of a file, which is made when it is missing. Waits for it at most so long; then the error names the
    /// holder. `what` is for that error.
    pub(crate) fn acquire(path: &Path, what: &str, wait: Duration) -> Result<Self> {
        let mut waited = Duration::ZERO;
        loop {
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)
                .map_err(Error::io("open", path))?;
            if files::try_lock(&file).map_err(Error::io("lock", path))? {
                // The directory may have been deleted or renamed while this waited, and another be in its place.
                if is_at(&file, path).map_err(Error::io("look at", path))? {
                    introduce(&file);
                    return Ok(Self { file });
                }
                continue;
            }
            if waited >= wait {
                return Err(Error::Busy { what: what.to_owned(), holder: holder(&file) });
            }
            sleep(STEP);
            waited += STEP;
        }
    }
}

/// True if the path leads to this file.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match std::fs::metadata(path) {
        Ok(there) => Ok((ours.dev(), ours.ino()) == (there.dev(), there.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Writes who holds the lock, for the errors of others. A lock is one without that, too.
fn introduce(file: &File) {
    let name = std::fs::read_to_string("/proc/self/comm").unwrap_or_default();
    let text = format!("process {} ({})\n", std::process::id(), name.trim());
    let _ = file.set_len(0);
    let _ = file.write_all_at(text.as_bytes(), 0);
}

fn holder(file: &File) -> String {
    let mut text = vec![0; MAX_HOLDER_BYTES as usize];
    let read = file.read_at(&mut text, 0).unwrap_or_default();
    let text = String::from_utf8_lossy(text.get(..read).unwrap_or_default()).into_owned();
    let line = text.lines().next().unwrap_or_default();
    if line.is_empty() { "another process".to_owned() } else { line.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_holds_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = Lock::acquire(&path, "the pool", WAIT).unwrap();
        let error = Lock::acquire(&path, "the pool", Duration::ZERO).unwrap_err();
        let ours = format!("the pool is being changed by process {} (", std::process::id());
        assert!(error.to_string().starts_with(&ours), "{error}");
        drop(first);
        Lock::acquire(&path, "the pool", Duration::ZERO).unwrap();
    }

    #[test]
    fn a_lock_that_was_moved_away_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = Lock::acquire(&path, "it", WAIT).unwrap();
        let other = path.clone();
        let second = std::thread::spawn(move || Lock::acquire(&other, "it", WAIT).unwrap());
        sleep(STEP * 3);
        std::fs::rename(&path, dir.path().join("away")).unwrap();
        drop(first);
        let _second = second.join().unwrap();
        assert!(Lock::acquire(&path, "it", Duration::ZERO).is_err(), "the new file is locked");
    }
}
