//! Packs that grow, and their way to the store.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::task::JoinSet;

use super::halt::Halt;
use crate::context::Context;
use crate::crypto::{Keys, Piece};
use crate::error::{Error, Result};
use crate::format::block::{BlockKind, BlockRef};
use crate::format::frame::{self, FrameLocation};
use crate::format::pack::{PackBuilder, PackKind, TARGET_BYTES};
use crate::id::{Digest, PackId, SnapshotId};
use crate::key::Key;
use crate::progress::Event;
use crate::repository::Repository;

/// A data pack is not sent with fewer bytes, but for the last one.
const LEAST_BYTES: usize = 8 << 20;
/// What the largest data pack has, but for its footer.
const MAX_DATA_BYTES: u64 = (TARGET_BYTES + frame::TARGET_BYTES) as u64;

/// What a session has written so far.
#[derive(Debug, Default)]
pub struct Counts {
    /// Raw bytes of new chunks.
    pub new_bytes: AtomicU64,
    /// Bytes of packs.
    pub stored_bytes: AtomicU64,
    /// Packs.
    pub packs: AtomicU64,
}

/// Memory of packs that were stored, for those to come.
#[derive(Debug, Default)]
pub struct Buffers(Mutex<Vec<Vec<u8>>>);

impl Buffers {
    fn take(&self) -> Option<Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    /// Takes memory back, unless the store still holds it.
    fn give(&self, bytes: Bytes) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // One is filled while others are on their way: more are never needed at one time.
        if let Ok(mut bytes) = bytes.try_into_mut()
            && kept.len() < 2
        {
            // Else they would be moved to the front.
            bytes.clear();
            kept.push(bytes.into());
        }
    }
}

/// The pack of one kind that grows.
#[derive(Debug, Default)]
struct Open {
    pack: Option<PackBuilder>,
    /// Bytes of those of this kind that were complete before.
    sent_bytes: u64,
}

impl Open {
    /// Takes the pack when it is large enough to be sent: a quarter of all there is by then. So the store has something to
    /// do from early on, and little is left for it when the last chunk was read; and whoever writes much has few packs.
    fn take_full(&mut self) -> Option<PackBuilder> {
        let least = (self.sent_bytes / 3).clamp(LEAST_BYTES as u64, TARGET_BYTES as u64);
        let full = self.pack.take_if(|pack| pack.len() as u64 >= least);
        self.sent_bytes += full.as_ref().map_or(0, |pack| pack.len() as u64);
        full
    }
}

/// Seals frames and manifest blocks and appends them to the session's open packs. Called from the workers, and seals
/// before it locks.
#[derive(Debug)]
pub struct Packer {
    session: SnapshotId,
    keys: Keys,
    ctx: Context,
    next_number: AtomicU32,
    buffers: Arc<Buffers>,
    data: Mutex<Open>,
    manifest: Mutex<Open>,
    complete: mpsc::Sender<PackBuilder>,
}

impl Packer {
    /// A packer whose complete packs go to `complete`.
    pub fn new(
        session: SnapshotId,
        keys: &Keys,
        complete: mpsc::Sender<PackBuilder>,
        buffers: Arc<Buffers>,
        ctx: &Context,
    ) -> Self {
        let (data, manifest) = (Mutex::default(), Mutex::default());
        let (keys, ctx, next_number) = (keys.clone(), ctx.clone(), AtomicU32::new(0));
        Self { session, keys, ctx, next_number, buffers, data, manifest, complete }
    }

    /// The repository's keys.
    pub fn keys(&self) -> &Keys {
        &self.keys
    }

    /// Appends an encoded frame, which it seals in place. Waits while the store is slower than the workers.
    pub fn add_frame(
        &self,
        stored: &mut Vec<u8>,
        chunk_lens: impl Iterator<Item = u32>,
    ) -> Result<FrameLocation> {
        self.keys.seal(Piece::Frame, stored, &*self.ctx.host);
        self.add(&self.data, PackKind::Data, |pack| pack.add_frame(stored, chunk_lens))
    }

    /// Appends a manifest block.
    pub fn add_block(&self, kind: BlockKind, block: &[u8], digest: Digest) -> Result<BlockRef> {
        let mut block = block.to_vec();
        self.keys.seal(Piece::Block(kind), &mut block, &*self.ctx.host);
        self.add(&self.manifest, PackKind::Manifest, |pack| BlockRef {
            digest,
            pack: pack.id(),
            offset: pack.add_block(kind, &block),
            len: block.len() as u32,
        })
    }

