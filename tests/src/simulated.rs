//! A store in memory for simulations: every delay, failure and coincidence follows from one seed and from the order
//! of the requests, and all time is the runtime's, so that a paused clock makes hours pass in no time.
//!
//! It promises what docs/protocol.md assumes of a store, and not more:
//!
//! - a request takes time, and others come before it;
//! - it can fail before anything happened, or happen without an answer, at once or much later;
//! - what was sent can happen again, at any later time;
//! - a listing looks at each key at a moment of its own between its beginning and its end;
//! - a process can stand still for days in the middle of a request, or die in it; what it sent arrives all the same.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::{Bound, Range};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use petra_engine::context::Host;
use petra_engine::key::{GRAVES, Key, PACKS, PINS, SNAPS};
use petra_engine::store::{Creation, Entry, Page, Store, StoreError, StoreErrorCause};
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, sleep};

/// The time of day when a world begins, in milliseconds since the Unix epoch.
const DAWN_MS: u64 = 1_800_000_000_000;
/// What chances are counted in.
const MYRIAD: u32 = 10_000;

/// How often things go wrong, in ten-thousandths of all requests.
#[derive(Clone, Copy, Debug)]
pub struct Faults {
    /// Requests that fail and do nothing.
    pub refused: u32,
    /// Writes that are done, but answered with an error.
    pub lost: u32,
    /// Writes that are answered with an error, and done later.
    pub late: u32,
    /// Writes that are done once more later.
    pub repeated: u32,
    /// Requests in which the process stands still for a long time, before or after they are done.
    pub stalled: u32,
    /// "Later" and "a long time" are at most this.
    pub horizon: Duration,
    /// A request takes at most about this long when all is well, and a listing at most twice as long again.
    pub latency: Duration,
    /// Packs take at most about this long on their way.
    pub upload: Duration,
}

impl Faults {
    /// Nothing goes wrong and nothing takes time.
    pub const NONE: Self = Self {
        refused: 0,
        lost: 0,
        late: 0,
        repeated: 0,
        stalled: 0,
        horizon: Duration::ZERO,
        latency: Duration::ZERO,
        upload: Duration::ZERO,
    };
}

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
    began: Instant,
    state: Mutex<State>,
}

struct State {
    rng: fastrand::Rng,
    faults: Faults,
    betrayal: Option<Betrayal>,
    objects: BTreeMap<String, Object>,
    /// Writes that were sent and are not done for the last time.
    under_way: usize,
    requests: u64,
    trace: blake3::Hasher,
    log: Option<fn(&str)>,
}

#[derive(Clone, Debug)]
struct Object {
    body: Bytes,
    modified_unix_ms: u64,
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("World").finish_non_exhaustive()
    }
}

/// A change on its way to the store.
#[derive(Clone, Debug)]
struct Write {
    process: Arc<Process>,
    key: String,
    change: Change,
}

#[derive(Clone, Debug)]
enum Change {
    Put(Bytes),
    Create(Bytes),
    Delete,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug)]
struct Fate {
    /// Until it is done.
    there: Duration,
    /// Until it is answered.
    back: Duration,
    kind: FateKind,
    /// After the answer it is done once more.
    again: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FateKind {
    Done,
    Refused,
    Lost,
    Late(Duration),
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

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings a write to the store, whatever becomes of its sender.
    async fn deliver(self: Arc<Self>, write: Write, fate: Fate, reply: oneshot::Sender<Answer>) {
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
                let both = state.betrayal == Some(Betrayal::TwoWinners);
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
        state.note(at, &write.process.name, format_args!("= {verb} {}{how}{what}", write.key));
        result
    }
}

/// The store's answer to a write, or that there is none.
type Answer = Result<Creation, Refused>;

#[derive(Debug)]
struct Refused;

async fn pause(time: Duration) {
    if !time.is_zero() {
        sleep(time).await;
    }
}

impl State {
    fn note(&mut self, at: Duration, who: &str, what: fmt::Arguments<'_>) {
        let line = format!("{:>12.3} {who:<12} {what}", at.as_secs_f64());
        self.trace.update(line.as_bytes()).update(b"\n");
        if let Some(log) = self.log {
            log(&line);
        }
    }

    fn chance(&mut self, per_myriad: u32) -> bool {
        per_myriad > 0 && self.rng.u32(..MYRIAD) < per_myriad
    }

