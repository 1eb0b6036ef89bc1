//! Collectors and compactors: look, conclude, act.

use crate::markers::MARKING;
use crate::model::{Model, Role, Step, Steps};
use crate::mutation::Mutation;
use crate::sets::{CHUNKS, Ids, Places, SESSIONS};
use crate::state::{ACTING, Decision, Pack, Phase, State, Viewer};
use crate::view::{Known, Verdict};

impl Model {
    /// Aborts of sessions judged silent, by any collector at any time.
    pub(crate) fn aborts(&self, state: &State, steps: &mut Steps) {
        for session in 0..SESSIONS {
            let decision = state.sessions[session].decision;
            if decision == Decision::None
                && self.is_known(state, session)
                && !self.is(Mutation::NoAborts)
            {
                let mut next = *state;
                next.sessions[session].decision = Decision::Abort;
                steps.push((Step::Abort { session }, next));
                if self.is(Mutation::AbortDeletesPacks)
                    && state.sessions[session].pack != Pack::None
                {
                    // The Abort is still on its way, and the commit may win.
                    let mut next = *state;
                    next.sessions[session].pack = Pack::Doomed;
                    steps.push((Step::Abort { session }, next));
                }
                if self.is(Mutation::PinOfUndecidedRemoved) && !state.adrift.has(session) {
                    let mut next = *state;
                    next.adrift |= Ids::one(session);
                    steps.push((Step::RemovePin { session }, next));
                }
            }
            if decision == Decision::Abort && self.is(Mutation::AbortRemoved) {
                let mut next = *state;
                next.sessions[session].decision = Decision::None;
                steps.push((Step::RemoveAbort { session }, next));
            }
        }
    }

    /// The steps of a collector.
    pub(crate) fn collector(&self, state: &State, viewer: usize, steps: &mut Steps) {
        if state.viewers[viewer].stage == ACTING {
            self.act(state, viewer, steps);
            self.restart(state, viewer, steps);
            return;
        }
        if self.mark_packs(state, viewer, steps) {
            self.restart(state, viewer, steps);
            return;
        }
        self.view(state, viewer, steps, &mut |known, next, steps| {
            // One that had a DELETE needs no other to be as good as gone.
            let doomed = state.sessions_where(|session| session.pack == Pack::Doomed);
            let (deletes, dead) = (known.deletes - doomed, known.dead);
            let mut next = *next;
            next.viewers[viewer] = Viewer::acting(deletes, dead);
            if self.is(Mutation::MarkersInsteadOfPins) {
                next.markers -= known.live.packs();
                if !deletes.is_empty() {
                    let marking = Viewer { stage: MARKING, dead: deletes, ..Viewer::default() };
                    next.viewers[viewer] = marking;
                }
            }
            steps.push((Step::Conclude { viewer, deletes, dead }, next));
        });
    }

    /// The next stage of a view, and what is to follow when it is complete.
    fn view(
        &self,
        state: &State,
        viewer: usize,
        steps: &mut Steps,
        known: &mut dyn FnMut(&Known, &State, &mut Steps),
    ) {
        let it = state.viewers[viewer];
        self.look(state, &it, &mut |view, complete| {
            let mut next = *state;
            next.viewers[viewer] = view;
            if !complete {
                steps.push((Step::Look { viewer, stage: it.stage, decided: view.decided }, next));
                return;
            }
            next.viewers[viewer] = Viewer::default();
            match self.conclude(state, &view) {
                Verdict::StartOver => steps.push((Step::StartOver { viewer }, next)),
                Verdict::Damage => {
                    next.damage = true;
                    steps.push((Step::FindDamage { viewer }, next));
                }
                Verdict::Known(what) => known(&what, &next, steps),
            }
        });
        self.restart(state, viewer, steps);
    }

    /// It dies and begins again.
    fn restart(&self, state: &State, viewer: usize, steps: &mut Steps) {
        if state.viewers[viewer].stage != 0 {
            let mut next = *state;
            next.viewers[viewer] = Viewer::default();
            steps.push((Step::Restart { viewer }, next));
        }
    }

