//! What must hold in every state.

use crate::model::{Model, Role};
use crate::mutation::Mutation;
use crate::sets::{Ids, Places, SESSIONS};
use crate::state::{ClonePhase, Decision, Mark, Pack, Phase, State};
use crate::view::Verdict;

/// What must hold in every state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Property {
    /// What a committed snapshot without a Purge refers to is there, or a map leads to where it is; so an Undelete
    /// that won brings everything back.
    KeptIsReadable,
    /// What a valid pin protects can be read, purged or not: by clones, and by writers that are not decided.
    PinnedIsReadable,
    /// No collector takes a sound repository for damaged.
    NoFalseAlarm,
    /// Who was told that a session or an Undelete won, or lost, was told the truth.
    ReportsAreTrue,
    /// If everybody died now, one collector that spares no one would leave what is needed, and nothing else. A
    /// clone that died holds what it pinned.
    NothingLeaks,
    /// A collector that may abort nobody gets through: sessions that pause do not keep it from its work.
    NobodyBlocks,
}

impl Property {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::KeptIsReadable,
        Self::PinnedIsReadable,
        Self::NoFalseAlarm,
        Self::ReportsAreTrue,
        Self::NothingLeaks,
        Self::NobodyBlocks,
    ];

    /// Whether it holds.
    pub fn holds(self, model: &Model, state: &State) -> bool {
        match self {
            Self::KeptIsReadable => {
                let readable = model.readable(state, model.maps(state));
                model.kept(state).iter().all(|kept| state.sessions[kept].refs.within(readable))
            }
            Self::PinnedIsReadable => pinned_is_readable(model, state),
            Self::NoFalseAlarm => !state.damage,
            Self::ReportsAreTrue => reports_are_true(model, state),
            Self::NothingLeaks => nothing_leaks(model, state),
            Self::NobodyBlocks => {
                !matches!(model.conclude(state, &model.alone(state, false)), Verdict::StartOver)
            }
        }
    }
}

fn pinned_is_readable(model: &Model, state: &State) -> bool {
    let readable = model.readable(state, model.maps(state));
    let clones =
        state.clones.iter().filter(|clone| clone.phase == ClonePhase::Valid).all(|clone| {
            let refs = state.sessions[usize::from(clone.snapshot)].refs;
            if model.is(Mutation::ReaderKeepsMaps) {
                refs.within(model.readable(state, clone.maps))
            } else {
                refs.within(readable)
            }
        });
    let undecided = state.sessions.iter().enumerate().filter(|(id, session)| {
        session.decision == Decision::None
            && matches!(model.config.roles[*id], Role::Writer(_) | Role::Retry(..))
    });
    clones
        && undecided.into_iter().all(|(id, session)| match session.phase {
            Phase::Checked => (session.valid & Ids::ALL_SESSIONS)
                .iter()
                .all(|witness| state.sessions[witness].refs.within(readable)),
            Phase::Stored => (session.refs - Places::of(id)).within(readable),
            _ => true,
        })
}

fn reports_are_true(model: &Model, state: &State) -> bool {
    state.sessions.iter().enumerate().all(|(id, session)| {
        let is_writer = matches!(model.config.roles[id], Role::Writer(_) | Role::Retry(..));
        let is_lost = || state.graves.has(id) && session.mark != Mark::Purge;
        match session.phase {
            Phase::Done if is_writer => session.decision == Decision::Commit && !is_lost(),
            Phase::Lost => session.decision != Decision::Commit || state.graves.has(id),
            _ => true,
        }
    }) && (state.told_back & (state.purged() | state.graves)).is_empty()
}

/// Said in its own words, not by what a collector does: what should stay after the last collection.
fn nothing_leaks(model: &Model, state: &State) -> bool {
    let Verdict::Known(known) = model.conclude(state, &model.alone(state, true)) else {
        return false;
    };
    let stored = state.sessions_where(|session| session.pack != Pack::None);
    let kept = state.sessions_where(|session| {
        session.decision == Decision::Commit && session.mark != Mark::Purge
    }) - state.graves;
    let mut needed = Places::NONE;
    for snapshot in kept.iter() {
        needed |= state.sessions[snapshot].refs;
    }
    for clone in &state.clones {
        if matches!(clone.phase, ClonePhase::Pinned | ClonePhase::HalfChecked | ClonePhase::Valid) {
            needed |= state.sessions[usize::from(clone.snapshot)].refs;
        }
    }
    let maps = state.decided_as(Decision::Map) - state.graves;
    let mut moved = Places::NONE;
    for _ in 0..SESSIONS {
        for map in maps.iter() {
            let copied = state.sessions[map].refs;
            needed |= (needed & copied).moved_to(map);
            moved |= copied;
        }
    }
    (stored - known.deletes).within((needed - moved).packs())
}

