//! Storing what was lost once more, and saying where it is now.
//!
//! A healing is committed like a compaction: readers that find a piece missing or damaged look up where it was
//! copied, and collectors keep the copies. It changes and deletes nothing, so it can run beside anything else. Chunks
//! are stored anew. Manifest blocks refer to packs of others, so the snapshots that they are taken from are pinned.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;

use super::damage::{Damage, LostChunk};
use super::{Healed, Origin, RepairOptions};
use crate::chunker::Chunking;
use crate::chunks::{self, Placement};
use crate::collect::Copier;
use crate::context::Context;
use crate::crypto::Keys;
use crate::error::{Error, Result};
use crate::format::frame::FrameLocation;
use crate::id::{ChunkId, PackId, SnapshotId};
use crate::key::Key;
use crate::name::Name;
use crate::record::kind;
use crate::repository::Repository;
use crate::scan::{Piece, Scanner};
use crate::session::Session;
use crate::source::Source;
use crate::target::Sink;
use crate::tree;
use crate::workers::Workers;

/// Bytes of chunks that are read together.
const BATCH_BYTES: usize = 8 << 20;
/// Chunks of a source that wait to be stored.
const CHUNKS_WAITING: usize = 64;

/// Heals what it can, and takes it out of `damage`.
pub(super) async fn heal(
    repo: &Repository,
    damage: &mut Damage,
    options: &RepairOptions,
    ctx: &Context,
) -> Result<Vec<Healed>> {
    let mut work = Healing::begin(repo, damage, options.dry_run, ctx).await?;
    let committed = match work.run(damage, options).await {
        Ok(()) if work.by_pack.is_empty() => {
            work.abandon().await;
            return Ok(vec![]);
        }
        Ok(()) => work.commit().await,
        Err(error) => Err(error),
    };
    match committed {
        Ok(()) => Ok(work.healed()),
        Err(error @ Error::Lost { .. }) => Err(error),
        Err(error) => {
            work.abandon().await;
            Err(error)
        }
    }
}

struct Healing<'a> {
    repo: &'a Repository,
    ctx: &'a Context,
    /// None in a dry run, which writes nothing.
    session: Option<Session>,
    /// Snapshots that are pinned: their blocks refer to packs that must not go before this is committed.
    witnesses: Vec<SnapshotId>,
    workers: Workers,
    /// Away while a worker has it.
    copier: Option<Copier>,
    by_pack: BTreeMap<(PackId, Origin), Counts>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    chunks: u64,
    blocks: u64,
    bytes: u64,
}

impl<'a> Healing<'a> {
    async fn begin(
        repo: &'a Repository,
        damage: &Damage,
        dry_run: bool,
        ctx: &'a Context,
    ) -> Result<Self> {
        let candidates = damage.blocks.values().flat_map(|lost| &lost.candidates);
        let owners: BTreeSet<SnapshotId> = candidates.map(|(_, snapshot)| *snapshot).collect();
        let owners: Vec<SnapshotId> = owners.into_iter().collect();
        let (session, witnesses) = if dry_run {
            (None, owners)
        } else {
            let (session, valid) = Session::begin(repo, &owners, ctx).await?;
            (Some(session), valid)
        };
        let id = session.as_ref().map_or_else(|| ctx.host.new_id(), Session::id);
        Ok(Self {
            repo,
            ctx,
            session,
            witnesses,
            workers: Workers::start(ctx)?,
            copier: Some(Copier::new(id, repo.keys(), ctx)?),
            by_pack: BTreeMap::new(),
        })
    }

    async fn run(&mut self, damage: &mut Damage, options: &RepairOptions) -> Result<()> {
        self.blocks(damage).await?;
        self.duplicates(damage).await?;
        for (name, source) in &options.sources {
            if damage.chunks.is_empty() {
                break;
            }
            self.source(damage, name, source.clone()).await?;
        }
        Ok(())
    }

