//! A worker: turns one segment at a time into frames and a leaf.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::packer::{Counts, Packer};
use crate::chunker::Chunking;
use crate::context::Context;
use crate::crypto::Keys;
use crate::error::{Error, Result};
use crate::format::block::BlockKind;
use crate::format::frame::{self, FrameEncoder, FrameLocation};
use crate::format::leaf::{ChunkRef, Extent, Leaf};
use crate::format::node::Child;
use crate::id::ChunkId;
use crate::index::{ChunkLocation, DedupIndex};
use crate::progress::Event;
use crate::scan::{Piece, Receiver, Scanner, Stop};
use crate::source::Source;
use crate::splice::{Changes, Spliced, compare, splice};
use crate::tree;

/// Chunks that are hashed together: about as many as a window has.
const CHUNKS_AT_ONCE: usize = 32;
/// How often progress is reported.
const REPORT_BYTES: u64 = 4 << 20;

/// One thread's state. Buffers are reused from segment to segment.
pub struct Worker<'a> {
    scanner: Scanner,
    assembler: Assembler<'a>,
}

/// How the leaf of a segment is made.
#[derive(Debug)]
pub enum Method {
    /// From all of its bytes, which may be those of the parent's leaf.
    Scan(Option<Arc<Leaf>>),
    /// It is the parent's.
    Keep,
    /// From the parent's leaf, or zeros where it had none, and the bytes around the changes.
    Splice {
        /// The parent's leaf.
        leaf: Option<Arc<Leaf>>,
        /// What has changed since.
        changes: Changes,
    },
}

impl Method {
    /// The method where the parent's leaf is `leaf`, or zeros where there is none.
    pub fn from_changes(leaf: Option<Arc<Leaf>>, changes: Option<Changes>) -> Self {
        match changes {
            None => Self::Scan(leaf),
            Some(changes) if changes.is_empty() => Self::Keep,
            Some(changes) => Self::Splice { leaf, changes },
        }
    }
}

impl<'a> Worker<'a> {
    /// A worker for one thread.
    pub fn new(
        chunking: Chunking,
        index: &'a DedupIndex,
        packer: &'a Packer,
        counts: &'a Counts,
        ctx: &'a Context,
    ) -> Result<Self> {
        let encoder = FrameEncoder::new().map_err(|_| Error::Internal("zstd has no memory"))?;
        let keys = packer.keys();
        let assembler = Assembler {
            keys,
            index,
            packer,
            counts,
            ctx,
            encoder,
            frame: Vec::with_capacity(frame::TARGET_BYTES + chunking.max_len()),
            frame_chunks: Vec::new(),
            waiting: Vec::new(),
            stored: Vec::new(),
            leaf: Leaf::default(),
            unreported: 0,
            known_frames: HashMap::new(),
            last_frame: None,
        };
        Ok(Self { scanner: Scanner::new(keys.cutter(chunking)), assembler })
    }

    /// Makes the leaf of one segment. `before` is that of the parent.
    pub fn segment(
        &mut self,
        source: &dyn Source,
        range: Range<u64>,
        before: Child,
        method: Method,
    ) -> Result<Child> {
        let Self { scanner, assembler } = self;
        assembler.begin();
        match method {
            Method::Keep => {
                assembler.ctx.progress.event(Event::Processed { bytes: before.data_bytes() });
                return Ok(before);
            }
            Method::Splice { leaf, changes } => {
                let extents = tree::extents(leaf.as_deref(), range.end - range.start);
                let frames = leaf.as_ref().map_or(&[][..], |leaf| &leaf.frames);
                splice(scanner, source, range, &extents, &changes, &mut |piece| match piece {
                    Spliced::Kept(extent) => assembler.kept(extent, frames),
                    Spliced::Scanned(piece) => assembler.piece(piece),
                })?;
            }
            Method::Scan(leaf) => {
                match (source.extents(range.clone())?, leaf) {
                    (Some(extents), _) => assembler.known(source, range.start, extents)?,
                    (None, Some(leaf)) => {
                        let (keys, frames) = (assembler.keys, &leaf.frames);
                        compare(scanner, source, range, &leaf.extents, keys, &mut |piece| {
                            match piece {
                                Spliced::Kept(extent) => assembler.kept(extent, frames),
                                Spliced::Scanned(piece) => assembler.piece(piece),
                            }
                        })?;
                    }
                    (None, None) => scanner.scan_knowing(source, range, assembler)?,
                }
            }
        }
        assembler.end(before)
    }
}

