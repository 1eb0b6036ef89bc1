//! One run: a world and its processes, all from one seed.

use std::sync::Arc;
use std::time::Duration;

use petra_engine::Repository;
use petra_engine::chunker::Chunking;
use petra_engine::context::Limits;
use petra_tests::simulated::{Betrayal, Faults, Process, World};
use tokio::runtime::Builder;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::actor::{Actor, Policy, Role, context};
use crate::finale;
use crate::oracle::{Oracle, Seen};

/// Small chunks, so that small volumes have some.
const CHUNKING: Chunking = Chunking::FastCdc { min: 2048, average: 4096, max: 16_384 };
/// No run takes longer, by its own clock, unless something waits for nothing.
const AGE: Duration = Duration::from_secs(400 * 86_400);
const HOUR: Duration = Duration::from_secs(3600);

/// What became of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Its seed.
    pub seed: u64,
    /// Requests of all processes.
    pub requests: u64,
    /// A hash of its log.
    pub trace: String,
    /// What must not happen.
    pub violations: Vec<String>,
    /// What happened.
    pub seen: Seen,
}

/// Runs a seed.
pub fn run(seed: u64, betrayal: Option<Betrayal>, log: Option<fn(&str)>) -> Outcome {
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let oracle = Oracle::default();
    let (requests, trace) = runtime.block_on(async {
        let world = World::new(seed, betrayal, log);
        let life = live(seed, &world, &oracle);
        if timeout(AGE, life).await.is_err() {
            oracle.violation("something waits for ever".to_owned());
        }
        (world.requests(), world.trace().to_string())
    });
    Outcome { seed, requests, trace, violations: oracle.violations(), seen: oracle.seen() }
}

/// What one process does.
#[derive(Clone, Copy, Debug)]
struct Part {
    role: Role,
    steps: u32,
    seed: u64,
    skew_ms: i64,
    pace: Duration,
    /// In which of its requests it dies.
    dies_at: Option<u32>,
}

async fn live(seed: u64, world: &Arc<World>, oracle: &Oracle) {
    // Not the world's own numbers.
    let mut rng = fastrand::Rng::with_seed(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let founder = Process::new(world, "founder".to_owned(), rng.u64(..), 0, None);
    let ctx = context(&founder, limits(&mut rng));
    let repo = Repository::init(founder.store(), CHUNKING, &ctx).await.unwrap();
    let mut first = Actor {
        process: founder,
        repo,
        ctx,
        oracle: oracle.clone(),
        rng: rng.fork(),
        pace: Duration::from_secs(1),
        policy: Policy::random(&mut rng),
        volumes: vec![],
    };
    first.play(Role::Writer, rng.u32(..4)).await;

    let faults = faults(&mut rng);
    world.note("world", format_args!("{faults:?}"));
    world.set_faults(faults);
    let mut playing = JoinSet::new();
    let policy = Policy::random(&mut rng);
    world.note("world", format_args!("{policy:?}"));
    for part in cast(&mut rng, faults.horizon) {
        world.note("world", format_args!("{part:?}"));
        let (world, oracle, limits) = (world.clone(), oracle.clone(), limits(&mut rng));
        let volumes = first.volumes.clone();
        playing.spawn(async move { perform(part, policy, &world, &oracle, limits, volumes).await });
    }
    while let Some(played) = playing.join_next().await {
        if let Err(error) = played {
            oracle.violation(format!("a process panicked: {error}"));
        }
    }
    world.set_faults(Faults::NONE);
    while world.under_way() > 0 {
        tokio::time::sleep(HOUR).await;
    }
    world.be_honest();
    world.note("world", format_args!("the end"));
    // By any clock, all that was is long ago.
    tokio::time::sleep(100 * HOUR).await;
    let judge = Process::new(world, "judge".to_owned(), rng.u64(..), 0, None);
    finale::check(&judge, oracle, rng.fork()).await;
}

fn limits(rng: &mut fastrand::Rng) -> Limits {
    let index_chunks = if rng.u32(..4) == 0 { rng.usize(1..40) } else { 1 << 12 };
    let (requests, packs_in_flight) = (rng.usize(1..=8), rng.usize(1..=2));
    Limits { threads: 0, requests, packs_in_flight, index_chunks }
}

fn faults(rng: &mut fastrand::Rng) -> Faults {
    let mut often = |most: u32| if rng.bool() { rng.u32(..most) } else { 0 };
    let (refused, lost, late) = (often(150), often(150), often(150));
    let (repeated, stalled) = (often(1500), often(300));
    let horizon = rng.choice([1, 24, 96]).unwrap_or(1) * HOUR;
    let latency = Duration::from_millis(rng.choice([100, 1000, 20_000]).unwrap_or(100));
    // Writers of much data are at it for long, while others come and go.
    let upload = rng.choice([1, 20, 500]).unwrap_or(1) * latency;
    Faults { refused, lost, late, repeated, stalled, horizon, latency, upload }
}

/// Two to six processes: a writer and a collector are always among them.
fn cast(rng: &mut fastrand::Rng, horizon: Duration) -> Vec<Part> {
    use Role::{Cloner, Collector, Deleter, Reader, Writer};
    const OTHERS: [Role; 8] =
        [Writer, Writer, Writer, Collector, Collector, Deleter, Reader, Cloner];
    // Near each other in time, or in the time of the faults.
    let pace = if rng.u32(..4) > 0 { Duration::from_secs(20) } else { horizon };
    let mut roles = vec![Writer, Collector];
    if rng.u32(..3) > 0 {
        roles.push(Deleter);
    }
    for _ in 0..rng.usize(..=3) {
        roles.extend(rng.choice(OTHERS));
    }
    let part = |role| Part {
        role,
        steps: rng.u32(1..=8),
        seed: rng.u64(..),
        skew_ms: if rng.u32(..3) > 0 { 0 } else { rng.i64(-7_200_000..7_200_000) },
        pace,
        dies_at: (rng.u32(..3) == 0).then(|| rng.u32(..120)),
    };
    roles.into_iter().map(part).collect()
}

/// Plays a part. A process that dies is followed by a new one at times.
async fn perform(
    part: Part,
    policy: Policy,
    world: &Arc<World>,
    oracle: &Oracle,
    limits: Limits,
    volumes: Vec<(&'static str, petra_tests::volume::Volume)>,
) {
    let mut rng = fastrand::Rng::with_seed(part.seed);
    let mut dies_at = part.dies_at;
    for life in 0..2 {
        let name = format!(
            "{:?}-{:03x}{}",
            part.role,
            part.seed >> 52,
            ["", "'"].get(life).copied().unwrap_or_default()
        );
        let process = Process::new(world, name, rng.u64(..), part.skew_ms, dies_at);
        let play = async {
            let Ok(repo) = Repository::open(process.store()).await else { return };
            let mut actor = Actor {
                ctx: context(&process, limits.clone()),
                process: process.clone(),
                repo,
                oracle: oracle.clone(),
                rng: rng.fork(),
                pace: part.pace,
                policy,
                volumes: volumes.clone(),
            };
            actor.play(part.role, part.steps).await;
            process.note(format_args!("is done"));
        };
        tokio::select! {
            biased;
            () = process.death() => {
                oracle.saw("process died", 1);
                process.note(format_args!("dies"));
            }
            () = play => return,
        }
        if rng.bool() {
            return;
        }
        dies_at = None;
    }
}
