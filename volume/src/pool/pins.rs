//! Notes of pins that may hold data of a repository for nothing.
//!
//! A lazy clone's pin and its volume can't be made or ended in one step. So each pin is noted in the pool before it is
//! taken, and before its volume is deleted. The note goes when the volume has the pin, or when the pin is ended. After
//! a crash, or while the repository is away, the note stays, and [`settle`] ends the pin later:
//!
//! ```text
//! clone    note -> pin -> volume -> forget           deletion   note -> delete the volume -> end the pin -> forget
//! ```
//!
//! Whoever is at work holds a lock on the note, so that nobody ends a pin under it.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use petra_engine::clone::ClonePin;
use petra_engine::{Context, Repository, SnapshotId};
use serde::{Deserialize, Serialize};

use super::state::{self, LazyState};
use super::{Pool, entries};
use crate::error::{Error, Result};
use crate::sys::files;

/// What a note says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    format: u32,
    repository: String,
    snapshot: SnapshotId,
    pin: SnapshotId,
}

/// A note that nobody else looks at until this is dropped.
#[derive(Debug)]
pub struct NotedPin {
    note: Note,
    path: PathBuf,
    _lock: File,
}

impl NotedPin {
    /// The URL of the repository that the pin is in.
    pub fn repository(&self) -> &str {
        &self.note.repository
    }

    /// The pin.
    pub fn pin(&self) -> SnapshotId {
        self.note.pin
    }

    /// The snapshot that it holds.
    pub fn snapshot(&self) -> SnapshotId {
        self.note.snapshot
    }

    /// Forgets the note: the pin is a volume's, or has ended.
    pub fn forget(self) -> Result<()> {
        std::fs::remove_file(&self.path).map_err(Error::io("delete", &self.path))
    }
}

impl Pool {
    /// Notes a pin; durable when this returns.
    pub fn note_pin(
        &self,
        repository: &str,
        snapshot: SnapshotId,
        pin: SnapshotId,
    ) -> Result<NotedPin> {
        let directory = self.pins_directory();
        std::fs::create_dir_all(&directory).map_err(Error::io("create", &directory))?;
        let path = directory.join(pin.to_string());
        let draft = directory.join(format!(".{pin}"));
        let note = Note { format: state::FORMAT, repository: repository.to_owned(), snapshot, pin };
        let write = || {
            let mut file =
                File::options().read(true).write(true).create(true).truncate(true).open(&draft)?;
            if !files::try_lock(&file)? {
                // Somebody takes it for left behind, and is about to delete it.
                return Err(std::io::ErrorKind::ResourceBusy.into());
            }
            file.write_all(&serde_json::to_vec_pretty(&note)?)?;
            file.sync_all()?;
            std::fs::rename(&draft, &path)?;
            files::sync_directory(&directory)?;
            Ok(file)
        };
        let lock = write().map_err(Error::io::<std::io::Error>("write", &path))?;
        Ok(NotedPin { note, path, _lock: lock })
    }

    /// The notes that nobody is at work with.
    pub fn noted_pins(&self) -> Result<Vec<NotedPin>> {
        let directory = self.pins_directory();
        let mut noted = vec![];
        for name in entries(&directory)? {
            let path = directory.join(&name);
            let file = match File::options().read(true).write(true).open(&path) {
                Ok(file) => file,
                // It was forgotten meanwhile.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::io("open", path)(error)),
            };
            if !files::try_lock(&file).map_err(Error::io("lock", &path))? {
                continue;
            }
            if name.as_encoded_bytes().starts_with(b".") {
                // Whoever wrote it died before the pin was taken.
                let _ = std::fs::remove_file(&path);
                continue;
            }
            match state::read::<Note>(&path) {
                Ok(Some(note)) => noted.push(NotedPin { note, path, _lock: file }),
                Ok(None) => {}
                // It must not keep others from being ended.
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "a note of a pin can't be read")
                }
            }
        }
        Ok(noted)
    }

    /// True if a volume needs the pin: then nothing is to be ended.
    pub(crate) fn needs_pin(&self, pin: SnapshotId) -> Result<bool> {
        for volume in self.volumes()? {
            match volume.state() {
                Ok(state) => {
                    if state.lazy.is_some_and(|lazy| lazy.pin == pin && !lazy.hydrated) {
                        return Ok(true);
                    }
                }
                Err(Error::Unknown { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    fn pins_directory(&self) -> PathBuf {
        self.root().join("pins")
    }
}

/// Ends the pins of a repository that hold data for nothing; gives how many.
pub async fn settle(pool: &Pool, url: &str, repo: &Repository, ctx: &Context) -> Result<usize> {
    let noted = blocking({
        let pool = pool.clone();
        move || pool.noted_pins()
    })
    .await?;
    let mut ended = 0;
    for noted in noted.into_iter().filter(|noted| noted.repository() == url) {
        let (pool, pin) = (pool.clone(), noted.pin());
        if !blocking(move || pool.needs_pin(pin)).await? {
            ClonePin::taken(repo, pin, noted.snapshot()).end(ctx).await?;
            ended += 1;
        }
        noted.forget()?;
    }
    Ok(ended)
}

/// Notes the pin of a volume that will be deleted, or needs it no longer.
pub fn note_end(pool: &Pool, lazy: &LazyState) -> Result<NotedPin> {
    pool.note_pin(&lazy.repository, lazy.snapshot, lazy.pin)
}

/// Runs what waits for disks.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| Error::Internal("work on a pool panicked"))?
}
