//! The agent's side of lazy images: for each volume it fetches what its image server wants, at once, and everything
//! else when there is time.
//!
//! ```text
//! want (urgent) ------> read -> pieces of the range -> socket, before anything else
//! want (read-ahead) --> read -+-> whatever came along -> socket
//! hydrator -----------> read -+   (pauses while someone waits)
//!   the start list, then segments near what was touched, then all others in order
//! ```
//!
//! A store that is away is asked again and again, and the wants wait; only damage is an answer. While a server is
//! connected its [`Connection`] holds its FUSE descriptor, so that a successor can go on where it was killed ([`End::Died`]).

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Buf, Bytes};
use petra_engine::format::SEGMENT_BYTES;
use petra_engine::reader::{DamagedRange, Piece, Portion, Reading, Stretch, VolumeReader};
use petra_engine::{ErrorKind, SnapshotId};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::connection::{Connection, End, ended, receive_message};
use super::hydration::hydrate;
use super::presence::BLOCK_BYTES;
use super::wire::{self, MAX_BODY, ToAgent, ToServer};
use crate::error::{Error, Result};

/// Urgent wants that are read at one time. More wait for their turn.
const URGENT_READS: usize = 16;
/// Reads for read-ahead and hydration at one time, and bytes of each. Hydration takes requests of 8 MiB that bring 16 MiB
/// at most: with what waits for the socket, and what is kept of other reads, some 140 MiB of memory.
const OTHER_READS: usize = 4;
pub(super) const PIECE_BYTES: u64 = 8 << 20;
/// Messages that wait for the socket.
const QUEUE: usize = 8;
/// How long hydration makes way for those who wait before it takes one more step.
const MAKE_WAY: Duration = Duration::from_millis(100);
/// Between attempts while the store is away.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// What happens to a volume that an agent serves.
#[derive(Debug)]
#[non_exhaustive]
pub enum AgentEvent<'a> {
    /// The store did not answer, or refused. Told once, until it is back.
    StoreAway {
        /// Why.
        error: &'a petra_engine::Error,
    },
    /// It answers again.
    StoreBack,
    /// The local disk has no room for what nobody asked for: it waits. Told once, until there is room again.
    RoomShort,
    /// The server can't make durable what came. Told each time that it is tried.
    FlushFailed,
    /// A part of the volume can't be read, and reading it is an I/O error. Told each time that it is tried.
    Damaged {
        /// Bytes of the volume.
        range: Range<u64>,
        /// What is missing or damaged.
        error: &'a petra_engine::Error,
    },
    /// What was read since the volume was first mounted, in that order: what a start list is made of.
    Recorded {
        /// Bytes of the volume.
        ranges: &'a [Range<u64>],
    },
    /// Everything is in the local image, and durable. The repository is not needed any more.
    Hydrated,
    /// Everything but damaged parts is in the local image.
    Incomplete {
        /// Bytes that can't be read.
        damaged_bytes: u64,
    },
    /// Its image server died. Who uses the volume waits for a successor, which is being started.
    ServerDied,
    /// A successor goes on where the dead server was.
    ServerReplaced,
    /// No successor could be started in time: all that use the volume get I/O errors, until it is attached anew.
    ServerLost {
        /// Why.
        error: &'a Error,
    },
}

