//! Snapshots and reads a volume of 10 TiB of unique data, of which only the manifest exists: its leaves are made when asked
//! for.
//!
//! ```console
//! $ cargo run --release -p petra-benches --example ten_tib [TIB]
//! ```
//!
//! The volume has 64 segments of 1 MiB changed, which is known (as from an extent map), and nothing else of it can be read.
//! Prints how long the snapshot takes, how long it takes to read the first bytes of it after opening it, what was asked of the
//! store, how many chunks a second the index finds, and the peak memory, of which the store's own part is told.

#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use petra_engine::crypto::Keys;
use petra_engine::format::block::{BlockKind, BlockRef};
use petra_engine::format::envelope;
use petra_engine::format::frame::FrameLocation;
use petra_engine::format::leaf::{ChunkRef, Extent, Leaf};
use petra_engine::format::node::Child;
use petra_engine::format::pack::{HEADER_BYTES, PackBuilder, PackKind};
use petra_engine::index::DedupIndex;
use petra_engine::key::Key;
use petra_engine::reader::VolumeReader;
use petra_engine::record::{Decision, SnapshotRecord, SnapshotStats, VolumeRecord, kind};
use petra_engine::snapshot::{Parent, SnapshotRequest, snapshot};
use petra_engine::source::Source;
use petra_engine::store::{Creation, MemoryStore, Page, Store, StoreError};
use petra_engine::{ChunkId, Context, Name, PackId, Repository, Result, SnapshotId, tree};

const SEGMENT: u64 = 64 << 20;
const MIB: u64 = 1 << 20;
const CHUNK: u32 = 16 << 10;
const CHUNKS: u32 = (SEGMENT / CHUNK as u64) as u32;
const FRAME_RAW: u32 = 1 << 20;
const FRAME_STORED: u32 = 1 << 19;
/// Leaves in a manifest pack, each in a place of fixed length.
const LEAVES: u32 = 200;
const LEAF_PLACE: u32 = 160 << 10;
/// The packs of nodes, which are real.
const NODES_FROM: u32 = 1 << 30;
const CHANGES: u64 = 64;

/// The session that made the volume.
fn first() -> SnapshotId {
    SnapshotId::from_parts(1_700_000_000_000, 1)
}

/// Four numbers that nobody else has (splitmix64).
fn chunk_id(number: u64) -> ChunkId {
    let mut id = [0; 32];
    for (word, n) in id.as_chunks_mut::<8>().0.iter_mut().zip(0..) {
        let mut x = (number * 4 + n).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        *word = (x ^ (x >> 31)).to_le_bytes();
    }
    ChunkId(id)
}

fn leaf(segment: u32) -> Leaf {
    let frames = (0..SEGMENT as u32 / FRAME_RAW).map(|frame| FrameLocation {
        pack: PackId { session: first(), number: segment },
        offset: HEADER_BYTES as u32 + frame * FRAME_STORED,
        stored_len: FRAME_STORED,
        raw_len: FRAME_RAW,
    });
    let chunks = (0..CHUNKS).map(|n| {
        let id = chunk_id(u64::from(segment) * u64::from(CHUNKS) + u64::from(n));
        let (frame, offset) = (n / (FRAME_RAW / CHUNK), n % (FRAME_RAW / CHUNK) * CHUNK);
        Extent::Chunk(ChunkRef { id, len: CHUNK, frame, offset })
    });
    Leaf { frames: frames.collect(), extents: chunks.collect() }
}

/// Where a leaf is: behind the packs of data.
fn place(segment: u32, segments: u32) -> (PackId, u32) {
    let number = segments + segment / LEAVES;
    let offset = HEADER_BYTES as u32 + segment % LEAVES * LEAF_PLACE;
    (PackId { session: first(), number }, offset)
}

/// A store that makes the leaves of the volume, and keeps all else.
#[derive(Debug)]
struct Synthetic {
    segments: u32,
    small: MemoryStore,
    gets: AtomicU64,
    lists: AtomicU64,
    puts: AtomicU64,
}