/// Collects the pieces of a segment into frames and a leaf.
struct Assembler<'a> {
    keys: &'a Keys,
    index: &'a DedupIndex,
    packer: &'a Packer,
    counts: &'a Counts,
    ctx: &'a Context,
    encoder: FrameEncoder,
    /// New chunks that are not yet in a pack.
    frame: Vec<u8>,
    frame_chunks: Vec<(ChunkId, u32)>,
    /// Extents of the leaf whose chunks are in `frame`.
    waiting: Vec<usize>,
    stored: Vec<u8>,
    leaf: Leaf,
    /// Bytes of chunks that no event has reported yet.
    unreported: u64,
    /// Positions in `leaf.frames`.
    known_frames: HashMap<FrameLocation, u32>,
    /// The one that was asked for last: mostly it is that of the next chunk too.
    last_frame: Option<(FrameLocation, u32)>,
}

impl Assembler<'_> {
    fn begin(&mut self) {
        self.frame.clear();
        self.frame_chunks.clear();
        self.waiting.clear();
        self.known_frames.clear();
        self.last_frame = None;
        self.leaf = Leaf::default();
    }

    /// Takes a segment whose chunks are known, and reads those of them that are new.
    fn known(&mut self, source: &dyn Source, start: u64, extents: Vec<Extent>) -> Result<()> {
        let (mut at, mut missing) = (start, Vec::new());
        let mut plan = Vec::with_capacity(extents.len());
        for extent in extents {
            let len = extent.len_bytes();
            plan.push(match extent {
                Extent::Zero { .. } => Some(extent),
                Extent::Chunk(chunk) => match self.index.get(&chunk.id) {
                    Some(ChunkLocation { frame, offset }) => {
                        let frame = self.frame_position(frame);
                        Some(Extent::Chunk(ChunkRef { frame, offset, ..chunk }))
                    }
                    None => {
                        missing.push((at, len));
                        None
                    }
                },
            });
            at += u64::from(len);
        }
        let mut plan = plan.into_iter();
        source.read_chunks(&missing, &mut |bytes| {
            for extent in plan.by_ref() {
                match extent {
                    Some(extent) => self.take(extent),
                    None => return self.chunk(bytes),
                }
            }
            Err(Error::Internal("a source gave more chunks than it was asked for"))
        })?;
        for extent in plan {
            self.take(extent.ok_or(Error::Internal("a source gave too few chunks"))?);
        }
        Ok(())
    }

    /// Takes an extent of the parent's leaf, which has these frames.
    fn kept(&mut self, extent: Extent, frames: &[FrameLocation]) -> Result<()> {
        let extent = match extent {
            Extent::Zero { .. } => extent,
            Extent::Chunk(chunk) => {
                let frame = frames.get(chunk.frame as usize);
                let frame = *frame.ok_or(Error::Internal("a chunk without a frame"))?;
                Extent::Chunk(ChunkRef { frame: self.frame_position(frame), ..chunk })
            }
        };
        self.take(extent);
        Ok(())
    }

    /// Takes what need not be read.
    fn take(&mut self, extent: Extent) {
        if let Extent::Chunk(chunk) = extent {
            self.unreported += u64::from(chunk.len);
            if self.unreported >= REPORT_BYTES {
                self.report();
            }
        }
        self.leaf.extents.push(extent);
    }

    fn piece(&mut self, piece: Piece<'_>) -> Result<()> {
        match piece {
            Piece::Zero(len) => self.leaf.extents.push(Extent::Zero { len }),
            Piece::Chunk(bytes) => self.chunk(bytes)?,
        }
        Ok(())
    }

    fn chunk(&mut self, bytes: &[u8]) -> Result<()> {
        self.chunk_named(self.keys.chunk_id(bytes), bytes)
    }

    fn chunk_named(&mut self, id: ChunkId, bytes: &[u8]) -> Result<()> {
        let len = bytes.len() as u32;
        self.unreported += u64::from(len);
        if self.unreported >= REPORT_BYTES {
            self.report();
        }
        if let Some(ChunkLocation { frame, offset }) = self.index.get(&id) {
            let frame = self.frame_position(frame);
            self.leaf.extents.push(Extent::Chunk(ChunkRef { id, len, frame, offset }));
            return Ok(());
        }
        let offset = match self.offset_in_frame(&id) {
            Some(offset) => offset,
            None => {
                if self.frame.len() + bytes.len() > frame::TARGET_BYTES && !self.frame.is_empty() {
                    self.flush()?;
                }
                let offset = self.frame.len() as u32;
                self.frame.extend_from_slice(bytes);
                self.frame_chunks.push((id, len));
                offset
            }
        };
        self.waiting.push(self.leaf.extents.len());
        self.leaf.extents.push(Extent::Chunk(ChunkRef { id, len, frame: u32::MAX, offset }));
        Ok(())
    }

    /// Where a chunk is in the open frame: the same data can come twice in a short stretch.
    fn offset_in_frame(&self, id: &ChunkId) -> Option<u32> {
        let mut offset = 0;
        for (known, len) in &self.frame_chunks {
            if known == id {
                return Some(offset);
            }
            offset += len;
        }
        None
    }

    fn frame_position(&mut self, location: FrameLocation) -> u32 {
        if let Some((last, position)) = self.last_frame
            && last == location
        {
            return position;
        }
        let frames = &mut self.leaf.frames;
        let position = *self.known_frames.entry(location).or_insert_with(|| {
            frames.push(location);
            (frames.len() - 1) as u32
        });
        self.last_frame = Some((location, position));
        position
    }

    /// Compresses the open frame and puts it into a pack.
    fn flush(&mut self) -> Result<()> {
        if self.frame.is_empty() {
            return Ok(());
        }
        self.encoder.encode(&self.frame, &mut self.stored);
        let lens = self.frame_chunks.iter().map(|(_, len)| *len);
        let location = self.packer.add_frame(&mut self.stored, lens)?;
        let position = self.frame_position(location);
        for at in self.waiting.drain(..) {
            if let Some(Extent::Chunk(chunk)) = self.leaf.extents.get_mut(at) {
                chunk.frame = position;
            }
        }
        let mut offset = 0;
        let extents = self.frame_chunks.drain(..).map(|(id, len)| {
            let chunk = ChunkRef { id, len, frame: 0, offset };
            offset += len;
            Extent::Chunk(chunk)
        });
        let stored = Leaf { frames: vec![location], extents: extents.collect() };
        self.index.insert(&Arc::new(stored), |_| true);
        let bytes = self.frame.len() as u64;
        self.counts.new_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.ctx.progress.event(Event::New { bytes });
        self.frame.clear();
        Ok(())
    }

    fn report(&mut self) {
        let bytes = std::mem::take(&mut self.unreported);
        self.ctx.progress.event(Event::Processed { bytes });
    }

    fn end(&mut self, before: Child) -> Result<Child> {
        self.flush()?;
        self.report();
        let leaf = &self.leaf;
        let data_bytes = leaf.data_bytes();
        if data_bytes == 0 {
            return Ok(Child::Zero);
        }
        let digest = leaf.digest();
        let block = match before {
            Child::Block { block, .. } if block.digest == digest => block,
            _ => self.packer.add_block(BlockKind::Leaf, &leaf.encode(), digest)?,
        };
        Ok(Child::Block { block, data_bytes })
    }
}

// Of a segment of which nothing is known.
impl Receiver for Assembler<'_> {
    fn take(&mut self, piece: Piece<'_>) -> Result<(), Stop> {
        Ok(self.piece(piece)?)
    }

    fn take_chunks(&mut self, chunks: &[&[u8]]) -> Result<(), Stop> {
        let keys = self.keys;
        for (id, bytes) in keys.chunk_ids(chunks).zip(chunks) {
            self.chunk_named(id, bytes)?;
        }
        Ok(())
    }

    fn chunks_at_once(&self) -> usize {
        CHUNKS_AT_ONCE
    }
}