    /// Heals manifest blocks from blocks of the same content.
    async fn blocks(&mut self, damage: &mut Damage) -> Result<()> {
        let mut healed = Vec::new();
        for (place, lost) in &damage.blocks {
            self.ctx.check()?;
            for (candidate, snapshot) in &lost.candidates {
                if !self.witnesses.contains(snapshot) {
                    continue;
                }
                let bytes = match tree::read_block(self.repo, candidate).await {
                    Ok(bytes) => bytes,
                    Err(error) if error.is_unreadable() => continue,
                    Err(error) => return Err(error),
                };
                let (kind, block) = (lost.kind, lost.block);
                let added = self.with_copier(move |copier| {
                    copier.add_block(block.pack, block.offset, block.len, kind, &bytes)
                });
                match added.await {
                    Ok(()) => {}
                    // The search found that it says the same; it may have been damaged since.
                    Err(error) if error.is_unreadable() => continue,
                    Err(error) => return Err(error),
                }
                let counts = self.by_pack.entry((place.0, Origin::Repository)).or_default();
                counts.blocks += 1;
                healed.push(*place);
                break;
            }
        }
        for place in healed {
            damage.blocks.remove(&place);
        }
        Ok(())
    }

    /// Heals chunks that are stored in another place as well.
    async fn duplicates(&mut self, damage: &mut Damage) -> Result<()> {
        let most = damage.chunks.values().map(|lost| lost.candidates.len()).max().unwrap_or(0);
        for attempt in 0..most {
            let mut batch: Vec<(ChunkId, u32, FrameLocation, u32)> = Vec::new();
            let mut bytes = 0;
            let tries: Vec<_> = damage
                .chunks
                .iter()
                .filter_map(|(id, lost)| {
                    let (frame, offset) = lost.candidates.get(attempt)?;
                    Some((*id, lost.len, *frame, *offset))
                })
                .collect();
            for one in tries {
                bytes += one.1 as usize;
                batch.push(one);
                if bytes >= BATCH_BYTES {
                    self.batch(damage, std::mem::take(&mut batch)).await?;
                    bytes = 0;
                }
            }
            self.batch(damage, batch).await?;
        }
        Ok(())
    }

    async fn batch(
        &mut self,
        damage: &mut Damage,
        batch: Vec<(ChunkId, u32, FrameLocation, u32)>,
    ) -> Result<()> {
        self.ctx.check()?;
        let mut plans: HashMap<FrameLocation, Vec<Placement>> = HashMap::new();
        let mut places: Vec<(ChunkId, Range<usize>)> = Vec::with_capacity(batch.len());
        let mut end = 0;
        for (id, len, frame, offset) in batch {
            let place = end..end + len as usize;
            end = place.end;
            let target = place.start as u64;
            plans.entry(frame).or_default().push(Placement { id, offset, len, target });
            places.push((id, place));
        }
        let sink = Arc::new(Buffer(Mutex::new(vec![0; end])));
        let plans = plans.into_iter().collect();
        let read = chunks::read_chunks(self.repo, plans, sink.clone(), &self.workers, self.ctx);
        let (_, losses) = read.await?;
        let lost: HashSet<u64> =
            losses.iter().flat_map(|loss| &loss.plan.1).map(|placement| placement.target).collect();
        let buffer = std::mem::take(&mut *sink.0.lock().unwrap_or_else(PoisonError::into_inner));
        for (id, place) in places {
            if !lost.contains(&(place.start as u64)) {
                let bytes = buffer.get(place).unwrap_or_default().to_vec();
                self.chunk(damage, id, bytes, Origin::Repository).await?;
            }
        }
        Ok(())
    }

    /// Heals chunks that a volume still has: first where they were in it, then wherever they are.
    async fn source(
        &mut self,
        damage: &mut Damage,
        name: &Name,
        source: Arc<dyn Source>,
    ) -> Result<()> {
        let wanted: BTreeMap<ChunkId, (u32, Vec<u64>)> = damage
            .chunks
            .iter()
            .map(|(id, LostChunk { len, addresses, .. })| {
                let of_volume = addresses.iter().filter(|(volume, _)| volume == name);
                (*id, (*len, of_volume.map(|(_, at)| *at).collect()))
            })
            .collect();
        let (found, mut chunks) = mpsc::channel(CHUNKS_WAITING);
        let (chunking, keys) = (self.repo.config().chunking, self.repo.keys().clone());
        let ctx = self.ctx.clone();
        let search = tokio::task::spawn_blocking(move || {
            search(&*source, wanted, chunking, &keys, &ctx, &mut |id, bytes| {
                // The other end is gone only after it failed, and that failure is the one to report.
                found.blocking_send((id, bytes)).map_err(|_| Error::Cancelled)
            })
        });
        let mut healed = Ok(());
        while let Some((id, bytes)) = chunks.recv().await {
            healed = self.chunk(damage, id, bytes, Origin::Source(name.clone())).await;
            if healed.is_err() {
                break;
            }
        }
        drop(chunks);
        let searched = search.await.map_err(|_| Error::Internal("searching a source panicked"))?;
        healed?;
        searched
    }

