//! The ids by which a cluster knows volumes and snapshots. They say where everything is, so that a controller needs no
//! state of its own, and have at most [`MAX_STRING_BYTES`] bytes.
//!
//! | what | id |
//! |---|---|
//! | a volume | `POOL/NAME`: the id of a pool, and the volume's name in it |
//! | a volume that any node may read | `ro/PIN/N/REPOSITORY#@ID`: volume number N of a snapshot, held by a pin |
//! | a group of snapshots | `REPOSITORY#@ID` |
//! | a snapshot | `REPOSITORY#@ID/VOLUME`, or any URL of a volume of a snapshot |
//!
//! `REPOSITORY` is a URL or the name of one that the driver was started with: only with a name do long URLs fit.
//!
//! The ID of a snapshot is given out before it is uploaded: it is the upload's. The snapshot has this id or, where attempts
//! were aborted, one of the next ([`petra_volume::snapshot::resolve`]).

use std::fmt;
use std::str::FromStr;

use petra_engine::{Name, SnapshotId};

use crate::MAX_STRING_BYTES;

/// Names up to this long are used as they are.
const MAX_VOLUME_NAME_BYTES: usize = MAX_STRING_BYTES - 27;
/// The same for the names of volumes in snapshots: 63 bytes is what Kubernetes allows for most names.
const MAX_MEMBER_NAME_BYTES: usize = 63;

/// A volume's id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumeHandle {
    /// A volume of one pool.
    Local {
        /// The pool's id.
        pool: SnapshotId,
        /// The name in the pool.
        name: Name,
    },
    /// Nodes make clones of their own, which nobody can write to.
    ReadOnly {
        /// What keeps the snapshot: also the name of the clones.
        pin: SnapshotId,
        /// Which volume of the snapshot, from 1.
        number: u32,
        /// The repository, by name or URL.
        repository: String,
        /// The snapshot.
        snapshot: SnapshotId,
    },
}

/// The id of a snapshot, or of a group of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotHandle {
    /// The repository, by name or URL.
    pub repository: String,
    /// What follows `#`: `@ID/VOLUME`, or a path.
    pub item: String,
}

impl SnapshotHandle {
    /// The id of a group.
    pub fn group(repository: &str, id: SnapshotId) -> Self {
        Self { repository: repository.to_owned(), item: format!("@{id}") }
    }

    /// The id of a volume of a snapshot.
    pub fn member(repository: &str, id: SnapshotId, volume: &Name) -> Self {
        let item = format!("@{id}/{}", volume.encoded());
        Self { repository: repository.to_owned(), item }
    }

    /// The snapshot, if the id names it by its id.
    pub fn id(&self) -> Option<SnapshotId> {
        let item = self.item.strip_prefix('@')?;
        item.split_once('/').map_or(item, |(id, _)| id).parse().ok()
    }
}

impl fmt::Display for SnapshotHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.repository, self.item)
    }
}

impl FromStr for SnapshotHandle {
    type Err = Foreign;

    fn from_str(text: &str) -> Result<Self, Foreign> {
        let (repository, item) = text.split_once('#').ok_or(Foreign)?;
        if repository.is_empty() || item.is_empty() {
            return Err(Foreign);
        }
        Ok(Self { repository: repository.to_owned(), item: item.to_owned() })
    }
}

impl fmt::Display for VolumeHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local { pool, name } => write!(f, "{pool}/{}", name.as_str()),
            Self::ReadOnly { pin, number, repository, snapshot } => {
                write!(f, "ro/{pin}/{number}/{repository}#@{snapshot}")
            }
        }
    }
}

impl FromStr for VolumeHandle {
    type Err = Foreign;

