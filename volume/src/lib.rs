//! The Linux side of Petra: live volumes on a node, their snapshots, and clones that start at once. docs/volumes.md has
//! the layout of a pool and the processes.
//!
//! | module | what it knows |
//! |---|---|
//! | [`device`] | whether a device or image is mounted, attached or otherwise in use |
//! | [`error`] | what can go wrong |

pub mod device;
pub mod error;

pub use device::{System, Use};
pub use error::{Error, Result};
