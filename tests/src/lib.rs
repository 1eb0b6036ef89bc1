//! Support for tests of Petra as a whole: S3 servers, mounts, and saying what a test needs.

#![expect(clippy::expect_used, reason = "in support of tests a panic is the right way to fail")]

pub mod disk;
pub mod host;
pub mod lab;
pub mod lazy;
pub mod loop_device;
pub mod mount;
pub mod outcomes;
pub mod pool;
pub mod recording;
pub mod require;
pub mod s3;
pub mod scripted;
pub mod simulated;
pub mod slow;
pub mod volume;
