//! What operators see: logs, events and metrics.
//!
//! Every call has a number, which is in all lines that are logged for it, on this node and on those that it asks. A
//! call's code and duration are logged and counted when it ends. Requests are logged at the level `debug`, without
//! secrets.
//!
//! | module | what |
//! |---|---|
//! | [`describe`] | requests as text, without secrets |
//! | [`events`] | what people should know of |
//! | [`logs`] | how and where lines are written |
//! | [`metrics`] | what is counted |
//! | [`observe`] | the layer around all calls |
//! | [`pools`] | what pools say when somebody looks |
//! | [`web`] | the page for Prometheus, and those for probes |

pub mod describe;
pub mod events;
pub mod logs;
pub mod metrics;
pub mod observe;
pub mod pools;
pub mod web;

pub use events::{Severity, event};
pub use logs::{Format, start};
pub use metrics::Metrics;
pub use observe::{Observe, current_request};
pub use pools::{PoolReading, Readings, Source};
