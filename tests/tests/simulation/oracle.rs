//! The plain model: which snapshots were acknowledged and deleted, and so which ones must, may or must not be there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use petra_engine::record::SnapshotRecord;
use petra_engine::{Name, SnapshotId};
use petra_tests::volume::Volume;

/// The label that tells of which attempt a snapshot is.
pub const ATTEMPT: &str = "attempt";

/// A moment, by the number of things that the oracle has heard.
pub type Moment = u64;
/// After everything.
pub const END: Moment = u64::MAX;

/// What happened, and how often.
pub type Seen = BTreeMap<&'static str, u64>;

/// Volumes by name.
pub type Volumes = Vec<(Name, Arc<Volume>)>;

/// Shared by all actors.
#[derive(Clone, Debug, Default)]
pub struct Oracle(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    now: Moment,
    attempts: Vec<Attempt>,
    calls: Vec<Call>,
    violations: Vec<String>,
    seen: Seen,
}

/// One call of `snapshot`.
#[derive(Clone, Debug)]
struct Attempt {
    volumes: Volumes,
    result: AttemptResult,
}

/// What the caller knows of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttemptResult {
    /// It was not told, or it died: the snapshot may be there, or come later.
    Unknown,
    /// It was told that the snapshot is there, at this moment.
    Committed(SnapshotId, Moment),
    /// It was told that there is none.
    Failed,
}

/// One call that deletes a snapshot or brings it back.
#[derive(Clone, Copy, Debug)]
struct Call {
    snapshot: SnapshotId,
    /// Deletes; otherwise brings back.
    deletes: bool,
    began: Moment,
    /// When it was acknowledged. One that failed may be done at any later time.
    done: Option<Moment>,
}

impl Oracle {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what must not happen.
    pub fn violation(&self, text: String) {
        self.state().violations.push(text);
    }

    /// What has happened that must not.
    pub fn violations(&self) -> Vec<String> {
        self.state().violations.clone()
    }

    /// Counts what happened.
    pub fn saw(&self, what: &'static str, times: u64) {
        *self.state().seen.entry(what).or_default() += times;
    }

    /// What happened.
    pub fn seen(&self) -> Seen {
        self.state().seen.clone()
    }

    /// The present moment.
    pub fn now(&self) -> Moment {
        let mut state = self.state();
        state.now += 1;
        state.now
    }

    /// A snapshot is being taken; gives the attempt's number.
    pub fn attempt(&self, volumes: Volumes) -> usize {
        let mut state = self.state();
        state.attempts.push(Attempt { volumes, result: AttemptResult::Unknown });
        state.attempts.len() - 1
    }

    /// The result of an attempt.
    pub fn attempted(&self, number: usize, result: AttemptResult) {
        if let Some(attempt) = self.state().attempts.get_mut(number) {
            attempt.result = result;
        }
    }

    /// A snapshot is being deleted, or brought back; gives the call's number.
    pub fn call(&self, snapshot: SnapshotId, deletes: bool) -> usize {
        let began = self.now();
        let mut state = self.state();
        state.calls.push(Call { snapshot, deletes, began, done: None });
        state.calls.len() - 1
    }

    /// A call was acknowledged.
    pub fn done(&self, number: usize) {
        let now = self.now();
        if let Some(call) = self.state().calls.get_mut(number) {
            call.done = Some(now);
        }
    }

    /// Snapshots that were acknowledged, deleted ones included.
    pub fn committed(&self) -> Vec<SnapshotId> {
        let result = |attempt: &Attempt| match attempt.result {
            AttemptResult::Committed(id, _) => Some(id),
            _ => None,
        };
        self.state().attempts.iter().filter_map(result).collect()
    }

    /// What a snapshot holds. A snapshot of which nobody knows is a violation.
    pub fn volumes(&self, record: &SnapshotRecord) -> Volumes {
        let known = attempt_of(record).and_then(|number| {
            self.state().attempts.get(number).map(|attempt| attempt.volumes.clone())
        });
        known.unwrap_or_else(|| {
            self.violation(format!("nobody made snapshot {}", record.id));
            vec![]
        })
    }

