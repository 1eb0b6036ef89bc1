//! A clock that a test sets, and random numbers that repeat.

use std::sync::atomic::{AtomicU64, Ordering};

use petra_engine::context::Host;

/// Time stands still but for [`advance`](Self::advance); random numbers are a hash of a counter.
#[derive(Debug)]
pub struct FixedHost {
    seed: u64,
    now_ms: AtomicU64,
    drawn: AtomicU64,
}

impl FixedHost {
    /// A host of its own: hosts of different seeds never draw the same number.
    pub fn new(seed: u64, now_ms: u64) -> Self {
        Self { seed, now_ms: now_ms.into(), drawn: 0.into() }
    }

    /// Lets time pass.
    pub fn advance(&self, ms: u64) {
        self.now_ms.fetch_add(ms, Ordering::Relaxed);
    }
}

impl Host for FixedHost {
    fn unix_ms(&self) -> u64 {
        self.now_ms.load(Ordering::Relaxed)
    }

    fn random(&self) -> u128 {
        let drawn = self.drawn.fetch_add(1, Ordering::Relaxed);
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.seed.to_le_bytes()).update(&drawn.to_le_bytes());
        let mut bytes = [0; 16];
        hasher.finalize_xof().fill(&mut bytes);
        u128::from_le_bytes(bytes)
    }
}
