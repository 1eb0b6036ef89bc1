//! Hydration: bringing everything that is absent, in an order that follows use.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use petra_engine::format::SEGMENT_BYTES;
use petra_engine::reader::{Reading, Stretch};
use tokio::task::{JoinError, JoinSet};

use super::agent::{Agent, AgentEvent, Gone, PIECE_BYTES, pieces_of};
use super::presence::BLOCK_BYTES;
use super::wire::{ToAgent, ToServer};

/// Absent runs that lie closer together are fetched as one.
const GAP_BYTES: u64 = 1 << 20;
/// Segments that are planned together, where nothing was touched. Writers work on several at one time, so that frames of
/// neighbours lie between each other.
const SEGMENTS: u64 = 4;
/// After so much hydrated data it is made durable, while more comes: so much is fetched again after a crash. A flush holds
/// up those who write, so it is not done more often; the server begins to write out earlier.
const FLUSH_BYTES: u64 = 1 << 30;
/// Between attempts while the server can't store what comes, or can't make it durable: twice as long each time.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// How often is looked for room.
const LOOK: Duration = Duration::from_secs(1);

/// Brings everything that is absent, the start list first. Ends without an event when the server is gone.
pub(super) async fn hydrate(agent: Arc<Agent>, start_list: Vec<Range<u64>>) {
    let mut hydration = Hydration {
        agent: agent.clone(),
        reads: JoinSet::new(),
        flush: JoinSet::new(),
        damaged: BTreeSet::new(),
        unflushed_bytes: 0,
        short: false,
    };
    if hydration.run(start_list).await.is_err() {
        return;
    }
    let damaged: u64 = hydration.damaged.iter().map(|(start, end)| end - start).sum();
    let event = match damaged {
        0 => AgentEvent::Hydrated,
        damaged_bytes => AgentEvent::Incomplete { damaged_bytes },
    };
    agent.events.event(agent.volume, event);
}

/// Fills a volume.
struct Hydration {
    agent: Arc<Agent>,
    /// Each gives the parts that can't be read.
    reads: JoinSet<Result<Vec<Range<u64>>, Gone>>,
    /// The one that is under way.
    flush: JoinSet<Result<bool, Gone>>,
    /// Start and end of what can't be read.
    damaged: BTreeSet<(u64, u64)>,
    unflushed_bytes: u64,
    /// There was no room when it was looked for last.
    short: bool,
}

impl Hydration {
    async fn run(&mut self, start_list: Vec<Range<u64>>) -> Result<(), Gone> {
        let len_bytes = self.agent.len_bytes;
        for range in start_list {
            let start = range.start / BLOCK_BYTES * BLOCK_BYTES;
            let end = range.end.min(len_bytes);
            for piece in pieces_of(&(start..end), PIECE_BYTES) {
                // A list of another time may name what is there.
                for run in self.absent(piece).await? {
                    self.start(run).await?;
                }
            }
        }
        let segments = len_bytes.div_ceil(SEGMENT_BYTES);
        let mut left_before = u64::MAX;
        let mut pauses = pauses();
        loop {
            let mut left = 0;
            let mut done = vec![false; usize::try_from(segments).unwrap_or_default()];
            let mut next = 0;
            while let Some(segments) = self.next_segments(&mut done, &mut next) {
                let end = (segments.end * SEGMENT_BYTES).min(len_bytes);
                let runs = join(self.absent(segments.start * SEGMENT_BYTES..end).await?);
                left += runs.iter().map(|run| run.end - run.start).sum::<u64>();
                self.bring(&runs).await?;
            }
            while let Some(read) = self.reads.join_next().await {
                self.note(read)?;
            }
            if left == 0 {
                return self.flush_all().await;
            }
            if left >= left_before {
                // The server can't store what it gets: a person may make room meanwhile.
                tokio::time::sleep(pauses.next().unwrap_or(LONGEST_PAUSE)).await;
            } else {
                pauses = self::pauses();
            }
            left_before = left;
        }
    }

    /// A segment near what was touched, or else the next ones in order.
    fn next_segments(&self, done: &mut [bool], next: &mut usize) -> Option<Range<u64>> {
        let mut touched = self.agent.touched.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(segment) = touched.pop_back() {
            if let Some(done) = done.get_mut(segment as usize).filter(|done| !**done) {
                *done = true;
                return Some(segment..segment + 1);
            }
        }
        drop(touched);
        *next += done.get(*next..)?.iter().position(|done| !done)?;
        let start = *next as u64;
        let left = done.get_mut(*next..)?.iter_mut().take(SEGMENTS as usize);
        for done in left.take_while(|done| !**done) {
            *done = true;
            *next += 1;
        }
        Some(start..*next as u64)
    }

