//! Collects garbage in a repository of a million packs, of which only the manifests exist: they are made when asked for.
//!
//! ```console
//! $ cargo run --release -p petra-benches --example collect_million [SESSIONS]
//! ```
//!
//! Every session is the snapshot of a volume of 31 GiB that shares nothing with the others, in 1,000 data packs and one
//! manifest pack: 1,000 sessions, the default, are a million packs and 31 TiB. Chunks are of the largest default
//! size. Every tenth snapshot is deleted, and of every twentieth that is left half is shared with a deleted one. The
//! collector lists, reads, checks and walks as it always does. Prints what it did, the time and the peak memory.

#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use petra_engine::chunker::Chunking;
use petra_engine::collect::{CollectOptions, collect};
use petra_engine::crypto::Keys;
use petra_engine::format::block::{BlockKind, BlockRef};
use petra_engine::format::envelope;
use petra_engine::format::frame::FrameLocation;
use petra_engine::format::leaf::{ChunkRef, Extent, Leaf};
use petra_engine::format::node::Child;
use petra_engine::format::pack::{PackBuilder, PackKind};
use petra_engine::key::Key;
use petra_engine::record::{Decision, SnapshotRecord, SnapshotStats, VolumeRecord, kind};
use petra_engine::store::{Creation, Entry, MemoryStore, Page, Store, StoreError, StoreErrorCause};
use petra_engine::{ChunkId, Context, Name, PackId, Repository, SnapshotId, tree};

const SEGMENT: u64 = 64 << 20;
const SEGMENTS: usize = 500;
const PACKS: u32 = 1000;
const PACK_BYTES: u64 = 33 << 20;
const FRAME_STORED: u32 = 1 << 19;
const FRAME_RAW: u32 = 1 << 20;
const CHUNK: u32 = 64 << 10;
const PAGE: usize = 1000;

/// Objects of a repository that are computed, over a store for all others.
#[derive(Debug)]
struct Synthetic {
    sessions: u64,
    small: MemoryStore,
    /// Packs that were deleted.
    deleted: Mutex<std::collections::BTreeSet<PackId>>,
    manifests: Mutex<BTreeMap<u64, Arc<(Bytes, VolumeRecord)>>>,
}

fn session(number: u64) -> SnapshotId {
    SnapshotId::from_parts(1_700_000_000_000 + number, u128::from(number))
}

fn number(id: SnapshotId) -> u64 {
    id.unix_ms() - 1_700_000_000_000
}

/// The session whose packs hold a segment: every twentieth snapshot shares half of it with its neighbour.
fn home(snapshot: u64, segment: usize) -> u64 {
    if snapshot % 20 == 1 && segment.is_multiple_of(2) { snapshot - 1 } else { snapshot }
}

fn leaf(snapshot: u64, segment: usize, ids: &[ChunkId]) -> Leaf {
    let home = session(home(snapshot, segment));
    let frames = (0..SEGMENT as u32 / FRAME_RAW).map(|frame| {
        // Two packs for each segment, 32 frames in each.
        let number = segment as u32 * 2 + frame / 32;
        let offset = 16 + frame % 32 * FRAME_STORED;
        let pack = PackId { session: home, number };
        FrameLocation { pack, offset, stored_len: FRAME_STORED, raw_len: FRAME_RAW }
    });
    let chunks = ids.iter().zip(0_u32..).map(|(id, n)| {
        let (frame, offset) = (n * CHUNK / FRAME_RAW, n * CHUNK % FRAME_RAW);
        Extent::Chunk(ChunkRef { id: *id, len: CHUNK, frame, offset })
    });
    Leaf { frames: frames.collect(), extents: chunks.collect() }
}

impl Synthetic {
    fn new(sessions: u64) -> Self {
        Self {
            sessions,
            small: MemoryStore::new(),
            deleted: Mutex::default(),
            manifests: Mutex::default(),
        }
    }

    /// The manifest pack of a snapshot, and its volume.
    fn manifest(&self, snapshot: u64) -> Arc<(Bytes, VolumeRecord)> {
        if let Some(known) = self.manifests.lock().unwrap().get(&snapshot) {
            return known.clone();
        }
        let ids: Vec<ChunkId> =
            (0..SEGMENT as u32 / CHUNK).map(|n| ChunkId::of(&n.to_le_bytes())).collect();
        let digest = leaf(snapshot, 0, &ids).digest();
        let pack = PackId { session: session(snapshot), number: PACKS };
        let mut builder = PackBuilder::new(pack, PackKind::Manifest, &Keys::none());
        let mut children = Vec::new();
        for segment in 0..SEGMENTS {
            let block = leaf(snapshot, segment, &ids).encode();
            let offset = builder.add_block(BlockKind::Leaf, &block);
            let len = block.len() as u32;
            let block = BlockRef { digest, pack, offset, len };
            children.push(Child::Block { block, data_bytes: SEGMENT });
        }
        let root = tree::build(children, &[], &mut |kind, block, digest| {
            let offset = builder.add_block(kind, block);
            Ok(BlockRef { digest, pack, offset, len: block.len() as u32 })
        });
        let len = SEGMENTS as u64 * SEGMENT;
        let name = Name::new("volume", "v").unwrap();
        let volume = VolumeRecord::new(name, len, root.unwrap());
        let made = Arc::new((builder.finish().1, volume));
        let mut manifests = self.manifests.lock().unwrap();
        while manifests.len() >= 2 {
            manifests.pop_first();
        }
        manifests.insert(snapshot, made.clone());
        made
    }