impl Synthetic {
    /// The leaf at a place, if it is one.
    fn leaf_at(&self, key: &str, range: &Range<u64>) -> Option<Bytes> {
        let pack: PackId = key.strip_prefix("packs/")?.parse().ok()?;
        if pack.session != first() || !(self.segments..NODES_FROM).contains(&pack.number) {
            return None;
        }
        let from = (range.start as u32 - HEADER_BYTES as u32) / LEAF_PLACE;
        let to = (range.end as u32 - 1 - HEADER_BYTES as u32) / LEAF_PLACE;
        let mut bytes = Vec::with_capacity(((to - from + 1) * LEAF_PLACE) as usize);
        for n in from..=to {
            let block = leaf((pack.number - self.segments) * LEAVES + n).encode();
            bytes.extend_from_slice(&block);
            bytes.resize(((n - from + 1) * LEAF_PLACE) as usize, 0);
        }
        let skip = range.start as usize - HEADER_BYTES - (from * LEAF_PLACE) as usize;
        Some(Bytes::from(bytes).slice(skip..skip + (range.end - range.start) as usize))
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
        self.gets.fetch_add(1, Ordering::Relaxed);
        self.small.get(key).await
    }

    async fn get_range(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.gets.fetch_add(1, Ordering::Relaxed);
        match self.leaf_at(key.as_str(), &range) {
            Some(bytes) => Ok(bytes),
            None => self.small.get_range(key, range).await,
        }
    }

    async fn put(&self, key: &Key, body: Bytes) -> Result<(), StoreError> {
        self.puts.fetch_add(1, Ordering::Relaxed);
        self.small.put(key, body).await
    }

    async fn create(&self, key: &Key, body: Bytes) -> Result<Creation, StoreError> {
        self.puts.fetch_add(1, Ordering::Relaxed);
        self.small.create(key, body).await
    }

    async fn list(&self, prefix: &str, after: Option<&str>) -> Result<Page, StoreError> {
        self.lists.fetch_add(1, Ordering::Relaxed);
        self.small.list(prefix, after).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.small.delete(key).await
    }
}

/// The volume, of which some is known to have changed.
#[derive(Debug)]
struct Changed {
    len_bytes: u64,
}

impl Changed {
    /// The first bytes that changed, and how far it is from each change to the next.
    fn stride(&self) -> u64 {
        self.len_bytes / CHANGES / SEGMENT * SEGMENT
    }
}

impl Source for Changed {
    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&offset.to_le_bytes()).finalize_xof().fill(buf);
        Ok(())
    }

    fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        Ok((from < self.len_bytes).then_some(from..self.len_bytes))
    }

    fn changed(&self, segment: Range<u64>, parent: SnapshotId) -> Option<Vec<Range<u64>>> {
        assert_eq!(parent, first());
        let at = segment.start;
        let here = at.is_multiple_of(self.stride()) && at / self.stride() < CHANGES;
        Some(here.then(|| at..at + MIB).into_iter().collect())
    }

    fn check_unchanged(&self) -> Result<()> {
        Ok(())
    }
}

/// Makes the volume's nodes, and the decision that commits its snapshot.
async fn make(store: &Synthetic, len_bytes: u64) {
    let mut children = Vec::with_capacity(store.segments as usize);
    for segment in 0..store.segments {
        let leaf = leaf(segment);
        let (pack, offset) = place(segment, store.segments);
        let len = leaf.encode().len() as u32;
        assert!(len <= LEAF_PLACE);
        let block = BlockRef { digest: leaf.digest(), pack, offset, len };
        children.push(Child::Block { block, data_bytes: leaf.data_bytes() });
    }
    let pack = PackId { session: first(), number: NODES_FROM };
    let mut builder = PackBuilder::new(pack, PackKind::Manifest, &Keys::none());
    let root = tree::build(children, &[], &mut |kind: BlockKind, block, digest| {
        let offset = builder.add_block(kind, block);
        Ok(BlockRef { digest, pack, offset, len: block.len() as u32 })
    });
    let body = builder.finish().1;
    store.small.put(&Key::pack(pack), body).await.unwrap();
    let record = SnapshotRecord {
        id: first(),
        experiment: name("e"),
        run: name("r"),
        name: None,
        created: jiff::Timestamp::UNIX_EPOCH,
        labels: BTreeMap::new(),
        message: None,
        metadata: BTreeMap::new(),
        parent: None,
        origin: None,
        volumes: vec![VolumeRecord::new(name("v"), len_bytes, root.unwrap())],
        stats: SnapshotStats::default(),
    };
    let decision = Decision::Commit { stamp: format!("{:032x}", 1), snapshot: Box::new(record) };
    let key = Key::snap(first());
    let sealed = envelope::seal(kind::DECISION, &key, &decision).unwrap();
    store.small.create(&key, sealed).await.unwrap();
}

