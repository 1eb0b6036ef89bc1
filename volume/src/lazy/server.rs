//! The image server: the process that serves a lazy image over FUSE.
//!
//! Requests whose blocks are there are done at once by the thread that read them. Others are parked until the link has
//! brought what they wait for, so that they keep nobody else waiting. All threads are plain threads: there is little
//! to wait for but the kernel.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::image::LocalImage;
use super::link::{Link, Outbox};
use super::presence::{BootId, Presence, VolumeIdentity};
use super::readahead::ReadAhead;
use super::waits::{WINDOW_BLOCKS, Waits};
use super::wire::ToAgent;
use crate::error::{Error, Result};
use crate::fuse::{File, Negotiated, Reply, Session, Zeroing, resident};

/// How long a successor waits for the files of a server that is dying.
const PREDECESSOR: Duration = Duration::from_secs(30);
/// How long any other server waits: for those who look whether there is one.
const LOOKS: Duration = Duration::from_secs(2);
/// Windows that a recording holds: 8 GiB of a volume.
const RECORDED_WINDOWS: usize = 1 << 16;

/// What an image server needs to know.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// The volume.
    pub volume: VolumeIdentity,
    /// Its local image: a sparse file of the volume's length.
    pub image: PathBuf,
    /// Its presence map, which [`Presence::create`] made.
    pub presence: PathBuf,
    /// Where the working copy of the presence map is, or will be: a path in a tmpfs.
    pub working: PathBuf,
    /// An empty directory for the file system.
    pub mount: PathBuf,
    /// The agent's socket.
    pub socket: PathBuf,
    /// The image is read and written past the page cache: all that use it must keep to blocks of 4 KiB. Else it is
    /// never done so.
    pub direct: bool,
    /// Nothing may be written.
    pub read_only: bool,
    /// How long a read waits for absent data.
    pub patience: Duration,
    /// Threads that serve requests.
    pub threads: usize,
}

/// A FUSE descriptor that a dead server left.
#[derive(Debug)]
pub struct Inheritance {
    /// The descriptor.
    pub device: OwnedFd,
    /// What that server had agreed on with the kernel.
    pub negotiated: Negotiated,
}

impl Inheritance {
    /// Another one of the same descriptor: while there is one, no request is answered with an error.
    pub fn try_clone(&self) -> Result<Self> {
        let device = self.device.try_clone().map_err(Error::io("keep", "a FUSE descriptor"))?;
        Ok(Self { device, negotiated: self.negotiated })
    }

    /// False when the file system is gone, so that nobody needs a server.
    pub fn is_mounted(&self) -> bool {
        let mut device = [PollFd::new(&self.device, PollFlags::empty())];
        // What can't be asked may still be mounted.
        let asked = poll(&mut device, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        asked.is_err() || device.iter().all(|device| device.revents().is_empty())
    }
}

/// A running image server.
#[derive(Debug)]
pub struct Server {
    inner: Arc<Inner>,
    session: Arc<Session>,
    threads: usize,
}

/// What threads share.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) image: LocalImage,
    pub(super) volume: VolumeIdentity,
    read_only: bool,
    patience: Duration,
    waits: Mutex<Waits<Parked>>,
    ahead: Mutex<ReadAhead>,
    recording: Recording,
    pub(super) outbox: Outbox,
    /// The file system is gone, or this process is about to be.
    pub(super) ending: AtomicBool,
}

/// A request that waits.
#[derive(Debug)]
pub(super) struct Parked {
    work: Work,
    reply: Reply,
    since: Instant,
}

#[derive(Debug)]
enum Work {
    Read(Range<u64>),
    Write { offset: u64, data: Vec<u8> },
    Zero { range: Range<u64>, how: Zeroing },
}

impl Work {
    fn range(&self) -> Range<u64> {
        match self {
            Self::Read(range) | Self::Zero { range, .. } => range.clone(),
            Self::Write { offset, data } => *offset..*offset + data.len() as u64,
        }
    }
}

/// What was read, in the order of the first touch.
#[derive(Debug, Default)]
struct Recording {
    stopped: AtomicBool,
    seen: Mutex<(std::collections::HashSet<u64>, Vec<Range<u64>>)>,
}

