//! Restoring a volume: from a record to bytes in a file, on a device or in a stream.
//!
//! ```text
//! for each 4 GiB of the volume:
//!   leaves      what belongs where
//!   plan        (in place: only what differs) frames, grouped into large requests
//!   fetch       some requests at a time                         (async)
//!   workers     decompress, verify every chunk, write           (rayon)
//! ```

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use futures::{StreamExt, stream};
use serde::Serialize;

use crate::chunks::{ChunkReader, FramePlan, Loss, Outcome, Placement, ranges, requests};
use crate::context::Context;
use crate::crypto::Keys;
use crate::error::{Error, Result};
use crate::fetch::Request;
use crate::format::frame::FrameLocation;
use crate::format::leaf::{Extent, Leaf};
use crate::format::node::Child;
use crate::progress::Event;
use crate::record::VolumeRecord;
use crate::repository::Repository;
use crate::scan::is_zero;
use crate::target::{FileTarget, Sink};
use crate::tree::{self, SegmentLeaf};
use crate::verify::describe as describe_damage;
use crate::workers::Workers;

/// Requests of at most [`crate::fetch::MAX_REQUEST`] bytes in memory at one time.
const REQUESTS_IN_FLIGHT: usize = 8;

/// How to restore.
#[derive(Clone, Copy, Debug, Default)]
pub struct RestoreOptions {
    /// Read the target first and write only what differs.
    pub in_place: bool,
    /// Restore everything that is whole; report what is not instead of failing.
    pub keep_going: bool,
}

/// What a restore did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RestoreReport {
    /// The length of the volume.
    pub len_bytes: u64,
    /// Bytes written to the target.
    pub written_bytes: u64,
    /// Bytes read from packs.
    pub fetched_bytes: u64,
    /// Requests for them.
    pub gets: u64,
    /// What could not be restored. Empty unless the restore kept going.
    pub damaged: Vec<Damage>,
    /// From start to end.
    pub elapsed_ms: u64,
}

/// Ranges of a volume that can't be read, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// The object that is missing or damaged.
    pub object: String,
    /// What was expected and what was found.
    pub detail: String,
    /// Bytes of the volume.
    pub ranges: Vec<ByteRange>,
}

/// A range of bytes; `end` is not part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct ByteRange {
    /// The first byte.
    pub start: u64,
    /// The byte after the last.
    pub end: u64,
}

impl From<Range<u64>> for ByteRange {
    fn from(range: Range<u64>) -> Self {
        Self { start: range.start, end: range.end }
    }
}

/// Restores a volume to a file or device.
pub async fn restore(
    repo: &Repository,
    volume: &VolumeRecord,
    target: FileTarget,
    options: &RestoreOptions,
    ctx: &Context,
) -> Result<RestoreReport> {
    let target = Arc::new(target);
    let sink: Arc<dyn Sink> = target.clone();
    let mut work = Restore::begin(repo, volume, sink, options.keep_going, ctx).await?;
    for batch in work.batches() {
        let mut leaves = work.leaves(batch).await?;
        if target.holds_data() {
            leaves = work.prepare_target(&target, leaves, options.in_place).await?;
        }
        work.write(leaves).await?;
    }
    let workers = work.workers.clone();
    let report = work.finish()?;
    let mut target = Arc::into_inner(target).ok_or(Error::Internal("a restore worker is left"))?;
    workers.block(move || target.finish()).await??;
    Ok(report)
}

/// Restores a volume to a stream, in order.
pub async fn stream(
    repo: &Repository,
    volume: &VolumeRecord,
    mut out: Box<dyn std::io::Write + Send>,
    options: &RestoreOptions,
    ctx: &Context,
) -> Result<RestoreReport> {
    let segment = Arc::new(SegmentBuffer::default());
    let mut work = Restore::begin(repo, volume, segment.clone(), options.keep_going, ctx).await?;
    for batch in work.batches() {
        for (number, leaf) in work.leaves(batch).await? {
            let range = tree::segment_range(volume.len_bytes, number);
            segment.begin(range.clone());
            work.write(vec![(number, leaf)]).await?;
            let written;
            (out, written) = {
                let segment = segment.clone();
                let mut out = out;
                let drain = move || {
                    let result = segment.drain_to(&mut *out);
                    (out, result)
                };
                work.workers.block(drain).await?
            };
            written.map_err(Error::io("write", "standard output"))?;
        }
    }
    out.flush().map_err(Error::io("write", "standard output"))?;
    work.finish()
}

