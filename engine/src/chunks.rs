//! Reading chunks: fetching their frames, verifying every chunk, and handing them over.
//!
//! ```text
//! plans -> requests -> fetch -> open, decompress, verify -> Sink
//!             ^                          |
//!             +---- relocations <--------+  missing or damaged: where compactions or repairs copied it
//! ```

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use futures::{StreamExt, stream};

use crate::context::Context;
use crate::crypto::{Keys, Piece};
use crate::error::{Error, Result};
use crate::fetch::{Fetched, Request, Span, coalesce};
use crate::format::frame::{self, FrameLocation};
use crate::id::{ChunkId, PackId};
use crate::key::Key;
use crate::progress::Event;
use crate::relocation::{self, Copied};
use crate::repository::Repository;
use crate::target::Sink;
use crate::verify::describe;
use crate::workers::Workers;

/// The same for each reader of some chunks; there may be one on every thread.
const READ_REQUESTS: usize = 2;

/// A chunk's way from its frame to the volume.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placement {
    pub(crate) id: ChunkId,
    /// First byte within the raw frame.
    pub(crate) offset: u32,
    pub(crate) len: u32,
    /// First byte within the volume.
    pub(crate) target: u64,
}

impl Placement {
    pub(crate) fn range(&self) -> Range<u64> {
        self.target..self.target + u64::from(self.len)
    }
}

/// What is wanted of one frame.
pub(crate) type FramePlan = (FrameLocation, Vec<Placement>);

/// Copies of chunks that are tried next, by the place that is tried now: the frame, the first byte in it, and that in the volume.
type OtherCopies = HashMap<(FrameLocation, u32, u64), Vec<(FrameLocation, u32)>>;

/// Chunks of a frame that can't be read, and why.
#[derive(Debug)]
pub(crate) struct Loss {
    pub(crate) error: Error,
    pub(crate) plan: FramePlan,
}

/// Fetches, verifies and writes some chunks; gives how many bytes were fetched, and what can't be read.
pub(crate) async fn read_chunks(
    repo: &Repository,
    plans: Vec<FramePlan>,
    sink: Arc<dyn Sink>,
    workers: &Workers,
    ctx: &Context,
) -> Result<(u64, Vec<Loss>)> {
    let reader =
        ChunkReader { repo: repo.clone(), sink, workers: workers.clone(), ctx: ctx.clone() };
    let requests = requests(plans).into_iter().map(|request| reader.run(request));
    let mut outcomes = stream::iter(requests).buffer_unordered(READ_REQUESTS);
    let mut all = Outcome::default();
    while let Some(outcome) = outcomes.next().await {
        all.add(outcome?);
    }
    Ok((all.fetched_bytes, all.damaged))
}

/// What fetching, verifying and writing needs.
pub(crate) struct ChunkReader {
    pub(crate) repo: Repository,
    pub(crate) sink: Arc<dyn Sink>,
    pub(crate) workers: Workers,
    pub(crate) ctx: Context,
}

impl ChunkReader {
    /// Fetches, verifies and writes all that one request is for; what is missing or damaged there, from where it was
    /// copied.
    pub(crate) async fn run(&self, request: Request<FramePlan>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let mut work = vec![(request, 0)];
        let mut others = OtherCopies::new();
        while let Some((request, moves)) = work.pop() {
            let pack = request.pack;
            let fetched = tokio::select! {
                biased;
                () = self.ctx.cancel.cancelled() => Err(Error::Cancelled),
                fetched = request.fetch(&self.repo, &self.ctx) => fetched,
            };
            let losses = match fetched {
                Ok(fetched) => {
                    let (keys, sink, ctx) =
                        (self.repo.keys().clone(), self.sink.clone(), self.ctx.clone());
                    let write = move || write_request(&request, &fetched, &keys, &*sink, &ctx);
                    let mut written = self.workers.run(&self.ctx, write).await?;
                    let losses = std::mem::take(&mut written.damaged);
                    outcome.add(written);
                    losses
                }
                Err(error) if error.is_damage() => {
                    outcome.gets += 1;
                    let lost = |span: Span<_>| Loss { error: missing(pack), plan: span.tag };
                    request.spans.into_iter().map(lost).collect()
                }
                Err(error) => return Err(error),
            };
            if losses.is_empty() || moves == relocation::MAX_MOVES {
                outcome.damaged.extend(losses);
                continue;
            }
            let moved = self.moved(pack, losses, &mut others, &mut outcome).await?;
            work.extend(moved.into_iter().map(|request| (request, moves + 1)));
        }
        Ok(outcome)
    }

    /// Requests for the places to which compactions and repairs copied what is missing or damaged. What was not copied
    /// stays lost.
    async fn moved(
        &self,
        pack: PackId,
        losses: Vec<Loss>,
        others: &mut OtherCopies,
        outcome: &mut Outcome,
    ) -> Result<Vec<Request<FramePlan>>> {
        let has_all = |copies: &[Copied]| {
            let has = |(frame, placements): &FramePlan| {
                placements.iter().all(|Placement { offset, len, .. }| {
                    copies.iter().any(|copy| copy.to.chunk(frame.offset, *offset, *len).is_some())
                })
            };
            losses.iter().all(|loss| has(&loss.plan))
        };
        let (copies, damage) = match self.repo.relocations(pack, has_all).await {
            Ok(copies) => (copies, None),
            Err(error) if error.is_damage() => (Vec::new().into(), Some(describe(&error))),
            Err(error) => return Err(error),
        };
        let mut moved: BTreeMap<(PackId, u32), FramePlan> = BTreeMap::new();
        for Loss { error, plan: (frame, placements) } in losses {
            let mut left = Vec::new();
            for placement in placements {
                let at = (frame.offset, placement.offset, placement.len);
                // Of several copies, one after the other.
                let copies = copies.iter().filter_map(|copy| copy.to.chunk(at.0, at.1, at.2));
                let place = (frame, placement.offset, placement.target);
                let mut copies = copies.chain(others.remove(&place).into_iter().flatten());
                match copies.next() {
                    Some((frame, offset)) => {
                        let rest: Vec<_> = copies.collect();
                        if !rest.is_empty() {
                            others.insert((frame, offset, placement.target), rest);
                        }
                        let plan =
                            moved.entry((frame.pack, frame.offset)).or_insert((frame, vec![]));
                        plan.1.push(Placement { offset, ..placement });
                    }
                    None => left.push(placement),
                }
            }
            if left.is_empty() {
                continue;
            }
            let error = match (&damage, error) {
                // It is gone for a good reason, but what says where to can't be read.
                (Some((object, detail)), Error::Missing { .. }) => {
                    Error::Damaged { object: object.clone(), detail: detail.clone() }
                }
                (_, error) => error,
            };
            outcome.damaged.push(Loss { error, plan: (frame, left) });
        }
        Ok(requests(moved.into_values().collect()))
    }
}

