//! Object keys: the layout of a repository.
//!
//! | key | object |
//! |---|---|
//! | `config` | the repository's parameters, made once by `init` |
//! | `packs/SESSION/NUMBER` | frames or manifest blocks |
//! | `snaps/SESSION` | the session's decision, made once: Commit or Abort |
//! | `marks/SNAPSHOT/K` | Delete (odd K), Purge or Undelete (even K), each made once |
//! | `pins/OWNER/N` | snapshots that a session or clone needs |
//! | `ends/CLONE` | the clone needs its pin no longer |
//! | `moves/PACK/SESSION` | a compaction that moves a pack: found by it, decided by `snaps/SESSION` |
//! | `graves/SESSION` | ids of sessions, snapshots and clones whose small objects were removed |
//! | `keys/ID` | the data key of an encrypted repository, wrapped for one secret |
//! | `quarantine/KEY` | what a repair found in the place of a damaged object |
//! | `runs/EXPERIMENT/RUN/SESSION` | where a session belongs: found by name, decided by `snaps/SESSION` |
//! | `starts/SNAPSHOT/N` | what a mount of the snapshot's volume N touches first: a hint for clones |
//! | `policies/N` | how long snapshots are kept; the highest number holds |
//! | `probe/STAMP` | there for a moment, while a store is tried |
//!
//! Keys are relative to the repository; stores add their prefix or directory.

use std::fmt;

use crate::crypto::Keys;
use crate::id::{PackId, SnapshotId};
use crate::name::Name;

/// The key of one object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(String);

/// The prefix of all packs.
pub const PACKS: &str = "packs/";
/// The prefix of all decisions.
pub const SNAPS: &str = "snaps/";
/// The prefix of all marks.
pub const MARKS: &str = "marks/";
/// The prefix of all pins.
pub const PINS: &str = "pins/";
/// The prefix of all ends.
pub const ENDS: &str = "ends/";
/// The prefix of the hints that packs were moved.
pub const MOVES: &str = "moves/";
/// The prefix of the lists of ids that are dead.
pub const GRAVES: &str = "graves/";
/// The prefix of the wrapped data keys.
pub const KEYS: &str = "keys/";
/// The prefix of what repairs set aside.
pub const QUARANTINE: &str = "quarantine/";
/// The prefix of the catalogue.
pub const RUNS: &str = "runs/";
/// The prefix of the start lists.
pub const STARTS: &str = "starts/";
/// The prefix of all policies.
pub const POLICIES: &str = "policies/";
/// The prefix of all probes.
pub const PROBE: &str = "probe/";

impl Key {
    /// The repository's parameters.
    pub fn config() -> Self {
        Self("config".to_owned())
    }

    /// A pack.
    pub fn pack(id: PackId) -> Self {
        Self(format!("{PACKS}{id}"))
    }

    /// A session's decision.
    pub fn snap(session: SnapshotId) -> Self {
        Self(format!("{SNAPS}{session}"))
    }

    /// The `k`-th mark on a snapshot, from 1.
    pub fn mark(snapshot: SnapshotId, k: u32) -> Self {
        Self(format!("{MARKS}{snapshot}/{k:06}"))
    }

    /// The `n`-th pin of a session or clone.
    pub fn pin(owner: SnapshotId, n: u32) -> Self {
        Self(format!("{PINS}{owner}/{n:06}"))
    }

    /// A wrapped data key.
    pub fn slot(id: SnapshotId) -> Self {
        Self(format!("{KEYS}{id}"))
    }

    /// A session's entry in the catalogue.
    pub fn catalogue(keys: &Keys, experiment: &Name, run: &Name, session: SnapshotId) -> Self {
        Self(format!("{}{session}", run_prefix(keys, experiment, run)))
    }

    /// A clone's end.
    pub fn end(clone: SnapshotId) -> Self {
        Self(format!("{ENDS}{clone}"))
    }

    /// A list of dead ids.
    pub fn grave(id: SnapshotId) -> Self {
        Self(format!("{GRAVES}{id}"))
    }

    /// The start list of a snapshot's `n`-th volume, from 1.
    pub fn start(snapshot: SnapshotId, n: u32) -> Self {
        Self(format!("{STARTS}{snapshot}/{n:06}"))
    }

    /// The `n`-th set of policies, from 1.
    pub fn policies(n: u32) -> Self {
        Self(format!("{POLICIES}{n:06}"))
    }

    /// The object of one probe.
    pub fn probe(stamp: &str) -> Self {
        Self(format!("{PROBE}{stamp}"))
    }

    /// Where a repair keeps what it found in the place of a damaged object.
    pub fn quarantine(key: &Self) -> Self {
        Self(format!("{QUARANTINE}{key}"))
    }

    /// A key from a listing.
    pub fn from_listing(key: String) -> Self {
        Self(key)
    }

    /// The key as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The catalogue's entries of one experiment.
pub fn experiment_prefix(keys: &Keys, experiment: &Name) -> String {
    format!("{RUNS}{}/", keys.experiment_component(experiment))
}

/// The catalogue's entries of one run.
pub fn run_prefix(keys: &Keys, experiment: &Name, run: &Name) -> String {
    format!("{}{}/", experiment_prefix(keys, experiment), keys.run_component(experiment, run))
}

/// The hints that a pack was moved.
pub fn moves_prefix(pack: PackId) -> String {
    format!("{MOVES}{pack}/")
}

/// The part of a listed key after `prefix`, as an id and a number (`SESSION/NUMBER`).
pub fn parse_numbered(key: &str, prefix: &str) -> Option<PackId> {
    key.strip_prefix(prefix)?.parse().ok()
}

/// The session of a listed entry of the catalogue.
pub fn parse_catalogued(key: &str) -> Option<SnapshotId> {
    key.strip_prefix(RUNS)?.split('/').nth(2)?.parse().ok()
}

/// The number of a listed set of policies.
pub fn parse_policies(key: &str) -> Option<u32> {
    let digits = key.strip_prefix(POLICIES)?;
    let n = digits.parse().ok()?;
    // One number has one spelling.
    (format!("{n:06}") == digits).then_some(n)
}

/// The part of a listed key after `prefix`, as an id.
pub fn parse_id(key: &str, prefix: &str) -> Option<SnapshotId> {
    key.strip_prefix(prefix)?.parse().ok()
}
