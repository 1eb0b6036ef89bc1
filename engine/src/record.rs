//! The JSON objects of a repository: configuration, snapshot records, decisions, pins, marks.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::chunker::Chunking;
use crate::format::block::BlockRef;
use crate::format::node::{self, Child};
use crate::format::{self, FormatError};
use crate::id::{Digest, PackId, SnapshotId};
use crate::name::Name;

/// A repository's parameters (`config`), made once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// The repository's id.
    pub id: SnapshotId,
    /// When it was made.
    pub created: Timestamp,
    /// How volumes are split.
    pub chunking: Chunking,
    /// How many may write at one time.
    #[serde(default, skip_serializing_if = "Writers::is_many")]
    pub writers: Writers,
    /// How everything else is encrypted; None where it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<Encryption>,
}

/// How many processes may write to a repository at one time. Any number may read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Writers {
    /// Any number: the store creates an object for one of them only.
    #[default]
    Many,
    /// One, whose owner sees to that: for a store that does not keep create-if-absent.
    Single,
}

impl Writers {
    fn is_many(&self) -> bool {
        *self == Self::Many
    }
}

/// How a repository is encrypted. What is derived from which key is part of the format, not a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Encryption {
    /// The cipher of packs and small objects.
    pub cipher: Cipher,
}

/// A cipher.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cipher {
    /// AES-256-GCM with a key for each message (see [`crate::crypto`]).
    #[serde(rename = "aes-256-gcm")]
    Aes256Gcm,
}

/// A snapshot: one point in time of one or more volumes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// Its id, which is also the id of the session that made it.
    pub id: SnapshotId,
    /// The experiment it belongs to.
    pub experiment: Name,
    /// The run it belongs to.
    pub run: Name,
    /// A name that people gave. The newest snapshot of a run that bears a name is found by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// When it was made, by the writer's clock.
    pub created: Timestamp,
    /// For selection: `step=train`, `phase=final`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// For programs: a notebook's image, environment and mounts, for example.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// The snapshot whose manifest was compared with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<SnapshotId>,
    /// The snapshot that this one is a copy of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// What was snapshotted.
    pub volumes: Vec<VolumeRecord>,
    /// What it cost.
    pub stats: SnapshotStats,
}

/// Where a copied snapshot was first made: a copy of a copy has the same origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The repository.
    pub repository: SnapshotId,
    /// The snapshot there.
    pub snapshot: SnapshotId,
    /// When that one was made.
    pub created: Timestamp,
}

/// One volume of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// Its name.
    pub name: Name,
    /// Its length.
    pub len_bytes: u64,
    /// Bytes that are not zeros.
    pub data_bytes: u64,
    /// The content digest: equal volumes of a repository have equal ones.
    pub content: Digest,
    /// The root of its manifest. None for a volume of zeros.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<RootRef>,
}

/// Where the root of a manifest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootRef {
    /// The content digest of the root node.
    pub digest: Digest,
    /// The pack that holds it.
    pub pack: PackId,
    /// First byte within the pack.
    pub offset: u32,
    /// Bytes.
    pub len: u32,
}

/// What a snapshot cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotStats {
    /// Bytes of volumes that are not zeros.
    pub data_bytes: u64,
    /// Bytes of chunks that the repository did not have, uncompressed.
    pub new_bytes: u64,
    /// Bytes of packs sent to the store.
    pub stored_bytes: u64,
    /// Objects sent to the store, the record included.
    pub puts: u64,
    /// From the start to the commit.
    pub elapsed_ms: u64,
}

/// What was decided about a session (`snaps/SESSION`), made once, first wins.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "decision", rename_all = "kebab-case")]
pub enum Decision {
    /// The session made this snapshot.
    Commit {
        /// Tells this write from any other.
        stamp: Stamp,
        /// The snapshot.
        snapshot: Box<SnapshotRecord>,
    },
    /// The session copied what was needed of some packs, which may go.
    Compaction {
        /// Tells this write from any other.
        stamp: Stamp,
        /// What is where now.
        moves: Vec<Move>,
    },
    /// A collector gave up on the session. Its packs are garbage, for ever.
    Abort {
        /// Tells this write from any other.
        stamp: Stamp,
    },
}

/// A pack whose needed pieces were copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    /// The pack.
    pub source: PackId,
    /// The [`Relocation`](crate::format::relocation::Relocation), in a manifest pack of the session.
    pub table: RootRef,
}

/// A clone's pins are no longer needed (`ends/CLONE`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Tells this write from any other.
    pub stamp: Stamp,
}

/// Ids of which nothing is left but this (`graves/ID`): aborted sessions, purged snapshots that nobody pins, ended
/// clones, compactions of packs that nobody needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grave {
    /// In ascending order.
    pub dead: Vec<SnapshotId>,
}

