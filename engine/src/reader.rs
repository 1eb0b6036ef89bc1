//! Random access to a stored volume: what a lazy clone reads from.
//!
//! ```text
//! range -> nodes -> leaf -> frames of all chunks that overlap -> batches -> fetch, verify -> pieces
//!         (cached)  (cached)           ^ being fetched for someone else: wait for that
//! ```
//!
//! Opening reads nothing. Nodes and leaves are read when they are first touched, so that the first byte of a volume of any
//! size is a handful of requests away. Whatever a fetched frame holds of the same segment is handed over too: it was
//! paid for, and what lies together is used together.

mod stretch;

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt, Shared, WeakShared};
use futures::{StreamExt, stream};
use tokio::sync::OnceCell;

use crate::chunks::{ChunkReader, FramePlan, Outcome, Placement, ranges};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::fetch::{Request, Span, coalesce};
use crate::format::block::BlockRef;
use crate::format::frame::FrameLocation;
use crate::format::leaf::{ChunkRef, Extent, Leaf};
use crate::format::node::{self, Child, FAN_OUT, Node};
use crate::format::{BLOCK_BYTES, SEGMENT_BYTES};
use crate::record::VolumeRecord;
use crate::repository::Repository;
use crate::target::Sink;
use crate::tree;
use crate::workers::Workers;

pub use self::stretch::{Portion, Stretch};

/// Leaves that are kept: of the smallest chunks some hundred KiB each.
const LEAVES: usize = 64;
/// Nodes that are kept: some 60 KiB each. One of the lowest level covers 64 GiB.
const NODES: usize = 64;
/// Bytes of fetched data that are kept.
const RECENT_BYTES: u64 = 32 << 20;
/// Requests of one read that are under way at one time.
const REQUESTS_IN_FLIGHT: usize = 4;

/// A stored volume, open for reads at any place. Many may run at once.
pub struct VolumeReader {
    repo: Repository,
    volume: VolumeRecord,
    ctx: Context,
    workers: Workers,
    nodes: Cache<(u8, u64), Node>,
    leaves: Cache<u64, Leaf>,
    /// Frames of segments that are being fetched, or were just now.
    under_way: Mutex<HashMap<(u64, FrameLocation), UnderWay>>,
    recent: Mutex<Recent>,
}

/// The last batches. Frames do not end where blocks do, so whoever reads on needs the last one again.
#[derive(Default)]
struct Recent {
    batches: VecDeque<(Fetching, u64)>,
    bytes: u64,
}

/// What a read brought.
#[derive(Debug, Default)]
pub struct Reading {
    /// In address order, not overlapping: all of the range that is whole, and what came along. Whole blocks of
    /// [`BLOCK_BYTES`]; only the volume's last may be shorter.
    pub pieces: Vec<Piece>,
    /// Blocks of the range that can't be read.
    pub damaged: Vec<DamagedRange>,
}

/// A part of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Zeros.
    Zeros(Range<u64>),
    /// Data, verified.
    Data {
        /// Its first byte in the volume.
        offset: u64,
        /// The bytes.
        bytes: Bytes,
    },
}

impl Piece {
    /// The bytes of the volume that it holds.
    pub fn range(&self) -> Range<u64> {
        match self {
            Self::Zeros(range) => range.clone(),
            Self::Data { offset, bytes } => *offset..offset + bytes.len() as u64,
        }
    }
}

/// A part of a volume that can't be read, and why.
#[derive(Clone, Debug)]
pub struct DamagedRange {
    /// Bytes of the volume.
    pub range: Range<u64>,
    /// What is missing or damaged.
    pub error: Arc<Error>,
}

/// What a batch of frames brought: the same for all who wait for it.
type Fetched = Result<Arc<Batch>, Arc<Error>>;
type Fetching = Shared<BoxFuture<'static, Fetched>>;
/// The same, without keeping it alive.
type UnderWay = WeakShared<BoxFuture<'static, Fetched>>;

/// What is wanted of a frame, and the segment that it is for.
type SegmentPlan = (u64, FramePlan);

/// The chunks of some frames.
#[derive(Debug)]
struct Batch {
    /// By address.
    pieces: Vec<(u64, Bytes)>,
    lost: Vec<DamagedRange>,
}

