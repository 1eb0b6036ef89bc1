//! The node agent in process, on real pools with real helper processes. Needs root, loop devices, FUSE, and the program
//! `petra` beside the tests.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "a test may panic"
)]

mod clones;
mod lab;
mod snapshots;
mod volumes;
