//! The writer: pin, check, choose what to reuse, store, commit.

use crate::model::{Model, Step, Steps};
use crate::mutation::Mutation;
use crate::sets::{Ids, Places, SESSIONS};
use crate::state::{ClonePhase, Decision, Pack, Phase, State};

/// The session that may be resumed.
const RESUMED: usize = 1;

impl Model {
    /// The steps of one attempt.
    pub(crate) fn writer(&self, state: &State, session: usize, candidates: Ids, steps: &mut Steps) {
        if self.config.resuming && session == RESUMED {
            self.resume(state, session, steps);
        }
        let it = &state.sessions[session];
        if it.phase == Phase::Committed && self.is(Mutation::MarkersInsteadOfPins) {
            self.check_markers(state, session, steps);
            return;
        }
        let mut push = |step: Step, change: &dyn Fn(&mut State)| {
            let mut next = *state;
            change(&mut next);
            steps.push((step, next));
        };
        let me = Ids::one(session);
        if state.adrift.has(session)
            && self.is(Mutation::PinUnacknowledged)
            && it.decision == Decision::None
        {
            push(Step::PinArrives { session }, &|next| next.adrift -= me);
        }
        if it.pack == Pack::Sent {
            push(Step::PackArrives { session }, &|next| {
                next.sessions[session].pack = Pack::Present;
            });
        }
        match it.phase {
            Phase::Idle => self.begin(state, session, candidates, steps),
            Phase::Pinned => {
                // In the wrong order where graves come first.
                let graves_first = self.is(Mutation::PinnerReadsGravesFirst);
                push(Step::CheckMarks { session }, &|next| {
                    let found = if graves_first { state.graves } else { self.purged(state) };
                    let ignored = self.is(Mutation::NoPurgeCheck);
                    let it = &mut next.sessions[session];
                    it.valid = if ignored { it.witnesses } else { it.witnesses - found };
                    it.phase = if self.config.graves && !self.is(Mutation::PinnerSkipsGraves) {
                        Phase::HalfChecked
                    } else {
                        Phase::Checked
                    };
                });
            }
            Phase::HalfChecked => {
                // Where the check comes before the pin, this is the pin.
                if self.is(Mutation::CheckBeforePin) || self.is(Mutation::ExistenceBeforePin) {
                    push(Step::Pin { session, witnesses: it.valid }, &|next| {
                        let it = &mut next.sessions[session];
                        it.witnesses = it.valid;
                        it.phase = Phase::Checked;
                    });
                    return;
                }
                push(Step::CheckGraves { session }, &|next| {
                    let found = if self.is(Mutation::PinnerReadsGravesFirst) {
                        self.purged(state)
                    } else {
                        state.graves
                    };
                    next.sessions[session].valid -= found;
                    next.sessions[session].phase = Phase::Checked;
                });
            }
            Phase::Checked => self.store(state, session, steps),
            Phase::Stored => self.commit(state, session, steps),
            Phase::Committed => push(Step::CheckGravesAfterCommit { session }, &|next| {
                let graved = state.graves.has(session) && !self.is(Mutation::CommitSkipsGraves);
                next.sessions[session].phase = if graved { Phase::Lost } else { Phase::Done };
            }),
            Phase::Copied | Phase::Done => {}
            Phase::Lost => {
                if self.is(Mutation::TimeoutIsLoss) && it.decision == Decision::None {
                    push(Step::CommitLate { session }, &|next| {
                        next.sessions[session].decision = Decision::Commit;
                    });
                }
            }
        }
    }

