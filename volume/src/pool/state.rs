//! What a pool and its volumes remember in files: JSON with a format version, replaced atomically.
//!
//! Files hold what was decided and wanted. What is attached or mounted is asked from the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use jiff::Timestamp;
use petra_engine::record::VolumeRecord;
use petra_engine::start::StartList;
use petra_engine::{Name, SnapshotId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::backend::BackendKind;
use crate::error::{Error, Result};
use crate::sys::files;
use crate::volume::DEFAULT_PATIENCE;

/// The format version of both files.
pub const FORMAT: u32 = 1;
/// Longer files are not ours.
const MAX_STATE_BYTES: u64 = 1 << 20;

/// `pool.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolState {
    /// The format version.
    pub format: u32,
    /// The pool's id; names its directory in `/run/petra`.
    pub id: SnapshotId,
    /// What its file system is.
    pub backend: BackendKind,
    /// When it was made.
    pub created: Timestamp,
    /// Volumes may be promised this part of the usable room, in percent: above 100 is thin provisioning.
    pub overcommit_percent: u32,
    /// What no volume, clone or copy may begin to use, in bytes; None for a size that follows the pool's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reserve_bytes: Option<u64>,
}

/// What a volume holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Filesystem {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
    /// btrfs.
    Btrfs,
    /// Whatever its user writes: a block device without a file system of ours.
    Raw,
}

impl Filesystem {
    /// The name that mount(2) and people know.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Raw => "raw",
        }
    }
}

impl fmt::Display for Filesystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Filesystem {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Ext4, Self::Xfs, Self::Btrfs, Self::Raw]
            .into_iter()
            .find(|filesystem| filesystem.as_str() == text)
            .ok_or_else(|| "a volume has ext4, xfs, btrfs, or is raw".to_owned())
    }
}

/// `volume.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeState {
    /// The format version.
    pub format: u32,
    /// The volume's id: stays the same if it is renamed, and is another for a later volume of the same name.
    pub id: SnapshotId,
    /// Its name, which is also its directory's.
    pub name: Name,
    /// The length of its image, in bytes.
    pub size_bytes: u64,
    /// The block size of its device, in bytes: 512 or 4096.
    pub sector_bytes: u32,
    /// What it holds.
    pub filesystem: Filesystem,
    /// When it was made.
    pub created: Timestamp,
    /// The URL of the snapshot that it was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
    /// For a clone whose data is not all here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lazy: Option<LazyState>,
    /// The copy that the next snapshot is compared with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<BaseState>,
    /// All copies that someone needs, also the base. Others are rubbish.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub copies: BTreeSet<SnapshotId>,
    /// What its users asked for last.
    #[serde(default)]
    pub wanted: Wanted,
    /// The image is larger than its file system, which grows at the next mount.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub grow_filesystem: bool,
    /// Made for one mount: it is deleted when that ends.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ephemeral: bool,
    /// Whatever its maker wants to be remembered.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

/// Where the data of a lazy clone comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LazyState {
    /// The repository's URL.
    pub repository: String,
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// The volume's number in the snapshot, from 1.
    pub number: u32,
    /// The volume of the snapshot: enough to read it, also when the snapshot was deleted meanwhile.
    pub volume: VolumeRecord,
    /// What keeps the snapshot readable: [`ClonePin`](petra_engine::clone::ClonePin)'s id.
    pub pin: SnapshotId,
    /// What a mount reads first, where somebody has found out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<StartList>,
    /// All data is here, and the pin has ended. The next device needs no image server.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hydrated: bool,
    /// Somebody waits for all of its data: it comes also while nobody uses the volume.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fill: bool,
}

/// A copy that holds what a snapshot in a repository holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseState {
    /// The copy.
    pub copy: SnapshotId,
    /// The repository's id.
    pub repository: SnapshotId,
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// The volume of the snapshot.
    pub volume: Name,
}

/// What users asked for: after a crash it says which devices nobody needs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// A device for it.
    #[serde(default)]
    pub attached: bool,
    /// Nobody may write to the device.
    #[serde(default)]
    pub read_only: bool,
    /// How long a read waits for data that is not here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patience_seconds: Option<u64>,
    /// Where it should be mounted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mounted_at: Option<PathBuf>,
}

impl VolumeState {
    /// True while an image server has something to do: for a device, or for who waits for all of the data.
    pub(crate) fn needs_server(&self) -> bool {
        self.wanted.attached || self.lazy.as_ref().is_some_and(|lazy| lazy.fill && !lazy.hydrated)
    }
}

