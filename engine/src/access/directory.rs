//! Secrets of several repositories, in files for the processes of one machine. Meant for a directory in memory (tmpfs).
//!
//! One file for each repository: JSON, named by the BLAKE3 hash of its URL, for its owner alone.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::{Access, known};
use crate::error::{Error, Result};
use crate::url::RepositoryUrl;

/// Longer files are not ours.
const MAX_FILE_BYTES: u64 = 1 << 18;
/// Drafts of one file at a time, with those that crashes have left.
const MAX_DRAFTS: u32 = 64;

/// A directory of secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretsDirectory {
    path: PathBuf,
}

impl SecretsDirectory {
    /// The directory at this path. It is made when something is put in it.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Keeps the secrets of a repository, in place of those before. Without any this forgets it.
    pub fn put<'a>(
        &self,
        url: &RepositoryUrl,
        secrets: impl IntoIterator<Item = (&'a String, &'a String)>,
    ) -> Result<()> {
        let path = self.file(url);
        match content(secrets)? {
            None => self.remove(url),
            Some(json) if is_there(&path, &json)? => Ok(()),
            Some(json) => self.write(&path, &json).map_err(Error::io("write", path)),
        }
    }

    /// True where these very secrets are kept.
    pub fn holds<'a>(
        &self,
        url: &RepositoryUrl,
        secrets: impl IntoIterator<Item = (&'a String, &'a String)>,
    ) -> Result<bool> {
        content(secrets)?.map_or(Ok(false), |json| is_there(&self.file(url), &json))
    }

    /// How a repository is opened; None where nothing is kept for it.
    pub fn access(&self, url: &RepositoryUrl) -> Result<Option<Access>> {
        let path = self.file(url);
        let Some(json) = read(&path).map_err(Error::io("read", &path))? else { return Ok(None) };
        let secrets: BTreeMap<String, String> =
            serde_json::from_slice(&json).map_err(|error| Error::Damaged {
                object: path.display().to_string(),
                // The words of serde_json may hold a part of a secret.
                detail: format!("no secrets, at column {}", error.column()),
            })?;
        Access::from_secrets(&secrets).map(Some)
    }

    /// Forgets the secrets of a repository.
    pub fn remove(&self, url: &RepositoryUrl) -> Result<()> {
        let path = self.file(url);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io("delete", path)(error))
            }
            _ => Ok(()),
        }
    }

    fn file(&self, url: &RepositoryUrl) -> PathBuf {
        self.path.join(blake3::hash(url.to_string().as_bytes()).to_hex().as_str())
    }

    fn write(&self, path: &Path, json: &[u8]) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.path)?;
        // Whoever made it: nobody else looks in.
        std::fs::set_permissions(&self.path, Permissions::from_mode(0o700))?;
        let (draft, mut file) = draft(path)?;
        let written = file.write_all(json).and_then(|()| std::fs::rename(&draft, path));
        if written.is_err() {
            let _ = std::fs::remove_file(&draft);
        }
        written
    }
}

/// What a file holds; None for no secrets.
fn content<'a>(
    secrets: impl IntoIterator<Item = (&'a String, &'a String)>,
) -> Result<Option<Zeroizing<Vec<u8>>>> {
    let secrets = known(secrets);
    if secrets.is_empty() {
        return Ok(None);
    }
    let json = serde_json::to_vec(&secrets);
    let json = Zeroizing::new(json.map_err(|_| Error::Internal("secrets are no JSON"))?);
    if json.len() as u64 > MAX_FILE_BYTES {
        return Err(Error::Request("the secrets are too long".to_owned()));
    }
    Ok(Some(json))
}

fn is_there(path: &Path, json: &Zeroizing<Vec<u8>>) -> Result<bool> {
    let found = read(path).map_err(Error::io("read", path))?;
    Ok(found.is_some_and(|found| found == *json))
}

/// A new file beside another one, for its owner alone.
fn draft(path: &Path) -> io::Result<(PathBuf, File)> {
    let mut refused = io::Error::from(io::ErrorKind::AlreadyExists);
    for number in 0..MAX_DRAFTS {
        let draft = path.with_extension(format!("new-{number}"));
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft) {
            Ok(file) => return Ok((draft, file)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => refused = error,
            Err(error) => return Err(error),
        }
    }
    Err(refused)
}

fn read(path: &Path) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    // With room from the beginning: a vector that grows leaves parts of itself behind.
    let len = file.metadata()?.len().min(MAX_FILE_BYTES);
    let mut bytes = Zeroizing::new(Vec::with_capacity(len as usize + 1));
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secrets(passphrase: &str) -> BTreeMap<String, String> {
        BTreeMap::from([
            ("passphrase".to_owned(), passphrase.to_owned()),
            ("unknown".to_owned(), "not kept".to_owned()),
        ])
    }

    #[test]
    fn secrets_are_kept_by_repository_and_for_nobody_else() {
        let parent = tempfile::tempdir().unwrap();
        let directory = SecretsDirectory::new(parent.path().join("a/secrets"));
        let [one, other]: [RepositoryUrl; 2] =
            ["file:///one", "file:///two"].map(|url| url.parse().unwrap());
        assert!(directory.access(&one).unwrap().is_none());
        directory.remove(&one).unwrap();
        directory.put(&one, &secrets("first")).unwrap();
        directory.put(&other, &secrets("second")).unwrap();
        let passphrase = |url| directory.access(url).unwrap().unwrap().secret.unwrap();
        let expected = |text: &str| crate::Secret::passphrase(text.into()).unwrap();
        assert_eq!(passphrase(&one), expected("first"));
        assert_eq!(passphrase(&other), expected("second"));
        directory.put(&one, &secrets("third")).unwrap();
        assert!(directory.holds(&one, &secrets("third")).unwrap());
        assert!(!directory.holds(&one, &secrets("first")).unwrap());
        assert_eq!(passphrase(&one), expected("third"));

        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(directory.path()), 0o700);
        let files: Vec<PathBuf> =
            directory.path().read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(files.len(), 2);
        for file in &files {
            assert_eq!(mode(file), 0o600);
            assert!(!std::fs::read_to_string(file).unwrap().contains("not kept"));
            std::fs::write(file, "{\"passphrase\": hidden").unwrap();
        }
        let error = directory.access(&one).unwrap_err().to_string();
        assert!(!error.contains("hidden"), "{error}");

        directory.put(&one, &BTreeMap::new()).unwrap();
        assert!(directory.access(&one).unwrap().is_none());
    }

    #[test]
    fn many_writers_leave_one_whole_file() {
        let parent = tempfile::tempdir().unwrap();
        let directory = SecretsDirectory::new(parent.path());
        let url: RepositoryUrl = "file:///one".parse().unwrap();
        std::thread::scope(|scope| {
            for n in 0..8 {
                let (directory, url) = (&directory, &url);
                scope.spawn(move || {
                    for round in 0..20 {
                        directory.put(url, &secrets(&format!("{n}-{round}"))).unwrap();
                        directory.access(url).unwrap().unwrap();
                    }
                });
            }
        });
        assert_eq!(parent.path().read_dir().unwrap().count(), 1);
    }
}
