//! A store in memory for simulations: every delay, failure and coincidence follows from one seed and from the order
//! of the requests, and all time is the runtime's, so that a paused clock makes hours pass in no time.
//!
//! It promises what docs/protocol.md assumes of a store, and not more:
//!
//! - a request takes time, and others come before it;
//! - it can fail before anything happened, or happen without an answer, at once or much later;
//! - what was sent can happen again, at any later time;
//! - a listing looks at each key at a moment of its own between its beginning and its end;
//! - a process can stand still for days in the middle of a request, or die in it; what it sent arrives all the same.

mod fate;
mod process;
mod store;
mod world;

pub use fate::{Faults, spread};
pub use process::{Process, Troubles};
pub use world::{Betrayal, World};