    fn fate(&mut self, operation: &str, key: &str, is_write: bool) -> Fate {
        let faults = self.faults;
        if faults.latency.is_zero() {
            let none = Duration::ZERO;
            return Fate { there: none, back: none, kind: FateKind::Done, again: None };
        }
        let is_upload = operation == "put" && key.starts_with(PACKS);
        let most = if is_upload { faults.upload } else { faults.latency };
        let mut there = spread(&mut self.rng, most);
        let mut back = spread(&mut self.rng, faults.latency / 4);
        if self.chance(faults.stalled) {
            let stalled = if self.rng.bool() { &mut there } else { &mut back };
            *stalled += spread(&mut self.rng, faults.horizon);
        }
        let kind = if self.chance(faults.refused) {
            FateKind::Refused
        } else if is_write && self.chance(faults.lost) {
            FateKind::Lost
        } else if is_write && self.chance(faults.late) {
            FateKind::Late(spread(&mut self.rng, faults.horizon))
        } else {
            FateKind::Done
        };
        let again = is_write && kind != FateKind::Refused && self.chance(faults.repeated);
        let again = again.then(|| spread(&mut self.rng, faults.horizon));
        Fate { there, back, kind, again }
    }

    fn matching(&self, prefix: &str, after: Option<&str>) -> BTreeMap<String, Entry> {
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

/// A time between 1 ms and `most`: short ones are as likely as long ones, by orders of magnitude.
pub fn spread(rng: &mut fastrand::Rng, most: Duration) -> Duration {
    let most_ms = most.as_millis().max(1) as u64;
    let scale = most_ms >> rng.u32(..=most_ms.ilog2());
    Duration::from_millis(rng.u64(scale.div_ceil(2)..=scale).max(1))
}

/// A process that sends requests, has a clock of its own, and can die.
#[derive(Debug)]
pub struct Process {
    name: String,
    world: Arc<World>,
    /// How much its clock is ahead.
    skew_ms: i64,
    life: Mutex<Life>,
    death: Notify,
}

#[derive(Debug)]
struct Life {
    rng: fastrand::Rng,
    /// Requests until it dies.
    left: Option<u32>,
    dead: bool,
    troubles: Troubles,
}

/// What a process was told wrongly so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Troubles {
    /// Requests that were answered with an error.
    pub errors: u32,
    /// Those of them that made a decision, or told of one.
    pub doubts: u32,
}

impl Process {
    /// A process that dies in its `dies_at`-th request, from 0.
    pub fn new(
        world: &Arc<World>,
        name: String,
        seed: u64,
        skew_ms: i64,
        dies_at: Option<u32>,
    ) -> Arc<Self> {
        let rng = fastrand::Rng::with_seed(seed);
        let life = Life { rng, left: dies_at, dead: false, troubles: Troubles::default() };
        let (world, life) = (world.clone(), Mutex::new(life));
        Arc::new(Self { name, world, skew_ms, life, death: Notify::new() })
    }

    /// Where it is.
    pub fn world(&self) -> &World {
        &self.world
    }

    /// Its name in the log.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits until the process dies.
    pub async fn death(&self) {
        self.death.notified().await;
    }

    /// What went wrong so far, as the process saw it.
    pub fn troubles(&self) -> Troubles {
        self.life().troubles
    }

    /// The store, as this process reaches it.
    pub fn store(self: &Arc<Self>) -> Arc<dyn Store> {
        Arc::new(SimulatedStore(self.clone()))
    }

    /// Adds a line to the log.
    pub fn note(&self, what: fmt::Arguments<'_>) {
        self.world.note(&self.name, what);
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a request; says whether the process dies in it.
    fn breathe(&self) -> bool {
        let mut life = self.life();
        if life.left == Some(0) {
            life.dead = true;
        }
        life.left = life.left.and_then(|left| left.checked_sub(1));
        life.dead
    }

    /// Never returns: whoever runs the process drops it.
    async fn die(&self) {
        self.death.notify_one();
        std::future::pending().await
    }
}

impl Host for Process {
    fn unix_ms(&self) -> u64 {
        self.world.now_ms().saturating_add_signed(self.skew_ms)
    }

    fn random(&self) -> u128 {
        self.life().rng.u128(..)
    }
}

/// The store as one process reaches it.
#[derive(Debug)]
struct SimulatedStore(Arc<Process>);

impl SimulatedStore {
    fn world(&self) -> &Arc<World> {
        &self.0.world
    }

    /// Decides what becomes of a request, and writes it down.
    fn send(&self, operation: &'static str, key: &str, len: usize, is_write: bool) -> Fate {
        let at = self.world().began.elapsed();
        let fate = {
            let mut state = self.world().state();
            state.requests += 1;
            let fate = state.fate(operation, key, is_write);
            let kind = match fate.kind {
                FateKind::Done => String::new(),
                other => format!(" {other:?}"),
            };
            let again = fate.again.map(|after| format!(" again after {after:?}"));
            state.note(
                at,
                &self.0.name,
                format_args!(
                    "> {operation} {key} {len} {}+{} ms{kind}{}",
                    fate.there.as_millis(),
                    fate.back.as_millis(),
                    again.unwrap_or_default()
                ),
            );
            fate
        };
        if fate.kind != FateKind::Done {
            let mut life = self.0.life();
            life.troubles.errors += 1;
            let decides = key.starts_with(SNAPS) || key.starts_with(GRAVES);
            life.troubles.doubts += u32::from(decides);
        }
        fate
    }