impl Recording {
    fn note(&self, blocks: &Range<u64>, len_bytes: u64) {
        if self.stopped.load(Ordering::Relaxed) {
            return;
        }
        const WINDOW: u64 = WINDOW_BLOCKS * super::presence::BLOCK_BYTES;
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let (windows, ranges) = &mut *seen;
        for window in blocks.start / WINDOW_BLOCKS..blocks.end.div_ceil(WINDOW_BLOCKS) {
            if !windows.insert(window) {
                continue;
            }
            let range = window * WINDOW..((window + 1) * WINDOW).min(len_bytes);
            match ranges.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => ranges.push(range),
            }
        }
        if windows.len() >= RECORDED_WINDOWS {
            self.stopped.store(true, Ordering::Relaxed);
        }
    }

    fn stop(&self) -> Vec<Range<u64>> {
        self.stopped.store(true, Ordering::Relaxed);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.0 = std::collections::HashSet::new();
        seen.1.clone()
    }
}

impl Server {
    /// Opens the volume and mounts it, or takes over what another server had mounted. When this returns the file can
    /// be used.
    pub fn start(options: &ServerOptions, inherited: Option<Inheritance>) -> Result<Self> {
        let begun = Instant::now();
        let boot = BootId::current()?;
        let wait = if inherited.is_some() { PREDECESSOR } else { LOOKS };
        let presence = loop {
            let opened = Presence::open(&options.presence, &options.working, options.volume, boot);
            match opened {
                Err(Error::Busy { .. }) if begun.elapsed() < wait => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                opened => break opened?,
            }
        };
        let len_bytes = options.volume.len_bytes;
        let image = LocalImage::open(&options.image, len_bytes, options.direct, presence)?;
        // A successor has missed the first reads, which are what a recording is for.
        let recording = Recording { stopped: inherited.is_some().into(), ..Recording::default() };
        let session = match inherited {
            Some(Inheritance { device, negotiated }) => Session::resume(device, negotiated)?,
            None => Session::mount(&options.mount)?,
        };
        let session = Arc::new(session);
        let inner = Arc::new(Inner {
            image,
            volume: options.volume,
            read_only: options.read_only,
            patience: options.patience,
            waits: Mutex::default(),
            ahead: Mutex::default(),
            recording,
            outbox: Outbox::default(),
            ending: AtomicBool::new(false),
        });
        let buffer = || resident(session.buffer_bytes());
        let link = Link {
            server: inner.clone(),
            socket: options.socket.clone(),
            device: session.device(),
            negotiated: session.negotiated(),
            buffers: (buffer()?, buffer()?),
        };
        spawn("link", move || link.run())?;
        let clock = inner.clone();
        spawn("clock", move || clock.watch_the_clock())?;
        Ok(Self { inner, session, threads: options.threads.max(1) })
    }

    /// Serves requests until the file system is unmounted; then everything is durable, and nobody uses the volume.
    pub fn run(&self) -> Result<()> {
        let mut threads = Vec::new();
        for _ in 0..self.threads {
            let (session, inner) = (self.session.clone(), self.inner.clone());
            threads.push(spawn("fuse", move || session.serve(&*inner))?);
        }
        for thread in threads {
            thread
                .join()
                .map_err(|_| Error::Internal("a thread of the image server panicked"))??;
        }
        self.inner.ending.store(true, Ordering::Relaxed);
        let closed = self.inner.image.close();
        self.inner.outbox.end(&ToAgent::Bye.encode());
        closed
    }

    /// Makes durable what is there, for a server that is asked to end while the file system is in use. It can be taken
    /// over then, like one that was killed.
    pub fn flush(&self) -> Result<()> {
        self.inner.image.sync()
    }
}

fn spawn<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<std::thread::JoinHandle<T>> {
    let thread = std::thread::Builder::new().name(format!("petra-{name}")).spawn(work);
    thread.map_err(Error::io("start a thread for", "an image server"))
}

impl Inner {
    pub(super) fn waits(&self) -> MutexGuard<'_, Waits<Parked>> {
        // Each use leaves it whole, so a panic elsewhere does not spoil it.
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_absent(&self, blocks: Range<u64>) -> bool {
        self.image.presence().first_absent(blocks).is_some()
    }

