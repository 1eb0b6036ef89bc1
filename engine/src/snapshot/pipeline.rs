//! The stages of a snapshot and the queues between them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use futures::{StreamExt, stream};
use tokio::sync::{Semaphore, mpsc};

use super::fill::Known;
use super::halt::Halt;
use super::packer::{Buffers, Counts, Packer, upload};
use super::past::VolumePast;
use super::worker::{Method, Worker};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::format::leaf::Leaf;
use crate::format::node::Child;
use crate::id::SnapshotId;
use crate::index::DedupIndex;
use crate::repository::Repository;
use crate::source::Source;
use crate::splice::Changes;
use crate::tree;
use crate::workers::Workers;

/// Parent leaves that are read ahead of the workers.
const LEAVES_AHEAD: usize = 8;

/// One volume to go through.
#[derive(Debug)]
pub struct VolumeJob {
    source: Arc<dyn Source>,
    /// The parent.
    parent: Option<SnapshotId>,
    /// The parent's volume.
    past: VolumePast,
    /// Leaves of the parent whose chunks the index has already.
    leaves: Mutex<HashMap<usize, Arc<Leaf>>>,
    /// As that of the past, which is found out while the work goes on.
    distrusted: AtomicBool,
}

/// One segment to go through.
#[derive(Debug)]
struct Job {
    volume: usize,
    segment: usize,
    before: Child,
    method: Method,
}

/// What a pipeline wrote.
#[derive(Debug)]
pub struct Written {
    /// The roots of the manifests, in the order of the jobs.
    pub roots: Vec<Child>,
    /// What it cost.
    pub counts: Arc<Counts>,
}

impl VolumeJob {
    /// A volume with its past, which is that of `parent`.
    pub fn new(source: Arc<dyn Source>, parent: Option<SnapshotId>, mut past: VolumePast) -> Self {
        let leaves = Mutex::new(std::mem::take(&mut past.leaves));
        let distrusted = AtomicBool::new(past.distrusted);
        Self { source, parent, past, leaves, distrusted }
    }

    fn jobs(&self, volume: usize) -> impl Iterator<Item = Job> {
        (0..tree::segment_count(self.source.len_bytes())).map(move |segment| Job {
            volume,
            segment,
            before: self.past.children.get(segment).copied().unwrap_or(Child::Zero),
            method: Method::Scan(None),
        })
    }

    /// The parent's leaf of a segment is damaged, or refers to what is: nothing of it is used as a whole.
    fn distrust(&self, job: &mut Job) {
        (job.before, job.method) = (Child::Zero, Method::Scan(None));
        self.distrusted.store(true, Ordering::Relaxed);
    }

    /// What the source says has changed in a segment since the parent; None where that is not known.
    async fn changes(&self, segment: usize, ctx: &Context) -> Result<Option<Changes>> {
        let range = tree::segment_range(self.source.len_bytes(), segment);
        let is_known = range == tree::segment_range(self.past.len_bytes, segment)
            && !self.past.unknown.contains(&segment);
        let Some(parent) = self.parent.filter(|_| is_known) else { return Ok(None) };
        let (source, asked) = (self.source.clone(), range.clone());
        let ask = move || source.changed(asked, parent);
        let changed = if ctx.limits.threads == 0 {
            ask()
        } else {
            let asked = tokio::task::spawn_blocking(ask).await;
            asked.map_err(|_| Error::Internal("a source panicked"))?
        };
        Ok(changed.map(|ranges| Changes::within(&range, ranges)))
    }

