//! The stages of a snapshot and the queues between them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use futures::{StreamExt, stream};
use tokio::sync::mpsc;

use super::halt::Halt;
use super::packer::{Counts, Packer, upload};
use super::worker::Worker;
use super::{preload, remember};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::format::block::BlockRef;
use crate::format::node::Child;
use crate::id::SnapshotId;
use crate::index::DedupIndex;
use crate::record::VolumeRecord;
use crate::repository::Repository;
use crate::source::Source;
use crate::tree::{self, Segments};

/// Parent leaves that are read ahead of the workers.
const LEAVES_AHEAD: usize = 8;

/// One volume to go through.
#[derive(Debug)]
pub struct VolumeJob {
    source: Arc<dyn Source>,
    /// The parent's leaves.
    before: Vec<Child>,
    /// The parent's nodes.
    nodes: Vec<BlockRef>,
    /// The parent's length.
    before_len: u64,
    /// The parent's segments whose chunks the index has already.
    preloaded: usize,
    /// The parent's manifest is damaged: no node of it may be used again, since equal digests do not make it whole.
    distrusted: AtomicBool,
}

/// One segment to go through.
#[derive(Clone, Copy, Debug)]
struct Job {
    volume: usize,
    segment: usize,
    before: Child,
}

/// A volume that was written.
#[derive(Debug)]
pub struct WrittenVolume {
    /// The root of its manifest.
    pub root: Child,
    /// Bytes that are not zeros.
    pub data_bytes: u64,
}

/// What a pipeline wrote.
#[derive(Debug)]
pub struct Written {
    /// In the order of the jobs.
    pub volumes: Vec<WrittenVolume>,
    /// What it cost.
    pub counts: Arc<Counts>,
}

impl VolumeJob {
    /// Reads what is needed of the parent.
    pub async fn prepare(
        repo: &Repository,
        source: Arc<dyn Source>,
        before: Option<&VolumeRecord>,
        index: &DedupIndex,
        budget: &mut usize,
        ctx: &Context,
    ) -> Result<Self> {
        let (segments, before_len) = match before {
            Some(before) => (tree::segments(repo, before, ctx).await?, before.len_bytes),
            None => (Segments::default(), 0),
        };
        let mut before = segments.leaves;
        let done = preload(repo, before_len, &before, index, budget, ctx).await?;
        let distrusted = !done.unreadable.is_empty() || !segments.unreadable.is_empty();
        for segment in done.unreadable {
            if let Some(child) = before.get_mut(segment) {
                *child = Child::Zero;
            }
        }
        Ok(Self {
            source,
            before,
            nodes: segments.nodes,
            before_len,
            preloaded: done.segments,
            distrusted: AtomicBool::new(distrusted),
        })
    }

    fn jobs(&self, volume: usize) -> impl Iterator<Item = Job> {
        (0..tree::segment_count(self.source.len_bytes())).map(move |segment| Job {
            volume,
            segment,
            before: self.before.get(segment).copied().unwrap_or(Child::Zero),
        })
    }
}

/// The pipeline of one session.
#[derive(Debug)]
pub struct Pipeline {
    repo: Repository,
    session: SnapshotId,
    index: Arc<DedupIndex>,
    ctx: Context,
    halt: Arc<Halt>,
}

impl Pipeline {
    /// A pipeline that reuses what the index knows.
    pub fn new(
        repo: &Repository,
        session: SnapshotId,
        index: Arc<DedupIndex>,
        ctx: &Context,
    ) -> Self {
        let halt = Arc::new(Halt::new(&ctx.cancel));
        Self { repo: repo.clone(), session, index, ctx: ctx.clone(), halt }
    }

    /// Goes through all volumes. When it returns, every pack is acknowledged.
    pub async fn run(self, volumes: Vec<VolumeJob>) -> Result<Written> {
        // The parts are tasks of their own, which would go on after this future was dropped.
        let _guard = self.halt.guard();
        let counts = Arc::new(Counts::default());
        let (complete, packs) = mpsc::channel(1);
        let (jobs, queue) = mpsc::channel(2 * self.ctx.limits.threads.max(1));
        let uploader = tokio::spawn(upload(
            self.repo.clone(),
            packs,
            counts.clone(),
            self.halt.clone(),
            self.ctx.clone(),
        ));
        let volumes = Arc::new(volumes);
        let work = {
            let (index, halt, ctx) = (self.index.clone(), self.halt.clone(), self.ctx.clone());
            let (volumes, counts) = (volumes.clone(), counts.clone());
            let packer = Packer::new(self.session, complete);
            let chunking = self.repo.config().chunking;
            tokio::task::spawn_blocking(move || {
                let stage = Stage { volumes: &volumes, chunking, index: &index, packer: &packer };
                stage.run(queue, &counts, &halt, &ctx)
            })
        };
        let planned = self.plan(&volumes, jobs).await;
        planned.unwrap_or_else(|error| self.halt.fail(error));
        let written = work.await.map_err(|_| Error::Internal("a snapshot worker panicked"))?;
        uploader.await.map_err(|_| Error::Internal("the task that stores packs panicked"))?;
        self.halt.result()?;
        Ok(Written { volumes: written?, counts })
    }