    /// Choosing witnesses, and pinning them.
    fn begin(&self, state: &State, session: usize, candidates: Ids, steps: &mut Steps) {
        for witnesses in (candidates & self.found(state)).subsets() {
            let mut next = *state;
            let it = &mut next.sessions[session];
            if witnesses.is_empty() {
                it.phase = Phase::Checked;
            } else if self.is(Mutation::CheckBeforePin) || self.is(Mutation::ExistenceBeforePin) {
                it.valid = if self.is(Mutation::CheckBeforePin) {
                    witnesses - self.purged(state)
                } else {
                    // A pack with a DELETE under way may still be there.
                    witnesses
                };
                it.phase = Phase::HalfChecked;
                steps.push((Step::CheckExistence { session, witnesses }, next));
                continue;
            } else {
                it.witnesses = witnesses;
                it.phase = Phase::Pinned;
                if self.is(Mutation::NoPin)
                    || self.is(Mutation::MarkersInsteadOfPins)
                    || self.is(Mutation::PinUnacknowledged)
                {
                    next.adrift |= Ids::one(session);
                }
            }
            steps.push((Step::Pin { session, witnesses }, next));
        }
        if self.config.borrowing {
            for (clone, lender) in state.clones.iter().enumerate().take(self.config.clones) {
                let lends = match lender.phase {
                    ClonePhase::Valid => true,
                    ClonePhase::Pinned => self.is(Mutation::BorrowUnchecked),
                    ClonePhase::Ended => self.is(Mutation::BorrowEnded),
                    _ => false,
                };
                if lends {
                    let mut next = *state;
                    next.sessions[session].valid = Ids::clone(clone);
                    next.sessions[session].phase = Phase::Checked;
                    steps.push((Step::Borrow { session, clone }, next));
                }
            }
        }
    }

    /// Choosing what to refer to, and storing the session's own pack. Nobody sees the choice before the commit.
    fn store(&self, state: &State, session: usize, steps: &mut Steps) {
        let it = &state.sessions[session];
        let reusable =
            it.valid.iter().fold(Places::NONE, |all, from| match from.checked_sub(SESSIONS) {
                None => all | state.sessions[from].refs,
                Some(clone) => all | state.sessions[usize::from(state.clones[clone].snapshot)].refs,
            });
        let mut choices: Vec<Places> = reusable.subsets().collect();
        if self.config.resolving {
            let resolved: Vec<_> =
                choices.iter().map(|places| self.resolved(state, *places)).collect();
            choices.extend(resolved);
        }
        if self.is(Mutation::ReuseFromPackList) || self.is(Mutation::ReuseUndecided) {
            let listed = state.sessions_where(|other| {
                let undecided = other.decision == Decision::None;
                other.pack != Pack::None && (undecided || self.is(Mutation::ReuseFromPackList))
            });
            choices.extend(listed.iter().map(|pack| Places::one(pack, 0)));
        }
        let mut own = Places::one(session, 0);
        if let crate::model::Role::Retry(of, _) = self.config.roles[session]
            && (self.is(Mutation::RetryKeepsPacks) || self.is(Mutation::RetryKeepsNames))
            && state.sessions[of].pack != Pack::None
        {
            own = Places::one(of, 0);
        }
        let mut chosen: Vec<Places> = Vec::with_capacity(choices.len());
        for reused in choices {
            if chosen.contains(&reused) {
                continue;
            }
            chosen.push(reused);
            let mut next = *state;
            let it = &mut next.sessions[session];
            // An earlier commit of this session may have arrived: then that is what it refers to.
            if it.decision != Decision::Commit {
                it.refs = own | reused;
            }
            // What was pinned stays pinned; which of it holds matters no more. A borrower stays one.
            it.valid -= Ids::ALL_SESSIONS;
            it.phase = Phase::Stored;
            if own.packs().has(session) {
                let waits = !self.is(Mutation::CommitBeforePacks);
                it.pack = if waits { Pack::Present } else { Pack::Sent };
            }
            steps.push((Step::Store { session, refs: own | reused }, next));
        }
    }

    /// Where places are now, by the compactions that are there.
    fn resolved(&self, state: &State, mut places: Places) -> Places {
        let maps = state.decided_as(Decision::Map) - state.removed;
        for _ in 0..SESSIONS {
            for map in maps.iter() {
                let moved = places & state.sessions[map].refs;
                places = (places - moved) | moved.moved_to(map);
            }
        }
        places
    }

