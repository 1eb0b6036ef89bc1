//! Live volumes on real file systems: pools, freezing, what has changed, lazy clones. They need root, and loop devices.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "in tests a panic is the right way to fail"
)]

mod agent;
mod clones;
mod copies;
mod freeze;
mod incremental;
mod lazy;
mod pool;
mod recovery;
mod snapshot;