    /// Stores a chunk for each place that lost it.
    async fn chunk(
        &mut self,
        damage: &mut Damage,
        id: ChunkId,
        bytes: Vec<u8>,
        origin: Origin,
    ) -> Result<()> {
        let Some(lost) = damage.chunks.remove(&id) else { return Ok(()) };
        for (pack, ..) in &lost.places {
            let counts = self.by_pack.entry((*pack, origin.clone())).or_default();
            counts.chunks += 1;
            counts.bytes += bytes.len() as u64;
        }
        self.with_copier(move |copier| {
            for (pack, frame, start) in lost.places {
                copier.add_chunk(pack, frame, start, &bytes);
            }
            Ok(())
        })
        .await
    }

    /// Works with the copier where it may take its time, then stores the packs that are complete.
    async fn with_copier<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Copier) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let away = || Error::Internal("a worker kept what it was lent");
        let mut copier = self.copier.take().ok_or_else(away)?;
        let done = self.workers.run(self.ctx, move || {
            let result = work(&mut copier);
            let complete = copier.take_complete();
            Ok((copier, complete, result))
        });
        let (copier, complete, result) = done.await?;
        self.copier = Some(copier);
        for (id, bytes) in complete {
            if self.session.is_some() {
                self.repo.store().put(&Key::pack(id), bytes).await?;
            }
        }
        result
    }

    async fn commit(&mut self) -> Result<()> {
        let moves = self.with_copier(|copier| Ok(copier.finish())).await?;
        let Some(session) = &mut self.session else { return Ok(()) };
        // Hints first: without them nobody would find what the decision says.
        for moved in &moves {
            let key = Key::moves(moved.source, session.id());
            self.repo.store().put(&key, self.repo.seal(kind::MOVE, &key, &())?).await?;
        }
        self.ctx.check()?;
        session.commit_moves(moves).await?;
        // What was found before lacks these.
        self.repo.relocation_cache().clear();
        Ok(())
    }

    /// Lets collectors have what was stored at once. Best effort: silence would do in the end.
    async fn abandon(&mut self) {
        let stored = !self.by_pack.is_empty();
        if let Some(session) = self.session.as_mut().filter(|s| stored || s.puts() > 0) {
            session.abandon().await;
        }
    }

    fn healed(&self) -> Vec<Healed> {
        let healed = self.by_pack.iter().map(|((pack, origin), counts)| Healed {
            pack: *pack,
            from: origin.clone(),
            chunks: counts.chunks,
            blocks: counts.blocks,
            bytes: counts.bytes,
        });
        healed.collect()
    }
}

/// Looks for chunks in a source.
fn search(
    source: &dyn Source,
    mut wanted: BTreeMap<ChunkId, (u32, Vec<u64>)>,
    chunking: Chunking,
    keys: &Keys,
    ctx: &Context,
    found: &mut dyn FnMut(ChunkId, Vec<u8>) -> Result<()>,
) -> Result<()> {
    let mut here = Vec::new();
    for (id, (len, addresses)) in &wanted {
        ctx.check()?;
        for at in addresses {
            if at + u64::from(*len) > source.len_bytes() {
                continue;
            }
            let mut bytes = vec![0; *len as usize];
            source.read_at(&mut bytes, *at)?;
            if keys.chunk_id(&bytes) == *id {
                found(*id, bytes)?;
                here.push(*id);
                break;
            }
        }
    }
    for id in here {
        wanted.remove(&id);
    }
    let mut scanner = Scanner::new(keys.cutter(chunking));
    for segment in 0..tree::segment_count(source.len_bytes()) {
        if wanted.is_empty() {
            break;
        }
        let range = tree::segment_range(source.len_bytes(), segment);
        scanner.scan(source, range.start, range.end - range.start, &mut |piece| {
            ctx.check()?;
            let Piece::Chunk(bytes) = piece else { return Ok(()) };
            let id = keys.chunk_id(bytes);
            if wanted.remove(&id).is_some() {
                found(id, bytes.to_vec())?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Memory that chunks are read into.
#[derive(Debug)]
struct Buffer(Mutex<Vec<u8>>);

impl Sink for Buffer {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let at = offset as usize;
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let place = all.get_mut(at..at + bytes.len());
        place.ok_or(Error::Internal("a chunk that was not asked for"))?.copy_from_slice(bytes);
        Ok(())
    }
}
