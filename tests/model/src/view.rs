//! What a collector or compactor looks at, in which order, and what it concludes.

use crate::model::Model;
use crate::mutation::Mutation;
use crate::sets::{Ids, Places, SESSIONS};
use crate::state::{ClonePhase, Decision, Mark, Pack, Phase, State, Viewer};

/// Things that are looked at in one stage. A LIST of decisions has a beginning and an end.
pub(crate) mod look {
    pub(crate) const GRAVES: u8 = 1;
    pub(crate) const MARKS: u8 = 2;
    pub(crate) const ENDS: u8 = 4;
    pub(crate) const PINS: u8 = 8;
    pub(crate) const BEGIN: u8 = 16;
    pub(crate) const END: u8 = 32;
}

/// What follows from a view.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Verdict {
    /// The view does not hold together.
    StartOver,
    /// Something is missing that must not be.
    Damage,
    /// What is needed, and what is not.
    Known(Known),
}

/// What is needed, and what is not.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Known {
    /// Places that are live and not covered by a map.
    pub(crate) live: Places,
    /// Packs that can go.
    pub(crate) deletes: Ids,
    /// Ids that can go to a grave.
    pub(crate) dead: Ids,
}

impl Model {
    /// The stages of a view. To look at several things in one stage is to look at them in the worst order: whoever
    /// sees decisions listed from the moment of the pins on misses no more than one who lists them later.
    pub(crate) fn stages(&self) -> &'static [u8] {
        use look::{BEGIN, END, ENDS, GRAVES, MARKS, PINS};
        const RIGHT: &[u8] = &[GRAVES | MARKS | ENDS, PINS | BEGIN, END];
        match self.mutation {
            Some(Mutation::PinsBeforeMarks) => &[GRAVES | PINS, MARKS | ENDS | BEGIN, END],
            Some(Mutation::DecisionsBeforePins) => &[GRAVES | MARKS | ENDS | BEGIN, END, PINS],
            Some(Mutation::EndsLast) => &[GRAVES | MARKS, PINS | BEGIN, END, ENDS],
            _ => RIGHT,
        }
    }

    /// The viewer after its next stage, once for each part of the LIST that it may find, and whether its view is
    /// complete then.
    pub(crate) fn look(&self, state: &State, viewer: &Viewer, then: &mut dyn FnMut(Viewer, bool)) {
        let stages = self.stages();
        let stage = stages[usize::from(viewer.stage)];
        let mut next = *viewer;
        next.stage += 1;
        let complete = usize::from(next.stage) == stages.len();
        if stage & look::GRAVES != 0
            && !self.is(Mutation::CollectorSkipsGraves)
            && !self.is(Mutation::CollectorReadsGravesLast)
        {
            next.graves = state.graves;
        }
        if stage & look::MARKS != 0 {
            next.purged = self.purged(state);
        }
        if stage & look::ENDS != 0 {
            next.ended =
                state.clones_where(|clone| clone.phase == ClonePhase::Ended) - state.removed;
        }
        if stage & look::PINS != 0 {
            next.pins = self.pins(state);
        }
        let decided = state.sessions_where(|session| session.decision != Decision::None);
        if stage & look::BEGIN != 0 {
            next.decided = decided - state.removed;
        }
        if stage & look::END == 0 {
            then(next, complete);
            return;
        }
        // Whatever is found of what is in a grave does not matter.
        let certain = next.decided - state.removed;
        let uncertain = decided - certain - next.graves;
        for found in uncertain.subsets() {
            then(Viewer { decided: certain | found, ..next }, complete);
        }
    }

    /// Places that somebody who lists compactions again after each "not found" can read.
    pub(crate) fn readable(&self, state: &State, maps: Ids) -> Places {
        let present = state.sessions_where(|session| session.pack == Pack::Present);
        let mut readable = present.iter().fold(Places::NONE, |all, pack| all | Places::of(pack));
        for _ in maps.iter() {
            for map in maps.iter() {
                let copied = state.sessions[map].refs;
                // A copy is readable place by place.
                let there = readable & copied.moved_to(map);
                let source = copied.packs().iter().next().unwrap_or_default();
                readable |= copied & there.moved_to(source);
            }
        }
        readable
    }

    /// The compactions that a LIST finds.
    pub(crate) fn maps(&self, state: &State) -> Ids {
        state.decided_as(Decision::Map) - state.removed
    }

    /// What follows from a complete view.
    pub(crate) fn conclude(&self, state: &State, view: &Viewer) -> Verdict {
        // Graves: last.
        let graves = match self.mutation {
            Some(Mutation::CollectorSkipsGraves) => Ids::NONE,
            Some(Mutation::CollectorReadsGravesFirst) => view.graves,
            Some(Mutation::CollectorReadsGravesLast) => state.graves,
            _ if view.graves != state.graves => return Verdict::StartOver,
            _ => view.graves,
        };
        let found = view.decided - graves;
        let decided = view.decided | graves;
        let commits = found & state.decided_as(Decision::Commit);
        let mut maps = found & state.decided_as(Decision::Map);

        // Roots.
        let purged = if self.is(Mutation::PurgesIgnored) { Ids::NONE } else { view.purged };
        let ended = if self.is(Mutation::EndsIgnored) { Ids::NONE } else { view.ended };
        let mut void = ended | graves;
        if !self.is(Mutation::VoidPinsHold) {
            void |= decided;
        }
        let held = if self.is(Mutation::PinsIgnored) {
            Ids::NONE
        } else {
            (view.pins - void).iter().fold(Ids::NONE, |all, owner| all | state.pinned_by(owner))
        };

        // Maps.
        if !self.is(Mutation::NoStartOver)
            && maps.iter().any(|map| !state.sessions[map].refs.packs().within(decided))
        {
            return Verdict::StartOver;
        }
        if self.is(Mutation::OneCopyKept) {
            // Which one depends on the view.
            let keep_last = !view.purged.is_empty();
            for map in maps.iter() {
                let is_copied = |other: usize| {
                    !(state.sessions[other].refs & state.sessions[map].refs).is_empty()
                };
                let preferred = |other: usize| if keep_last { other > map } else { other < map };
                if maps.iter().any(|other| preferred(other) && is_copied(other)) {
                    maps -= Ids::one(map);
                }
            }
        }

        // The walk.
        let readable = self.readable(state, self.maps(state));
        let mut live = Places::NONE;
        for root in (commits - (purged - held)).iter() {
            let refs = state.sessions[root].refs;
            if refs.within(readable) {
                live |= refs;
            } else if purged.has(root) {
                // Either the pin came too late, and nobody relies on it; or its owner is decided by now, refers to
                // a part of the root, and the rest was collected: then what it refers to must not go with it.
                let decided_since = || {
                    (view.pins - void)
                        .iter()
                        .any(|owner| state.pinned_by(owner).has(root) && self.is_over(state, owner))
                };
                if self.is(Mutation::PurgedPinnedIsDamage) {
                    return Verdict::Damage;
                } else if !self.is(Mutation::PurgedPinnedIsIgnored) && decided_since() {
                    return Verdict::StartOver;
                }
            } else if self.purged(state).has(root) && !self.is(Mutation::PurgedMeanwhileIsDamage) {
                return Verdict::StartOver;
            } else {
                return Verdict::Damage;
            }
        }
        let direct = live;
        let mut covered = Places::NONE;
        for map in maps.iter() {
            let copied = state.sessions[map].refs;
            covered |= copied;
            if self.is(Mutation::SomeCopied) {
                covered |=
                    copied.packs().iter().fold(Places::NONE, |all, pack| all | Places::of(pack));
            }
        }
        if !self.is(Mutation::MapsNotFollowed) {
            live = self.followed(state, live, maps);
        }

        // What can go.
        let stored = state.sessions_where(|session| session.pack != Pack::None);
        let settled = if self.is(Mutation::UndecidedPacksGo) { Ids::ALL_SESSIONS } else { decided };
        let deletes = (stored & settled) - (live - covered).packs();
        let needless = maps.iter().filter(|map| {
            let session = &state.sessions[*map];
            let source_gone = || {
                let mut sources = session.refs.packs().iter();
                sources.all(|pack| state.sessions[pack].pack == Pack::Doomed)
            };
            let of = if self.is(Mutation::ChainedMapGraved) { direct } else { live };
            (session.refs & of).is_empty() || self.is(Mutation::LiveMapGraved) && source_gone()
        });
        let held = if self.is(Mutation::PinnedGraved) { Ids::NONE } else { held };
        let dead = found & state.decided_as(Decision::Abort)
            | commits & (view.purged - held)
            | view.ended
            | needless.fold(Ids::NONE, |all, map| all | Ids::one(map));
        let dead = if self.config.graves { dead - graves } else { Ids::NONE };
        Verdict::Known(Known { live: live - covered, deletes, dead })
    }

    /// Whether a pin's owner needs it no more.
    fn is_over(&self, state: &State, owner: usize) -> bool {
        match owner.checked_sub(SESSIONS) {
            None => state.sessions[owner].decision != Decision::None,
            Some(clone) => state.clones[clone].phase == ClonePhase::Ended,
        }
    }

    /// Live places and all their copies.
    pub(crate) fn followed(&self, state: &State, mut live: Places, maps: Ids) -> Places {
        for _ in maps.iter() {
            for map in maps.iter() {
                live |= (live & state.sessions[map].refs).moved_to(map);
            }
        }
        live
    }

    /// What a collector would see that is alone in the world: everybody else is dead, and nobody is spared.
    pub(crate) fn alone(&self, state: &State, aborting: bool) -> Viewer {
        let decided = state.sessions_where(|session| session.decision != Decision::None);
        let known = (0..SESSIONS).filter(|session| self.is_known(state, *session));
        let known = known.fold(Ids::NONE, |all, session| all | Ids::one(session));
        // A pin that had a DELETE may be there again.
        let pins = state.sessions_where(|session| !session.witnesses.is_empty())
            | state.clones_where(|clone| clone.phase != ClonePhase::Idle);
        Viewer {
            purged: self.purged(state),
            ended: state.clones_where(|clone| clone.phase == ClonePhase::Ended) - state.removed,
            pins,
            decided: (decided - state.removed)
                | if aborting && !self.is(Mutation::NoAborts) { known } else { Ids::NONE },
            graves: state.graves,
            ..Viewer::default()
        }
    }

    /// Snapshots that users take for theirs: committed and not purged.
    pub(crate) fn kept(&self, state: &State) -> Ids {
        let kept = state.sessions_where(|session| {
            let unchecked =
                session.phase == Phase::Committed && self.is(Mutation::MarkersInsteadOfPins);
            session.decision == Decision::Commit && session.mark != Mark::Purge && !unchecked
        });
        (kept | state.told_back & state.decided_as(Decision::Commit)) - state.graves
    }
}
