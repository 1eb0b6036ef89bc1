//! Live volumes on real file systems: pools, freezing, what has changed, lazy clones. They need root, and loop devices.

#![expect(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "in tests a panic is the right way to fail"
)]

mod freeze;
mod pool;