    fn missing(&self, work: &Work) -> Option<u64> {
        match work {
            Work::Read(range) => self.image.missing_for_read(range),
            Work::Write { .. } | Work::Zero { .. } => self.image.missing_for_write(&work.range()),
        }
    }

    /// Does what is asked, or lets it wait for a block.
    fn attempt(&self, parked: Parked, buffer: &mut [u8]) {
        if self.missing(&parked.work).is_none() {
            return self.perform(parked, buffer);
        }
        let blocks = self.image.blocks(&parked.work.range());
        let mut waits = self.waits();
        // It may have come at this moment; what comes later finds it among those that wait.
        let Some(block) = self.missing(&parked.work) else {
            drop(waits);
            return self.perform(parked, buffer);
        };
        let wanted = match &parked.work {
            Work::Read(_) => waits.want(&blocks, true, |blocks| self.is_absent(blocks)),
            // Blocks in the middle are overwritten.
            Work::Write { .. } | Work::Zero { .. } => {
                let last = blocks.end.saturating_sub(1);
                let mut wanted = waits.want(&(block..block + 1), true, |b| self.is_absent(b));
                wanted.extend(waits.want(&(last..blocks.end), true, |b| self.is_absent(b)));
                wanted
            }
        };
        waits.park(block, parked);
        drop(waits);
        self.ask(wanted, true);
    }

    fn perform(&self, Parked { work, reply, .. }: Parked, buffer: &mut [u8]) {
        match work {
            Work::Read(range) => match self.image.read(&range, buffer) {
                Ok(data) => reply.data(data),
                Err(error) => reply.error(error),
            },
            Work::Write { offset, data } => self.perform_write(offset, &data, reply),
            Work::Zero { range, how } => match self.image.zero(&range, how) {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(error),
            },
        }
    }

    fn perform_write(&self, offset: u64, data: &[u8], reply: Reply) {
        match self.image.write(offset, data) {
            Ok(()) => reply.written(data.len() as u32),
            Err(error) => reply.error(error),
        }
    }

    fn ask(&self, ranges: Vec<Range<u64>>, urgent: bool) {
        for range in ranges {
            let range = range.start..range.end.min(self.volume.len_bytes);
            // Without an agent it waits in its window, and the next agent is asked.
            self.outbox.send(ToAgent::Want { range, urgent }.encode());
        }
    }

    /// A new agent is asked for all that anyone waits for.
    pub(super) fn begin_again(&self) {
        let ranges = self.waits().begin_again();
        self.ask(ranges, true);
    }

    /// True when a request waits for a part of a range.
    pub(super) fn is_waited_for(&self, offset: u64, len: usize) -> bool {
        let range = offset..offset.saturating_add(len as u64);
        self.waits().is_waited_for(&self.image.blocks(&range))
    }

    /// Data of the volume came.
    pub(super) fn fill(&self, offset: u64, bytes: &[u8], buffer: &mut [u8]) {
        let range = offset..offset.saturating_add(bytes.len() as u64);
        self.settle(&range, self.image.fill(offset, bytes), buffer);
    }

    /// Zeros of the volume came.
    pub(super) fn fill_zeros(&self, range: Range<u64>, buffer: &mut [u8]) {
        self.settle(&range.clone(), self.image.fill_zeros(range), buffer);
    }

    /// Lets those go on that waited for a range.
    fn settle(&self, range: &Range<u64>, filled: Result<(), Errno>, buffer: &mut [u8]) {
        let blocks = self.image.blocks(range);
        if let Err(error) = filled {
            tracing::warn!(?range, %error, "data of the volume can't be stored");
            return self.give_up(&blocks, error, buffer);
        }
        let ready = self.waits().arrived(&blocks, |blocks| self.is_absent(blocks));
        for parked in ready {
            self.attempt(parked, buffer);
        }
    }

    /// A range can't be read.
    pub(super) fn fail(&self, range: &Range<u64>, reason: &str, buffer: &mut [u8]) {
        tracing::warn!(volume = %self.volume.id, ?range, reason, "a part of the volume can't be read");
        self.give_up(&self.image.blocks(range), Errno::IO, buffer);
    }