    /// True when somebody has at least tried to delete a snapshot.
    pub fn may_be_deleted(&self, snapshot: SnapshotId) -> bool {
        self.state().calls.iter().any(|call| call.deletes && call.snapshot == snapshot)
    }

    /// The same for anybody but the one of this call.
    pub fn may_be_deleted_by_others(&self, number: usize) -> bool {
        let state = self.state();
        let snapshot = state.calls.get(number).map(|call| call.snapshot);
        let others = state.calls.iter().enumerate().filter(|(other, _)| *other != number);
        others.into_iter().any(|(_, call)| call.deletes && Some(call.snapshot) == snapshot)
    }

    /// Attempts of which nobody knows, counted: those that are listed and those that are not.
    pub fn count_doubts(&self, records: &[SnapshotRecord]) {
        let listed: BTreeSet<usize> = records.iter().filter_map(attempt_of).collect();
        let attempts = self.state().attempts.clone();
        for (number, attempt) in attempts.iter().enumerate() {
            if attempt.result == AttemptResult::Unknown {
                let is_there = listed.contains(&number);
                self.saw(if is_there { "doubtful and there" } else { "doubtful and not there" }, 1);
            }
        }
    }

    /// Compares a listing that was made between two moments.
    pub fn check_listing(&self, began: Moment, ended: Moment, records: &[SnapshotRecord]) {
        let violations = self.state().check_listing(began, ended, records);
        self.state().violations.extend(violations);
    }
}

fn attempt_of(record: &SnapshotRecord) -> Option<usize> {
    record.labels.get(ATTEMPT)?.parse().ok()
}

impl State {
    fn check_listing(
        &self,
        began: Moment,
        ended: Moment,
        records: &[SnapshotRecord],
    ) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut listed: BTreeMap<usize, SnapshotId> = BTreeMap::new();
        for record in records {
            let id = record.id;
            let number = attempt_of(record).unwrap_or(usize::MAX);
            let Some(attempt) = self.attempts.get(number) else {
                wrong.push(format!("{id} is listed, and nobody made it"));
                continue;
            };
            if let Some(other) = listed.insert(number, id) {
                wrong.push(format!("attempt {number} made both {other} and {id}"));
            }
            match attempt.result {
                AttemptResult::Failed => {
                    wrong.push(format!("{id} is listed, but attempt {number} failed"))
                }
                AttemptResult::Committed(other, _) if other != id => {
                    wrong.push(format!("{id} is listed, but attempt {number} made {other}"));
                }
                _ => {}
            }
            if self.holds(true, id, began, ended) {
                wrong.push(format!("{id} is listed, but it was deleted"));
            }
        }
        for (number, attempt) in self.attempts.iter().enumerate() {
            if let AttemptResult::Committed(id, at) = attempt.result
                && at < began
                && !listed.contains_key(&number)
            {
                let untouched = !self
                    .calls
                    .iter()
                    .any(|call| call.deletes && call.snapshot == id && call.began < ended);
                if untouched || self.holds(false, id, began, ended) {
                    wrong.push(format!("{id} of attempt {number} is not listed"));
                }
            }
        }
        wrong
    }

    /// True when a call of one kind was acknowledged before a time began, and every call of the other kind was
    /// acknowledged before that one began, or begins after the time.
    fn holds(&self, deletes: bool, snapshot: SnapshotId, began: Moment, ended: Moment) -> bool {
        let calls = || self.calls.iter().filter(|call| call.snapshot == snapshot);
        let others = || calls().filter(|call| call.deletes != deletes && call.began < ended);
        calls().filter(|call| call.deletes == deletes).any(|call| {
            call.done.is_some_and(|done| done < began)
                && others().all(|other| other.done.is_some_and(|done| done < call.began))
        })
    }
}
