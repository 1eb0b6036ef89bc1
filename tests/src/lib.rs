//! Support for tests of Petra as a whole: S3 servers, mounts, and saying what a test needs.

#![expect(clippy::expect_used, reason = "in support of tests a panic is the right way to fail")]

pub mod mount;
pub mod require;
pub mod s3;
pub mod scripted;
