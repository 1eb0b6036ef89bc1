//! What is counted.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use petra_engine::SnapshotId;
use petra_engine::record::SnapshotStats;
use prometheus_client::encoding::{EncodeLabelSet, text::encode};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use tonic::Code;

use super::pools::Readings;

/// Upper ends of the histogram of durations, in seconds.
const SECONDS: [f64; 12] = [0.005, 0.02, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];
/// Snapshots that are remembered, so that none counts twice.
const REMEMBERED: usize = 4096;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MethodLabels {
    method: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    method: String,
    code: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PoolLabels {
    node: String,
    pool: String,
}

/// All that is counted in this process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    operations: Family<OutcomeLabels, Counter>,
    seconds: Family<MethodLabels, Histogram, fn() -> Histogram>,
    under_way: Family<MethodLabels, Gauge>,
    snapshots: Counter,
    data_bytes: Counter,
    new_bytes: Counter,
    stored_bytes: Counter,
    ratio: Gauge<f64, AtomicU64>,
    counted: Mutex<VecDeque<SnapshotId>>,
    pools: Mutex<PoolGauges>,
}

/// What is set anew whenever somebody looks.
#[derive(Debug, Default)]
struct PoolGauges {
    total: Family<PoolLabels, Gauge>,
    free: Family<PoolLabels, Gauge>,
    reserve: Family<PoolLabels, Gauge>,
    promised: Family<PoolLabels, Gauge>,
    limit: Family<PoolLabels, Gauge>,
    volumes: Family<PoolLabels, Gauge>,
    hydrating: Family<PoolLabels, Gauge>,
    missing: Family<PoolLabels, Gauge>,
    uploads: Family<PoolLabels, Gauge>,
    away: Gauge,
}

fn durations() -> Histogram {
    Histogram::new(SECONDS)
}

impl Metrics {
    /// Nothing is counted yet.
    pub fn new() -> Arc<Self> {
        let mut registry = Registry::with_prefix("petra");
        let operations = Family::default();
        let text = "Calls that ended, by code";
        registry.register("csi_operations", text, operations.clone());
        let seconds = Family::new_with_constructor(durations as fn() -> Histogram);
        let text = "How long calls took";
        registry.register_with_unit("csi_operation_duration", text, Unit::Seconds, seconds.clone());
        let under_way = Family::default();
        registry.register("csi_operations_under_way", "Calls under way", under_way.clone());

        let snapshots = Counter::default();
        registry.register("snapshots_uploaded", "Snapshots uploaded", snapshots.clone());
        let mut bytes = |name: &str, text: &str| {
            let counter = Counter::<u64>::default();
            registry.register_with_unit(name, text, Unit::Bytes, counter.clone());
            counter
        };
        let data_bytes = bytes("snapshot_data", "Bytes in uploaded snapshots that are not zeros");
        let new_bytes = bytes("snapshot_new", "Of these, bytes that the repository did not have");
        let stored_bytes = bytes("snapshot_stored", "Bytes sent for them, compressed");
        let ratio = Gauge::default();
        let text = "Bytes in uploaded snapshots for each byte sent";
        registry.register("snapshot_deduplication_ratio", text, ratio.clone());

        let pools = PoolGauges::default();
        let mut of_pools =
            |name: &str, unit, text: &str, family: &Family<PoolLabels, Gauge>| match unit {
                Some(unit) => registry.register_with_unit(name, text, unit, family.clone()),
                None => registry.register(name, text, family.clone()),
            };
        let b = || Some(Unit::Bytes);
        of_pools("pool_size", b(), "Size of the pool's file system", &pools.total);
        of_pools("pool_free", b(), "Bytes that can still be written", &pools.free);
        of_pools("pool_reserve", b(), "Bytes held back for volumes that are there", &pools.reserve);
        of_pools("pool_promised", b(), "Sizes of all volumes together", &pools.promised);
        of_pools("pool_promise_limit", b(), "What may be promised at most", &pools.limit);
        of_pools("pool_volumes", None, "Volumes in the pool", &pools.volumes);
        of_pools("hydration_volumes", None, "Clones whose data is not all here", &pools.hydrating);
        let text = "Bytes that clones still lack, about";
        of_pools("hydration_missing", b(), text, &pools.missing);
        of_pools("uploads_pending", None, "Snapshots whose upload has not ended", &pools.uploads);
        let text = "Nodes that did not answer when this was asked for";
        registry.register("nodes_away", text, pools.away.clone());

        Arc::new(Self {
            registry,
            operations,
            seconds,
            under_way,
            snapshots,
            data_bytes,
            new_bytes,
            stored_bytes,
            ratio,
            counted: Mutex::default(),
            pools: Mutex::new(pools),
        })
    }

    /// Counts a call that begins.
    pub(super) fn begin(&self, method: &str) {
        self.under_way.get_or_create(&MethodLabels { method: method.to_owned() }).inc();
    }

    /// Counts a call that ended.
    pub(super) fn end(&self, method: &str, code: Code, took: Duration) {
        let labels = MethodLabels { method: method.to_owned() };
        self.under_way.get_or_create(&labels).dec();
        self.seconds.get_or_create(&labels).observe(took.as_secs_f64());
        let outcome = OutcomeLabels { method: method.to_owned(), code: format!("{code:?}") };
        self.operations.get_or_create(&outcome).inc();
    }

    /// Counts a snapshot whose upload ended, once, however often it is told.
    pub fn snapshot_uploaded(&self, id: SnapshotId, stats: &SnapshotStats) {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        if counted.contains(&id) {
            return;
        }
        counted.push_back(id);
        if counted.len() > REMEMBERED {
            counted.pop_front();
        }
        self.snapshots.inc();
        let data = self.data_bytes.inc_by(stats.data_bytes).saturating_add(stats.data_bytes);
        self.new_bytes.inc_by(stats.new_bytes);
        let stored =
            self.stored_bytes.inc_by(stats.stored_bytes).saturating_add(stats.stored_bytes);
        #[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
        self.ratio.set(data as f64 / stored.max(1) as f64);
    }

    /// Everything as text, in the format of OpenMetrics, with what pools say at this moment.
    pub fn text(&self, readings: &Readings) -> Result<String, fmt::Error> {
        // Held until it is written, so that two who look at the same time see whole answers.
        let pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        pools.set(readings);
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

impl PoolGauges {
    fn set(&self, readings: &Readings) {
        let families = [
            &self.total,
            &self.free,
            &self.reserve,
            &self.promised,
            &self.limit,
            &self.volumes,
            &self.hydrating,
            &self.missing,
            &self.uploads,
        ];
        for family in families {
            family.clear();
        }
        for pool in &readings.pools {
            let labels = PoolLabels { node: pool.node.clone(), pool: pool.pool.clone() };
            let room = &pool.room;
            let values = [
                room.total_bytes,
                room.free_bytes,
                room.reserve_bytes,
                room.promised_bytes,
                room.limit_bytes,
                room.volumes,
                pool.hydrating_volumes,
                pool.missing_bytes,
                pool.uploads,
            ];
            for (family, value) in families.into_iter().zip(values) {
                family.get_or_create(&labels).set(i64::try_from(value).unwrap_or(i64::MAX));
            }
        }
        self.away.set(i64::try_from(readings.away).unwrap_or(i64::MAX));
    }
}