    /// Finds out how the leaf of a segment is made, after the index has the parent's chunks of that segment.
    async fn prepare_segment(&self, mut job: Job, pipeline: &Pipeline) -> Result<Job> {
        let kept = self.leaves.lock().unwrap_or_else(PoisonError::into_inner).remove(&job.segment);
        let changes = self.changes(job.segment, &pipeline.ctx).await?;
        // A leaf that is kept is read only where it may lead to packs that are set aside: a large volume has thousands.
        let is_taken_over =
            changes.as_ref().is_some_and(Changes::is_empty) && pipeline.known.shunned.is_empty();
        let block = match job.before {
            Child::Block { block, .. } if !is_taken_over => block,
            Child::Block { .. } | Child::Zero => {
                job.method = Method::from_changes(None, changes);
                return Ok(job);
            }
        };
        if kept.is_some() {
            job.method = Method::from_changes(kept, changes);
            return Ok(job);
        }
        let range = tree::segment_range(self.past.len_bytes, job.segment);
        match tree::read_leaf(&pipeline.repo, &block, range.end - range.start).await {
            Ok(leaf) => {
                let leaf = Arc::new(leaf);
                pipeline.known.remember(&leaf);
                if pipeline.known.shuns(&job.before, &leaf) {
                    self.distrust(&mut job);
                } else {
                    job.method = Method::from_changes(Some(leaf), changes);
                }
            }
            // A leaf that can't be read costs duplicates, not the snapshot.
            Err(_) => self.distrust(&mut job),
        }
        Ok(job)
    }
}

/// The pipeline of one session.
#[derive(Debug)]
pub struct Pipeline {
    repo: Repository,
    session: SnapshotId,
    known: Known,
    workers: Workers,
    ctx: Context,
    halt: Arc<Halt>,
}

impl Pipeline {
    /// A pipeline that reuses what the index knows.
    pub fn new(
        repo: &Repository,
        session: SnapshotId,
        known: Known,
        workers: Workers,
        ctx: &Context,
    ) -> Self {
        let halt = Arc::new(Halt::new(&ctx.cancel));
        Self { repo: repo.clone(), session, known, workers, ctx: ctx.clone(), halt }
    }

    /// Goes through all volumes. When it returns, every pack is acknowledged.
    pub async fn run(self, volumes: Vec<VolumeJob>) -> Result<Written> {
        // The parts are tasks of their own, which would go on after this future was dropped.
        let _guard = self.halt.guard();
        let counts = Arc::new(Counts::default());
        let pool = self.workers.pool();
        // Work within a task can't wait for room in the middle of a segment; it waits between segments.
        let (complete, packs) =
            mpsc::channel(if pool.is_none() { Semaphore::MAX_PERMITS } else { 1 });
        let (jobs, queue) = mpsc::channel(2 * self.ctx.limits.threads.max(1));
        let buffers = Arc::new(Buffers::default());
        let uploader = tokio::spawn(upload(
            self.repo.clone(),
            packs,
            buffers.clone(),
            counts.clone(),
            self.halt.clone(),
            self.ctx.clone(),
        ));
        let volumes = Arc::new(volumes);
        let work = {
            let (index, halt, ctx) =
                (self.known.index.clone(), self.halt.clone(), self.ctx.clone());
            let (volumes, counts) = (volumes.clone(), counts.clone());
            let packer = Packer::new(self.session, self.repo.keys(), complete, buffers, &ctx);
            let chunking = self.repo.config().chunking;
            match pool {
                None => tokio::spawn(async move {
                    let (index, packer, counts) = (&*index, &packer, &*counts);
                    let stage = Stage { volumes: &volumes, chunking, index, packer, counts };
                    stage.run_inline(queue, &halt, &ctx).await
                }),
                Some(pool) => tokio::task::spawn_blocking(move || {
                    let (index, packer, counts) = (&*index, &packer, &*counts);
                    let stage = Stage { volumes: &volumes, chunking, index, packer, counts };
                    stage.run(&pool, queue, &halt, &ctx)
                }),
            }
        };
        let planned = self.plan(&volumes, jobs).await;
        planned.unwrap_or_else(|error| self.halt.fail(error));
        let written = work.await.map_err(|_| Error::Internal("a snapshot worker panicked"))?;
        uploader.await.map_err(|_| Error::Internal("the task that stores packs panicked"))?;
        self.halt.result()?;
        Ok(Written { roots: written?, counts })
    }