impl Wanted {
    /// How long a read waits for data that is not here.
    pub fn patience(&self) -> Duration {
        self.patience_seconds.map_or(DEFAULT_PATIENCE, Duration::from_secs)
    }
}

/// The part of a state that every version has.
#[derive(Deserialize)]
struct Versioned {
    format: u32,
}

/// Reads a state. None when there is no such file.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let bytes = match files::read_small(path, MAX_STATE_BYTES) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    parse(&bytes, path).map(Some)
}

/// Understands a state. `path` is for errors.
pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8], path: &Path) -> Result<T> {
    let damaged =
        |error: serde_json::Error| Error::Damaged { path: path.into(), detail: error.to_string() };
    let Versioned { format } = serde_json::from_slice(bytes).map_err(damaged)?;
    if format != FORMAT {
        return Err(Error::Version { path: path.into(), found: format, supported: FORMAT });
    }
    serde_json::from_slice(bytes).map_err(damaged)
}

/// Writes a state: durable when this returns, and never half there. A full pool has room for it, unless it grows by much.
pub(crate) fn write(path: &Path, state: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(state)
        .map_err(|error| Error::Damaged { path: path.into(), detail: error.to_string() })?;
    files::replace(path, &text).map_err(Error::io("write", path))
}

#[cfg(test)]
mod tests {
    use petra_engine::format::node::Child;
    use proptest::prelude::*;

    use super::*;

    fn volume() -> VolumeState {
        let id = SnapshotId::from_parts(1, 2);
        let name = Name::new("volume", "data 1").unwrap();
        VolumeState {
            format: FORMAT,
            id,
            name: name.clone(),
            size_bytes: 1 << 30,
            sector_bytes: 4096,
            filesystem: Filesystem::Ext4,
            created: Timestamp::UNIX_EPOCH,
            origin: Some("file:///r#e/r/s".to_owned()),
            lazy: Some(LazyState {
                repository: "file:///r".to_owned(),
                snapshot: id,
                number: 1,
                volume: VolumeRecord::new(name.clone(), 1 << 30, Child::Zero),
                pin: id,
                start: Some(StartList::new([0..4096, 1 << 20..2 << 20])),
                hydrated: false,
                fill: true,
            }),
            base: Some(BaseState { copy: id, repository: id, snapshot: id, volume: name }),
            copies: BTreeSet::from([id]),
            wanted: Wanted {
                attached: true,
                read_only: false,
                patience_seconds: Some(60),
                mounted_at: Some("/mnt/data".into()),
            },
            grow_filesystem: true,
            ephemeral: true,
            metadata: BTreeMap::from([("claim".to_owned(), "a/b".to_owned())]),
        }
    }

    #[test]
    fn states_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("volume.json");
        assert_eq!(read::<VolumeState>(&path).unwrap(), None);
        write(&path, &volume()).unwrap();
        assert_eq!(read(&path).unwrap(), Some(volume()));
        let plain = VolumeState {
            origin: None,
            lazy: None,
            base: None,
            copies: BTreeSet::new(),
            wanted: Wanted::default(),
            grow_filesystem: false,
            ephemeral: false,
            metadata: BTreeMap::new(),
            ..volume()
        };
        write(&path, &plain).unwrap();
        assert_eq!(read(&path).unwrap(), Some(plain));
    }

    #[test]
    fn newer_and_foreign_files_are_refused() {
        let path = Path::new("/p/volume.json");
        let newer = br#"{"format": 7, "something": "else"}"#;
        let Err(Error::Version { found: 7, supported: FORMAT, .. }) =
            parse::<VolumeState>(newer, path)
        else {
            panic!("not refused")
        };
        for foreign in ["", "{}", "[1]", "{\"format\":1}", "{\"format\":\"1\"}", "\0\0\0"] {
            let error = parse::<VolumeState>(foreign.as_bytes(), path).unwrap_err();
            assert!(matches!(error, Error::Damaged { .. }), "{foreign}: {error}");
        }
        let mut text = serde_json::to_value(volume()).unwrap();
        text["name"] = "../../etc".into();
        let text = serde_json::to_vec(&text).unwrap();
        assert!(matches!(parse::<VolumeState>(&text, path), Err(Error::Damaged { .. })));
    }

    proptest! {
        #[test]
        fn damage_never_panics(at in any::<proptest::sample::Index>(), byte: u8, cut: bool) {
            let mut bytes = serde_json::to_vec(&volume()).unwrap();
            let at = at.index(bytes.len());
            if cut { bytes.truncate(at) } else { bytes[at] = byte }
            let _ = parse::<VolumeState>(&bytes, Path::new("/p"));
        }
    }
}
