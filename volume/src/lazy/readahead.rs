//! Which reads follow each other, and how far ahead is worth asking for.

use std::ops::Range;

/// Readers that are told apart.
const STREAMS: usize = 8;
/// What is asked for at first when a read follows another, and at most.
const FIRST_BYTES: u64 = 256 << 10;
const LAST_BYTES: u64 = 8 << 20;
/// A read that skips no more than this still follows the one before.
const GAP_BYTES: u64 = 256 << 10;

/// The last readers.
#[derive(Debug, Default)]
pub(super) struct ReadAhead {
    /// The one used last at the end.
    streams: Vec<Stream>,
}

#[derive(Clone, Copy, Debug)]
struct Stream {
    /// Where the last read ended.
    end: u64,
    /// How far ahead is asked for.
    ahead: u64,
    /// Up to where was asked for.
    asked: u64,
}

impl ReadAhead {
    /// Takes note of a read; gives what should be asked for beyond it, if it follows another.
    pub(super) fn note(&mut self, read: &Range<u64>, len_bytes: u64) -> Option<Range<u64>> {
        let follows = |stream: &Stream| (stream.end..=stream.end + GAP_BYTES).contains(&read.start);
        let Some(at) = self.streams.iter().position(follows) else {
            if self.streams.len() == STREAMS {
                self.streams.remove(0);
            }
            self.streams.push(Stream { end: read.end, ahead: 0, asked: read.end });
            return None;
        };
        let mut stream = self.streams.remove(at);
        stream.end = read.end;
        let left = stream.asked.saturating_sub(read.end);
        // Asked for in large pieces: again when half of the last one is used up.
        let wanted = (left <= stream.ahead / 2).then(|| {
            stream.ahead = (stream.ahead * 2).clamp(FIRST_BYTES, LAST_BYTES);
            let start = stream.asked.max(read.end);
            stream.asked = (read.end + stream.ahead).min(len_bytes).max(start);
            start..stream.asked
        });
        self.streams.push(stream);
        wanted.filter(|range| !range.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequential_reads_ask_for_more_and_more() {
        let (mut ahead, mut asked, mut last) = (ReadAhead::default(), 0, 0);
        let len = 100 << 20;
        for n in 0..400_u64 {
            let read = n * (64 << 10)..(n + 1) * (64 << 10);
            assert!(n < 2 || asked >= read.end, "what is read was asked for before");
            if let Some(range) = ahead.note(&read, len) {
                assert!(range.start >= asked && range.end > range.start);
                last = range.end - range.start;
                asked = range.end;
            }
        }
        assert!(last >= LAST_BYTES / 2, "{last}");
        assert!(asked <= 400 * (64 << 10) + LAST_BYTES);
    }

    #[test]
    fn random_reads_ask_for_nothing() {
        let mut ahead = ReadAhead::default();
        for n in 0..1000_u64 {
            let at = n * 7_654_321 % 1000 * (1 << 20);
            assert_eq!(ahead.note(&(at..at + 4096), 1 << 40), None);
        }
        assert_eq!(ahead.streams.len(), STREAMS);
    }

    #[test]
    fn nothing_is_asked_for_past_the_end() {
        let mut ahead = ReadAhead::default();
        assert_eq!(ahead.note(&(0..4096), 8192), None);
        assert_eq!(ahead.note(&(4096..8192), 8192), None);
    }
}