    fn from_str(text: &str) -> Result<Self, Foreign> {
        if let Some(rest) = text.strip_prefix("ro/") {
            let mut parts = rest.splitn(3, '/');
            let mut next = || parts.next().ok_or(Foreign);
            let (pin, number, snapshot) = (next()?, next()?, next()?);
            let (repository, snapshot) = snapshot.rsplit_once("#@").ok_or(Foreign)?;
            return Ok(Self::ReadOnly {
                pin: pin.parse().map_err(|_| Foreign)?,
                number: number.parse().map_err(|_| Foreign)?,
                repository: repository.to_owned(),
                snapshot: snapshot.parse().map_err(|_| Foreign)?,
            });
        }
        let (pool, name) = text.split_once('/').ok_or(Foreign)?;
        let pool = pool.parse().map_err(|_| Foreign)?;
        Ok(Self::Local { pool, name: Name::new("volume", name).map_err(|_| Foreign)? })
    }
}

/// An id that this driver never gave out: it names nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is no id of this driver")]
pub struct Foreign;

/// The name in a pool of the volume that a CSI call calls `name`: the same where it fits.
pub fn volume_name(name: &str) -> Name {
    shortened(name, MAX_VOLUME_NAME_BYTES)
}

/// The name in a snapshot of a volume that people call `name`.
pub fn member_name(name: &str) -> Name {
    shortened(name, MAX_MEMBER_NAME_BYTES)
}

/// The name itself if it is one and fits, else a hash of it.
fn shortened(name: &str, max_bytes: usize) -> Name {
    let hashed =
        || format!("v-{}", blake3::hash(name.as_bytes()).to_hex().get(..32).unwrap_or("0"));
    let text = if name.len() <= max_bytes { name.to_owned() } else { hashed() };
    let named = Name::new("volume", text).or_else(|_| Name::new("volume", hashed()));
    #[expect(clippy::expect_used, reason = "letters and digits are a name")]
    named.expect("a hash is a name")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "01ARZ3NDEKTSV4RRFFQ69G5FAV";

    #[test]
    fn handles_come_back() {
        let id: SnapshotId = ID.parse().unwrap();
        let name = volume_name("pvc-6e1bd01f");
        let local = VolumeHandle::Local { pool: id, name: name.clone() };
        assert_eq!(local.to_string(), format!("{ID}/pvc-6e1bd01f"));
        let everywhere = VolumeHandle::ReadOnly {
            pin: id,
            number: 2,
            repository: "s3://b/p?endpoint=http://h:1".to_owned(),
            snapshot: id,
        };
        for handle in [local, everywhere] {
            assert_eq!(handle.to_string().parse(), Ok(handle));
        }
        let member = SnapshotHandle::member("main", id, &member_name("a b"));
        assert_eq!(member.to_string(), format!("main#@{ID}/a%20b"));
        for handle in [member, SnapshotHandle::group("main", id)] {
            assert_eq!(handle.id(), Some(id));
            assert_eq!(handle.to_string().parse(), Ok(handle));
        }
        assert_eq!("main#e/r/s".parse::<SnapshotHandle>().unwrap().id(), None);
    }

    #[test]
    fn ids_fit_whatever_the_names() {
        for name in ["x".repeat(128), "x".repeat(101), "ä/b\0".repeat(30), "..".to_owned()] {
            let handle =
                VolumeHandle::Local { pool: ID.parse().unwrap(), name: volume_name(&name) };
            assert!(handle.to_string().len() <= MAX_STRING_BYTES);
            assert_eq!(handle.to_string().parse(), Ok(handle));
        }
        assert_ne!(volume_name(&"x".repeat(200)), volume_name(&"x".repeat(201)));
    }

    #[test]
    fn what_is_foreign_names_nothing() {
        let traversal = format!("{ID}/../../etc");
        for id in ["", "x", "/", "ro/", "ro/1/2/3", "a/b", ID, &format!("{ID}/"), &traversal] {
            assert_eq!(id.parse::<VolumeHandle>(), Err(Foreign), "{id}");
        }
        for id in ["", "x", "#", "a#", "#a"] {
            assert_eq!(id.parse::<SnapshotHandle>(), Err(Foreign), "{id}");
        }
    }
}