/// One segment in memory.
#[derive(Debug, Default)]
struct SegmentBuffer {
    state: Mutex<(u64, Vec<u8>)>,
}

impl SegmentBuffer {
    fn begin(&self, range: Range<u64>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 = range.start;
        // Fresh memory is zeros already: what is sparse costs no work.
        state.1 = vec![0; (range.end - range.start) as usize];
    }

    fn drain_to(&self, out: &mut dyn std::io::Write) -> std::io::Result<()> {
        out.write_all(&self.state.lock().unwrap_or_else(PoisonError::into_inner).1)
    }
}

impl Sink for SegmentBuffer {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let at = (offset - state.0) as usize;
        let place = state.1.get_mut(at..at + bytes.len());
        place.ok_or(Error::Internal("a chunk outside of its segment"))?.copy_from_slice(bytes);
        Ok(())
    }
}

/// A running restore.
pub(crate) struct Restore<'a> {
    repo: &'a Repository,
    volume: &'a VolumeRecord,
    sink: Arc<dyn Sink>,
    keep_going: bool,
    ctx: &'a Context,
    workers: Workers,
    segments: Vec<Child>,
    report: RestoreReport,
    losses: Vec<(String, FramePlan)>,
    started_ms: u64,
}

impl<'a> Restore<'a> {
    pub(crate) async fn begin(
        repo: &'a Repository,
        volume: &'a VolumeRecord,
        sink: Arc<dyn Sink>,
        keep_going: bool,
        ctx: &'a Context,
    ) -> Result<Self> {
        let started_ms = ctx.host.unix_ms();
        let workers = Workers::start(ctx)?;
        let segments = tree::segments(repo, volume, ctx).await?;
        ctx.progress.event(Event::Planned { bytes: volume.data_bytes });
        let report = RestoreReport { len_bytes: volume.len_bytes, ..RestoreReport::default() };
        let mut work = Self {
            repo,
            volume,
            sink,
            keep_going,
            ctx,
            workers,
            segments: segments.leaves,
            report,
            losses: Vec::new(),
            started_ms,
        };
        for unreadable in segments.unreadable {
            work.damage(unreadable.error, vec![unreadable.range])?;
        }
        Ok(work)
    }

    pub(crate) fn batches(&self) -> Vec<Vec<(usize, Child)>> {
        let numbered: Vec<_> = self.segments.iter().copied().enumerate().collect();
        numbered.chunks(tree::BATCH_SEGMENTS).map(<[_]>::to_vec).collect()
    }

    pub(crate) async fn leaves(
        &self,
        batch: Vec<(usize, Child)>,
    ) -> Result<Vec<(usize, SegmentLeaf)>> {
        tree::leaves(self.repo, self.volume.len_bytes, batch, &self.workers, self.ctx).await
    }

    /// Notes damage, or fails with it unless the restore keeps going.
    fn damage(&mut self, error: Error, ranges: Vec<Range<u64>>) -> Result<()> {
        let (object, detail) = match &error {
            Error::Missing { object, .. } => (object.clone(), "it is missing".to_owned()),
            Error::Damaged { object, detail } => (object.clone(), detail.clone()),
            // One block of a newer version within an older repository: most likely a flipped bit.
            Error::Version { object, .. } if self.keep_going => (object.clone(), error.to_string()),
            _ => return Err(error),
        };
        let ranges = join(ranges);
        if !self.keep_going {
            let volume = &self.volume.name;
            let detail = format!("{detail}; {} of volume {volume} need it", describe(&ranges));
            return Err(Error::Damaged { object, detail });
        }
        match self.report.damaged.iter_mut().find(|d| d.object == object && d.detail == detail) {
            Some(known) => {
                known.ranges.extend(ranges);
                known.ranges = join(known.ranges.iter().map(|r| r.start..r.end).collect());
            }
            None => self.report.damaged.push(Damage { object, detail, ranges }),
        }
        Ok(())
    }

