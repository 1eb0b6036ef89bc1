//! Live volumes on real file systems: pools, freezing, what has changed, lazy clones. They need root, and loop devices.

mod copies;
mod freeze;
mod incremental;
mod pool;
mod recovery;
mod snapshot;
