//! What the kernel is asked for beyond the standard library: ioctls, loop devices, mounts. All `unsafe` code of pools and
//! volumes is here, behind safe functions that answer the kernel's own errors.

pub(crate) mod btrfs;
pub(crate) mod fiemap;
pub(crate) mod files;
pub(crate) mod loops;
pub(crate) mod mounts;
pub(crate) mod reflink;
pub(crate) mod resize;
pub(crate) mod tools;
