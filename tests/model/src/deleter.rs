//! Deleting, undeleting and purging.

use crate::model::{Deleting, Model, Step, Steps};
use crate::mutation::Mutation;
use crate::sets::Ids;
use crate::state::{Decision, Mark, Phase, State};

impl Model {
    /// Deleting, undeleting and purging: nobody has to remember anything, since marks compete for keys.
    pub(crate) fn deleter(&self, state: &State, steps: &mut Steps) {
        for snapshot in state.decided_as(Decision::Commit).iter() {
            let mut mark = |step: Step, mark: Mark| {
                let mut next = *state;
                next.sessions[snapshot].mark = mark;
                if matches!(step, Step::Delete { .. }) {
                    next.told_back -= Ids::one(snapshot);
                }
                if matches!(step, Step::Undelete { .. }) && self.is(Mutation::UndeleteRemovesMark) {
                    next.told_back |= Ids::one(snapshot);
                }
                steps.push((step, next));
            };
            let (delete, undelete) = (Step::Delete { snapshot }, Step::Undelete { snapshot });
            let purge = Step::Purge { snapshot };
            match (self.config.deleting, state.sessions[snapshot].mark) {
                (Deleting::Purge, Mark::None) => mark(purge, Mark::Purge),
                (Deleting::Purge, _) => {}
                (Deleting::Undelete(_), Mark::None) => {
                    mark(delete, Mark::Delete1);
                    // Sent when the Delete mark was still there.
                    if state.told_back.has(snapshot) {
                        mark(purge, Mark::Purge);
                    }
                }
                (Deleting::Undelete(_), Mark::Delete1) => {
                    mark(purge, Mark::Purge);
                    if self.is(Mutation::UndeleteRemovesMark) {
                        mark(undelete, Mark::None);
                    } else {
                        mark(undelete, Mark::Undelete2);
                    }
                }
                (Deleting::Undelete(times), Mark::Undelete2) => {
                    if times > 1 {
                        mark(delete, Mark::Delete3);
                    }
                }
                (Deleting::Undelete(_), Mark::Delete3) => {
                    mark(purge, Mark::Purge);
                    mark(undelete, Mark::Undelete4);
                }
                (Deleting::Undelete(_), Mark::Undelete4 | Mark::Purge) => {}
            }
            if self.is(Mutation::PurgeBesideUndelete)
                && state.sessions[snapshot].mark == Mark::Undelete2
                && !state.purged_beside.has(snapshot)
            {
                let mut next = *state;
                next.purged_beside |= Ids::one(snapshot);
                steps.push((purge, next));
            }
            // The marks are gone, so an Undelete that was on its way finds its key free. Who reads graves then
            // learns that it came too late.
            if self.is(Mutation::UndeleteSkipsGraves)
                && matches!(self.config.deleting, Deleting::Undelete(_))
                && state.sessions[snapshot].mark == Mark::Purge
                && state.removed.has(snapshot)
            {
                let mut next = *state;
                next.told_back |= Ids::one(snapshot);
                steps.push((Step::UndeleteLate { snapshot }, next));
            }
            if self.is(Mutation::DeleteDecision) {
                let mut next = *state;
                next.sessions[snapshot].decision = Decision::None;
                steps.push((Step::DeleteDecision { snapshot }, next));
            }
        }
        if self.is(Mutation::DeleteDecision) {
            let deleted = state.sessions_where(|session| {
                session.phase == Phase::Done && session.decision == Decision::None
            });
            for snapshot in deleted.iter() {
                let mut next = *state;
                next.sessions[snapshot].decision = Decision::Commit;
                steps.push((Step::DecisionReturns { snapshot }, next));
            }
        }
    }
}
