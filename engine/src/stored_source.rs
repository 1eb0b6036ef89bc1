//! A volume of a snapshot as the source of another: what copies between repositories read.
//!
//! It knows its holes without reading, and which segments are those of a snapshot that was copied before. Where both
//! repositories cut and name chunks alike it also gives their ids, so that only those are read that are missing there.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::runtime::Handle;

use crate::chunks::{self, Placement};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::format::SEGMENT_BYTES;
use crate::format::frame::FrameLocation;
use crate::format::leaf::{ChunkRef, Extent, Leaf};
use crate::format::node::Child;
use crate::id::SnapshotId;
use crate::progress::{Event, Progress};
use crate::record::VolumeRecord;
use crate::repository::Repository;
use crate::source::Source;
use crate::target::Sink;
use crate::tree;
use crate::workers::Workers;

/// Bytes of chunks that are read together. Each thread holds as many.
const WINDOW_BYTES: u64 = 8 << 20;

/// A volume of a snapshot.
///
/// Its methods wait for the store, so they must be called where blocking is allowed, while the runtime that
/// [`open`](Self::open) was called on goes on.
#[derive(Debug)]
pub struct StoredSource {
    repo: Repository,
    volume: VolumeRecord,
    segments: Vec<Child>,
    unchanged: Option<Unchanged>,
    gives_ids: bool,
    ctx: Context,
    runtime: Handle,
    workers: Workers,
    /// Segments that are being read, the one used last at the end: at most one for each thread.
    reading: Mutex<Vec<Open>>,
    fetched_bytes: AtomicU64,
}

/// Segments that are the same in a snapshot that was copied before.
#[derive(Debug)]
struct Unchanged {
    /// The copy.
    copy: SnapshotId,
    /// By segment.
    same: Vec<bool>,
}

/// A segment that is being read.
#[derive(Debug)]
struct Open {
    segment: usize,
    leaf: Arc<Leaf>,
    window: Window,
}

/// Some chunks of a segment in memory.
#[derive(Debug, Default)]
struct Window {
    /// Addresses that it has everything of; where there is no chunk there are zeros.
    range: Range<u64>,
    /// Address, length and place in `bytes`, ascending.
    chunks: Vec<(u64, u32, usize)>,
    bytes: Vec<u8>,
}

impl StoredSource {
    /// Opens a volume. `copied` is the same volume of a snapshot of this repository, and the copy of that snapshot in
    /// the repository that this one goes to. With `gives_ids`, that repository cuts and names chunks as this one.
    pub async fn open(
        repo: &Repository,
        volume: &VolumeRecord,
        copied: Option<(SnapshotId, &VolumeRecord)>,
        gives_ids: bool,
        ctx: &Context,
    ) -> Result<Self> {
        let workers = Workers::start(ctx)?;
        Self::open_with(repo, volume, copied, gives_ids, &workers, ctx).await
    }

    /// The same with threads that all volumes of a snapshot share.
    pub(crate) async fn open_with(
        repo: &Repository,
        volume: &VolumeRecord,
        copied: Option<(SnapshotId, &VolumeRecord)>,
        gives_ids: bool,
        workers: &Workers,
        ctx: &Context,
    ) -> Result<Self> {
        let segments = readable_segments(repo, volume, ctx).await?;
        let unchanged = match copied {
            // A parent that can't be read only costs time.
            Some((copy, parent)) => readable_segments(repo, parent, ctx).await.ok().map(|before| {
                let same = segments.iter().zip(before).enumerate().map(|(n, (now, before))| {
                    let range = |volume: &VolumeRecord| tree::segment_range(volume.len_bytes, n);
                    range(volume) == range(parent) && now.has_content_of(&before)
                });
                Unchanged { copy, same: same.collect() }
            }),
            None => None,
        };
        // The pipeline says itself what it has processed.
        let progress = Arc::new(FetchedOnly(ctx.progress.clone()));
        Ok(Self {
            repo: repo.clone(),
            volume: volume.clone(),
            segments,
            unchanged,
            gives_ids,
            ctx: Context { progress, ..ctx.clone() },
            runtime: Handle::current(),
            workers: workers.clone(),
            reading: Mutex::default(),
            fetched_bytes: AtomicU64::new(0),
        })
    }

    /// Bytes read from packs so far, those of manifests not counted.
    pub fn fetched_bytes(&self) -> u64 {
        self.fetched_bytes.load(Ordering::Relaxed)
    }