fn missing(pack: PackId) -> Error {
    let (object, needed_by) = (Key::pack(pack).to_string(), "a committed snapshot".to_owned());
    Error::Missing { object, needed_by }
}

/// Few large requests for the frames of all plans.
pub(crate) fn requests(plans: Vec<FramePlan>) -> Vec<Request<FramePlan>> {
    let span = |plan: FramePlan| Span {
        pack: plan.0.pack,
        offset: plan.0.offset,
        len: plan.0.stored_len,
        tag: plan,
    };
    coalesce(plans.into_iter().map(span).collect())
}

/// The bytes of the volume that a plan is for.
pub(crate) fn ranges(plan: &FramePlan) -> Vec<Range<u64>> {
    plan.1.iter().map(Placement::range).collect()
}

/// What came of a request.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) fetched_bytes: u64,
    pub(crate) written_bytes: u64,
    pub(crate) gets: u64,
    pub(crate) damaged: Vec<Loss>,
}

impl Outcome {
    fn add(&mut self, other: Self) {
        self.fetched_bytes += other.fetched_bytes;
        self.written_bytes += other.written_bytes;
        self.gets += other.gets;
        self.damaged.extend(other.damaged);
    }
}

/// Decompresses, verifies and writes all that one request brought.
fn write_request(
    request: &Request<FramePlan>,
    fetched: &Fetched,
    keys: &Keys,
    sink: &dyn Sink,
    ctx: &Context,
) -> Result<Outcome> {
    let mut outcome = Outcome { fetched_bytes: fetched.len_bytes(), gets: 1, ..Outcome::default() };
    let (mut opened, mut raw) = (Vec::new(), Vec::new());
    for span in &request.spans {
        ctx.check()?;
        let (location, placements) = &span.tag;
        let object = || format!("frame {}+{} of {}", span.offset, span.len, Key::pack(span.pack));
        let decoded = fetched.span(span).and_then(|stored| {
            keys.open(Piece::Frame, stored, &mut opened)
                .and_then(|stored| frame::decode(stored, location.raw_len, &mut raw))
                .map_err(|error| error.of(object()))
        });
        if let Err(error) = decoded {
            outcome.damaged.push(Loss { error, plan: span.tag.clone() });
            continue;
        }
        // The same chunk may go to several places, but is hashed once.
        let mut places: Vec<_> = placements.iter().map(|chunk| (chunk.offset, chunk.len)).collect();
        places.sort_unstable();
        places.dedup();
        let chunks: Vec<_> = places.iter().map(|(at, len)| chunk_of(&raw, *at, *len)).collect();
        let found: HashMap<_, _> = places.into_iter().zip(keys.chunk_ids(&chunks)).collect();
        let mut whole = Vec::with_capacity(placements.len());
        for placement in placements {
            let ok = found.get(&(placement.offset, placement.len)) == Some(&placement.id);
            if ok {
                whole.push(*placement);
            } else {
                let detail = format!("chunk {} expected, other bytes found", placement.id);
                let error = Error::Damaged { object: object(), detail };
                outcome.damaged.push(Loss { error, plan: (*location, vec![*placement]) });
            }
        }
        outcome.written_bytes += write_placements(&mut raw, whole, sink)?;
        let bytes = placements.iter().map(|placement| u64::from(placement.len)).sum();
        ctx.progress.event(Event::Processed { bytes });
    }
    Ok(outcome)
}

fn chunk_of(raw: &[u8], offset: u32, len: u32) -> &[u8] {
    let start = offset as usize;
    // The leaf's parser made sure that chunks lie within their frames.
    raw.get(start..start + len as usize).unwrap_or_default()
}

/// Writes verified chunks; neighbours in both frame and volume go in one call.
fn write_placements(
    raw: &mut Vec<u8>,
    mut placements: Vec<Placement>,
    sink: &dyn Sink,
) -> Result<u64> {
    placements.sort_by_key(|placement| placement.target);
    let mut written = 0;
    let mut rest = placements.into_iter();
    let mut next = rest.next();
    while let Some(mut run) = next {
        next = rest.next();
        while let Some(neighbour) = next.filter(|n| {
            n.target == run.target + u64::from(run.len) && n.offset == run.offset + run.len
        }) {
            run.len += neighbour.len;
            next = rest.next();
        }
        written += u64::from(run.len);
        if next.is_none() && run.offset == 0 && run.len as usize == raw.len() {
            sink.take(raw, run.target)?;
        } else {
            sink.write_at(chunk_of(raw, run.offset, run.len), run.target)?;
        }
    }
    Ok(written)
}
