//! A model of the repository's protocol (docs/protocol.md), and a checker that explores all its states.
//!
//! ```text
//!   Config: which actors        Mutation: which step is left out
//!        \                      /
//!         Model: all steps from a State  -->  explore: every state that can be reached
//!           writer, reader, collector,            |
//!           compactor, deleter, view              v
//!                                     Property: what must hold in each of them
//! ```
//!
//! The configurations and what they show are in `tests/`. A checker of our own, of some 150 lines, since a library's
//! keeps the whole way to each state and so is slower by far; see docs/protocol.md, "What was checked".

#![allow(
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    reason = "a model has no users: a panic is a failing test, and arrays are as long as their numbers say"
)]

pub mod checker;
pub mod configurations;
mod collector;
pub mod model;
pub mod mutation;
pub mod property;
mod reader;
pub mod sets;
pub mod state;
mod view;
mod writer;

pub use checker::{Exploration, explore};
pub use model::{Config, Deleting, Model, Role};
pub use mutation::Mutation;
pub use property::{Goal, Property};