/// Snapshots that an owner needs (`pins/OWNER/N`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// Tells this write from any other.
    pub stamp: Stamp,
    /// Whose it is.
    pub owner: PinOwner,
    /// The snapshots.
    pub snapshots: Vec<SnapshotId>,
    /// For programs: what it is for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

/// Who needs pinned snapshots, and until when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PinOwner {
    /// A writer, until its session is decided. A silent one may be aborted.
    Session,
    /// A clone, until it ends. Never aborted: silence means nothing.
    Clone,
}

/// A mark on a snapshot (`marks/SNAPSHOT/K`), made once, first wins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Tells this write from any other.
    pub stamp: Stamp,
    /// What is said of the snapshot.
    pub mark: MarkKind,
    /// When, by the writer's clock. The grace time counts from here; safety does not.
    pub at: Timestamp,
}

/// What a mark says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MarkKind {
    /// Deleted, but can still come back. At odd K.
    Delete,
    /// Its data may go; it can't come back. At even K.
    Purge,
    /// Back again. At even K, in competition with Purge.
    Undelete,
}

/// An entry of the catalogue (`runs/EXPERIMENT/RUN/SESSION`): the names in full, since keys may hold them shortened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CatalogueEntry {
    /// The experiment.
    pub experiment: Name,
    /// The run.
    pub run: Name,
}

/// A random number that makes each write different from every other.
pub type Stamp = String;

/// Words that name the kinds of objects in their envelopes.
pub mod kind {
    /// [`super::Config`].
    pub const CONFIG: &str = "repository";
    /// [`super::Decision`].
    pub const DECISION: &str = "decision";
    /// [`super::Pin`].
    pub const PIN: &str = "pin";
    /// [`super::Mark`].
    pub const MARK: &str = "mark";
    /// [`super::End`].
    pub const END: &str = "end";
    /// [`super::Grave`].
    pub const GRAVE: &str = "grave";
    /// A hint that a pack was moved: nothing but its key counts.
    pub const MOVE: &str = "move";
    /// A slot of the data key, see [`crate::crypto`].
    pub const KEY: &str = "key";
    /// [`super::CatalogueEntry`].
    pub const CATALOGUE: &str = "catalogue";
    /// [`crate::start::StartList`].
    pub const START: &str = "start";
    /// What [`crate::policies`] stores.
    pub const POLICIES: &str = "policies";
}

impl From<RootRef> for BlockRef {
    fn from(RootRef { digest, pack, offset, len }: RootRef) -> Self {
        Self { digest, pack, offset, len }
    }
}

impl From<BlockRef> for RootRef {
    fn from(BlockRef { digest, pack, offset, len }: BlockRef) -> Self {
        Self { digest, pack, offset, len }
    }
}

impl VolumeRecord {
    /// Builds a record; computes the content digest.
    pub fn new(name: Name, len_bytes: u64, root: Child) -> Self {
        let data_bytes = root.data_bytes();
        let root = match root {
            Child::Zero => None,
            Child::Block { block, .. } => Some(block.into()),
        };
        let content = content_digest(len_bytes, root.as_ref());
        Self { name, len_bytes, data_bytes, content, root }
    }

    /// The root as a child, with the level of its node.
    pub fn root(&self) -> (Child, u8) {
        let level = node::root_level(format::segments(self.len_bytes));
        let data_bytes = self.data_bytes;
        let child =
            self.root.map_or(Child::Zero, |root| Child::Block { block: root.into(), data_bytes });
        (child, level)
    }

    /// Checks what later arithmetic relies on: for records that come from elsewhere than [`Repository`](crate::Repository).
    pub fn validate(&self) -> Result<(), FormatError> {
        if self.len_bytes > format::MAX_VOLUME_BYTES {
            return Err(FormatError::invalid(format!("a volume of {} bytes", self.len_bytes)));
        }
        let actual = content_digest(self.len_bytes, self.root.as_ref());
        if actual != self.content {
            return Err(FormatError::Checksum {
                found: self.content.to_string(),
                actual: actual.to_string(),
            });
        }
        Ok(())
    }
}

impl SnapshotRecord {
    /// Checks what later arithmetic relies on.
    pub fn validate(&self) -> Result<(), FormatError> {
        self.volumes.iter().try_for_each(VolumeRecord::validate)
    }

    /// The volume of this name.
    pub fn volume(&self, name: &Name) -> Option<&VolumeRecord> {
        self.volumes.iter().find(|volume| volume.name == *name)
    }
}

fn content_digest(len_bytes: u64, root: Option<&RootRef>) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"petra volume 1\n").update(&len_bytes.to_le_bytes());
    if let Some(root) = root {
        hasher.update(&root.digest.0);
    }
    Digest(*hasher.finalize().as_bytes())
}