    fn give_up(&self, blocks: &Range<u64>, error: Errno, buffer: &mut [u8]) {
        let failed = self.waits().failed(blocks);
        for parked in failed {
            // It may have been overwritten meanwhile.
            let missing = self.missing(&parked.work);
            if missing.is_some_and(|block| blocks.contains(&block)) {
                parked.reply.error(error);
            } else {
                self.attempt(parked, buffer);
            }
        }
    }

    /// The absent parts of a range, and up to where they are all.
    pub(super) fn absent(&self, range: &Range<u64>, limit: usize) -> (u64, Vec<Range<u64>>) {
        let blocks = self.image.blocks(&(range.start..range.end.min(self.volume.len_bytes)));
        let mut ranges = Vec::new();
        let mut at = blocks.start;
        while let Some(run) = self.image.presence().absent_run(at..blocks.end) {
            if ranges.len() == limit {
                return (run.start * super::presence::BLOCK_BYTES, ranges);
            }
            at = run.end;
            let block = super::presence::BLOCK_BYTES;
            ranges.push(run.start * block..(run.end * block).min(self.volume.len_bytes));
        }
        (range.end, ranges)
    }

    pub(super) fn recorded(&self) -> Vec<Range<u64>> {
        self.recording.stop()
    }

    fn watch_the_clock(&self) {
        let tick = (self.patience / 4).clamp(Duration::from_millis(10), Duration::from_secs(1));
        while !self.ending.load(Ordering::Relaxed) {
            std::thread::sleep(tick);
            let late = self.waits().take_if(|parked| parked.since.elapsed() > self.patience);
            for parked in late {
                let range = parked.work.range();
                tracing::warn!(volume = %self.volume.id, ?range, "data did not come in time");
                parked.reply.error(Errno::IO);
            }
        }
    }
}

impl File for Inner {
    fn len_bytes(&self) -> u64 {
        self.volume.len_bytes
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, range: Range<u64>, buffer: &mut [u8], reply: Reply) {
        self.recording.note(&self.image.blocks(&range), self.volume.len_bytes);
        if !self.image.presence().is_complete() {
            let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
            let beyond = ahead.note(&range, self.volume.len_bytes);
            drop(ahead);
            self.attempt(Parked { work: Work::Read(range), reply, since: Instant::now() }, buffer);
            if let Some(beyond) = beyond {
                let blocks = self.image.blocks(&beyond);
                let wanted = self.waits().want(&blocks, false, |blocks| self.is_absent(blocks));
                self.ask(wanted, false);
            }
            return;
        }
        self.perform(Parked { work: Work::Read(range), reply, since: Instant::now() }, buffer);
    }

    fn write(&self, offset: u64, data: &[u8], reply: Reply) {
        let range = offset..offset + data.len() as u64;
        if self.image.refuses(&range) {
            return reply.error(Errno::INVAL);
        }
        if self.image.missing_for_write(&range).is_none() {
            return self.perform_write(offset, data, reply);
        }
        let work = Work::Write { offset, data: data.to_vec() };
        // Not aligned, so the image is not direct, and the buffer not needed.
        self.attempt(Parked { work, reply, since: Instant::now() }, &mut []);
    }

    fn zero(&self, range: Range<u64>, how: Zeroing, reply: Reply) {
        if self.image.refuses(&range) {
            return reply.error(Errno::INVAL);
        }
        let work = Work::Zero { range, how };
        self.attempt(Parked { work, reply, since: Instant::now() }, &mut []);
    }

    fn sync(&self, reply: Reply) {
        match self.image.sync() {
            Ok(()) => reply.ok(),
            Err(error) => {
                tracing::warn!(volume = %self.volume.id, %error, "cannot sync");
                reply.error(Errno::IO);
            }
        }
    }

    fn interrupt(&self, unique: u64) -> bool {
        let found = self.waits().take_if(|parked| parked.reply.unique() == unique);
        let any = !found.is_empty();
        for parked in found {
            parked.reply.error(Errno::INTR);
        }
        any
    }
}
