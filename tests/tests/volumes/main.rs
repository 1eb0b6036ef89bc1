
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "in tests a panic is the right way to fail"
#![expect(
)]
//! Live volumes on real file systems: pools, freezing, and what has changed.
//! Tests of live volumes on real file systems. They need root, and loop devices.
mod freeze;
mod pool;