    fn decision(&self, snapshot: u64) -> Bytes {
        let name = |text: &str| Name::new("name", text).unwrap();
        let record = SnapshotRecord {
            id: session(snapshot),
            experiment: name("e"),
            run: name("r"),
            name: None,
            created: jiff::Timestamp::UNIX_EPOCH,
            labels: BTreeMap::new(),
            message: None,
            metadata: BTreeMap::new(),
            parent: None,
            origin: None,
            volumes: vec![self.manifest(snapshot).1.clone()],
            stats: SnapshotStats::default(),
        };
        let stamp = format!("{snapshot:032x}");
        let decision = Decision::Commit { stamp, snapshot: Box::new(record) };
        envelope::seal(kind::DECISION, &Key::snap(session(snapshot)), &decision).unwrap()
    }

    fn missing(&self, key: &str) -> StoreError {
        StoreError {
            operation: "read",
            key: key.to_owned(),
            location: self.location(),
            cause: StoreErrorCause::NotFound,
            detail: "it was never made".to_owned(),
        }
    }

    fn synthetic(&self, key: &str) -> Option<Bytes> {
        if let Some(id) = key.strip_prefix("snaps/").and_then(|id| id.parse().ok()) {
            return (number(id) < self.sessions).then(|| self.decision(number(id)));
        }
        let pack: PackId = key.strip_prefix("packs/")?.parse().ok()?;
        let known = pack.number == PACKS && number(pack.session) < self.sessions;
        let there = known && !self.deleted.lock().unwrap().contains(&pack);
        there.then(|| self.manifest(number(pack.session)).0.clone())
    }

    /// The keys of synthetic objects after `after`, in order.
    fn keys(&self, prefix: &str, after: &str) -> Vec<Entry> {
        let entry = |key, len| Entry { key, len, modified_unix_ms: 0 };
        let mut page = Vec::new();
        if prefix == "snaps/" {
            let from = after.strip_prefix(prefix).and_then(|id| id.parse().ok());
            let from = from.map_or(0, |id| number(id) + 1);
            let to = self.sessions.min(from + PAGE as u64);
            page.extend((from..to).map(|n| entry(format!("{prefix}{}", session(n)), 1000)));
        } else if prefix == "packs/" {
            let last: Option<PackId> = after.strip_prefix(prefix).and_then(|id| id.parse().ok());
            let (mut n, mut number) =
                last.map_or((0, 0), |last| (number(last.session), last.number + 1));
            let deleted = self.deleted.lock().unwrap();
            while page.len() < PAGE && n < self.sessions {
                if number > PACKS {
                    (n, number) = (n + 1, 0);
                    continue;
                }
                let pack = PackId { session: session(n), number };
                if !deleted.contains(&pack) {
                    let len = if number == PACKS { 20 << 20 } else { PACK_BYTES };
                    page.push(entry(format!("{prefix}{pack}"), len));
                }
                number += 1;
            }
        }
        page
    }
}

#[async_trait]
impl Store for Synthetic {
    fn location(&self) -> String {
        "synthetic".to_owned()
    }

    fn create_is_exclusive(&self) -> bool {
        true
    }

    async fn get(&self, key: &Key) -> Result<Bytes, StoreError> {
        match self.synthetic(key.as_str()) {
            Some(bytes) => Ok(bytes),
            None => self.small.get(key).await,
        }
    }

    async fn get_range(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        let bytes = self.synthetic(key.as_str()).ok_or_else(|| self.missing(key.as_str()))?;
        let end = bytes.len().min(range.end as usize);
        Ok(bytes.slice((range.start as usize).min(end)..end))
    }

    async fn put(&self, key: &Key, body: Bytes) -> Result<(), StoreError> {
        self.small.put(key, body).await
    }

    async fn create(&self, key: &Key, body: Bytes) -> Result<Creation, StoreError> {
        self.small.create(key, body).await
    }

    async fn list(&self, prefix: &str, after: Option<&str>) -> Result<Page, StoreError> {
        let entries = self.keys(prefix, after.unwrap_or_default());
        if entries.is_empty() {
            return self.small.list(prefix, after).await;
        }
        Ok(Page { entries, more: true })
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        match key.as_str().strip_prefix("packs/").and_then(|id| id.parse().ok()) {
            Some(pack) => {
                self.deleted.lock().unwrap().insert(pack);
                Ok(())
            }
            None => self.small.delete(key).await,
        }
    }
}

fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[tokio::main]
async fn main() {
    let sessions = std::env::args().nth(1).map_or(1000, |n| n.parse().expect("a number"));
    let ctx = Context::default();
    let store = Arc::new(Synthetic::new(0));
    let chunking: Chunking = "cdc".parse().unwrap();
    Repository::init(store.clone(), chunking, &ctx).await.unwrap();
    let config = store.get(&Key::config()).await.unwrap();
    let store = Arc::new(Synthetic::new(sessions));
    store.put(&Key::config(), config).await.unwrap();
    let repo = Repository::open(store.clone()).await.unwrap();
    for n in (0..sessions).step_by(10) {
        repo.delete(session(n), &ctx).await.unwrap();
    }
    println!("{} packs, {} MiB before", sessions * u64::from(PACKS + 1), peak_mib());
    // The data does not exist, so that nothing could be copied.
    let options = CollectOptions {
        grace: Duration::ZERO,
        max_waste_percent: None,
        ..CollectOptions::default()
    };
    let started = Instant::now();
    let report = collect(&repo, &options, &ctx).await.unwrap();
    println!("{report:#?}");
    println!("{:.1} s, peak memory {} MiB", started.elapsed().as_secs_f64(), peak_mib());
    let deleted = sessions.div_ceil(10);
    assert_eq!(report.purged, deleted);
    // What a neighbour shares with a deleted snapshot stays, but the neighbour's own packs for it are garbage.
    let expected = deleted * u64::from(PACKS + 1);
    assert_eq!(report.deleted_packs, expected);
}
