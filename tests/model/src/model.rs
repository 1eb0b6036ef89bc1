//! What a configuration has, and every step that can be taken from a state.

use crate::mutation::Mutation;
use crate::property::Goal;
use crate::sets::{CLONES, Ids, Places, SESSIONS};
use crate::state::{ACTING, ClonePhase, Decision, Pack, Phase, State, VIEWERS, Viewer};

/// What a session number is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Nobody uses it.
    Unused,
    /// A snapshot that is there from the beginning.
    Snapshot,
    /// A writer that may choose any of these snapshots as witnesses.
    Writer(Ids),
    /// The next attempt of a writer that lost its session, with the same choice of witnesses.
    Retry(usize, Ids),
    /// A compactor of one pack.
    Compactor,
}

/// How snapshots are deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deleting {
    /// A Purge mark at once: nobody but an Undelete depends on the Delete before it.
    Purge,
    /// Delete, then Undelete or Purge, this often.
    Undelete(u8),
}

/// Which actors there are, and what they may do: the bound of an exploration.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Its name.
    pub name: &'static str,
    /// What each session does.
    pub roles: [Role; SESSIONS],
    /// How many clones there are.
    pub clones: usize,
    /// How many collectors; each collects for ever.
    pub collectors: usize,
    /// Marks.
    pub deleting: Deleting,
    /// Whether snapshot 0 has a second chunk that others can reuse by itself.
    pub second_chunk: bool,
    /// Whether writers may store the places that maps lead to, instead of those in their witness's leaves.
    pub resolving: bool,
    /// Whether writers that died may be resumed under the same session.
    pub resuming: bool,
    /// Whether sessions may borrow the pins of clones.
    pub borrowing: bool,
    /// Whether there are graves.
    pub graves: bool,
    /// What must happen in it.
    pub goals: &'static [Goal],
}

/// A step that an actor takes, as it appears in a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it; docs/protocol.md explains the steps")]
pub enum Step {
    Pin { session: usize, witnesses: Ids },
    PinArrives { session: usize },
    CheckExistence { session: usize, witnesses: Ids },
    CheckMarks { session: usize },
    CheckGraves { session: usize },
    Borrow { session: usize, clone: usize },
    Store { session: usize, refs: Places },
    PutCopy { session: usize },
    PackArrives { session: usize },
    Unpin { session: usize },
    Commit { session: usize },
    CommitUnanswered { session: usize },
    CommitLate { session: usize },
    FindAbort { session: usize },
    GiveUp { session: usize },
    Resume { session: usize, sent: bool },
    CommitArrives { session: usize },
    FindCommit { session: usize },
    CheckGravesAfterCommit { session: usize },

    ClonePin { clone: usize, snapshot: usize },
    CloneCheckMarks { clone: usize },
    CloneCheckGraves { clone: usize },
    CloneUnpin { clone: usize },
    CloneEnd { clone: usize },

    Delete { snapshot: usize },
    Undelete { snapshot: usize },
    UndeleteLate { snapshot: usize },
    Purge { snapshot: usize },
    DeleteDecision { snapshot: usize },
    DecisionReturns { snapshot: usize },

    Abort { session: usize },
    RemoveAbort { session: usize },
    RemovePin { session: usize },
    Look { viewer: usize, stage: u8, decided: Ids },
    StartOver { viewer: usize },
    Conclude { viewer: usize, deletes: Ids, dead: Ids },
    FindDamage { viewer: usize },
    DeletePack { viewer: usize, pack: usize },
    PutGrave { viewer: usize },
    RemoveKeys { viewer: usize },
    Restart { viewer: usize },
    PutMarkers { viewer: usize },
    LookAgain { viewer: usize },
    CheckMarkers { session: usize },

    Copy { viewer: usize, session: usize, places: Places },
    DeleteSource { session: usize },
}

/// Steps that can be taken, each with the state that it leads to.
pub type Steps = Vec<(Step, State)>;

/// The protocol in a configuration, whole or without a step.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    /// Its actors.
    pub config: Config,
    /// What is done wrong.
    pub mutation: Option<Mutation>,
}

impl Model {
    /// The protocol as it should be.
    pub const fn new(config: Config) -> Self {
        Self { config, mutation: None }
    }

