//! What pools say when somebody looks.

use async_trait::async_trait;
use petra_volume::pool::{Pool, Status as Room};
use petra_volume::snapshot;
use std::fmt;
use std::os::unix::fs::MetadataExt;

/// Where values come from that are asked for when somebody looks.
#[async_trait]
pub trait Source: Send + Sync + fmt::Debug {
    /// What there is to say now.
    async fn read(&self) -> Readings;

    /// Whether calls can be served; if not, why.
    async fn ready(&self) -> Result<(), String>;
}

/// Values at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Readings {
    /// Pools that this process has.
    pub pools: Vec<PoolReading>,
    /// How many nodes do not answer.
    pub away: u64,
}

/// A pool at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolReading {
    /// The node's name.
    pub node: String,
    /// The pool's id.
    pub pool: String,
    /// Its room.
    pub room: Room,
    /// Clones whose data is not all here.
    pub hydrating_volumes: u64,
    /// What they lack, about: what they write themselves looks like data that arrived.
    pub missing_bytes: u64,
    /// Snapshots whose upload has not ended.
    pub uploads: u64,
}

impl PoolReading {
    /// Looks at a pool. Blocks.
    pub fn of(node: &str, pool: &Pool) -> petra_volume::Result<Self> {
        let mut reading = Self {
            node: node.to_owned(),
            pool: pool.state().id.to_string(),
            room: pool.status()?,
            hydrating_volumes: 0,
            missing_bytes: 0,
            uploads: snapshot::pending(pool)?.len().try_into().unwrap_or(u64::MAX),
        };
        for volume in pool.volumes()? {
            // One that was deleted meanwhile, or is damaged, lacks nothing that could come.
            let Ok(state) = volume.state() else { continue };
            let Some(lazy) = state.lazy.filter(|lazy| !lazy.hydrated) else { continue };
            let here = std::fs::metadata(volume.image()).map_or(0, |found| found.blocks() * 512);
            reading.hydrating_volumes += 1;
            reading.missing_bytes += lazy.volume.data_bytes.saturating_sub(here);
        }
        Ok(reading)
    }
}

/// A node: one pool.
#[derive(Clone, Debug)]
pub struct OfPool {
    /// The node's name.
    pub node: String,
    /// The pool.
    pub pool: Pool,
}

#[async_trait]
impl Source for OfPool {
    async fn read(&self) -> Readings {
        let this = self.clone();
        let read = tokio::task::spawn_blocking(move || PoolReading::of(&this.node, &this.pool));
        match read.await {
            Ok(Ok(reading)) => Readings { pools: vec![reading], away: 0 },
            Ok(Err(error)) => {
                tracing::warn!(%error, "the pool can't be looked at");
                Readings::default()
            }
            Err(_) => Readings::default(),
        }
    }

    async fn ready(&self) -> Result<(), String> {
        let pool = self.pool.clone();
        match tokio::task::spawn_blocking(move || pool.status().map(drop)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }
}
