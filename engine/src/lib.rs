//! Petra's engine: content-addressable snapshots of block volumes, without Kubernetes, printing or global state.
//!
//! ```text
//!              snapshot                                     restore
//!   Source -> scan -> chunks -> frames -> packs      record -> tree -> leaves
//!               |        ^                  |                            |
//!               |     DedupIndex            v                            v
//!               +-> leaves -> tree       Store  <------ fetch ------- frames -> verify -> Sink
//!                               |           ^
//!                               v           |
//!                            record -> Session (pin, packs, commit)
//! ```
//!
//! A [`Repository`] is opened over a [`Store`](store::Store). [`snapshot`](snapshot::snapshot) reads
//! [`Source`](source::Source)s and commits a [`SnapshotRecord`](record::SnapshotRecord);
//! [`restore`](restore::restore) writes a volume of a record to a target. Everything takes a [`Context`]: clock,
//! progress, cancellation and limits. docs/format.md defines every byte, docs/protocol.md the order of writes.

pub mod access;
pub mod chunker;
mod chunks;
pub mod clone;
pub mod collect;
pub mod context;
pub mod copy;
pub mod crypto;
pub mod diff;
pub mod error;
pub mod fetch;
pub mod format;
mod graves;
mod hash;
pub mod id;
pub mod index;
pub mod key;
mod listings;
pub mod marks;
mod memory;
pub mod name;
pub mod policies;
mod probe;
pub mod progress;
pub mod publish;
pub mod reader;
pub mod record;
mod relocation;
pub mod repair;
pub mod repository;
pub mod restore;
pub mod retention;
pub mod sample;
pub mod scan;
pub mod session;
pub mod snapshot;
pub mod source;
mod splice;
pub mod start;
pub mod store;
pub mod stored_source;
mod survey;
pub mod target;
pub mod tree;
pub mod url;
pub mod usage;
pub mod verify;
mod workers;

pub use access::Access;
pub use context::Context;
pub use crypto::{NewKey, Secret};
pub use error::{Error, ErrorKind, Result};
pub use id::{ChunkId, Digest, PackId, SnapshotId};
pub use name::Name;
pub use repository::Repository;
pub use url::{Item, PetraUrl, RepositoryUrl, Selector, SnapshotRef};