    /// Whether this is done wrong.
    pub fn is(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    /// The repository before anyone takes a step.
    pub fn initial(&self) -> State {
        let mut state = State::default();
        for (id, role) in self.config.roles.iter().enumerate() {
            if *role == Role::Snapshot {
                let session = &mut state.sessions[id];
                session.phase = Phase::Done;
                session.decision = Decision::Commit;
                session.pack = Pack::Present;
                session.refs = Places::one(id, 0);
                if self.config.second_chunk {
                    session.refs |= Places::one(id, 1);
                }
            }
        }
        state
    }

    /// Every step that can be taken, and where it leads.
    pub fn steps(&self, state: &State, steps: &mut Steps) {
        for (session, role) in self.config.roles.iter().enumerate() {
            match role {
                Role::Unused | Role::Snapshot => {}
                Role::Writer(witnesses) => self.writer(state, session, *witnesses, steps),
                Role::Retry(of, witnesses) => {
                    if state.sessions[*of].phase == Phase::Lost {
                        self.writer(state, session, *witnesses, steps);
                    }
                }
                Role::Compactor => self.compactor(state, session, steps),
            }
        }
        for clone in 0..self.config.clones.min(CLONES) {
            self.clone(state, clone, steps);
        }
        self.deleter(state, steps);
        self.aborts(state, steps);
        for viewer in 0..self.config.collectors {
            // Equal collectors do equal things.
            if viewer == 0 || state.viewers[viewer] != state.viewers[viewer - 1] {
                self.collector(state, viewer, steps);
            }
        }
        for (_, next) in steps.iter_mut() {
            self.reduce(next);
        }
    }

    /// Forgets what makes no difference any more, so that equal states look equal.
    fn reduce(&self, state: &mut State) {
        let compared = !matches!(
            self.mutation,
            Some(
                Mutation::CollectorSkipsGraves
                    | Mutation::CollectorReadsGravesFirst
                    | Mutation::CollectorReadsGravesLast
            )
        );
        for viewer in &mut state.viewers {
            // All it can do is find that graves differ, and start over.
            if compared && viewer.stage != ACTING && viewer.graves != state.graves {
                *viewer = Viewer::default();
            }
        }
        state.viewers[..self.config.collectors.min(VIEWERS)].sort_unstable();
        let seen = state.viewers.iter().fold(Ids::NONE, |all, viewer| all | viewer.pins);
        for (id, session) in state.sessions.iter_mut().enumerate() {
            // A void pin that no view has.
            if session.decision != Decision::None
                && !seen.has(id)
                && !self.is(Mutation::VoidPinsHold)
            {
                session.witnesses = Ids::NONE;
            }
            if session.decision == Decision::Abort && session.phase == Phase::Lost {
                session.refs = Places::NONE;
            }
        }
        for (id, clone) in state.clones.iter_mut().enumerate() {
            let seen = !(seen & Ids::clone(id)).is_empty();
            if clone.phase == ClonePhase::Ended && !seen && !self.is(Mutation::EndsIgnored) {
                clone.snapshot = 0;
            }
        }
    }

    /// Snapshots that can be found: their decision may be seen, whether they are deleted or not.
    pub(crate) fn found(&self, state: &State) -> Ids {
        state.decided_as(Decision::Commit)
    }

    /// Snapshots with a Purge mark that everybody sees.
    pub(crate) fn purged(&self, state: &State) -> Ids {
        (state.purged() | state.purged_beside) - state.removed
    }

    /// Owners whose pins a LIST finds.
    pub(crate) fn pins(&self, state: &State) -> Ids {
        let sessions = state.sessions_where(|session| {
            session.decision == Decision::None
                && session.phase != Phase::Lost
                && !session.witnesses.is_empty()
        });
        let clones = state.clones_where(|clone| {
            matches!(clone.phase, ClonePhase::Pinned | ClonePhase::HalfChecked | ClonePhase::Valid)
        });
        (sessions | clones) - state.adrift
    }

    /// Whether a session has left anything that makes it known.
    pub(crate) fn is_known(&self, state: &State, session: usize) -> bool {
        let it = &state.sessions[session];
        // Who lends to a session knows it.
        it.pack != Pack::None
            || !it.witnesses.is_empty()
            || !(it.valid - Ids::ALL_SESSIONS).is_empty()
    }
}
