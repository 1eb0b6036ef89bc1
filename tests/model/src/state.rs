//! A state of the world: the repository's objects, and what each actor has done and remembers.
//!
//! # What may happen to a request
//!
//! Any PUT or DELETE that was sent may be applied again at any later time, and its answer may be lost. What that
//! adds to the order of the actors' steps comes down to three cases:
//!
//! - *A PUT that is not acknowledged.* Its author waits for it or sends it again. So it is one step of its author,
//!   which happens when the PUT is applied; that an author dies with a PUT under way, and it is applied later, is
//!   the author taking this step late and none after it.
//! - *Create-if-absent of a key that is never deleted.* One create is applied first; all others, and the same one
//!   again, change nothing. The author learns who won, if it asks as `publish` does. What it may conclude
//!   *without* an answer is nothing, so it does nothing.
//! - *A key whose DELETE was sent.* PUT and DELETE can both be applied again, in any order and for ever, so from
//!   then on each look at this key may find it or not: a pack is [`Pack::Doomed`], a pin or an end is void, the
//!   decision and marks of an id in [`State::removed`] are there or not.
//!
//! # What is left out because it is covered
//!
//! An actor that dies takes no more steps: every state is also one in which any of its actors are dead. A pause is
//! the same for a while. Collectors and compactors that die and start again are explicit steps.
//!
//! A LIST reads key by key. What matters is which decisions it misses, so it has a beginning and an end, and finds
//! all that was there at its beginning and any part of what came since. Marks and pins are found at one moment
//! each: to find fewer marks, or more pins, makes a collector delete less, and a collector may also delete less
//! because it dies. A pin whose owner is decided may be gone, so a listing under way does not find it (which is
//! the dangerous case, where it matters), and the check for leaks does (which is the dangerous case there).

use crate::sets::{CLONES, Ids, Places, SESSIONS};

/// Collectors and compactors a configuration can have together.
pub const VIEWERS: usize = 4;

/// What `snaps/S` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Decision {
    /// Nothing: undecided.
    #[default]
    None,
    /// A snapshot.
    Commit,
    /// Nothing will come of this session.
    Abort,
    /// A compaction's map.
    Map,
}

/// How far a session is. Compactors use `Idle`, `Copied` and the phases from `Stored` on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Not begun.
    #[default]
    Idle,
    /// The pin is acknowledged.
    Pinned,
    /// One of two things to check is checked.
    HalfChecked,
    /// It is known which witnesses hold.
    Checked,
    /// What is to be compacted was read.
    Copied,
    /// The pack is acknowledged, and what to refer to is chosen.
    Stored,
    /// The commit is acknowledged, and graves are not read yet.
    Committed,
    /// Success was reported.
    Done,
    /// Failure was reported.
    Lost,
}

/// The pack of a session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Pack {
    /// No PUT was sent.
    #[default]
    None,
    /// A PUT was sent, and not applied. Only where waiting for it is left out.
    Sent,
    /// There.
    Present,
    /// A DELETE was sent.
    Doomed,
}

/// The marks of a snapshot: its last one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mark {
    /// No mark.
    #[default]
    None,
    /// Delete at key 1.
    Delete1,
    /// Undelete at key 2.
    Undelete2,
    /// Delete at key 3.
    Delete3,
    /// Undelete at key 4.
    Undelete4,
    /// Purge, at key 2 or 4.
    Purge,
}

/// A session: a writer's or a compactor's attempt, and all objects with its id.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Session {
    /// How far it is.
    pub phase: Phase,
    /// Its decision.
    pub decision: Decision,
    /// Its snapshot's marks.
    pub mark: Mark,
    /// Its pack.
    pub pack: Pack,
    /// The snapshots that its pin names.
    pub witnesses: Ids,
    /// The witnesses that hold, and the clones whose pin it borrows.
    pub valid: Ids,
    /// What its snapshot refers to; for a compaction, the places that it copied.
    pub refs: Places,
}

