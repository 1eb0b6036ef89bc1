//! What must hold in every state.

use crate::model::{Model, Role};
use crate::sets::{Ids, Places, SESSIONS};
use crate::state::{ClonePhase, Decision, Mark, Pack, Phase, State};
use crate::mutation::Mutation;
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
    let clones = state.clones.iter().filter(|clone| clone.phase == ClonePhase::Valid).all(|clone| {
        let refs = state.sessions[usize::from(clone.snapshot)].refs;
        if model.is(Mutation::ReaderKeepsMaps) {
            refs.within(model.readable(state, clone.maps))
        } else {
            refs.within(readable)
        }
    });
    let undecided = state.sessions.iter().enumerate().filter(|(id, session)| {
        session.decision == Decision::None && matches!(model.config.roles[*id], Role::Writer(_) | Role::Retry(..))
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
    let Verdict::Known(known) = model.conclude(state, &model.alone(state, true)) else { return false };
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
