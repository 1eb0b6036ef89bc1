//! The protocol as it is: in no state that can be reached does anything go wrong.

#![expect(clippy::print_stdout, reason = "what was explored, for those who ask: --nocapture")]

use std::time::Instant;

use petra_model::configurations::{
    BORROWING, CHAIN, CHAIN_AND_GRAVES, CLONES, COMPACTION, CONCURRENT, LARGE, RETRY, UNDELETE,
};
use petra_model::{Config, Model, Property, explore, missed};

/// Explores a configuration to its end, which must not come too soon.
#[track_caller]
fn sound(config: Config, at_least: usize) {
    let model = Model::new(config);
    assert_eq!(missed(model), [], "what {:?} is about does not happen", config.name);
    let start = Instant::now();
    let exploration = explore(model, &Property::ALL);
    if let Some(violation) = exploration.violation {
        panic!("{}: {violation:?}", config.name);
    }
    let (states, depth) = (exploration.states, exploration.depth);
    println!("{}: {states} states, {depth} deep, {:.0?}", config.name, start.elapsed());
    assert!(states >= at_least, "only {states} states");
}

#[test]
fn writers_collectors_deleter_and_clone() {
    sound(CONCURRENT, 2_000_000);
}

#[test]
fn two_clones() {
    sound(CLONES, 1_000_000);
}

#[test]
fn resumption_and_second_attempt() {
    sound(RETRY, 150_000);
}

#[test]
fn compaction() {
    sound(COMPACTION, 1_000_000);
}

#[test]
fn chained_and_racing_compactions() {
    sound(CHAIN, 4_000_000);
}

#[test]
fn undelete_and_graves() {
    sound(UNDELETE, 900_000);
}

#[test]
fn borrowing_and_compaction() {
    sound(BORROWING, 1_000_000);
}

#[test]
fn chained_compaction_and_graves() {
    sound(CHAIN_AND_GRAVES, 600_000);
}

/// Some minutes, and gigabytes of memory: `PETRA_MODEL=full`.
#[test]
fn larger_bounds() {
    if std::env::var_os("PETRA_MODEL").is_some_and(|bounds| bounds == "full") {
        for config in LARGE {
            sound(config, 1_000_000);
        }
    }
}