/// How far a clone is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ClonePhase {
    /// Not begun.
    #[default]
    Idle,
    /// The pin is acknowledged.
    Pinned,
    /// One of two things to check is checked.
    HalfChecked,
    /// The snapshot can be read.
    Valid,
    /// The pin's DELETE was sent and no end put. Only where that order is swapped.
    Unpinned,
    /// The end is acknowledged, and the pin's DELETE sent.
    Ended,
}

/// A clone that reads a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CloneState {
    /// How far it is.
    pub phase: ClonePhase,
    /// The snapshot that it pinned.
    pub snapshot: u8,
    /// The compactions that it knows, where it does not list them again.
    pub maps: Ids,
}

/// What a collector or compactor has seen so far, and what it has concluded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Viewer {
    /// Stages of its view that are done; `ACTING` when it is complete.
    pub stage: u8,
    /// Purged snapshots.
    pub purged: Ids,
    /// Ended clones.
    pub ended: Ids,
    /// Owners of pins.
    pub pins: Ids,
    /// Decided sessions.
    pub decided: Ids,
    /// Ids in graves.
    pub graves: Ids,
    /// Packs to delete.
    pub deletes: Ids,
    /// Ids to put in a grave.
    pub dead: Ids,
}

/// A viewer whose view is complete, and that deletes.
pub const ACTING: u8 = u8::MAX;

impl Viewer {
    /// With this to do, or nothing.
    pub fn acting(deletes: Ids, dead: Ids) -> Self {
        let stage = if deletes.is_empty() && dead.is_empty() { 0 } else { ACTING };
        Self { stage, deletes, dead, ..Self::default() }
    }
}

/// A state of the world.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct State {
    /// Sessions, by id.
    pub sessions: [Session; SESSIONS],
    /// Clones.
    pub clones: [CloneState; CLONES],
    /// Collectors, sorted since they are alike, and compactors after them.
    pub viewers: [Viewer; VIEWERS],
    /// Ids in graves.
    pub graves: Ids,
    /// Ids whose decisions, marks, pins and ends have had a DELETE.
    pub removed: Ids,
    /// Owners whose pin is not there although they act as if. Only where steps are left out.
    pub adrift: Ids,
    /// Snapshots with a Purge that does not compete with Undelete. Only where that is left out.
    pub purged_beside: Ids,
    /// Snapshots of which somebody was told that they are back, for good. Only where steps are left out.
    pub told_back: Ids,
    /// What a commit refers to that session 1 sent before it was resumed, and that may still arrive.
    pub sent: Places,
    /// Packs with markers. Only where they are used instead of pins.
    pub markers: Ids,
    /// A collector took the repository for damaged.
    pub damage: bool,
}

impl State {
    /// Sessions with this decision.
    pub fn decided_as(&self, decision: Decision) -> Ids {
        self.sessions_where(|session| session.decision == decision)
    }

    /// Sessions whose marks say Purge.
    pub fn purged(&self) -> Ids {
        self.sessions_where(|session| session.mark == Mark::Purge)
    }

    /// Sessions for which something holds.
    pub fn sessions_where(&self, holds: impl Fn(&Session) -> bool) -> Ids {
        let found = self.sessions.iter().enumerate().filter(|(_, session)| holds(session));
        found.fold(Ids::NONE, |all, (id, _)| all | Ids::one(id))
    }

    /// Clones for which something holds.
    pub fn clones_where(&self, holds: impl Fn(&CloneState) -> bool) -> Ids {
        let found = self.clones.iter().enumerate().filter(|(_, clone)| holds(clone));
        found.fold(Ids::NONE, |all, (id, _)| all | Ids::clone(id))
    }

    /// Snapshots that an owner's pin names.
    pub fn pinned_by(&self, owner: usize) -> Ids {
        match owner.checked_sub(SESSIONS) {
            None => self.sessions[owner].witnesses,
            Some(clone) => Ids::one(self.clones[clone].snapshot.into()),
        }
    }
}