    /// Sends every segment to the workers, after the index has the parent's chunks of that segment.
    async fn plan(&self, volumes: &[VolumeJob], jobs: mpsc::Sender<Job>) -> Result<()> {
        for (number, volume) in volumes.iter().enumerate() {
            let prepared = volume.jobs(number).map(|job| volume.prepare_segment(job, self));
            let mut prepared = std::pin::pin!(stream::iter(prepared).buffered(LEAVES_AHEAD));
            while let Some(job) = prepared.next().await {
                let job = job?;
                tokio::select! {
                    biased;
                    () = self.halt.wait() => return Ok(()),
                    sent = jobs.send(job) => if sent.is_err() { return Ok(()) },
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
    counts: &'a Counts,
}

/// The leaves of a volume as they come.
type Leaves = Mutex<Vec<Child>>;

impl Stage<'_> {
    /// Does all work on the threads of a pool.
    fn run(
        &self,
        pool: &rayon::ThreadPool,
        queue: mpsc::Receiver<Job>,
        halt: &Halt,
        ctx: &Context,
    ) -> Result<Vec<Child>> {
        let queue = Mutex::new(queue);
        let leaves = self.leaves();
        pool.scope(|scope| {
            for _ in 0..pool.current_num_threads() {
                scope.spawn(|_| {
                    if let Err(error) = self.work(&queue, &leaves, halt, ctx) {
                        halt.fail(error);
                    }
                });
            }
        });
        self.finish(leaves, halt)
    }

    /// Does all work within the calling task.
    async fn run_inline(
        &self,
        queue: mpsc::Receiver<Job>,
        halt: &Halt,
        ctx: &Context,
    ) -> Result<Vec<Child>> {
        let leaves = self.leaves();
        if let Err(error) = self.work_inline(queue, &leaves, halt, ctx).await {
            halt.fail(error);
        }
        self.finish(leaves, halt)
    }

    /// One thread's work, until the queue ends.
    fn work(
        &self,
        queue: &Mutex<mpsc::Receiver<Job>>,
        leaves: &[Leaves],
        halt: &Halt,
        ctx: &Context,
    ) -> Result<()> {
        let mut worker = self.worker(ctx)?;
        loop {
            let job = queue.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
            let Some(job) = job else { return Ok(()) };
            if halt.is_set() {
                return Ok(());
            }
            self.segment(&mut worker, job, leaves)?;
        }
    }

    /// A task's work, until the queue ends. The packs of one segment wait in memory at most.
    async fn work_inline(
        &self,
        mut queue: mpsc::Receiver<Job>,
        leaves: &[Leaves],
        halt: &Halt,
        ctx: &Context,
    ) -> Result<()> {
        let mut worker = self.worker(ctx)?;
        while let Some(job) = queue.recv().await {
            if halt.is_set() {
                return Ok(());
            }
            self.segment(&mut worker, job, leaves)?;
            self.packer.drained().await?;
        }
        Ok(())
    }

    fn worker<'a>(&'a self, ctx: &'a Context) -> Result<Worker<'a>> {
        Worker::new(self.chunking, self.index, self.packer, self.counts, ctx)
    }

    fn leaves(&self) -> Vec<Leaves> {
        let count = |volume: &VolumeJob| tree::segment_count(volume.source.len_bytes());
        self.volumes.iter().map(|v| Mutex::new(vec![Child::Zero; count(v)])).collect()
    }

    fn segment(&self, worker: &mut Worker<'_>, job: Job, leaves: &[Leaves]) -> Result<()> {
        let Some((volume, leaves)) = self.volumes.get(job.volume).zip(leaves.get(job.volume))
        else {
            return Err(Error::Internal("a job for no volume"));
        };
        let range = tree::segment_range(volume.source.len_bytes(), job.segment);
        let made = worker.segment(&*volume.source, range, job.before, job.method)?;
        let mut leaves = leaves.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(child) = leaves.get_mut(job.segment) {
            *child = made;
        }
        Ok(())
    }

    /// Writes the nodes above the leaves, and sends what is still open.
    fn finish(&self, leaves: Vec<Leaves>, halt: &Halt) -> Result<Vec<Child>> {
        if halt.is_set() {
            return Err(Error::Cancelled);
        }
        let mut roots = Vec::with_capacity(self.volumes.len());
        for (volume, leaves) in self.volumes.iter().zip(leaves) {
            let children = leaves.into_inner().unwrap_or_else(PoisonError::into_inner);
            let mut write = |kind, block: &[u8], digest| self.packer.add_block(kind, block, digest);
            let trusted = !volume.distrusted.load(Ordering::Relaxed);
            let known = if trusted { volume.past.nodes.as_slice() } else { &[] };
            roots.push(tree::build(children, known, &mut write)?);
        }
        self.packer.finish()?;
        Ok(roots)
    }
}
