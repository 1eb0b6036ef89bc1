//! The Linux side of Petra: facts about the block devices and files that volumes live on.
//!
//! | module | what it knows |
//! |---|---|
//! | [`device`] | whether a device or image is mounted, attached or otherwise in use |

pub mod device;

pub use device::{System, Use};
