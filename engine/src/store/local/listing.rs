//! Listing objects in the byte order of their keys.
//!
//! Directories are walked depth first, their entries sorted with a `/` after the names of directories. Names hold
//! no `/`, so this gives the order of whole keys: `a.b` comes before `a/x` because `.` comes before `/`.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;

use rustix::io::Errno;

use super::{Directory, is_any, is_reserved};
use crate::store::{Entry, Page};

/// The most entries of a page. A directory is read again for each of its pages, so they are large.
const PAGE: usize = 10_000;

impl Directory {
    pub(super) fn list(&self, prefix: &str, after: &str) -> io::Result<Page> {
        self.check()?;
        let mut listing = Listing { directory: self, prefix, after, page: Page::default() };
        let folder = prefix.rfind('/').map_or("", |end| prefix.split_at(end + 1).0);
        listing.walk(folder)?;
        Ok(listing.page)
    }

    /// The names in a folder (empty, or ending in `/`), those of directories with a `/` at their end.
    fn sorted_names(&self, folder: &str) -> io::Result<Vec<String>> {
        let path = match self.path(folder.strip_suffix('/').unwrap_or(folder)) {
            Ok(path) => path,
            Err(_) if folder.is_empty() => self.root.clone(),
            // No object has such a key.
            Err(_) => return Ok(Vec::new()),
        };
        let mut names = Vec::new();
        let entries = match fs::read_dir(path) {
            // Removed meanwhile, or never there.
            Err(error) if is_any(&error, &[Errno::NOENT, Errno::NOTDIR]) => return Ok(names),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            if folder.is_empty() && is_reserved(&name) {
                continue;
            }
            // Keys are text: what is not was put there by someone else, like links and devices.
            let Ok(mut name) = name.into_string() else { continue };
            let kind = match entry.file_type() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                kind => kind?,
            };
            if kind.is_dir() {
                name.push('/');
            } else if !kind.is_file() {
                continue;
            }
            names.push(name);
        }
        names.sort_unstable();
        Ok(names)
    }
}

/// One page in the making.
struct Listing<'a> {
    directory: &'a Directory,
    prefix: &'a str,
    after: &'a str,
    page: Page,
}

impl Listing<'_> {
    /// Adds the objects below `folder`, until the page is full.
    fn walk(&mut self, folder: &str) -> io::Result<()> {
        for name in self.directory.sorted_names(folder)? {
            let key = format!("{folder}{name}");
            if key.ends_with('/') {
                let wanted = key.starts_with(self.prefix) || self.prefix.starts_with(&key);
                let listed = key.as_str() <= self.after && !self.after.starts_with(&key);
                if wanted && !listed {
                    self.walk(&key)?;
                }
            } else if key.starts_with(self.prefix) && key.as_str() > self.after {
                self.add(key)?;
            }
            if self.page.more {
                break;
            }
        }
        Ok(())
    }

    fn add(&mut self, key: String) -> io::Result<()> {
        let metadata = match fs::symlink_metadata(self.directory.path(&key)?) {
            // Deleted meanwhile.
            Err(error) if is_any(&error, &[Errno::NOENT, Errno::NOTDIR]) => return Ok(()),
            metadata => metadata?,
        };
        if self.page.entries.len() == PAGE {
            self.page.more = true;
        } else {
            let entry = Entry { key, len: metadata.len(), modified_unix_ms: modified(&metadata) };
            self.page.entries.push(entry);
        }
        Ok(())
    }
}

fn modified(metadata: &Metadata) -> u64 {
    let ms =
        metadata.mtime().saturating_mul(1000).saturating_add(metadata.mtime_nsec() / 1_000_000);
    u64::try_from(ms).unwrap_or_default()
}
