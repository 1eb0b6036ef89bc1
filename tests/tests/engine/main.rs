//! The engine as a whole: what goes in comes out, whatever is damaged, fails, races or dies.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "in tests a panic is the right way to fail"
)]

mod ahead;
mod collect;
mod compact;
mod copy;
mod damage;
mod differences;
mod encryption;
mod faults;
mod fixtures;
mod found;
mod heal;
mod incremental;
mod kill;
mod pins;
mod probing;
mod pruning;
mod reader;
mod repair;
mod roundtrip;
mod sendable;
mod sources;
mod traffic;
mod undelete;
mod verify;

use tokio::runtime::Runtime;

/// A runtime for tests that are not asynchronous themselves.
fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}