    /// Zeroes what must be zero in a target that holds other data; with `compare`, drops extents that are already right.
    async fn prepare_target(
        &self,
        target: &Arc<FileTarget>,
        leaves: Vec<(usize, SegmentLeaf)>,
        compare: bool,
    ) -> Result<Vec<(usize, SegmentLeaf)>> {
        let len_bytes = self.volume.len_bytes;
        let ctx = self.stoppable();
        let jobs = leaves.into_iter().map(|(number, leaf)| {
            let (target, keys, ctx) = (target.clone(), self.repo.keys().clone(), ctx.clone());
            let unreadable =
                matches!(self.segments.get(number), Some(Child::Zero)) && self.is_lost(number);
            let workers = self.workers.clone();
            async move {
                let prepare = move || {
                    let Ok(leaf) = leaf else { return Ok((number, leaf)) };
                    if unreadable {
                        return Ok((number, Ok(None)));
                    }
                    let range = tree::segment_range(len_bytes, number);
                    let leaf = prepare_segment(&target, &keys, range, leaf, compare)?;
                    Ok((number, Ok(leaf)))
                };
                workers.run(&ctx, prepare).await
            }
        });
        let mut jobs = stream::iter(jobs).buffered(self.ctx.limits.threads.max(1));
        let mut prepared = Vec::new();
        while let Some(job) = jobs.next().await {
            match job {
                Ok(job) => prepared.push(job),
                Err(error) => {
                    ctx.cancel.cancel();
                    while jobs.next().await.is_some() {}
                    return Err(error);
                }
            }
        }
        Ok(prepared)
    }

    /// The context for what runs side by side: the first failure cancels the rest, and is returned only when all
    /// has ended, so that nothing writes to the target afterwards.
    fn stoppable(&self) -> Context {
        Context { cancel: self.ctx.cancel.child_token(), ..self.ctx.clone() }
    }

    /// True for a segment below a node that could not be read: it only looks like zeros.
    fn is_lost(&self, segment: usize) -> bool {
        let start = tree::segment_range(self.volume.len_bytes, segment).start;
        let ranges = self.report.damaged.iter().flat_map(|damage| &damage.ranges);
        ranges.into_iter().any(|range| range.start <= start && start < range.end)
    }

    /// Fetches, verifies and writes the chunks of some segments.
    pub(crate) async fn write(&mut self, leaves: Vec<(usize, SegmentLeaf)>) -> Result<()> {
        let mut frames: HashMap<FrameLocation, Vec<Placement>> = HashMap::new();
        for (number, leaf) in leaves {
            let range = tree::segment_range(self.volume.len_bytes, number);
            match leaf {
                Ok(Some(leaf)) => plan(&leaf, range.start, &mut frames),
                Ok(None) => {}
                Err(error) => self.damage(error, vec![range])?,
            }
        }
        let ctx = self.stoppable();
        let stop = ctx.cancel.clone();
        let (repo, sink, workers) = (self.repo.clone(), self.sink.clone(), self.workers.clone());
        let reader = ChunkReader { repo, sink: sink.clone(), workers, ctx };
        // In the order of the volume: what lies before the first place of all that is under way is settled.
        let requests = requests(frames.into_iter().collect()).into_iter();
        let mut requests: Vec<_> =
            requests.map(|request| (first_target(&request), request)).collect();
        requests.sort_by_key(|(first, _)| *first);
        let firsts = requests.iter().map(|(first, _)| *first).enumerate();
        let mut under_way: BTreeMap<usize, u64> = firsts.collect();
        let outcomes = requests.into_iter().enumerate();
        let outcomes =
            outcomes.map(async |(number, (_, request))| (number, reader.run(request).await));
        let mut outcomes = stream::iter(outcomes).buffer_unordered(REQUESTS_IN_FLIGHT);
        let mut result = Ok(());
        while let Some((number, outcome)) = outcomes.next().await {
            under_way.remove(&number);
            if let Some((_, first)) = under_way.first_key_value() {
                sink.settled(*first);
            }
            let noted = outcome.and_then(|outcome| self.note(outcome));
            if result.is_ok() && noted.is_err() {
                stop.cancel();
                result = noted;
            }
        }
        result
    }

