//! The engine itself, many processes of it at once, over a simulated store: latency, errors, lost answers, requests
//! that are done again, processes that stand still or die, and clocks that differ. One seed makes one run, always
//! the same.
//!
//! ```text
//! PETRA_SIM_SEED=17 cargo test -p petra-tests --test simulation seeds -- --nocapture    one seed, with its log
//! PETRA_SIM_SEEDS=0..100000 cargo test -p petra-tests --test simulation seeds           a range
//! ```
//!
//! In the log `>` is a request as it is sent, with the time that it takes there and back and what becomes of it, and
//! `=` a change as the store makes it. Other lines are steps of the processes.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "in tests a panic is the right way to fail, and a log is for reading"
)]

mod actor;
mod finale;
mod oracle;
mod run;
mod volumes;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use petra_tests::simulated::Betrayal;

use oracle::Seen;
use run::{Outcome, run};

/// What a plain `cargo test` runs.
const SEEDS: Range<u64> = 0..2000;
/// What some seed must come to.
const INTERESTING: [&str; 17] = [
    "attempt lost",
    "clone left",
    "doubtful and not there",
    "doubtful and there",
    "id buried",
    "pack compacted",
    "pack deleted",
    "process died",
    "repaired",
    "session aborted",
    "snapshot",
    "snapshot brought back",
    "snapshot deleted",
    "snapshot purged",
    "verified",
    "volume restored",
    "volume restored after its purge",
];
/// Failures that are printed.
const SHOWN: usize = 5;

/// Runs seeds on all processors; gives the outcomes that a test wants to see.
fn run_all(
    seeds: Range<u64>,
    betrayal: Option<Betrayal>,
    wanted: impl Fn(&Outcome) -> bool + Sync,
) -> Vec<Outcome> {
    let next = AtomicU64::new(seeds.start);
    let found = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        break;
                    }
                    let outcome = run(seed, betrayal, None);
                    if wanted(&outcome) {
                        let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                        found.push(outcome);
                        if found.len() >= SHOWN {
                            next.store(seeds.end, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
    });
    found.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn print(outcome: &Outcome) {
    let seed = outcome.seed;
    println!("seed {seed}:");
    for violation in &outcome.violations {
        println!("  {violation}");
    }
    println!(
        "  PETRA_SIM_SEED={seed} cargo test -p petra-tests --test simulation seeds -- --nocapture"
    );
}

#[test]
fn seeds() {
    if let Ok(seed) = std::env::var("PETRA_SIM_SEED") {
        let seed = seed.parse().unwrap();
        let outcome = run(seed, None, Some(|line| println!("{line}")));
        println!("seed {seed}: {} requests, trace {}", outcome.requests, outcome.trace);
        assert_eq!(outcome.violations, Vec::<String>::new());
        return;
    }
    let seeds = std::env::var("PETRA_SIM_SEEDS").map_or(SEEDS, |text| {
        let (start, end) = text.split_once("..").unwrap();
        start.parse().unwrap()..end.parse().unwrap()
    });
    let all = Mutex::new(Seen::new());
    let failed = run_all(seeds.clone(), None, |outcome| {
        // One by one: whoever stops a long run still sees what it found.
        let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
        outcome.seen.iter().for_each(|(what, times)| *all.entry(what).or_default() += times);
        if (outcome.seed + 1).is_multiple_of(1000) {
            println!("at seed {}", outcome.seed);
        }
        if !outcome.violations.is_empty() {
            print(outcome);
        }
        !outcome.violations.is_empty()
    });
    let failed: Vec<u64> = failed.iter().map(|outcome| outcome.seed).collect();
    assert!(failed.is_empty(), "seeds {failed:?} broke the protocol");
    let all = all.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!("{all:#?}");
    // What never happens is not tested.
    if seeds == SEEDS {
        let times = |what: &&str| all.get(*what).copied().unwrap_or_default();
        let never: Vec<&str> = INTERESTING.into_iter().filter(|what| times(what) == 0).collect();
        assert!(never.is_empty(), "{never:?} never happened");
    }
}

/// Otherwise nothing that a seed finds could be looked at again.
#[test]
fn a_seed_repeats_itself() {
    let differs = |first: &Outcome| run(first.seed, None, None) != *first;
    let differing = run_all(0..60, None, differs);
    let seeds: Vec<u64> = differing.iter().map(|outcome| outcome.seed).collect();
    assert!(seeds.is_empty(), "seeds {seeds:?} went another way the second time");
}

/// A simulation that can't fail shows nothing: each promise of the store that is broken must be noticed.
#[test]
fn broken_promises_are_noticed() {
    for betrayal in [Betrayal::TwoWinners, Betrayal::BlindListings, Betrayal::LostPins] {
        let noticed = run_all(0..300, Some(betrayal), |outcome| !outcome.violations.is_empty());
        assert!(!noticed.is_empty(), "nobody noticed {betrayal:?}");
    }
}
