//! Events of a running operation, for progress bars, logs and metrics.

use std::fmt;

/// Receives events. Called from worker threads some ten times per MiB at most; must not block.
pub trait Progress: Send + Sync + fmt::Debug {
    /// One step of the operation.
    fn event(&self, event: Event<'_>);
}

/// What happened. Byte counts are increments since the last event of the same kind.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The operation knows how many volume bytes it has to go through. May come several times; they add up.
    Planned {
        /// Bytes of volumes, without known holes.
        bytes: u64,
    },
    /// Volume bytes are done: chunked and deduplicated, or verified and written.
    Processed {
        /// Bytes of volumes.
        bytes: u64,
    },
    /// Chunks were found that the repository does not have.
    New {
        /// Their bytes, uncompressed.
        bytes: u64,
    },
    /// Objects were stored.
    Stored {
        /// Bytes sent to the store.
        bytes: u64,
    },
    /// Objects were read.
    Fetched {
        /// Bytes received from the store.
        bytes: u64,
    },
    /// Objects were deleted.
    Freed {
        /// Bytes given back.
        bytes: u64,
    },
    /// Something a person should know, although the operation goes on.
    Warning {
        /// One sentence.
        text: &'a str,
    },
}

/// Ignores all events.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn event(&self, _: Event<'_>) {}
}