impl std::fmt::Debug for VolumeReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VolumeReader").field("volume", &self.volume.name).finish_non_exhaustive()
    }
}

impl VolumeReader {
    /// Opens a volume. Makes no request.
    pub fn open(repo: &Repository, volume: &VolumeRecord, ctx: &Context) -> Result<Self> {
        Ok(Self {
            repo: repo.clone(),
            volume: volume.clone(),
            ctx: ctx.clone(),
            workers: Workers::start(ctx)?,
            nodes: Cache::new(NODES),
            leaves: Cache::new(LEAVES),
            under_way: Mutex::default(),
            recent: Mutex::default(),
        })
    }

    /// The length of the volume.
    pub fn len_bytes(&self) -> u64 {
        self.volume.len_bytes
    }

    /// True when a whole segment is known to be zeros, or lies past the end. Needs the nodes only.
    pub async fn is_zero_segment(&self, segment: u64) -> Result<bool> {
        Ok(matches!(self.segment(segment).await?, Child::Zero))
    }

    /// Reads a range, which is widened to whole blocks. Damage is in the answer; any other error ends the call, and says
    /// nothing about the data. Memory is that of the range and of the frames that it touches, so callers keep ranges
    /// to some MiB.
    pub async fn read(&self, range: Range<u64>) -> Result<Reading, Arc<Error>> {
        let range = blocks_around(range, self.volume.len_bytes);
        let mut reading = Reading::default();
        let mut at = range.start;
        while at < range.end {
            let segment = at / SEGMENT_BYTES;
            let bounds = tree::segment_range(self.volume.len_bytes, segment as usize);
            let end = bounds.end.min(range.end);
            match self.read_segment(segment, &bounds, at..end).await {
                Ok(part) => {
                    reading.pieces.extend(part.pieces);
                    reading.damaged.extend(part.damaged);
                }
                // A leaf or node: all below it is lost.
                Err(error) if error.is_unreadable() => {
                    reading.damaged.push(DamagedRange { range: at..end, error });
                }
                Err(error) => return Err(error),
            }
            at = end;
        }
        Ok(reading)
    }

    /// Reads some blocks of one segment.
    async fn read_segment(
        &self,
        segment: u64,
        bounds: &Range<u64>,
        wanted: Range<u64>,
    ) -> Result<Reading, Arc<Error>> {
        let Some(leaf) = self.leaf(segment, bounds).await.map_err(Arc::new)? else {
            return Ok(Reading { pieces: vec![Piece::Zeros(wanted)], damaged: vec![] });
        };
        let plans = plan(&leaf, bounds.start, std::slice::from_ref(&wanted));
        let fetching = self.fetch(plans.into_iter().map(|plan| (segment, plan)).collect());
        // Collected, since with a closure in it the future would not be Send for every lifetime.
        let fetched: Vec<_> = fetching
            .into_iter()
            .map(|fetching| async move { (fetching.clone().await, fetching) })
            .collect();
        let mut batches = stream::iter(fetched).buffer_unordered(REQUESTS_IN_FLIGHT);
        let (mut pieces, mut lost) = (Vec::new(), Vec::new());
        while let Some((batch, fetching)) = batches.next().await {
            let batch = batch?;
            // What is damaged now may be repaired when it is asked for again.
            if batch.lost.is_empty() {
                self.keep(fetching, &batch);
            }
            pieces.extend(batch.pieces.iter().cloned());
            lost.extend(batch.lost.iter().cloned());
        }
        pieces.sort_unstable_by_key(|(at, _)| *at);
        Ok(Assembly { bounds, wanted, pieces, lost }.assemble(&leaf))
    }

    /// What a segment refers to.
    async fn segment(&self, segment: u64) -> Result<Child> {
        let (mut child, root_level) = self.volume.root();
        for level in (1..=root_level).rev() {
            let Child::Block { block, .. } = child else { return Ok(Child::Zero) };
            let below = node::child_bytes(level) / SEGMENT_BYTES;
            let at = segment / below;
            let node = self.node(level, at / FAN_OUT as u64, &block).await?;
            let place = (at % FAN_OUT as u64) as usize;
            child = node.children.get(place).copied().unwrap_or(Child::Zero);
        }
        Ok(child)
    }

