//! A protocol that Petra does not use, since it loses data: see [`Mutation::MarkersInsteadOfPins`].
//!
//! Writers pin nothing. A collector puts a marker on each pack that it wants to delete, looks again whether anything
//! refers to it, and only then deletes it; it removes markers from packs that are referred to. A writer looks for
//! markers after its commit, and takes the commit back if there is one. With one collector that is sound: either the
//! writer sees the marker, or the collector sees the commit. With two, one removes the marker of the other.
//!
//! [`Mutation::MarkersInsteadOfPins`]: crate::Mutation::MarkersInsteadOfPins

use crate::model::{Model, Step, Steps};
use crate::sets::{Ids, Places};
use crate::state::{Decision, Mark, Phase, State, Viewer};

/// `Viewer::stage` of a collector whose markers are there.
const MARKED: u8 = u8::MAX - 1;
/// `Viewer::stage` of a collector that will mark what is in `Viewer::dead`.
pub(crate) const MARKING: u8 = u8::MAX - 2;

impl Model {
    /// From the first look to the second one; true when that is what the collector is at.
    pub(crate) fn mark_packs(&self, state: &State, viewer: usize, steps: &mut Steps) -> bool {
        let it = state.viewers[viewer];
        let mut next = *state;
        match it.stage {
            MARKING => {
                next.markers |= it.dead;
                next.viewers[viewer].stage = MARKED;
                steps.push((Step::PutMarkers { viewer }, next));
            }
            MARKED => {
                let commits = state.decided_as(Decision::Commit) - state.purged();
                let live =
                    commits.iter().fold(Places::NONE, |all, id| all | state.sessions[id].refs);
                next.viewers[viewer] = Viewer::acting(it.dead - live.packs(), Ids::NONE);
                steps.push((Step::LookAgain { viewer }, next));
            }
            _ => return false,
        }
        true
    }

    /// What a writer does after its commit.
    pub(crate) fn check_markers(&self, state: &State, session: usize, steps: &mut Steps) {
        let mut next = *state;
        let it = &mut next.sessions[session];
        if (it.refs.packs() & state.markers).is_empty() {
            it.phase = Phase::Done;
        } else {
            it.phase = Phase::Lost;
            it.mark = Mark::Purge;
        }
        steps.push((Step::CheckMarkers { session }, next));
    }
}