    /// Deciding the session.
    fn commit(&self, state: &State, session: usize, steps: &mut Steps) {
        let mut push = |step: Step, change: &dyn Fn(&mut State)| {
            let mut next = *state;
            change(&mut next);
            steps.push((step, next));
        };
        let commit = |next: &mut State| {
            let it = &mut next.sessions[session];
            it.decision = Decision::Commit;
            let checks = self.config.graves || self.is(Mutation::MarkersInsteadOfPins);
            it.phase = if checks { Phase::Committed } else { Phase::Done };
            it.valid = Ids::NONE;
            next.adrift -= Ids::one(session);
            next.sent = Places::NONE;
        };
        let lose = |next: &mut State| {
            next.sent = Places::NONE;
            let it = &mut next.sessions[session];
            it.phase = Phase::Lost;
            it.valid = Ids::NONE;
        };
        match state.sessions[session].decision {
            Decision::None => {
                if self.is(Mutation::UnpinBeforeCommit) && !state.adrift.has(session) {
                    push(Step::Unpin { session }, &|next| next.adrift |= Ids::one(session));
                    return;
                }
                push(Step::Commit { session }, &commit);
                if self.is(Mutation::ExistsIsLoss) {
                    push(Step::CommitUnanswered { session }, &|next| {
                        commit(next);
                        lose(next);
                    });
                }
                if self.is(Mutation::TimeoutIsLoss) {
                    push(Step::GiveUp { session }, &lose);
                }
            }
            Decision::Abort => {
                push(Step::FindAbort { session }, &lose);
                // The Abort's key was deleted.
                if state.removed.has(session) || self.is(Mutation::CommitOverwrites) {
                    push(Step::Commit { session }, &commit);
                }
            }
            // Sent before this writer was resumed: its own, whatever its stamp.
            Decision::Commit => push(Step::FindCommit { session }, &|next| {
                let disowned = self.is(Mutation::ResumeDisownsCommit);
                next.sessions[session].phase = if disowned { Phase::Lost } else { Phase::Done };
                next.sessions[session].valid = Ids::NONE;
            }),
            Decision::Map => {}
        }
    }

    /// Dying, and being resumed with nothing but the session's id and its pin.
    fn resume(&self, state: &State, session: usize, steps: &mut Steps) {
        let it = &state.sessions[session];
        if matches!(it.phase, Phase::Pinned | Phase::Checked | Phase::Stored) {
            let may_have_sent = it.phase == Phase::Stored && it.decision == Decision::None;
            for sent in [false, true] {
                if sent && !(may_have_sent && state.sent.is_empty()) {
                    continue;
                }
                let mut next = *state;
                let it = &mut next.sessions[session];
                if sent {
                    next.sent = it.refs;
                }
                it.phase = if it.witnesses.is_empty() { Phase::Checked } else { Phase::Pinned };
                it.valid = Ids::NONE;
                if it.decision != Decision::Commit {
                    it.refs = Places::NONE;
                }
                if self.is(Mutation::ResumeSkipsCheck) {
                    it.phase = Phase::Checked;
                    it.valid = it.witnesses;
                }
                steps.push((Step::Resume { session, sent }, next));
            }
        }
        if self.is(Mutation::ResumeTrustsPacks)
            && it.phase == Phase::Checked
            && it.pack == Pack::None
        {
            let mut next = *state;
            next.sessions[session].pack = Pack::Sent;
            next.sessions[session].refs = Places::one(session, 0);
            next.sessions[session].phase = Phase::Stored;
            steps.push((Step::Resume { session, sent: false }, next));
        }
        if !state.sent.is_empty() && it.decision == Decision::None {
            let mut next = *state;
            next.sessions[session].decision = Decision::Commit;
            next.sessions[session].refs = state.sent;
            next.sent = Places::NONE;
            steps.push((Step::CommitArrives { session }, next));
        }
    }
}
