//! The Linux side of Petra: live volumes on a node, their snapshots, and clones that start at once. docs/volumes.md has
//! the layout of a pool and the processes.
//!
//! | module | what it knows |
//! |---|---|

pub mod agent;
//! | [`agent`] | the process that fetches, hydrates and uploads for a pool |
pub mod backend;
//! | [`backend`] | how images are made, copied by reference and deleted on btrfs and XFS |
pub mod clones;
//! | [`clones`] | volumes made from snapshots of a repository |
pub mod copy_source;
//! | [`copy_source`] | reading a copy for a snapshot: past the page cache, and only what has changed |
pub mod device;
//! | [`device`] | whether a device or image is mounted, attached or otherwise in use |
pub mod error;
//! | [`error`] | what can go wrong |
pub mod extents;
//! | [`extents`] | where a file's bytes lie, and what two files have in common |
pub mod freeze;
//! | [`freeze`] | holding file systems still, and thawing them whatever dies |
pub mod fuse;
//! | [`fuse`] | a file system with one file, served by this process |
pub mod lazy;
//! | [`lazy`] | images whose data come when they are read |
pub mod pool;
//! | [`pool`] | the directory that holds a machine's volumes: making it, its room, its recovery |
pub mod programs;
//! | [`programs`] | how this crate's processes are started |
pub mod snapshot;
mod sys;
//! | `sys` | ioctls, loop devices, mounts: all `unsafe` code |
pub mod volume;
//! | [`volume`] | one volume: its device, mount, size, copies |

pub use backend::{Backend, BackendKind, PendingCopy};
pub use device::{System, Use};
pub use error::{Error, Result};
pub use petra_engine::ErrorKind;
pub use pool::Pool;
pub use programs::Programs;
pub use sys::files::Space;
pub use volume::{LockedVolume, Volume};