    /// Works with a segment; None when it is all zeros.
    fn with_segment<T>(
        &self,
        segment: usize,
        work: impl FnOnce(&mut Open) -> Result<T>,
    ) -> Result<Option<T>> {
        let Some(Child::Block { block, .. }) = self.segments.get(segment) else { return Ok(None) };
        let known = {
            let mut reading = self.reading();
            let at = reading.iter().position(|open| open.segment == segment);
            at.map(|at| reading.remove(at))
        };
        let mut current = match known {
            Some(open) => open,
            None => {
                let range = tree::segment_range(self.volume.len_bytes, segment);
                let read = tree::read_leaf(&self.repo, block, range.end - range.start);
                let leaf = Arc::new(self.runtime.block_on(read)?);
                Open { segment, leaf, window: Window::default() }
            }
        };
        let result = work(&mut current);
        let mut reading = self.reading();
        if reading.len() >= self.ctx.limits.threads.max(1) {
            reading.remove(0);
        }
        reading.push(current);
        result.map(Some)
    }

    fn reading(&self) -> MutexGuard<'_, Vec<Open>> {
        // Only pushed to and removed from, so a panic elsewhere does not spoil it.
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads some chunks of a leaf, given by their addresses.
    fn load(&self, leaf: &Leaf, chunks: &[(u64, ChunkRef)]) -> Result<Window> {
        self.ctx.check()?;
        let mut plans: HashMap<FrameLocation, Vec<Placement>> = HashMap::new();
        let mut places = Vec::with_capacity(chunks.len());
        let mut len_bytes = 0;
        for (target, chunk) in chunks {
            let Some(frame) = leaf.frames.get(chunk.frame as usize) else { continue };
            let ChunkRef { id, len, offset, .. } = *chunk;
            plans.entry(*frame).or_default().push(Placement { id, offset, len, target: *target });
            places.push((*target, len, len_bytes));
            len_bytes += len as usize;
        }
        let sink = Arc::new(Scattered { places, bytes: Mutex::new(vec![0; len_bytes]) });
        let plans = plans.into_iter().collect();
        let read = chunks::read_chunks(&self.repo, plans, sink.clone(), &self.workers, &self.ctx);
        let (fetched, losses) = self.runtime.block_on(read)?;
        if let Some(loss) = losses.into_iter().next() {
            return Err(loss.error);
        }
        self.fetched_bytes.fetch_add(fetched, Ordering::Relaxed);
        let bytes = std::mem::take(&mut *sink.bytes.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(Window { range: 0..0, chunks: sink.places.clone(), bytes })
    }

    /// Reads chunks from the one at `from` on.
    fn load_window(&self, open: &mut Open, from: u64, at_least: u64) -> Result<()> {
        let start = tree::segment_range(self.volume.len_bytes, open.segment).start;
        let end_of = |at: u64, chunk: &ChunkRef| at + u64::from(chunk.len);
        let until = from + at_least.max(WINDOW_BYTES);
        let chunks: Vec<(u64, ChunkRef)> = open
            .leaf
            .chunks()
            .map(|(at, chunk)| (start + at, *chunk))
            .filter(|(at, chunk)| end_of(*at, chunk) > from && *at < until)
            .collect();
        open.window = self.load(&open.leaf, &chunks)?;
        open.window.range = from..until;
        Ok(())
    }
}

async fn readable_segments(
    repo: &Repository,
    volume: &VolumeRecord,
    ctx: &Context,
) -> Result<Vec<Child>> {
    let segments = tree::segments(repo, volume, ctx).await?;
    match segments.unreadable.into_iter().next() {
        Some(unreadable) => Err(unreadable.error),
        None => Ok(segments.leaves),
    }
}

impl Window {
    /// Fills `buf` from `at`, which the window covers.
    fn copy_to(&self, buf: &mut [u8], at: u64) {
        buf.fill(0);
        let end = at + buf.len() as u64;
        let first = self.chunks.partition_point(|(start, len, _)| start + u64::from(*len) <= at);
        for (start, len, place) in self.chunks.iter().skip(first) {
            if *start >= end {
                break;
            }
            let (from, to) = ((*start).max(at), (start + u64::from(*len)).min(end));
            let source = place + (from - start) as usize;
            let source = self.bytes.get(source..source + (to - from) as usize);
            let target = buf.get_mut((from - at) as usize..(to - at) as usize);
            if let (Some(source), Some(target)) = (source, target) {
                target.copy_from_slice(source);
            }
        }
    }
}

impl Source for StoredSource {
    fn len_bytes(&self) -> u64 {
        self.volume.len_bytes
    }

    fn data_bytes_hint(&self) -> u64 {
        self.volume.data_bytes
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let segment = (at / SEGMENT_BYTES) as usize;
            let end = tree::segment_range(self.volume.len_bytes, segment).end;
            let step = end.saturating_sub(at).min(rest.len() as u64);
            let (piece, after) = rest.split_at_mut(step as usize);
            if piece.is_empty() {
                return Err(Error::Internal("a read past the end of a volume"));
            }
            let read = self.with_segment(segment, |open| {
                if open.window.range.start > at || open.window.range.end < at + step {
                    self.load_window(open, at, step)?;
                }
                open.window.copy_to(piece, at);
                if at + step == end {
                    // Read to its end: what other volumes are read with needs the memory.
                    open.window = Window::default();
                }
                Ok(())
            });
            if read?.is_none() {
                piece.fill(0);
            }
            (at, rest) = (at + step, after);
        }
        Ok(())
    }

    fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        let first = (from / SEGMENT_BYTES) as usize;
        for segment in first..self.segments.len() {
            let start = tree::segment_range(self.volume.len_bytes, segment).start;
            let found = self.with_segment(segment, |open| {
                let mut at = start;
                let mut found: Option<Range<u64>> = None;
                for extent in &open.leaf.extents {
                    let end = at + u64::from(extent.len_bytes());
                    match (&mut found, extent) {
                        (Some(range), Extent::Chunk(_)) => range.end = end,
                        (Some(_), Extent::Zero { .. }) => break,
                        (None, Extent::Chunk(_)) if end > from => found = Some(at.max(from)..end),
                        (None, _) => {}
                    }
                    at = end;
                }
                Ok(found)
            });
            if let Some(Some(range)) = found? {
                return Ok(Some(range));
            }
        }
        Ok(None)
    }

    /// All or nothing: the manifests tell which segments are the same, and chunks are known by their ids.
    fn changed(&self, segment: Range<u64>, parent: SnapshotId) -> Option<Vec<Range<u64>>> {
        let number = (segment.start / SEGMENT_BYTES) as usize;
        let unchanged = self.unchanged.as_ref().filter(|unchanged| unchanged.copy == parent);
        (unchanged?.same.get(number) == Some(&true)).then(Vec::new)
    }

    fn extents(&self, segment: Range<u64>) -> Result<Option<Vec<Extent>>> {
        if !self.gives_ids {
            return Ok(None);
        }
        let number = (segment.start / SEGMENT_BYTES) as usize;
        let extents = self.with_segment(number, |open| Ok(open.leaf.extents.clone()))?;
        let len = (segment.end - segment.start) as u32;
        Ok(Some(extents.unwrap_or_else(|| vec![Extent::Zero { len }])))
    }

    fn read_chunks(
        &self,
        chunks: &[(u64, u32)],
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let Some((first, _)) = chunks.first() else { return Ok(()) };
        let segment = (first / SEGMENT_BYTES) as usize;
        let start = tree::segment_range(self.volume.len_bytes, segment).start;
        let leaf = self.with_segment(segment, |open| Ok(open.leaf.clone()))?;
        let leaf = leaf.ok_or(Error::Internal("a chunk of a segment without any"))?;
        let mut wanted = chunks.iter().peekable();
        let mut batch = Vec::new();
        let mut batch_bytes = 0;
        for (at, chunk) in leaf.chunks().map(|(at, chunk)| (start + at, *chunk)) {
            if wanted.next_if(|(wanted, len)| *wanted == at && *len == chunk.len).is_none() {
                continue;
            }
            batch.push((at, chunk));
            batch_bytes += u64::from(chunk.len);
            if batch_bytes >= WINDOW_BYTES || wanted.peek().is_none() {
                let window = self.load(&leaf, &batch)?;
                for (_, len, place) in &window.chunks {
                    take(window.bytes.get(*place..place + *len as usize).unwrap_or_default())?;
                }
                batch.clear();
                batch_bytes = 0;
            }
        }
        if wanted.peek().is_some() {
            return Err(Error::Internal("chunks that the segment does not have"));
        }
        Ok(())
    }

    /// What is stored never changes.
    fn check_unchanged(&self) -> Result<()> {
        Ok(())
    }
}

/// Takes chunks of a volume to their places in memory.
#[derive(Debug)]
struct Scattered {
    /// Address, length and place, ascending; neighbours in the volume are neighbours in memory.
    places: Vec<(u64, u32, usize)>,
    bytes: Mutex<Vec<u8>>,
}

impl Sink for Scattered {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let after = self.places.partition_point(|(at, ..)| *at <= offset);
        let chunk = after.checked_sub(1).and_then(|n| self.places.get(n));
        let place = chunk.map(|(at, _, place)| place + (offset - at) as usize);
        let mut all = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let target = place.and_then(|place| all.get_mut(place..place + bytes.len()));
        target.ok_or(Error::Internal("a chunk that was not asked for"))?.copy_from_slice(bytes);
        Ok(())
    }
}

/// Passes on what was fetched, and warnings.
#[derive(Debug)]
struct FetchedOnly(Arc<dyn Progress>);

impl Progress for FetchedOnly {
    fn event(&self, event: Event<'_>) {
        if matches!(event, Event::Fetched { .. } | Event::Warning { .. }) {
            self.0.event(event);
        }
    }
}