/// Takes events. Must not block.
pub trait AgentEvents: Send + Sync + fmt::Debug {
    /// Something happened.
    fn event(&self, volume: SnapshotId, event: AgentEvent<'_>);
}

/// Knows how full the local disk is.
pub trait Room: Send + Sync + fmt::Debug {
    /// True when there is no room for what nobody asked for. May wait for the disk.
    fn is_short(&self) -> bool;
}

/// What an agent does for one volume.
#[derive(Debug)]
pub struct AgentOptions {
    /// The snapshot's volume.
    pub reader: Arc<VolumeReader>,
    /// What to fetch first: bytes of the volume.
    pub start_list: Vec<Range<u64>>,
    /// Fetch everything, not only what is wanted.
    pub hydrate: bool,
    /// After this time the server is asked what was read so far, for [`AgentEvent::Recorded`].
    pub record_for: Option<Duration>,
    /// Where the data goes.
    pub room: Arc<dyn Room>,
    /// Where events go.
    pub events: Arc<dyn AgentEvents>,
}

/// Serves an image server until it is gone.
pub async fn serve(
    connection: Connection,
    options: AgentOptions,
    cancel: &CancellationToken,
) -> Result<End> {
    let Connection { stream, hello, device, process } = connection;
    let (image_bytes, source_bytes) = (hello.volume.len_bytes, options.reader.len_bytes());
    if image_bytes < source_bytes {
        return Err(Error::Request(format!(
            "the image server of volume {} has {image_bytes} bytes, the snapshot {source_bytes}",
            hello.volume.id,
        )));
    }
    let (input, output) = stream.into_split();
    let (urgent, urgent_out) = mpsc::channel(QUEUE);
    let (other, other_out) = mpsc::channel(QUEUE);
    let agent = Arc::new(Agent {
        volume: hello.volume.id,
        image_bytes,
        // What lies behind is there already.
        len_bytes: source_bytes.next_multiple_of(BLOCK_BYTES).min(image_bytes),
        reader: options.reader,
        room: options.room,
        events: options.events,
        urgent,
        other,
        urgent_reads: Semaphore::new(URGENT_READS),
        other_reads: Arc::new(Semaphore::new(OTHER_READS)),
        waiting: AtomicUsize::new(0),
        quiet: Notify::new(),
        questions: Mutex::default(),
        next_question: AtomicU64::new(0),
        touched: Mutex::default(),
        away: Mutex::default(),
    });
    // All of them end when this call does.
    let mut tasks = JoinSet::new();
    tasks.spawn(write_all(output, urgent_out, other_out));
    if let Some(time) = options.record_for {
        let agent = agent.clone();
        tasks.spawn(async move { agent.record(time).await });
    }
    if options.hydrate {
        tasks.spawn(hydrate(agent.clone(), options.start_list));
    }
    let read = tokio::select! {
        () = cancel.cancelled() => return Err(Error::Cancelled),
        read = agent.read_all(input, &mut tasks) => read,
    };
    ended(read, &hello, device, process).await
}

/// A message on its way out: its header, and bytes that may be long.
type Message = (Vec<u8>, Bytes);

async fn write_all(
    mut output: OwnedWriteHalf,
    mut urgent: mpsc::Receiver<Message>,
    mut other: mpsc::Receiver<Message>,
) {
    loop {
        let message = tokio::select! {
            biased;
            message = urgent.recv() => message,
            message = other.recv() => message,
        };
        let Some((head, body)) = message else { return };
        // The reader finds out too.
        if output.write_all_buf(&mut Buf::chain(head.as_slice(), body)).await.is_err() {
            return;
        }
    }
}

/// What the tasks of one connection share.
pub(super) struct Agent {
    pub(super) volume: SnapshotId,
    /// The volume may be longer than its source.
    image_bytes: u64,
    /// What comes from here: the source, in whole blocks as far as there are any.
    pub(super) len_bytes: u64,
    reader: Arc<VolumeReader>,
    pub(super) room: Arc<dyn Room>,
    pub(super) events: Arc<dyn AgentEvents>,
    urgent: mpsc::Sender<Message>,
    pub(super) other: mpsc::Sender<Message>,
    urgent_reads: Semaphore,
    pub(super) other_reads: Arc<Semaphore>,
    /// Urgent wants that are not answered.
    waiting: AtomicUsize,
    quiet: Notify,
    questions: Mutex<HashMap<u64, oneshot::Sender<ToAgent>>>,
    next_question: AtomicU64,
    /// Segments in which something was wanted, the last one at the end.
    pub(super) touched: Mutex<VecDeque<u64>>,
    /// The store is away.
    away: Mutex<bool>,
}

/// The connection is gone, and the task has nothing to do any more.
pub(super) struct Gone;

impl Agent {
    async fn read_all(
        self: &Arc<Self>,
        mut input: OwnedReadHalf,
        tasks: &mut JoinSet<()>,
    ) -> io::Result<()> {
        let mut body = Vec::new();
        loop {
            let message = receive_message(&mut input, &mut body).await?;
            // Finished ones are let go of.
            while tasks.try_join_next().is_some() {}
            match message {
                ToAgent::Want { range, urgent } if range.end <= self.image_bytes => {
                    let range = range.start..range.end.min(self.len_bytes);
                    if range.is_empty() {
                        continue;
                    }
                    self.touch(&range);
                    let agent = self.clone();
                    if urgent {
                        self.waiting.fetch_add(1, Ordering::AcqRel);
                    }
                    tasks.spawn(async move { agent.want(range, urgent).await });
                }
                message @ (ToAgent::Absent { question, .. }
                | ToAgent::Flushed { question, .. }
                | ToAgent::Recorded { question, .. }) => {
                    let asked = self.questions().remove(&question);
                    if let Some(asked) = asked {
                        // Whoever asked may be gone.
                        let _ = asked.send(message);
                    }
                }
                ToAgent::Bye => return Ok(()),
                ToAgent::Hello(_) | ToAgent::Want { .. } => {
                    return Err(io::Error::other("an unexpected message"));
                }
            }
        }
    }

