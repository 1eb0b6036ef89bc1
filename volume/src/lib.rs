//! The Linux side of Petra: live volumes on a node, their snapshots, and clones that start at once. docs/volumes.md has
//! the layout of a pool and the processes.
//!
//! | module | what it knows |
//! |---|---|
//! | [`agent`] | the process that fetches, hydrates and uploads for a pool |
//! | [`backend`] | how images are made, copied by reference and deleted on btrfs and XFS |
//! | [`binds`] | a volume at more than one place: bind mounts |
//! | [`clones`] | volumes made from snapshots of a repository |
//! | [`copy_source`] | reading a copy for a snapshot: past the page cache, and only what has changed |
//! | [`device`] | whether a device or image is mounted, attached or otherwise in use |
//! | [`doctor`] | what this machine's kernel and tools can do |
//! | [`error`] | what can go wrong |
//! | [`extents`] | where a file's bytes lie, and what two files have in common |
//! | [`freeze`] | holding file systems still, and thawing them whatever dies |
//! | [`fuse`] | a file system with one file, served by this process |
//! | [`idle`] | working only when nobody else wants to, and not too fast |
//! | [`lazy`] | images whose data come when they are read |
//! | [`mount_options`] | the words of `mount -o` |
//! | [`pool`] | the directory that holds a machine's volumes: making it, its room, its recovery |
//! | [`programs`] | how this crate's processes are started |
//! | [`snapshot`] | one point in time of some volumes, and its way to a repository |
//! | `sys` | ioctls, loop devices, mounts: all `unsafe` code |
//! | [`volume`] | one volume: its device, mount, size, copies |

pub mod agent;
pub mod backend;
pub mod binds;
pub mod clones;
pub mod copy_source;
pub mod device;
pub mod doctor;
pub mod error;
pub mod extents;
pub mod freeze;
pub mod fuse;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod idle;
pub mod lazy;
pub mod mount_options;
pub mod pool;
pub mod programs;
pub mod snapshot;
mod sys;
pub mod volume;

pub use backend::{Backend, BackendKind, PendingCopy};
pub use device::{System, Use};
pub use error::{Error, Result};
pub use mount_options::MountOptions;
pub use petra_engine::ErrorKind;
pub use pool::Pool;
pub use programs::Programs;
pub use sys::files::Space;
pub use volume::{LockedVolume, Volume};
