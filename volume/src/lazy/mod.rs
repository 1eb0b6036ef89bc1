//! Lazy images: a clone that can be used before its data is there.
//!
//! ```text
//!  application -> file system -> loop device -> FUSE -> image server ----- present ----> local image
//!                                                            |  ^                        presence map
//!                                                       want |  | data      (Unix socket)
//!                                                            v  |
//!                                                          agent -> VolumeReader -> repository
//! ```
//!
//! | module | what it knows |
//! |---|---|
//! | [`presence`], `durable` | which blocks are there; what a crash leaves of that |
//! | `image` | the local image: reads, writes and fills that do not step on each other |
//! | [`server`] | the image server: FUSE requests, which of them wait for what, the link to the agent |
//! | `waits`, `readahead`, `link` | parts of it |
//! | [`wire`] | the messages between image server and agent |
//! | [`connection`] | the agent's side: who connects, the FUSE descriptor, how a connection ends |
//! | [`agent`] | the agent's side: what is wanted first |
//! | `hydration` | the agent's side: everything else |
//!
//! docs/volumes.md says what survives what.

pub mod agent;
pub mod connection;
mod durable;
mod hydration;
mod image;
mod link;
pub mod presence;
mod readahead;
pub mod server;
mod waits;
pub mod wire;