    fn questions(&self) -> MutexGuard<'_, HashMap<u64, oneshot::Sender<ToAgent>>> {
        self.questions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes where something was wanted; hydration goes on there.
    fn touch(&self, range: &Range<u64>) {
        let mut touched = self.touched.lock().unwrap_or_else(PoisonError::into_inner);
        let segment = range.start / SEGMENT_BYTES;
        if touched.back() != Some(&segment) {
            touched.retain(|known| *known != segment);
            touched.push_back(segment);
            if touched.len() > 64 {
                touched.pop_front();
            }
        }
    }

    /// Brings what a server asked for.
    async fn want(&self, range: Range<u64>, urgent: bool) {
        let reads = if urgent { &self.urgent_reads } else { &*self.other_reads };
        let permit = reads.acquire().await;
        let mut rest = Vec::new();
        for piece in pieces_of(&range, PIECE_BYTES) {
            match self.read(piece.clone()).await {
                Ok(found) => {
                    let (inside, outside) = split(found.pieces, &piece);
                    let queue = if urgent { &self.urgent } else { &self.other };
                    rest.extend(outside);
                    let sent = self.send(inside, queue).await.is_ok();
                    if !sent || self.send_damage(&found.damaged, queue).await.is_err() {
                        break;
                    }
                }
                Err(Gone) => break,
            }
        }
        drop(permit);
        if urgent && self.waiting.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.quiet.notify_waiters();
        }
        // What came along keeps nobody waiting.
        let _ = self.send(rest, &self.other).await;
    }

    /// Reads a range.
    pub(super) async fn read(&self, range: Range<u64>) -> Result<Reading, Gone> {
        let range = self.in_source(&range);
        let mut reading = self.patiently(|| self.reader.read(range.clone())).await?;
        self.fill_up(&mut reading);
        Ok(reading)
    }

    /// Plans the reading of ranges.
    pub(super) async fn stretch(&self, ranges: &[Range<u64>]) -> Result<Stretch, Gone> {
        let ranges: Vec<_> = ranges.iter().map(|range| self.in_source(range)).collect();
        let mut stretch = self.patiently(|| self.reader.stretch(&ranges)).await?;
        self.fill_up(&mut stretch.known);
        Ok(stretch)
    }

    /// Reads what one request of a stretch brings.
    pub(super) async fn read_portion(&self, portion: &Portion) -> Result<Reading, Gone> {
        let mut reading = self.patiently(|| self.reader.read_portion(portion)).await?;
        self.fill_up(&mut reading);
        Ok(reading)
    }

    fn in_source(&self, range: &Range<u64>) -> Range<u64> {
        range.start..range.end.min(self.reader.len_bytes())
    }

    fn fill_up(&self, reading: &mut Reading) {
        let source_bytes = self.reader.len_bytes();
        if source_bytes < self.len_bytes {
            fill_up(reading, source_bytes, self.len_bytes);
        }
    }

