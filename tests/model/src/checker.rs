//! Explores every state that can be reached, breadth first, with stateright.
//!
//! stateright keeps a 64-bit fingerprint of each state: that two of ten million states share one, so that what follows
//! from one of them is not looked at, has a chance of one in 300,000.

use std::collections::BTreeSet;
use std::fmt;

use stateright::{Checker, HasDiscoveries};

use crate::model::{Model, Step};
use crate::property::{Goal, Property};
use crate::state::State;

/// Threads of an exploration.
const THREADS: usize = 2;

/// What an exploration found.
#[derive(Debug)]
pub struct Exploration {
    /// Different states.
    pub states: usize,
    /// Steps to the state farthest away.
    pub depth: usize,
    /// A short way to a state in which a property does not hold.
    pub violation: Option<Violation>,
}

/// A way to a state in which a property does not hold.
pub struct Violation {
    /// The property.
    pub property: &'static str,
    /// The steps that lead there.
    pub trace: Vec<Step>,
    /// The state.
    pub state: State,
}

impl fmt::Debug for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} does not hold after", self.property)?;
        for step in &self.trace {
            writeln!(f, "  {step:?}")?;
        }
        writeln!(f, "in the state {:#?}", self.state)
    }
}

/// Explores a model until it is exhausted or one of the properties does not hold.
pub fn explore(model: Model, properties: &[Property]) -> Exploration {
    let explored = Explored { model, properties: properties.to_vec(), goals: vec![] };
    let checker = stateright::Model::checker(explored)
        .threads(THREADS)
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    let discoveries = checker.discoveries().into_iter();
    let shortest = discoveries.min_by_key(|(_, path)| path.clone().into_actions().len());
    Exploration {
        states: checker.unique_state_count(),
        depth: checker.max_depth(),
        violation: shortest.map(|(property, path)| Violation {
            property,
            state: *path.last_state(),
            trace: path.into_actions().into_iter().map(|(step, _)| step).collect(),
        }),
    }
}

/// Explores a model until all its goals are reached; gives those that no state reaches.
pub fn missed(model: Model) -> Vec<Goal> {
    let goals = model.config.goals;
    let names: BTreeSet<&str> = goals.iter().map(|goal| goal.condition().name).collect();
    let explored = Explored { model, properties: vec![], goals: goals.to_vec() };
    let checker = stateright::Model::checker(explored)
        .threads(THREADS)
        .finish_when(HasDiscoveries::AllOf(names))
        .spawn_bfs()
        .join();
    let reached = checker.discoveries();
    goals.iter().copied().filter(|goal| !reached.contains_key(goal.condition().name)).collect()
}

/// A model and what is asked of it.
pub(crate) struct Explored {
    pub(crate) model: Model,
    properties: Vec<Property>,
    goals: Vec<Goal>,
}

impl stateright::Model for Explored {
    type State = State;
    /// The state that a step leads to is found with the step.
    type Action = (Step, State);

    fn init_states(&self) -> Vec<State> {
        vec![self.model.initial()]
    }

    fn actions(&self, state: &State, actions: &mut Vec<(Step, State)>) {
        self.model.steps(state, actions);
    }

    fn next_state(&self, _: &State, (_, next): (Step, State)) -> Option<State> {
        Some(next)
    }

    fn properties(&self) -> Vec<stateright::Property<Self>> {
        let properties = self.properties.iter().map(|property| property.condition());
        properties.chain(self.goals.iter().map(|goal| goal.condition())).collect()
    }
}

macro_rules! condition {
    ($kind:ident, $expectation:ident: $($name:ident),*) => {
        impl $kind {
            /// As stateright wants it.
            fn condition(self) -> stateright::Property<Explored> {
                match self {
                    $(Self::$name => stateright::Property::$expectation(
                        stringify!($name),
                        |explored, state| Self::$name.holds(&explored.model, state),
                    ),)*
                }
            }
        }
    };
}

condition!(Property, always: KeptIsReadable, PinnedIsReadable, NoFalseAlarm, ReportsAreTrue, NothingLeaks, NobodyBlocks);
condition!(Goal, sometimes: ReuseOutlivesItsWitness, PurgedIsRead, RetryCommits, EarlierCommitFound, CopyIsRead,
    CopyOfCopyIsRead, RacingCopies, BorrowedCommits, UndeletedTwice, SnapshotBuried, CompactionBuried, AbortReplaced);