    fn add<T>(
        &self,
        slot: &Mutex<Open>,
        kind: PackKind,
        append: impl FnOnce(&mut PackBuilder) -> T,
    ) -> Result<T> {
        let mut open = slot.lock().unwrap_or_else(PoisonError::into_inner);
        let pack = open.pack.get_or_insert_with(|| {
            let number = self.next_number.fetch_add(1, Ordering::Relaxed);
            let id = PackId { session: self.session, number };
            let buffer = if kind == PackKind::Data { self.buffers.take() } else { None };
            buffer.map_or_else(
                || PackBuilder::new(id, kind, &self.keys),
                |buffer| PackBuilder::within(id, kind, &self.keys, buffer),
            )
        });
        let added = append(pack);
        let full = open.take_full();
        drop(open);
        full.map_or(Ok(()), |pack| self.send(pack))?;
        Ok(added)
    }

    /// Sends what is still open.
    pub fn finish(&self) -> Result<()> {
        for slot in [&self.data, &self.manifest] {
            let open = slot.lock().unwrap_or_else(PoisonError::into_inner).pack.take();
            open.map_or(Ok(()), |pack| self.send(pack))?;
        }
        Ok(())
    }

    /// Waits until the store has taken all complete packs off the queue. For a worker that must not block.
    pub async fn drained(&self) -> Result<()> {
        let room = self.complete.reserve_many(self.complete.max_capacity()).await;
        room.map(drop).map_err(|_| Error::Cancelled)
    }

    fn send(&self, pack: PackBuilder) -> Result<()> {
        // The other end is gone only after it failed, and that failure is the one to report.
        match self.complete.try_send(pack) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(pack)) => {
                self.complete.blocking_send(pack).map_err(|_| Error::Cancelled)
            }
            Err(TrySendError::Closed(_)) => Err(Error::Cancelled),
        }
    }
}

/// Stores complete packs until all are acknowledged: as many at a time as take no more memory than `packs_in_flight` of the
/// largest.
pub async fn upload(
    repo: Repository,
    mut complete: mpsc::Receiver<PackBuilder>,
    buffers: Arc<Buffers>,
    counts: Arc<Counts>,
    halt: Arc<Halt>,
    ctx: Context,
) {
    let mut puts: JoinSet<(u64, Result<()>)> = JoinSet::new();
    let mut in_flight_bytes = 0;
    let beside_one = ctx.limits.packs_in_flight.saturating_sub(1) as u64 * MAX_DATA_BYTES;
    loop {
        while in_flight_bytes > beside_one {
            let put = tokio::select! {
                biased;
                () = halt.wait() => None,
                put = puts.join_next() => put,
            };
            let Some(put) = put else { break };
            in_flight_bytes -= settle(put, &counts, &halt, &ctx);
        }
        let pack = tokio::select! {
            biased;
            () = halt.wait() => None,
            pack = complete.recv() => pack,
        };
        let Some(pack) = pack else { break };
        let (id, bytes) = pack.finish();
        let len = bytes.len() as u64;
        in_flight_bytes += len;
        let (store, buffers) = (repo.shared_store(), buffers.clone());
        puts.spawn(async move {
            let put = store.put(&Key::pack(id), bytes.clone()).await;
            buffers.give(bytes);
            (len, put.map_err(Error::from))
        });
    }
    if halt.is_set() {
        puts.abort_all();
    }
    while let Some(put) = puts.join_next().await {
        settle(put, &counts, &halt, &ctx);
    }
}

/// Takes note of how a request ended, and gives the bytes of its pack: 0 after a panic, which ends all.
fn settle(
    put: Result<(u64, Result<()>), tokio::task::JoinError>,
    counts: &Counts,
    halt: &Halt,
    ctx: &Context,
) -> u64 {
    match put {
        Ok((len, Ok(()))) => {
            counts.packs.fetch_add(1, Ordering::Relaxed);
            counts.stored_bytes.fetch_add(len, Ordering::Relaxed);
            ctx.progress.event(Event::Stored { bytes: len });
            len
        }
        Ok((len, Err(error))) => {
            halt.fail(error);
            len
        }
        Err(error) => {
            if !error.is_cancelled() {
                halt.fail(Error::Internal("a task that stores packs panicked"));
            }
            0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_grow_with_what_was_sent_before() {
        let session = SnapshotId::from_parts(1, 2);
        let frame = vec![7; frame::TARGET_BYTES];
        let (mut open, mut sizes) = (Open::default(), Vec::new());
        for _ in 0..256 {
            let new = || {
                let id = PackId { session, number: 0 };
                PackBuilder::new(id, PackKind::Data, &Keys::none())
            };
            open.pack.get_or_insert_with(new).add_frame(&frame, [frame.len() as u32].into_iter());
            sizes.extend(open.take_full().map(|pack| pack.len() >> 20));
        }
        assert_eq!(sizes, [8, 8, 8, 8, 11, 15, 20, 27, 32, 32, 32, 32]);
        assert!(open.pack.is_some_and(|pack| pack.len() < LEAST_BYTES * 4));
    }
}
