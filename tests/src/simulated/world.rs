//! The objects, the clock and what is under way.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use petra_engine::key::{PINS, PROBE};
use petra_engine::store::{Creation, Entry};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};

use super::fate::{Fate, FateKind, Faults};
use super::process::Process;

/// The time of day when a world begins, in milliseconds since the Unix epoch.
const DAWN_MS: u64 = 1_800_000_000_000;

/// A promise that the store breaks, to see that it is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Betrayal {
    /// Of two who create an object, both are told that they did, and the second one's stays.
    TwoWinners,
    /// Listings miss some objects that were acknowledged before.
    BlindListings,
    /// Pins are acknowledged and not kept.
    LostPins,
}

/// The store, the clock, and everything that is under way.
pub struct World {
    pub(super) began: Instant,
    state: Mutex<State>,
}

pub(super) struct State {
    pub rng: fastrand::Rng,
    pub faults: Faults,
    pub betrayal: Option<Betrayal>,
    pub objects: BTreeMap<String, Object>,
    /// Writes that were sent and are not done for the last time.
    pub under_way: usize,
    pub requests: u64,
    trace: blake3::Hasher,
    log: Option<fn(&str)>,
}

#[derive(Clone, Debug)]
pub(super) struct Object {
    pub body: Bytes,
    modified_unix_ms: u64,
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("World").finish_non_exhaustive()
    }
}

/// A change on its way to the store.
#[derive(Clone, Debug)]
pub(super) struct Write {
    pub process: Arc<Process>,
    pub key: String,
    pub change: Change,
}

#[derive(Clone, Debug)]
pub(super) enum Change {
    Put(Bytes),
    Create(Bytes),
    Delete,
}

impl World {
    /// An empty store in which nothing goes wrong yet. `log` is given each line of the log.
    pub fn new(seed: u64, betrayal: Option<Betrayal>, log: Option<fn(&str)>) -> Arc<Self> {
        let state = State {
            rng: fastrand::Rng::with_seed(seed),
            faults: Faults::NONE,
            betrayal,
            objects: BTreeMap::new(),
            under_way: 0,
            requests: 0,
            trace: blake3::Hasher::new(),
            log,
        };
        Arc::new(Self { began: Instant::now(), state: Mutex::new(state) })
    }

    /// Sets what goes wrong from now on. Writes that are under way stay so.
    pub fn set_faults(&self, faults: Faults) {
        self.state().faults = faults;
    }

    /// Keeps all promises from now on.
    pub fn be_honest(&self) {
        self.state().betrayal = None;
    }

    /// Writes that may still be done, for the first time or again.
    pub fn under_way(&self) -> usize {
        self.state().under_way
    }

    /// Requests so far.
    pub fn requests(&self) -> u64 {
        self.state().requests
    }

    /// Keys that begin so.
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        self.state().matching(prefix, None).into_keys().collect()
    }

    /// A hash of the log so far.
    pub fn trace(&self) -> blake3::Hash {
        self.state().trace.finalize()
    }

    /// Adds a line to the log.
    pub fn note(&self, who: &str, what: fmt::Arguments<'_>) {
        let at = self.began.elapsed();
        self.state().note(at, who, what);
    }

    /// The true time.
    pub fn now_ms(&self) -> u64 {
        DAWN_MS + self.began.elapsed().as_millis() as u64
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings a write to the store, whatever becomes of its sender.
    pub(super) async fn deliver(
        self: Arc<Self>,
        write: Write,
        fate: Fate,
        reply: oneshot::Sender<Answer>,
    ) {
        pause(fate.there).await;
        let done = match fate.kind {
            FateKind::Done | FateKind::Lost => Some(self.apply(&write, "")),
            FateKind::Refused | FateKind::Late(_) => None,
        };
        pause(fate.back).await;
        // A sender that is gone hears nothing.
        let _ = reply.send(done.filter(|_| fate.kind == FateKind::Done).ok_or(Refused));
        if let FateKind::Late(later) = fate.kind {
            pause(later).await;
            self.apply(&write, ", late");
        }
        if let Some(again) = fate.again {
            pause(again).await;
            self.apply(&write, ", again");
        }
        self.state().under_way -= 1;
    }

    fn apply(&self, write: &Write, how: &str) -> Creation {
        let modified_unix_ms = self.now_ms();
        let at = self.began.elapsed();
        let state = &mut *self.state();
        let there = state.objects.contains_key(&write.key);
        let betrayed = match state.betrayal {
            Some(Betrayal::LostPins) => write.key.starts_with(PINS),
            _ => false,
        };
        let (stays, result) = match &write.change {
            Change::Create(_) if there => {
                // A probe is found by those who try it first; this is about what happens where nobody does.
                let is_probe = write.key.starts_with(PROBE);
                let both = state.betrayal == Some(Betrayal::TwoWinners) && !is_probe;
                (!both, if both { Creation::Created } else { Creation::Exists })
            }
            _ => (betrayed, Creation::Created),
        };
        let (verb, body) = match &write.change {
            Change::Put(body) => ("put", Some(body)),
            Change::Create(body) => ("create", Some(body)),
            Change::Delete => ("delete", None),
        };
        if !stays {
            match body {
                Some(body) => {
                    // By copy: packs come with much more memory than they use.
                    let body = Bytes::copy_from_slice(body);
                    state.objects.insert(write.key.clone(), Object { body, modified_unix_ms });
                }
                None => {
                    state.objects.remove(&write.key);
                }
            }
        }
        let what = if result == Creation::Exists { ": exists" } else { "" };
        state.note(at, write.process.name(), format_args!("= {verb} {}{how}{what}", write.key));
        result
    }
}

/// The store's answer to a write, or that there is none.
pub(super) type Answer = Result<Creation, Refused>;

/// No answer.
#[derive(Debug)]
pub(super) struct Refused;

pub(super) async fn pause(time: Duration) {
    if !time.is_zero() {
        sleep(time).await;
    }
}

impl State {
    pub(super) fn note(&mut self, at: Duration, who: &str, what: fmt::Arguments<'_>) {
        let line = format!("{:>12.3} {who:<12} {what}", at.as_secs_f64());
        self.trace.update(line.as_bytes()).update(b"\n");
        if let Some(log) = self.log {
            log(&line);
        }
    }

    pub(super) fn matching(&self, prefix: &str, after: Option<&str>) -> BTreeMap<String, Entry> {
        let start = match after.filter(|after| *after >= prefix) {
            Some(after) => Bound::Excluded(after),
            None => Bound::Included(prefix),
        };
        self.objects
            .range::<str, _>((start, Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, object)| {
                let (len, modified_unix_ms) = (object.body.len() as u64, object.modified_unix_ms);
                (key.clone(), Entry { key: key.clone(), len, modified_unix_ms })
            })
            .collect()
    }
}