fn name(text: &str) -> Name {
    Name::new("name", text).unwrap()
}

fn memory_mib(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

fn index_rate() -> (f64, f64) {
    let count = 1 << 20;
    let index = DedupIndex::new(count);
    let leaves: Vec<Arc<Leaf>> = (0..count as u32 / CHUNKS).map(|n| Arc::new(leaf(n))).collect();
    let ids = leaves.iter().flat_map(|leaf| leaf.chunks()).map(|(_, chunk)| chunk.id);
    let ids: Vec<ChunkId> = ids.collect();
    let begun = Instant::now();
    for leaf in &leaves {
        index.insert(leaf, |_| true);
    }
    let inserted = begun.elapsed();
    let begun = Instant::now();
    let found = ids.iter().rev().filter(|id| index.get(id).is_some()).count();
    assert!(found >= count / 2);
    let rate = |time: std::time::Duration| count as f64 / time.as_secs_f64() / 1e6;
    (rate(inserted), rate(begun.elapsed()))
}

#[tokio::main]
async fn main() {
    let tib: u64 = std::env::args().nth(1).map_or(10, |n| n.parse().expect("a number"));
    let source = Changed { len_bytes: tib << 40 };
    let ctx = Context::default();
    let store = Arc::new(Synthetic {
        segments: (source.len_bytes / SEGMENT) as u32,
        small: MemoryStore::new(),
        gets: AtomicU64::new(0),
        lists: AtomicU64::new(0),
        puts: AtomicU64::new(0),
    });
    Repository::init(store.clone(), "fixed-16k".parse().unwrap(), &ctx).await.unwrap();
    make(&store, source.len_bytes).await;
    let before = memory_mib("VmHWM");
    println!(
        "{} leaves, {} chunks; {before} MiB to make them",
        store.segments,
        u64::from(store.segments) * u64::from(CHUNKS)
    );

    let requests =
        || [&store.gets, &store.puts, &store.lists].map(|n| n.swap(0, Ordering::Relaxed));
    requests();
    let begun = Instant::now();
    let repo = Repository::open(store.clone()).await.unwrap();
    let stride = source.stride();
    let request = SnapshotRequest {
        experiment: name("e"),
        run: name("r"),
        name: None,
        labels: BTreeMap::new(),
        message: None,
        metadata: BTreeMap::new(),
        parent: Parent::Snapshot(first()),
        volumes: vec![(name("v"), Arc::new(source))],
    };
    let taken = snapshot(&repo, request, &ctx).await.unwrap();
    let took = begun.elapsed();
    let [gets, puts, lists] = requests();
    println!(
        "snapshot, 1 MiB changed in each of {CHANGES} segments: {:.2} s, {gets} GET, {puts} PUT, {lists} LIST, {} MiB stored",
        took.as_secs_f64(),
        taken.stats.stored_bytes >> 20,
    );
    assert_eq!(taken.stats.new_bytes, CHANGES * MIB);

    let begun = Instant::now();
    let repo = Repository::open(store.clone()).await.unwrap();
    let reader = VolumeReader::open(&repo, &taken.volumes[0], &ctx).unwrap();
    let at = stride * (CHANGES - 1);
    let reading = reader.read(at..at + 4096).await.unwrap();
    assert!(reading.damaged.is_empty());
    let [gets, puts, lists] = requests();
    println!(
        "first read of it: {:.1} ms, {gets} GET, {puts} PUT, {lists} LIST",
        begun.elapsed().as_secs_f64() * 1000.0
    );

    println!(
        "peak memory {} MiB, with the {} MiB that the store has got",
        memory_mib("VmHWM"),
        taken.stats.stored_bytes >> 20
    );
    let (inserts, gets) = index_rate();
    println!("index of 2^20 chunks, one thread: {inserts:.1} M inserts/s, {gets:.1} M look-ups/s");
}
