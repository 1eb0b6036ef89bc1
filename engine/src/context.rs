//! What the embedding program gives to an operation: clock and randomness, progress, cancellation, limits.
//! The engine takes none of them from the surroundings.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use tokio_util::sync::CancellationToken;

use crate::error::{Error, Result};
use crate::id::SnapshotId;
use crate::progress::{Progress, Silent};

/// The clock and the source of randomness.
pub trait Host: Send + Sync + fmt::Debug {
    /// Milliseconds since the Unix epoch. Used for names and policies, never for safety.
    fn unix_ms(&self) -> u64;

    /// 128 random bits. Two calls anywhere in the world must never agree, and nobody may guess them: keys come from
    /// here.
    fn random(&self) -> u128;

    /// A fresh snapshot id.
    fn new_id(&self) -> SnapshotId {
        SnapshotId::from_parts(self.unix_ms(), self.random())
    }
}

/// The machine's clock and the kernel's random numbers.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemHost;

impl Host for SystemHost {
    #[expect(clippy::disallowed_methods, reason = "this is the host")]
    fn unix_ms(&self) -> u64 {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    #[expect(clippy::disallowed_methods, reason = "this is the host")]
    #[expect(
        clippy::expect_used,
        reason = "getrandom(2) can't fail on a supported kernel, and ids must not repeat"
    )]
    fn random(&self) -> u128 {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).expect("the kernel has random numbers");
        u128::from_le_bytes(bytes)
    }

    /// Those of one process sort in the order in which they were made, also within a millisecond: "latest" is the last one.
    fn new_id(&self) -> SnapshotId {
        static LAST_MS: AtomicU64 = AtomicU64::new(0);
        let now = self.unix_ms();
        let after = |last: u64| match last.checked_sub(now) {
            // Further ahead than ids are made at once: the clock was set back, and is right.
            Some(ahead) if ahead < MAX_AHEAD_MS => last + 1,
            _ => now,
        };
        let last =
            LAST_MS.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| Some(after(last)));
        SnapshotId::from_parts(last.map_or(now, after), self.random())
    }
}

/// How far the times of ids may run ahead of the clock when many are made at once.
const MAX_AHEAD_MS: u64 = 1000;

/// Bounds on what an operation uses.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Threads that read, chunk, hash and compress. With 0 there are none: tasks of the caller's runtime do that
    /// work themselves, between their requests. For programs that must stay single-threaded, and for simulations:
    /// on a runtime of one thread, everything that the engine does then follows from its context, store and
    /// sources alone.
    pub threads: usize,
    /// Requests to the store at one time.
    pub requests: usize,
    /// Packs that are complete and on their way to the store, of the largest size: more of smaller ones.
    pub packs_in_flight: usize,
    /// Chunks the deduplication index remembers (some 60 bytes each, with the leaves that it keeps for them).
    pub index_chunks: usize,
}

impl Default for Limits {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(2, usize::from).min(16);
        Self { threads, requests: 16, packs_in_flight: 2, index_chunks: 1 << 20 }
    }
}

/// Handed to every operation. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Context {
    /// Clock and randomness.
    pub host: Arc<dyn Host>,
    /// Where events go.
    pub progress: Arc<dyn Progress>,
    /// Cancels the operation at its next step; nothing half-made becomes visible.
    pub cancel: CancellationToken,
    /// Bounds.
    pub limits: Limits,
}

impl Context {
    /// Fails once the operation was cancelled.
    pub fn check(&self) -> Result<()> {
        if self.cancel.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }
}

impl Default for Context {
    fn default() -> Self {
        Self {
            host: Arc::new(SystemHost),
            progress: Arc::new(Silent),
            cancel: CancellationToken::new(),
            limits: Limits::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_sort_as_they_were_made() {
        let ids: Vec<SnapshotId> = (0..100).map(|_| SystemHost.new_id()).collect();
        assert!(ids.is_sorted());
    }
}
