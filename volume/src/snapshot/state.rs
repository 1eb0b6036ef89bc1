//! What a pool remembers of an upload: `POOL/uploads/ULID.json`. `ULID.lock` beside it is held by who works on it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use jiff::Timestamp;
use petra_engine::{Name, SnapshotId};
use serde::{Deserialize, Serialize};

use crate::pool::Pool;

/// What a snapshot is to be called, and where it goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// The repository's URL.
    pub repository: String,
    /// The experiment.
    pub experiment: Name,
    /// The run.
    pub run: Name,
    /// A name for the snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// For selection.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// For programs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

/// One volume of an upload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadVolume {
    /// Its name in the pool.
    pub volume: Name,
    /// Its id: a later volume of the same name has another.
    pub id: SnapshotId,
    /// Its name in the snapshot.
    pub name: Name,
    /// The copy to upload.
    pub copy: SnapshotId,
}

/// An upload that has not ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadState {
    /// The format version.
    pub format: u32,
    /// The upload's id.
    pub id: SnapshotId,
    /// When the copies were taken.
    pub created: Timestamp,
    /// All copies are kept. An upload that never became ready is rubbish.
    pub ready: bool,
    /// Where it goes.
    pub target: Target,
    /// The most to read in a second, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_bytes_per_s: Option<u64>,
    /// The volumes.
    pub volumes: Vec<UploadVolume>,
    /// Sessions that may have committed it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sessions: Vec<SnapshotId>,
    /// The snapshot, once it is committed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub committed: Option<SnapshotId>,
}

pub(super) fn directory(pool: &Pool) -> PathBuf {
    pool.root().join("uploads")
}

pub(super) fn path(pool: &Pool, id: SnapshotId) -> PathBuf {
    directory(pool).join(format!("{id}.json"))
}

pub(super) fn lock_path(pool: &Pool, id: SnapshotId) -> PathBuf {
    directory(pool).join(format!("{id}.lock"))
}