    async fn node(&self, level: u8, number: u64, block: &BlockRef) -> Result<Arc<Node>> {
        let total = self.volume.len_bytes.div_ceil(node::child_bytes(level));
        let before = (number * FAN_OUT as u64).min(total);
        let count = (total - before).min(FAN_OUT as u64) as usize;
        let cell = self.nodes.cell((level, number));
        let read = || async {
            tree::read_node(&self.repo, block, level, count, &self.ctx).await.map(Arc::new)
        };
        cell.get_or_try_init(read).await.cloned()
    }

    /// The leaf of a segment; None when it is all zeros.
    async fn leaf(&self, segment: u64, bounds: &Range<u64>) -> Result<Option<Arc<Leaf>>> {
        self.ctx.check()?;
        let Child::Block { block, .. } = self.segment(segment).await? else { return Ok(None) };
        let cell = self.leaves.cell(segment);
        let read = || async {
            tree::read_leaf(&self.repo, &block, bounds.end - bounds.start).await.map(Arc::new)
        };
        cell.get_or_try_init(read).await.cloned().map(Some)
    }

    /// Batches that bring all frames of some plans: those that are under way, and new ones.
    fn fetch(&self, plans: Vec<SegmentPlan>) -> Vec<Fetching> {
        let mut batches: Vec<Fetching> = Vec::new();
        let mut new: Vec<SegmentPlan> = Vec::new();
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        for (segment, plan) in plans {
            match under_way.get(&(segment, plan.0)).and_then(WeakShared::upgrade) {
                Some(known) if batches.iter().any(|batch| batch.ptr_eq(&known)) => {}
                Some(known) => batches.push(known),
                None => new.push((segment, plan)),
            }
        }
        for Request { pack, range, spans } in requests(new) {
            let mut frames = Vec::with_capacity(spans.len());
            let spans =
                spans.into_iter().map(|Span { pack, offset, len, tag: (segment, plan) }| {
                    frames.push((segment, plan.0));
                    Span { pack, offset, len, tag: plan }
                });
            let spans = spans.collect();
            let batch = self.start(Request { pack, range, spans });
            for frame in frames {
                if let Some(batch) = batch.downgrade() {
                    under_way.insert(frame, batch);
                }
            }
            batches.push(batch);
        }
        // Those that nobody waits for any more.
        if under_way.len() > 64 * REQUESTS_IN_FLIGHT {
            under_way.retain(|_, batch| batch.upgrade().is_some());
        }
        batches
    }

    /// Keeps a batch for a while.
    fn keep(&self, fetching: Fetching, batch: &Batch) {
        let bytes = batch.pieces.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if recent.batches.iter().any(|(known, _)| known.ptr_eq(&fetching)) {
            return;
        }
        recent.batches.push_back((fetching, bytes));
        recent.bytes += bytes;
        while recent.bytes > RECENT_BYTES {
            let Some((_, bytes)) = recent.batches.pop_front() else { break };
            recent.bytes -= bytes;
        }
    }

    fn start(&self, request: Request<FramePlan>) -> Fetching {
        let sink = Arc::new(Collect::default());
        let reader = ChunkReader {
            repo: self.repo.clone(),
            sink: sink.clone(),
            workers: self.workers.clone(),
            ctx: self.ctx.clone(),
        };
        let run = async move {
            let Outcome { damaged, .. } = reader.run(request).await.map_err(Arc::new)?;
            let lost = damaged.into_iter().flat_map(|loss| {
                let ranges = ranges(&loss.plan);
                let error = Arc::new(loss.error);
                ranges.into_iter().map(move |range| DamagedRange { range, error: error.clone() })
            });
            Ok(Arc::new(Batch {
                pieces: std::mem::take(&mut *sink.pieces()),
                lost: lost.collect(),
            }))
        };
        run.boxed().shared()
    }
}

