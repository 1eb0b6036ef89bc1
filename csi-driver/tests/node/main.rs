//! The service Node over real pools, devices and mounts. Needs root and loop devices.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a test may panic"
)]

mod lab;

mod block;
mod crashes;
mod filesystem;
mod refused;