    /// Deleting packs, and cleaning up small objects, in any order.
    fn act(&self, state: &State, viewer: usize, steps: &mut Steps) {
        let it = state.viewers[viewer];
        let mut push = |step: Step, mut next: State| {
            let it = &mut next.viewers[viewer];
            *it = Viewer::acting(it.deletes, it.dead);
            steps.push((step, next));
        };
        for pack in it.deletes.iter() {
            let mut next = *state;
            next.sessions[pack].pack = Pack::Doomed;
            next.viewers[viewer].deletes -= Ids::one(pack);
            push(Step::DeletePack { viewer, pack }, next);
        }
        if it.dead.is_empty() {
            return;
        }
        let graves_last = self.is(Mutation::GraveAfterRemoval);
        let mut next = *state;
        if it.dead.within(if graves_last { state.removed } else { state.graves }) {
            next.viewers[viewer].dead = Ids::NONE;
            if graves_last {
                next.graves |= it.dead;
                push(Step::PutGrave { viewer }, next);
            } else {
                next.removed |= it.dead;
                push(Step::RemoveKeys { viewer }, next);
            }
        } else if graves_last {
            next.removed |= it.dead;
            push(Step::RemoveKeys { viewer }, next);
        } else {
            next.graves |= it.dead;
            push(Step::PutGrave { viewer }, next);
        }
    }

    /// The steps of a compactor: view as a collector does, copy what is live in one pack, commit the map.
    pub(crate) fn compactor(&self, state: &State, session: usize, steps: &mut Steps) {
        let before = self.config.roles.iter().take(session);
        let viewer =
            self.config.collectors + before.filter(|role| **role == Role::Compactor).count();
        let it = &state.sessions[session];
        let mut next = *state;
        let me = &mut next.sessions[session];
        match it.phase {
            Phase::Idle if self.is(Mutation::FooterCompacted) => {
                for pack in (0..SESSIONS).filter(|pack| state.sessions[*pack].pack == Pack::Present)
                {
                    // A compactor's footer lists what it copied, a writer's what it stored.
                    let other = &state.sessions[pack];
                    let places = if self.config.roles[pack] == Role::Compactor {
                        other.refs.moved_to(pack)
                    } else {
                        other.refs & Places::of(pack)
                    };
                    copy(state, viewer, session, places, steps);
                }
            }
            Phase::Idle => self.view(state, viewer, steps, &mut |known, next, steps| {
                for pack in known.live.packs().iter().filter(|pack| *pack != session) {
                    let mut places = known.live & Places::of(pack);
                    if self.is(Mutation::SomeCopied) && places == Places::of(pack) {
                        places = Places::one(pack, CHUNKS - 1);
                    }
                    copy(next, viewer, session, places, steps);
                }
            }),
            Phase::Copied if self.is(Mutation::MapBeforeCopy) && it.decision == Decision::None => {
                me.decision = Decision::Map;
                me.phase = Phase::Done;
                steps.push((Step::Commit { session }, next));
            }
            Phase::Copied => {
                me.pack = Pack::Present;
                me.phase = Phase::Stored;
                steps.push((Step::PutCopy { session }, next));
            }
            Phase::Stored => {
                let source = it.refs.packs().iter().next().unwrap_or_default();
                if self.is(Mutation::SourceDeletedEarly)
                    && state.sessions[source].pack == Pack::Present
                {
                    next.sessions[source].pack = Pack::Doomed;
                    steps.push((Step::DeleteSource { session }, next));
                    return;
                }
                if it.decision == Decision::None || state.removed.has(session) {
                    let mut next = next;
                    next.sessions[session].decision = Decision::Map;
                    next.sessions[session].phase = Phase::Done;
                    steps.push((Step::Commit { session }, next));
                }
                if it.decision == Decision::Abort {
                    next.sessions[session].phase = Phase::Lost;
                    steps.push((Step::FindAbort { session }, next));
                }
            }
            _ => {}
        }
    }
}

/// A compactor has read what it copies.
fn copy(state: &State, viewer: usize, session: usize, places: Places, steps: &mut Steps) {
    let mut next = *state;
    next.sessions[session].refs = places;
    next.sessions[session].phase = Phase::Copied;
    steps.push((Step::Copy { viewer, session, places }, next));
}