/// What must happen somewhere, so that an exploration is known to reach what it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// A committed snapshot uses a pack of a snapshot that is purged, and of which another pack is deleted.
    ReuseOutlivesItsWitness,
    /// A clone reads a purged snapshot.
    PurgedIsRead,
    /// A writer that lost commits in its next attempt.
    RetryCommits,
    /// The commit that a writer sent before it died holds, and another one knows.
    EarlierCommitFound,
    /// A kept snapshot is read through a copy.
    CopyIsRead,
    /// And through a copy of a copy.
    CopyOfCopyIsRead,
    /// A place that a kept snapshot uses has two copies.
    RacingCopies,
    /// A purged snapshot lives on in a session that borrowed a pin.
    BorrowedCommits,
    /// A snapshot was brought back for the second time.
    UndeletedTwice,
    /// A purged snapshot is in a grave, and its keys are removed.
    SnapshotBuried,
    /// A compaction is in a grave, and its keys are removed.
    CompactionBuried,
    /// A commit takes the place of an Abort that was removed.
    AbortReplaced,
}

impl Goal {
    /// Whether it happened in this state.
    pub fn holds(self, model: &Model, state: &State) -> bool {
        let doomed = state.sessions_where(|session| session.pack == Pack::Doomed);
        let maps = model.maps(state);
        let used =
            model.kept(state).iter().fold(Places::NONE, |all, id| all | state.sessions[id].refs);
        let read_through = |map: usize| {
            let copied = state.sessions[map].refs;
            !(copied & used).is_empty() && copied.packs().within(doomed)
        };
        match self {
            Self::ReuseOutlivesItsWitness => model.kept(state).iter().any(|id| {
                let others = state.sessions[id].refs - Places::of(id);
                state.purged().iter().any(|witness| {
                    let refs = state.sessions[witness].refs;
                    !(refs & others).is_empty() && !(refs.packs() & doomed).is_empty()
                })
            }),
            Self::PurgedIsRead => state.clones.iter().any(|clone| {
                clone.phase == ClonePhase::Valid && state.purged().has(clone.snapshot.into())
            }),
            Self::RetryCommits => state.sessions.iter().enumerate().any(|(id, session)| {
                matches!(model.config.roles[id], Role::Retry(..)) && session.phase == Phase::Done
            }),
            Self::EarlierCommitFound => state.sessions.iter().enumerate().any(|(id, session)| {
                model.config.roles[id] != Role::Snapshot
                    && session.decision == Decision::Commit
                    && session.phase == Phase::Stored
            }),
            Self::CopyIsRead => maps.iter().any(read_through),
            Self::CopyOfCopyIsRead => maps.iter().any(|map| {
                let sources = state.sessions[map].refs.packs();
                read_through_a_map(state, maps, sources, used) && sources.within(doomed)
            }),
            Self::RacingCopies => maps.iter().any(|map| {
                let copied = state.sessions[map].refs & used;
                maps.iter()
                    .any(|other| other != map && !(copied & state.sessions[other].refs).is_empty())
            }),
            Self::BorrowedCommits => model.kept(state).iter().any(|id| {
                let session = &state.sessions[id];
                let others = session.refs - Places::of(id);
                model.config.roles[id] != Role::Snapshot
                    && session.witnesses.is_empty()
                    && others.packs().within(state.purged())
                    && !others.is_empty()
            }),
            Self::UndeletedTwice => {
                state.sessions.iter().any(|session| session.mark == Mark::Undelete4)
            }
            Self::SnapshotBuried => !(state.purged() & state.removed).is_empty(),
            Self::CompactionBuried => {
                !(state.decided_as(Decision::Map) & state.graves & state.removed).is_empty()
            }
            Self::AbortReplaced => state
                .sessions
                .iter()
                .enumerate()
                .any(|(id, session)| session.phase == Phase::Committed && state.graves.has(id)),
        }
    }
}

/// Whether a used place was copied to one of these packs.
fn read_through_a_map(state: &State, maps: Ids, packs: Ids, used: Places) -> bool {
    (maps & packs).iter().any(|map| !(state.sessions[map].refs & used).is_empty())
}