    async fn write(
        &self,
        operation: &'static str,
        key: &Key,
        change: Change,
    ) -> Result<Creation, StoreError> {
        let dies = self.0.breathe();
        if dies && self.0.life().rng.bool() {
            self.0.die().await;
        }
        let len = match &change {
            Change::Put(body) | Change::Create(body) => body.len(),
            Change::Delete => 0,
        };
        let fate = self.send(operation, key.as_str(), len, true);
        let write = Write { process: self.0.clone(), key: key.to_string(), change };
        self.world().state().under_way += 1;
        let (reply, answer) = oneshot::channel();
        tokio::spawn(self.world().clone().deliver(write, fate, reply));
        if dies {
            self.0.die().await;
        }
        match answer.await {
            Ok(Ok(done)) => Ok(done),
            _ => Err(self.error(operation, key.as_str(), StoreErrorCause::Unavailable)),
        }
    }

    /// A read looks at the store at one moment.
    async fn read<T>(
        &self,
        operation: &'static str,
        key: &str,
        look: impl FnOnce(&State) -> Option<T> + Send,
    ) -> Result<T, StoreError> {
        if self.0.breathe() {
            self.0.die().await;
        }
        let fate = self.send(operation, key, 0, false);
        pause(fate.there).await;
        let seen = look(&self.world().state());
        pause(fate.back).await;
        if fate.kind != FateKind::Done {
            return Err(self.error(operation, key, StoreErrorCause::Unavailable));
        }
        seen.ok_or_else(|| self.error(operation, key, StoreErrorCause::NotFound))
    }

    fn error(&self, operation: &'static str, key: &str, cause: StoreErrorCause) -> StoreError {
        StoreError {
            operation,
            key: key.to_owned(),
            location: self.location(),
            cause,
            detail: "says the simulation".to_owned(),
        }
    }
}

#[async_trait]
impl Store for SimulatedStore {
    fn location(&self) -> String {
        "simulated:".to_owned()
    }

    async fn get(&self, key: &Key) -> Result<Bytes, StoreError> {
        let key = key.as_str();
        let body = |state: &State| state.objects.get(key).map(|object| object.body.clone());
        self.read("get", key, body).await
    }

    async fn get_range(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        let key = key.as_str();
        let piece = |state: &State| {
            let body = &state.objects.get(key)?.body;
            let clamp = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(body.len());
            let (start, end) = (clamp(range.start), clamp(range.end));
            Some(body.slice(start..end.max(start)))
        };
        self.read("get_range", key, piece).await
    }

    async fn put(&self, key: &Key, body: Bytes) -> Result<(), StoreError> {
        self.write("put", key, Change::Put(body)).await.map(|_| ())
    }

    async fn create(&self, key: &Key, body: Bytes) -> Result<Creation, StoreError> {
        self.write("create", key, Change::Create(body)).await
    }

    async fn list(&self, prefix: &str, after: Option<&str>) -> Result<Page, StoreError> {
        let world = self.world().clone();
        let begins = self.read("list", prefix, |state| Some(state.matching(prefix, after))).await?;
        let latency = world.state().faults.latency;
        if !latency.is_zero() {
            let lasts = spread(&mut world.state().rng, 2 * latency);
            pause(lasts).await;
        }
        let state = &mut *world.state();
        let ends = state.matching(prefix, after);
        let keys: BTreeSet<&String> = begins.keys().chain(ends.keys()).collect();
        let bound = match state.rng.u8(..4) {
            0 if !latency.is_zero() => state.rng.usize(1..=5),
            _ => 1000,
        };
        let mut entries: Vec<Entry> = Vec::new();
        for key in keys {
            let seen = match (begins.get(key), ends.get(key)) {
                (Some(first), Some(last)) => Some(if state.rng.bool() { first } else { last }),
                (one, other) => one.or(other).filter(|_| state.rng.bool()),
            };
            let blind = state.betrayal == Some(Betrayal::BlindListings) && state.rng.u32(..10) == 0;
            let Some(entry) = seen.filter(|_| !blind) else { continue };
            if entries.len() == bound {
                return Ok(Page { entries, more: true });
            }
            entries.push(entry.clone());
        }
        Ok(Page { entries, more: false })
    }

    async fn list_folders(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let folders = |state: &State| {
            let rest = |key: &String| {
                let (folder, _) = key.strip_prefix(prefix)?.split_once('/')?;
                Some(folder.to_owned())
            };
            let folders: BTreeSet<String> =
                state.matching(prefix, None).keys().filter_map(rest).collect();
            Some(folders.into_iter().collect())
        };
        self.read("list_folders", prefix, folders).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.write("delete", key, Change::Delete).await.map(|_| ())
    }
}