    /// Sends every segment to the workers, after the index has the parent's chunks of that segment.
    async fn plan(&self, volumes: &[VolumeJob], jobs: mpsc::Sender<Job>) -> Result<()> {
        for (number, volume) in volumes.iter().enumerate() {
            let prepared = volume.jobs(number).map(|mut job| async move {
                if let Child::Block(block) = job.before
                    && job.segment >= volume.preloaded
                {
                    let range = tree::segment_range(volume.before_len, job.segment);
                    match tree::read_leaf(&self.repo, &block, range.end - range.start).await {
                        Ok(leaf) => {
                            remember(&self.index, &leaf);
                        }
                        // A leaf that can't be read costs duplicates, not the snapshot.
                        Err(_) => {
                            job.before = Child::Zero;
                            volume.distrusted.store(true, Ordering::Relaxed);
                        }
                    }
                }
                job
            });
            let mut prepared = std::pin::pin!(stream::iter(prepared).buffered(LEAVES_AHEAD));
            while let Some(job) = prepared.next().await {
                tokio::select! {
                    sent = jobs.send(job) => if sent.is_err() { return Ok(()) },
                    () = self.halt.wait() => return Ok(()),
                }
            }
        }
        Ok(())
    }
}

/// The stage of the workers.
struct Stage<'a> {
    volumes: &'a [VolumeJob],
    chunking: crate::chunker::Chunking,
    index: &'a DedupIndex,
    packer: &'a Packer,
}

impl Stage<'_> {
    fn run(
        &self,
        queue: mpsc::Receiver<Job>,
        counts: &Counts,
        halt: &Halt,
        ctx: &Context,
    ) -> Result<Vec<WrittenVolume>> {
        let threads = ctx.limits.threads.max(1);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|n| format!("petra-worker-{n}"))
            .build()
            .map_err(|_| Error::Internal("no worker threads can be started"))?;
        let queue = Mutex::new(queue);
        let leaves: Vec<Mutex<(Vec<Child>, u64)>> = self
            .volumes
            .iter()
            .map(|volume| {
                Mutex::new((vec![Child::Zero; tree::segment_count(volume.source.len_bytes())], 0))
            })
            .collect();
        pool.scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|_| {
                    if let Err(error) = self.work(&queue, &leaves, counts, halt, ctx) {
                        halt.fail(error);
                    }
                });
            }
        });
        if halt.is_set() {
            return Err(Error::Cancelled);
        }
        let mut written = Vec::with_capacity(self.volumes.len());
        for (volume, leaves) in self.volumes.iter().zip(leaves) {
            let (children, data_bytes) =
                leaves.into_inner().unwrap_or_else(PoisonError::into_inner);
            let mut write = |kind, block: &[u8], digest| self.packer.add_block(kind, block, digest);
            let trusted = !volume.distrusted.load(Ordering::Relaxed);
            let known = if trusted { volume.nodes.as_slice() } else { &[] };
            let root = tree::build(children, known, &mut write)?;
            written.push(WrittenVolume { root, data_bytes });
        }
        self.packer.finish()?;
        Ok(written)
    }

    /// One thread's work, until the queue ends.
    fn work(
        &self,
        queue: &Mutex<mpsc::Receiver<Job>>,
        leaves: &[Mutex<(Vec<Child>, u64)>],
        counts: &Counts,
        halt: &Halt,
        ctx: &Context,
    ) -> Result<()> {
        let mut worker = Worker::new(self.chunking, self.index, self.packer, counts, ctx)?;
        loop {
            let job = queue.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
            let Some(job) = job else { return Ok(()) };
            if halt.is_set() {
                return Ok(());
            }
            let Some((volume, leaves)) = self.volumes.get(job.volume).zip(leaves.get(job.volume))
            else {
                return Err(Error::Internal("a job for no volume"));
            };
            let range = tree::segment_range(volume.source.len_bytes(), job.segment);
            let done = worker.segment(
                &*volume.source,
                range.start,
                range.end - range.start,
                job.before,
            )?;
            let mut leaves = leaves.lock().unwrap_or_else(PoisonError::into_inner);
            leaves.1 += done.data_bytes;
            if let Some(child) = leaves.0.get_mut(job.segment) {
                *child = done.child;
            }
        }
    }
}