    /// Reads, however long the store is away.
    async fn patiently<T, R>(&self, read: impl Fn() -> R) -> Result<T, Gone>
    where
        R: Future<Output = Result<T, Arc<petra_engine::Error>>>,
    {
        let mut pause = FIRST_PAUSE;
        loop {
            match read().await {
                Ok(found) => {
                    let was_away = std::mem::take(&mut *self.away());
                    if was_away {
                        self.events.event(self.volume, AgentEvent::StoreBack);
                    }
                    return Ok(found);
                }
                Err(error) if error.kind() == ErrorKind::Cancelled => return Err(Gone),
                // Whatever it is, wrong credentials too: a person can mend it while the volume waits.
                Err(error) => {
                    let was_away = std::mem::replace(&mut *self.away(), true);
                    if !was_away {
                        self.events.event(self.volume, AgentEvent::StoreAway { error: &error });
                    }
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LAST_PAUSE);
                }
            }
        }
    }

    fn away(&self) -> MutexGuard<'_, bool> {
        self.away.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn send(
        &self,
        pieces: Vec<Piece>,
        queue: &mpsc::Sender<Message>,
    ) -> Result<(), Gone> {
        for piece in pieces {
            match piece {
                Piece::Zeros(range) => {
                    let message = ToServer::Zeros(range).encode();
                    queue.send((message, Bytes::new())).await.map_err(|_| Gone)?;
                }
                Piece::Data { mut offset, mut bytes } => {
                    while !bytes.is_empty() {
                        let part = bytes.split_to(bytes.len().min(MAX_BODY));
                        let header = wire::data_header(offset, part.len()).to_vec();
                        offset += part.len() as u64;
                        queue.send((header, part)).await.map_err(|_| Gone)?;
                    }
                }
            }
        }
        Ok(())
    }

    pub(super) async fn send_damage(
        &self,
        damaged: &[DamagedRange],
        queue: &mpsc::Sender<Message>,
    ) -> Result<(), Gone> {
        for DamagedRange { range, error } in damaged {
            self.events.event(self.volume, AgentEvent::Damaged { range: range.clone(), error });
            let mut reason = error.to_string();
            reason.truncate(reason.floor_char_boundary(wire::MAX_REASON));
            let message = ToServer::Failed { range: range.clone(), reason }.encode();
            queue.send((message, Bytes::new())).await.map_err(|_| Gone)?;
        }
        Ok(())
    }

    /// Asks the server something.
    pub(super) async fn ask(
        &self,
        question: impl FnOnce(u64) -> ToServer<'static>,
    ) -> Result<ToAgent, Gone> {
        let number = self.next_question.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        self.questions().insert(number, reply);
        let message = question(number).encode();
        self.other.send((message, Bytes::new())).await.map_err(|_| Gone)?;
        answer.await.map_err(|_| Gone)
    }

    async fn record(&self, time: Duration) {
        tokio::time::sleep(time).await;
        let answer = self.ask(|question| ToServer::StopRecording { question }).await;
        if let Ok(ToAgent::Recorded { ranges, .. }) = answer {
            self.events.event(self.volume, AgentEvent::Recorded { ranges: &ranges });
        }
    }

    /// Waits while someone waits for data, but not for ever: many small reads must not keep the volume lazy.
    pub(super) async fn make_way(&self) {
        let quiet = async {
            loop {
                let notified = self.quiet.notified();
                if self.waiting.load(Ordering::Acquire) == 0 {
                    return;
                }
                notified.await;
            }
        };
        let _ = tokio::time::timeout(MAKE_WAY, quiet).await;
    }
}

/// Lengthens what ends where the source does, in the midst of a block, to the end of that block: an image takes whole ones.
fn fill_up(reading: &mut Reading, source_bytes: u64, to: u64) {
    for damaged in reading.damaged.iter_mut().filter(|part| part.range.end == source_bytes) {
        damaged.range.end = to;
    }
    let pieces = &mut reading.pieces;
    match pieces.pop_if(|piece| piece.range().end == source_bytes) {
        None => {}
        Some(Piece::Zeros(range)) => pieces.push(Piece::Zeros(range.start..to)),
        Some(Piece::Data { offset, mut bytes }) => {
            let in_block = (source_bytes % BLOCK_BYTES) as usize;
            let tail = bytes.split_off(bytes.len().saturating_sub(in_block));
            let end = offset + bytes.len() as u64;
            if !bytes.is_empty() {
                pieces.push(Piece::Data { offset, bytes });
            }
            let mut block = tail.to_vec();
            block.resize((to - end) as usize, 0);
            pieces.push(Piece::Data { offset: end, bytes: block.into() });
        }
    }
}