/// Few large requests for the frames of all plans.
fn requests(plans: Vec<SegmentPlan>) -> Vec<Request<SegmentPlan>> {
    let span = |plan: SegmentPlan| {
        let FrameLocation { pack, offset, stored_len, .. } = plan.1.0;
        Span { pack, offset, len: stored_len, tag: plan }
    };
    coalesce(plans.into_iter().map(span).collect())
}

/// All frames that hold chunks of ranges, which are in order, each with all its chunks in the segment.
fn plan(leaf: &Leaf, start: u64, wanted: &[Range<u64>]) -> Vec<FramePlan> {
    let range = |at: u64, chunk: &ChunkRef| start + at..start + at + u64::from(chunk.len);
    let mut plans: HashMap<u32, Vec<Placement>> = HashMap::new();
    for (at, chunk) in leaf.chunks() {
        if overlaps(wanted, &range(at, chunk)) {
            plans.entry(chunk.frame).or_default();
        }
    }
    for (at, chunk) in leaf.chunks() {
        if let Some(placements) = plans.get_mut(&chunk.frame) {
            let ChunkRef { id, len, offset, .. } = *chunk;
            placements.push(Placement { id, offset, len, target: start + at });
        }
    }
    let located = |(frame, placements)| Some((*leaf.frames.get(frame as usize)?, placements));
    plans.into_iter().filter_map(located).collect()
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// True when a range overlaps one of several, which are in order.
fn overlaps(all: &[Range<u64>], range: &Range<u64>) -> bool {
    let first = all.partition_point(|one| one.end <= range.start);
    all.get(first).is_some_and(|one| overlap(one, range))
}

const BLOCK: u64 = BLOCK_BYTES as u64;

/// The blocks that a range touches.
fn blocks_around(range: Range<u64>, len_bytes: u64) -> Range<u64> {
    range.start / BLOCK * BLOCK..range.end.next_multiple_of(BLOCK).min(len_bytes)
}

/// The blocks that lie within a range. `end` is that of the segment, where a shorter block is whole.
fn blocks_within(range: &Range<u64>, end: u64) -> Range<u64> {
    let start = range.start.next_multiple_of(BLOCK);
    let last = if range.end == end { end } else { range.end / BLOCK * BLOCK };
    start..last.max(start)
}

/// What was fetched of a segment, on its way to whole blocks.
struct Assembly<'a> {
    bounds: &'a Range<u64>,
    wanted: Range<u64>,
    /// By address.
    pieces: Vec<(u64, Bytes)>,
    lost: Vec<DamagedRange>,
}

/// A part of a run: zeros where there are no bytes.
type Part = (Range<u64>, Option<Bytes>);

impl Assembly<'_> {
    fn assemble(&self, leaf: &Leaf) -> Reading {
        let mut reading = Reading::default();
        // Neighbouring extents that are known.
        let mut run: Vec<Part> = Vec::new();
        let mut at = self.bounds.start;
        for extent in &leaf.extents {
            let range = at..at + u64::from(extent.len_bytes());
            at = range.end;
            let known = match extent {
                Extent::Zero { .. } => Some(None),
                Extent::Chunk(_) => self.bytes(&range).map(Some),
            };
            match known {
                Some(bytes) => run.push((range, bytes)),
                None => {
                    self.cut(&std::mem::take(&mut run), &mut reading.pieces);
                    reading.damaged.extend(self.damage(range));
                }
            }
        }
        self.cut(&run, &mut reading.pieces);
        reading
    }

    /// The bytes of a chunk, if it was fetched.
    fn bytes(&self, range: &Range<u64>) -> Option<Bytes> {
        let after = self.pieces.partition_point(|(at, _)| *at <= range.start);
        let (at, bytes) = self.pieces.get(after.checked_sub(1)?)?;
        let start = (range.start - at) as usize;
        let end = start + (range.end - range.start) as usize;
        (end <= bytes.len()).then(|| bytes.slice(start..end))
    }

    /// A chunk that is not there: damaged if it was wanted.
    fn damage(&self, chunk: Range<u64>) -> Option<DamagedRange> {
        if !overlap(&chunk, &self.wanted) {
            return None;
        }
        let blocks = blocks_around(chunk.clone(), self.bounds.end);
        let range = blocks.start.max(self.wanted.start)..blocks.end.min(self.wanted.end);
        let loss = self.lost.iter().find(|lost| overlap(&lost.range, &chunk));
        let error = loss.map_or_else(
            || Arc::new(Error::Internal("a chunk was neither fetched nor lost")),
            |loss| loss.error.clone(),
        );
        Some(DamagedRange { range, error })
    }

    /// Cuts a run into pieces of whole blocks.
    fn cut(&self, run: &[Part], pieces: &mut Vec<Piece>) {
        let (Some((first, _)), Some((last, _))) = (run.first(), run.last()) else { return };
        let range = first.start..last.end;
        let all_zeros = run.iter().all(|(_, bytes)| bytes.is_none());
        if all_zeros && !overlap(&range, &self.wanted) {
            return;
        }
        let whole = blocks_within(&range, self.bounds.end);
        let mut data = Data { offset: whole.start, bytes: Vec::new() };
        for (range, bytes) in run {
            let kept = range.start.max(whole.start)..range.end.min(whole.end);
            if kept.is_empty() {
                continue;
            }
            match bytes {
                Some(bytes) => {
                    let start = (kept.start - range.start) as usize;
                    let end = (kept.end - range.start) as usize;
                    data.bytes.extend_from_slice(bytes.get(start..end).unwrap_or_default());
                }
                None => {
                    let zeros = blocks_within(&kept, self.bounds.end);
                    if zeros.is_empty() {
                        data.zeros(kept.end);
                        continue;
                    }
                    data.zeros(zeros.start);
                    data.finish(zeros.end, pieces);
                    pieces.push(Piece::Zeros(zeros));
                    data.zeros(kept.end);
                }
            }
        }
        data.finish(whole.end, pieces);
    }
}

