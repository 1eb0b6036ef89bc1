//! The clone: pin, check, read, end.

use crate::model::{Model, Step, Steps};
use crate::mutation::Mutation;
use crate::sets::Ids;
use crate::state::{ClonePhase, Decision, State};

impl Model {
    /// The steps of a clone.
    pub(crate) fn clone(&self, state: &State, clone: usize, steps: &mut Steps) {
        let it = &state.clones[clone];
        let snapshot = usize::from(it.snapshot);
        let mut push = |step: Step, phase: ClonePhase| {
            let mut next = *state;
            let it = &mut next.clones[clone];
            it.phase = phase;
            match phase {
                ClonePhase::Valid if self.is(Mutation::ReaderKeepsMaps) => {
                    it.maps = state.decided_as(Decision::Map);
                }
                ClonePhase::Ended => it.maps = Ids::NONE,
                _ => {}
            }
            steps.push((step, next));
        };
        let check_first = self.is(Mutation::CloneCheckBeforePin);
        match it.phase {
            ClonePhase::Idle => {
                for snapshot in self.found(state).iter() {
                    let mut next = *state;
                    let it = &mut next.clones[clone];
                    it.snapshot = u8::try_from(snapshot).unwrap_or(u8::MAX);
                    if check_first {
                        if !self.purged(state).has(snapshot) {
                            it.phase = ClonePhase::HalfChecked;
                            next.adrift |= Ids::clone(clone);
                            steps.push((Step::CloneCheckMarks { clone }, next));
                        }
                        continue;
                    }
                    it.phase = ClonePhase::Pinned;
                    if self.is(Mutation::CloneNoPin) {
                        next.adrift |= Ids::clone(clone);
                    }
                    steps.push((Step::ClonePin { clone, snapshot }, next));
                }
            }
            ClonePhase::Pinned => {
                let found = if self.is(Mutation::PinnerReadsGravesFirst) {
                    state.graves
                } else {
                    self.purged(state)
                };
                push(
                    Step::CloneCheckMarks { clone },
                    if found.has(snapshot) && !self.is(Mutation::CloneNoPurgeCheck) {
                        ClonePhase::Ended
                    } else if self.config.graves && !self.is(Mutation::PinnerSkipsGraves) {
                        ClonePhase::HalfChecked
                    } else {
                        ClonePhase::Valid
                    },
                );
            }
            ClonePhase::HalfChecked if check_first => {
                let mut next = *state;
                next.clones[clone].phase = ClonePhase::Valid;
                next.adrift -= Ids::clone(clone);
                steps.push((Step::ClonePin { clone, snapshot }, next));
            }
            ClonePhase::HalfChecked => {
                let found = if self.is(Mutation::PinnerReadsGravesFirst) {
                    self.purged(state)
                } else {
                    state.graves
                };
                push(
                    Step::CloneCheckGraves { clone },
                    if found.has(snapshot) { ClonePhase::Ended } else { ClonePhase::Valid },
                );
            }
            ClonePhase::Valid => {
                let borrowed = state.sessions.iter().any(|session| {
                    session.decision == Decision::None
                        && !(session.valid & Ids::clone(clone)).is_empty()
                });
                if borrowed && !self.is(Mutation::EndBeforeBorrower) {
                    // The clone's owner waits for the session, or aborts it.
                } else if self.is(Mutation::CloneUnpinsBeforeEnd) {
                    push(Step::CloneUnpin { clone }, ClonePhase::Unpinned);
                } else {
                    push(Step::CloneEnd { clone }, ClonePhase::Ended);
                }
            }
            ClonePhase::Unpinned => push(Step::CloneEnd { clone }, ClonePhase::Ended),
            ClonePhase::Ended => {}
        }
    }
}