/// A range in pieces of some length, cut at its multiples.
pub(super) fn pieces_of(range: &Range<u64>, len: u64) -> impl Iterator<Item = Range<u64>> + use<> {
    let (mut at, end) = (range.start, range.end);
    std::iter::from_fn(move || {
        let piece = at..((at / len + 1) * len).min(end);
        at = piece.end;
        (!piece.is_empty()).then_some(piece)
    })
}

/// Divides pieces into what lies within a range and what does not.
fn split(pieces: Vec<Piece>, within: &Range<u64>) -> (Vec<Piece>, Vec<Piece>) {
    let (mut inside, mut outside) = (Vec::new(), Vec::new());
    for piece in pieces {
        let whole = piece.range();
        let cut = |at: u64| at.clamp(whole.start, whole.end);
        let (start, end) = (cut(within.start), cut(within.end));
        for part in [whole.start..start, start..end, end..whole.end] {
            if part.is_empty() {
                continue;
            }
            let is_inside = part == (start..end);
            let part = match &piece {
                Piece::Zeros(_) => Piece::Zeros(part),
                Piece::Data { offset, bytes } => {
                    let at = |place: u64| (place - offset) as usize;
                    let bytes = bytes.slice(at(part.start)..at(part.end));
                    Piece::Data { offset: part.start, bytes }
                }
            };
            if is_inside { &mut inside } else { &mut outside }.push(part);
        }
    }
    (inside, outside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_divided_at_the_bounds() {
        let data =
            |offset: u64, bytes: &'static [u8]| Piece::Data { offset, bytes: Bytes::from(bytes) };
        let (inside, outside) = split(vec![data(0, b"abcdef"), Piece::Zeros(6..9)], &(2..7));
        assert_eq!(inside, [data(2, b"cdef"), Piece::Zeros(6..7)]);
        assert_eq!(outside, [data(0, b"ab"), Piece::Zeros(7..9)]);
        let (inside, outside) = split(vec![data(4, b"ab")], &(10..12));
        assert_eq!((inside, outside), (vec![], vec![data(4, b"ab")]));
    }

    #[test]
    fn the_last_block_of_a_source_is_filled_up() {
        let data = |offset: u64, bytes: Vec<u8>| Piece::Data { offset, bytes: bytes.into() };
        let filled = |pieces: Vec<Piece>, source_bytes| {
            let error = Arc::new(petra_engine::Error::Cancelled);
            let damaged = vec![DamagedRange { range: 4096..4608, error }];
            let mut reading = Reading { pieces, damaged };
            fill_up(&mut reading, source_bytes, source_bytes.next_multiple_of(BLOCK_BYTES));
            let end = if source_bytes == 4608 { 8192 } else { 4608 };
            assert_eq!(reading.damaged[0].range, 4096..end);
            reading.pieces
        };
        let block = [vec![7; 512], vec![0; 3584]].concat();
        let long = data(0, vec![7; 4608]);
        let expected = vec![data(0, vec![7; 4096]), data(4096, block.clone())];
        assert_eq!(filled(vec![long.clone()], 4608), expected);
        assert_eq!(filled(vec![data(4096, vec![7; 512])], 4608), [data(4096, block)]);
        assert_eq!(filled(vec![Piece::Zeros(0..4608)], 4608), [Piece::Zeros(0..8192)]);
        // Not its end, or an end that can't be read.
        assert_eq!(filled(vec![long.clone()], 9000), [long]);
        assert_eq!(filled(vec![], 4608), []);
    }

    #[test]
    fn ranges_are_cut() {
        let pieces: Vec<_> = pieces_of(&(5..25), 10).collect();
        assert_eq!(pieces, [5..10, 10..20, 20..25]);
        assert_eq!(pieces_of(&(5..5), 10).count(), 0);
    }
}