/// A piece that is being put together.
struct Data {
    offset: u64,
    bytes: Vec<u8>,
}

impl Data {
    /// Goes on with zeros up to an address.
    fn zeros(&mut self, until: u64) {
        self.bytes.resize(until.saturating_sub(self.offset) as usize, 0);
    }

    /// Ends the piece, if there is anything in it. The next begins at `next`.
    fn finish(&mut self, next: u64, pieces: &mut Vec<Piece>) {
        let bytes = std::mem::take(&mut self.bytes);
        if !bytes.is_empty() {
            pieces.push(Piece::Data { offset: self.offset, bytes: bytes.into() });
        }
        self.offset = next;
    }
}

/// Takes verified chunks.
#[derive(Debug, Default)]
struct Collect(Mutex<Vec<(u64, Bytes)>>);

impl Collect {
    fn pieces(&self) -> MutexGuard<'_, Vec<(u64, Bytes)>> {
        // Only pushed to, so a panic elsewhere does not spoil it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sink for Collect {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.pieces().push((offset, Bytes::copy_from_slice(bytes)));
        Ok(())
    }

    fn take(&self, frame: &mut Vec<u8>, offset: u64) -> Result<()> {
        self.pieces().push((offset, std::mem::take(frame).into()));
        Ok(())
    }
}

/// What was used last, each read once however many ask for it at one time.
struct Cache<K, V> {
    capacity: usize,
    entries: Mutex<Entries<K, V>>,
}

type Cell<V> = Arc<OnceCell<Arc<V>>>;

struct Entries<K, V> {
    used: u64,
    /// When it was used last, and what it is.
    cells: HashMap<K, (u64, Cell<V>)>,
}

impl<K: Copy + Eq + std::hash::Hash, V> Cache<K, V> {
    fn new(capacity: usize) -> Self {
        Self { capacity, entries: Mutex::new(Entries { used: 0, cells: HashMap::new() }) }
    }

    /// The place of a value. Whoever comes first fills it.
    fn cell(&self, key: K) -> Cell<V> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.used += 1;
        let now = entries.used;
        if !entries.cells.contains_key(&key) && entries.cells.len() >= self.capacity {
            let oldest = entries.cells.iter().min_by_key(|(_, (used, _))| *used);
            if let Some(oldest) = oldest.map(|(key, _)| *key) {
                entries.cells.remove(&oldest);
            }
        }
        let (used, cell) = entries.cells.entry(key).or_default();
        *used = now;
        cell.clone()
    }
}
