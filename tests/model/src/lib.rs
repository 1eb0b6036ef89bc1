//! A model of the repository's protocol (docs/protocol.md), all states of which are explored.
//!
//! ```text
//!   Config: which actors        Mutation: which step is left out
//!        \                      /
//!         Model: all steps from a State  -->  explore: every state that can be reached
//!           writer, reader, deleter,              |
//!           collector, compactor                  v
//!                                     Property: what must hold in each of them
//! ```
//!
//! It is about the order of requests and what each actor may conclude, not about bytes. The configurations and what
//! they show are in [`configurations`]; `tests/` explores them, and shows that each step is needed.

#![allow(
    clippy::indexing_slicing,
    reason = "a model has no users: a panic is a failing test, and arrays are as long as their numbers say"
)]

pub mod checker;
mod collector;
pub mod configurations;
mod deleter;
mod markers;
pub mod model;
pub mod mutation;
pub mod property;
mod reader;
pub mod sets;
pub mod state;
mod view;
mod writer;

pub use checker::{Exploration, explore, missed};
pub use model::{Config, Deleting, Model, Role};
pub use mutation::Mutation;
pub use property::{Goal, Property};