    /// The parts of a range that the server lacks, without those that can't be read.
    async fn absent(&self, range: Range<u64>) -> Result<Vec<Range<u64>>, Gone> {
        let mut all = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let rest = at..range.end;
            let ask = |question| ToServer::AskAbsent { question, range: rest };
            let ToAgent::Absent { end, ranges, .. } = self.agent.ask(ask).await? else {
                return Err(Gone);
            };
            // An answer that leads nowhere.
            if end <= at {
                return Err(Gone);
            }
            at = end;
            all.extend(ranges.into_iter().filter(|found| {
                let lost = |(start, end): &(u64, u64)| *start <= found.start && found.end <= *end;
                found.end <= range.end && !self.damaged.iter().any(lost)
            }));
        }
        Ok(all)
    }

    /// Begins to bring a range, with all that comes along.
    async fn start(&mut self, range: Range<u64>) -> Result<(), Gone> {
        let agent = self.agent.clone();
        let len_bytes = range.end - range.start;
        self.start_read(len_bytes, async move { agent.read(range).await }).await
    }

    /// Begins to bring some ranges, and nothing else: the rest has its turn too.
    async fn bring(&mut self, ranges: &[Range<u64>]) -> Result<(), Gone> {
        if ranges.is_empty() {
            return Ok(());
        }
        let Stretch { known, portions } = self.agent.stretch(ranges).await?;
        self.start_read(0, async move { Ok(known) }).await?;
        for portion in portions {
            let (agent, len_bytes) = (self.agent.clone(), portion.len_bytes());
            let read = async move { agent.read_portion(&portion).await };
            self.start_read(len_bytes, read).await?;
        }
        Ok(())
    }

    /// Begins a read, when it may.
    async fn start_read(
        &mut self,
        len_bytes: u64,
        read: impl Future<Output = Result<Reading, Gone>> + Send + 'static,
    ) -> Result<(), Gone> {
        if self.unflushed_bytes >= FLUSH_BYTES {
            self.begin_flush().await?;
        }
        self.unflushed_bytes += len_bytes;
        self.wait_for_room().await?;
        self.agent.make_way().await;
        let permit = self.agent.other_reads.clone().acquire_owned().await.map_err(|_| Gone)?;
        let agent = self.agent.clone();
        self.reads.spawn(async move {
            let found = read.await?;
            agent.send(found.pieces, &agent.other).await?;
            agent.send_damage(&found.damaged, &agent.other).await?;
            drop(permit);
            Ok(found.damaged.into_iter().map(|damaged| damaged.range).collect())
        });
        while let Some(read) = self.reads.try_join_next() {
            self.note(read)?;
        }
        Ok(())
    }

    fn note(&mut self, read: Result<Result<Vec<Range<u64>>, Gone>, JoinError>) -> Result<(), Gone> {
        for lost in read.map_err(|_| Gone)?? {
            // Joined with what it touches, so that a run over several of them is known as lost.
            let (mut start, mut end) = (lost.start, lost.end);
            let touching: Vec<(u64, u64)> = self
                .damaged
                .iter()
                .copied()
                .filter(|known| known.0 <= end && start <= known.1)
                .collect();
            for known in touching {
                self.damaged.remove(&known);
                (start, end) = (start.min(known.0), end.max(known.1));
            }
            self.damaged.insert((start, end));
        }
        Ok(())
    }

    /// Makes durable what has come so far. One flush at a time: a slow disk slows the rest down.
    async fn begin_flush(&mut self) -> Result<(), Gone> {
        self.end_flush().await?;
        self.unflushed_bytes = 0;
        let agent = self.agent.clone();
        self.flush.spawn(async move {
            match agent.ask(|question| ToServer::Flush { question }).await? {
                ToAgent::Flushed { done, .. } => Ok(done),
                _ => Err(Gone),
            }
        });
        Ok(())
    }

    /// Waits for a flush; true when all that came before it is durable.
    async fn end_flush(&mut self) -> Result<bool, Gone> {
        let Some(flushed) = self.flush.join_next().await else { return Ok(true) };
        let done = flushed.map_err(|_| Gone)??;
        if !done {
            // The server says why in its log.
            self.agent.events.event(self.agent.volume, AgentEvent::FlushFailed);
        }
        Ok(done)
    }

    /// Makes all durable, however long it takes: what is not durable must not count as hydrated.
    async fn flush_all(&mut self) -> Result<(), Gone> {
        for pause in pauses() {
            self.begin_flush().await?;
            if self.end_flush().await? {
                break;
            }
            tokio::time::sleep(pause).await;
        }
        Ok(())
    }

    /// Waits while only the reserve of the local disk is left. It is for those who write.
    async fn wait_for_room(&mut self) -> Result<(), Gone> {
        loop {
            let room = self.agent.room.clone();
            let short = tokio::task::spawn_blocking(move || room.is_short()).await;
            let was_short = std::mem::replace(&mut self.short, short.map_err(|_| Gone)?);
            if !self.short {
                return Ok(());
            }
            if !was_short {
                self.agent.events.event(self.agent.volume, AgentEvent::RoomShort);
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// How long to wait after each failure, for ever.
fn pauses() -> impl Iterator<Item = Duration> {
    std::iter::successors(Some(FIRST_PAUSE), |pause| Some((*pause * 2).min(LONGEST_PAUSE)))
}

/// Joins ranges that lie close together.
fn join(ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start.saturating_sub(last.end) <= GAP_BYTES => last.end = range.end,
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound() {
        let seconds: Vec<u64> = pauses().take(9).map(|pause| pause.as_secs()).collect();
        assert_eq!(seconds, [5, 10, 20, 40, 80, 160, 300, 300, 300]);
    }

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "a list of ranges is what is meant")]
    fn what_lies_close_together_is_joined() {
        assert_eq!(join(vec![0..4096, 8192..9000]), [0..9000]);
        assert_eq!(join(vec![0..1, 2 << 20..3 << 20]), [0..1, 2 << 20..3 << 20]);
    }
}