    fn note(&mut self, outcome: Outcome) -> Result<()> {
        self.report.gets += outcome.gets;
        self.report.fetched_bytes += outcome.fetched_bytes;
        self.report.written_bytes += outcome.written_bytes;
        outcome.damaged.into_iter().try_for_each(|Loss { error, plan }| {
            let ranges = ranges(&plan);
            self.losses.push((describe_damage(&error).1, plan));
            self.damage(error, ranges)
        })
    }

    /// The chunks that could not be read since the last call: why, and the places that were tried last.
    pub(crate) fn take_losses(&mut self) -> Vec<(String, FramePlan)> {
        std::mem::take(&mut self.losses)
    }

    /// Damage that was found since the last call, when the restore keeps going.
    pub(crate) fn take_damage(&mut self) -> Vec<Damage> {
        std::mem::take(&mut self.report.damaged)
    }

    pub(crate) fn finish(mut self) -> Result<RestoreReport> {
        self.ctx.check()?;
        self.report.elapsed_ms = self.ctx.host.unix_ms().saturating_sub(self.started_ms);
        Ok(self.report)
    }
}

fn plan(leaf: &Leaf, start: u64, frames: &mut HashMap<FrameLocation, Vec<Placement>>) {
    for (at, chunk) in leaf.chunks() {
        if let Some(location) = leaf.frames.get(chunk.frame as usize) {
            let (offset, len) = (chunk.offset, chunk.len);
            let placement = Placement { id: chunk.id, offset, len, target: start + at };
            frames.entry(*location).or_default().push(placement);
        }
    }
}

/// The first byte of the volume that a request is for.
fn first_target(request: &Request<FramePlan>) -> u64 {
    let placements = request.spans.iter().flat_map(|span| &span.tag.1);
    placements.map(|placement| placement.target).min().unwrap_or_default()
}

/// Sorts ranges and joins those that touch.
pub(crate) fn join(mut ranges: Vec<Range<u64>>) -> Vec<ByteRange> {
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<ByteRange> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => joined.push(range.into()),
        }
    }
    joined
}

fn describe(ranges: &[ByteRange]) -> String {
    let first: Vec<String> =
        ranges.iter().take(3).map(|range| format!("{}..{}", range.start, range.end)).collect();
    let more = ranges.len().saturating_sub(3);
    let more = if more > 0 { format!(" and {more} more ranges") } else { String::new() };
    format!("bytes {}{more}", first.join(", "))
}

/// Goes through one segment of a target that holds data. Gives the leaf with the chunks that are still to be written.
fn prepare_segment(
    target: &FileTarget,
    keys: &Keys,
    range: Range<u64>,
    leaf: Option<Leaf>,
    compare: bool,
) -> Result<Option<Leaf>> {
    let extents = tree::extents(leaf.as_ref(), range.end - range.start).into_owned();
    let mut at = range.start;
    let mut buf = Vec::new();
    let mut kept = Vec::with_capacity(extents.len());
    for extent in extents {
        let len = extent.len_bytes();
        let same = match &extent {
            Extent::Zero { len } => {
                let zero = compare && is_zero_range(target, at, u64::from(*len), &mut buf)?;
                if !zero {
                    target.zero(at, u64::from(*len))?;
                }
                true
            }
            Extent::Chunk(chunk) if compare => {
                buf.resize(len as usize, 0);
                target.read_at(&mut buf, at)?;
                keys.chunk_id(&buf) == chunk.id
            }
            Extent::Chunk(_) => false,
        };
        // A chunk that is there already is planned as if it were zeros: nothing to do.
        kept.push(if same { Extent::Zero { len } } else { extent });
        at += u64::from(len);
    }
    Ok(leaf.map(|leaf| Leaf { frames: leaf.frames, extents: kept }))
}

fn is_zero_range(target: &FileTarget, start: u64, len: u64, buf: &mut Vec<u8>) -> Result<bool> {
    let (mut at, end) = (start, start + len);
    // Most zeros of a sparse file are holes, which need no reading.
    while let Some(data) = target.next_data(at, end)? {
        at = data.start;
        while at < data.end {
            let step = (data.end - at).min(256 << 10);
            buf.resize(step as usize, 0);
            target.read_at(buf, at)?;
            if !is_zero(buf) {
                return Ok(false);
            }
            at += step;
        }
    }
    Ok(true)
}
