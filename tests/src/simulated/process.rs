//! Processes: who sends requests.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use petra_engine::context::Host;
use petra_engine::store::Store;
use tokio::sync::Notify;

use super::store::SimulatedStore;
use super::world::World;

/// A process that sends requests, has a clock of its own, and can die.
#[derive(Debug)]
pub struct Process {
    name: String,
    pub(super) world: Arc<World>,
    /// How much its clock is ahead.
    skew_ms: i64,
    life: Mutex<Life>,
    death: Notify,
}

#[derive(Debug)]
pub(super) struct Life {
    pub rng: fastrand::Rng,
    /// Requests until it dies.
    left: Option<u32>,
    dead: bool,
    pub troubles: Troubles,
}

/// What a process was told wrongly so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Troubles {
    /// Requests that were answered with an error.
    pub errors: u32,
    /// Those of them that made a decision, or told of one.
    pub doubts: u32,
}

impl Process {
    /// A process that dies in its `dies_at`-th request, from 0.
    pub fn new(
        world: &Arc<World>,
        name: String,
        seed: u64,
        skew_ms: i64,
        dies_at: Option<u32>,
    ) -> Arc<Self> {
        let rng = fastrand::Rng::with_seed(seed);
        let life = Life { rng, left: dies_at, dead: false, troubles: Troubles::default() };
        let (world, life) = (world.clone(), Mutex::new(life));
        Arc::new(Self { name, world, skew_ms, life, death: Notify::new() })
    }

    /// Where it is.
    pub fn world(&self) -> &World {
        &self.world
    }

    /// Its name in the log.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits until the process dies.
    pub async fn death(&self) {
        self.death.notified().await;
    }

    /// What went wrong so far, as the process saw it.
    pub fn troubles(&self) -> Troubles {
        self.life().troubles
    }

    /// The store, as this process reaches it.
    pub fn store(self: &Arc<Self>) -> Arc<dyn Store> {
        Arc::new(SimulatedStore(self.clone()))
    }

    /// Adds a line to the log.
    pub fn note(&self, what: fmt::Arguments<'_>) {
        self.world.note(&self.name, what);
    }

    pub(super) fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a request; says whether the process dies in it.
    pub(super) fn breathe(&self) -> bool {
        let mut life = self.life();
        if life.left == Some(0) {
            life.dead = true;
        }
        life.left = life.left.and_then(|left| left.checked_sub(1));
        life.dead
    }

    /// Never returns: whoever runs the process drops it.
    pub(super) async fn die(&self) {
        self.death.notify_one();
        std::future::pending().await
    }
}

impl Host for Process {
    fn unix_ms(&self) -> u64 {
        self.world.now_ms().saturating_add_signed(self.skew_ms)
    }

    fn random(&self) -> u128 {
        self.life().rng.u128(..)
    }
}
