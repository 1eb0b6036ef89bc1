//! The repositories that a pool's users have sent snapshots to, by their URLs: nobody else knows of those that have no name
//! any more.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Pool, state};
use crate::error::Result;

/// No more are remembered: those that were noted last.
const MOST: usize = 1024;
/// Longer URLs are not remembered, so that the file stays small.
const MAX_URL_BYTES: usize = 512;

/// What `repositories.json` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Noted {
    format: u32,
    /// The last one at the end.
    urls: Vec<String>,
}

impl Pool {
    /// Remembers a repository; durable when this returns.
    pub fn note_repository(&self, url: &str) -> Result<()> {
        if url.len() > MAX_URL_BYTES || self.repositories()?.iter().any(|known| known == url) {
            return Ok(());
        }
        let _list = self.lock_list()?;
        let mut urls = self.repositories()?;
        urls.retain(|known| known != url);
        urls.push(url.to_owned());
        urls.drain(..urls.len().saturating_sub(MOST));
        state::write(&self.repositories_path(), &Noted { format: state::FORMAT, urls })
    }

    /// The repositories that were noted, the last one at the end.
    pub fn repositories(&self) -> Result<Vec<String>> {
        let noted = state::read::<Noted>(&self.repositories_path())?;
        Ok(noted.map(|noted| noted.urls).unwrap_or_default())
    }

    fn repositories_path(&self) -> PathBuf {
        self.root().join("repositories.json")
    }
}
