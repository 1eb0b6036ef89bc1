//! Explores every state that can be reached, breadth first, so that a counterexample is as short as can be.
//!
//! Of a state that was visited only its fingerprint is kept, and that of a state before it; a trace is found by going
//! back along these and then forward through the model.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::model::{Model, Step};
use crate::property::{Goal, Property};
use crate::state::State;

/// Parts of the set of visited states, each with its own lock.
const SHARDS: usize = 256;
/// States that a thread takes at once.
const BLOCK: usize = 512;

/// What an exploration found.
#[derive(Debug)]
pub struct Exploration {
    /// Different states.
    pub states: usize,
    /// Steps between them.
    pub steps: usize,
    /// Steps to the state farthest away.
    pub depth: usize,
    /// The shortest way to a state in which a property does not hold.
    pub violation: Option<Violation>,
    /// Goals that no state reaches.
    pub missed: Vec<Goal>,
}

/// A way to a state in which a property does not hold.
pub struct Violation {
    /// The property.
    pub property: Property,
    /// The steps that lead there.
    pub trace: Vec<Step>,
    /// The state.
    pub state: State,
}

impl fmt::Debug for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:?} does not hold after", self.property)?;
        for step in &self.trace {
            writeln!(f, "  {step:?}")?;
        }
        writeln!(f, "in the state {:#?}", self.state)
    }
}

type Visited = HashMap<u64, u64, BuildHasherDefault<Fingerprint>>;

/// Explores a model until it is exhausted or a property does not hold.
pub fn explore(
    model: &Model,
    properties: &[Property],
    goals: &[Goal],
    threads: usize,
) -> Exploration {
    let initial = model.initial();
    let visited: Vec<Mutex<Visited>> = (0..SHARDS).map(|_| Mutex::default()).collect();
    visit(&visited, initial.fingerprint(), 0);
    let mut exploration = Exploration {
        states: 1,
        steps: 0,
        depth: 0,
        violation: None,
        missed: goals.to_vec(),
    };
    if let Some(property) = violated(model, properties, &initial) {
        exploration.violation = Some(Violation { property, trace: vec![], state: initial });
        return exploration;
    }
    let mut frontier = vec![initial];
    while !frontier.is_empty() {
        let next_block = AtomicUsize::new(0);
        let work = || {
            let mut found = Found { missed: exploration.missed.clone(), ..Found::default() };
            let mut steps = Vec::new();
            loop {
                let from = next_block.fetch_add(BLOCK, Ordering::Relaxed);
                let Some(rest) = frontier.get(from..) else { return found };
                for state in rest.iter().take(BLOCK) {
                    let fingerprint = state.fingerprint();
                    model.steps(state, &mut steps);
                    found.steps += steps.len();
                    for (_, next) in steps.drain(..) {
                        if visit(&visited, next.fingerprint(), fingerprint) {
                            if found.violation.is_none() {
                                found.violation = violated(model, properties, &next).map(|p| (p, next));
                            }
                            found.missed.retain(|goal| !goal.is_reached(model, &next));
                            found.states.push(next);
                        }
                    }
                }
            }
        };
        let found: Vec<Found> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(work)).collect();
            workers.into_iter().filter_map(|worker| worker.join().ok()).collect()
        });
        assert_eq!(found.len(), threads.max(1), "a thread of the exploration panicked");
        frontier.clear();
        for found in found {
            exploration.steps += found.steps;
            exploration.states += found.states.len();
            frontier.extend(found.states);
            exploration.missed.retain(|goal| found.missed.contains(goal));
            if let Some((property, state)) = found.violation {
                let trace = trace(model, &visited, &state);
                exploration.violation = Some(Violation { property, trace, state });
            }
        }
        if exploration.violation.is_some() {
            return exploration;
        }
        if !frontier.is_empty() {
            exploration.depth += 1;
        }
    }
    exploration
}

/// What a thread found in one step from the frontier.
#[derive(Default)]
struct Found {
    states: Vec<State>,
    steps: usize,
    violation: Option<(Property, State)>,
    missed: Vec<Goal>,
}

fn violated(model: &Model, properties: &[Property], state: &State) -> Option<Property> {
    properties.iter().copied().find(|property| !property.holds(model, state))
}

/// Notes a state; says whether it is new.
fn visit(visited: &[Mutex<Visited>], fingerprint: u64, before: u64) -> bool {
    match shard(visited, fingerprint).entry(fingerprint) {
        Entry::Occupied(_) => false,
        Entry::Vacant(entry) => {
            entry.insert(before);
            true
        }
    }
}

fn shard(visited: &[Mutex<Visited>], fingerprint: u64) -> MutexGuard<'_, Visited> {
    // The table inside uses the lower and the highest bits.
    let shard = usize::try_from(fingerprint >> 32).unwrap_or_default() % SHARDS;
    visited[shard].lock().unwrap_or_else(PoisonError::into_inner)
}

/// The steps from the initial state.
fn trace(model: &Model, visited: &[Mutex<Visited>], state: &State) -> Vec<Step> {
    let mut way = vec![state.fingerprint()];
    let first = model.initial().fingerprint();
    while let Some(here) = way.last().copied().filter(|here| *here != first) {
        let Some(before) = shard(visited, here).get(&here).copied() else { break };
        way.push(before);
    }
    let mut here = model.initial();
    let mut trace = Vec::with_capacity(way.len());
    let mut steps = Vec::new();
    for fingerprint in way.iter().rev().skip(1) {
        steps.clear();
        model.steps(&here, &mut steps);
        let Some((step, next)) = steps.iter().find(|(_, next)| next.fingerprint() == *fingerprint) else {
            break;
        };
        trace.push(*step);
        here = *next;
    }
    trace
}

/// Fingerprints need no more hashing.
#[derive(Default)]
struct Fingerprint(u64);

impl Hasher for Fingerprint {
    fn write(&mut self, _: &[u8]) {}

    fn write_u64(&mut self, fingerprint: u64) {
        self.0 = fingerprint;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
