//! What a pool remembers of an upload: `POOL/uploads/ULID.json`. `ULID.lock` beside it is held by who works on it, and
//! `ULID.unwanted` tells him to give it up.

use std::collections::BTreeMap;
use std::path::PathBuf;

use jiff::Timestamp;
use petra_engine::{Name, SnapshotId};
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::pool::{Pool, state};

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
    /// How many ids its sessions have used up. The first is the upload's own, and each has the next
    /// ([`SnapshotId::nth_after`]), so that whoever knows the upload finds the snapshot ([`resolve`](super::resolve)).
    #[serde(default, skip_serializing_if = "is_zero")]
    pub attempts: u32,
    /// The snapshot, once it is committed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub committed: Option<SnapshotId>,
}

fn is_zero(attempts: &u32) -> bool {
    *attempts == 0
}

/// What is noted about an upload; None where there is none. Someone may be working on it.
pub fn upload_state(pool: &Pool, id: SnapshotId) -> Result<Option<UploadState>> {
    state::read(&path(pool, id))
}

pub(super) fn directory(pool: &Pool) -> PathBuf {
    pool.root().join("uploads")
}

pub(super) fn path(pool: &Pool, id: SnapshotId) -> PathBuf {
    directory(pool).join(format!("{id}.json"))
}

/// Says that nobody wants the upload any more.
pub(super) fn unwanted_path(pool: &Pool, id: SnapshotId) -> PathBuf {
    directory(pool).join(format!("{id}.unwanted"))
}

pub(super) fn lock_path(pool: &Pool, id: SnapshotId) -> PathBuf {
    directory(pool).join(format!("{id}.lock"))
}
