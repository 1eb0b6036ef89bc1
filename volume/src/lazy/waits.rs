//! Requests that wait for blocks, and what was asked of the agent for them.
//!
//! The agent is asked for windows. One that was asked for is not asked for again while the answer is under way, however
//! many requests wait for it.

use std::collections::BTreeMap;
use std::ops::Range;

use super::presence::BLOCK_BYTES;

/// Blocks that are asked for together: 128 KiB.
pub(super) const WINDOW_BLOCKS: u64 = 32;

/// The windows that are under way, with all that waits for them.
#[derive(Debug)]
pub(super) struct Waits<T> {
    windows: BTreeMap<u64, Window<T>>,
}

impl<T> Default for Waits<T> {
    fn default() -> Self {
        Self { windows: BTreeMap::new() }
    }
}

#[derive(Debug)]
struct Window<T> {
    urgent: bool,
    /// Each waits for one block; when that is there it looks for the next.
    waiters: Vec<(u64, T)>,
}

/// The windows that some blocks lie in.
fn windows(blocks: &Range<u64>) -> Range<u64> {
    blocks.start / WINDOW_BLOCKS..blocks.end.div_ceil(WINDOW_BLOCKS)
}

fn blocks_of(window: u64) -> Range<u64> {
    window * WINDOW_BLOCKS..(window + 1) * WINDOW_BLOCKS
}

impl<T> Waits<T> {
    /// Notes that the windows of some blocks are wanted, as far as something in them is absent; gives what is to be
    /// asked for, in bytes.
    pub(super) fn want(
        &mut self,
        blocks: &Range<u64>,
        urgent: bool,
        is_absent: impl Fn(Range<u64>) -> bool,
    ) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for number in windows(blocks) {
            let known = self.windows.get(&number);
            if known.is_some_and(|window| window.urgent || !urgent) || !is_absent(blocks_of(number))
            {
                continue;
            }
            let window = self.windows.entry(number);
            window.or_insert_with(|| Window { urgent, waiters: Vec::new() }).urgent = urgent;
            push(&mut ranges, number);
        }
        ranges
    }

    /// Lets something wait for a block whose window is wanted.
    pub(super) fn park(&mut self, block: u64, waiter: T) {
        let window = self.windows.entry(block / WINDOW_BLOCKS);
        let window = window.or_insert_with(|| Window { urgent: true, waiters: Vec::new() });
        window.waiters.push((block, waiter));
    }

    /// True when something waits for one of some blocks.
    pub(super) fn is_waited_for(&self, blocks: &Range<u64>) -> bool {
        let mut waiters =
            self.windows.range(windows(blocks)).flat_map(|(_, window)| &window.waiters);
        waiters.any(|(block, _)| blocks.contains(block))
    }

    /// Blocks have come: gives all that waited for them.
    pub(super) fn arrived(
        &mut self,
        blocks: &Range<u64>,
        is_absent: impl Fn(Range<u64>) -> bool,
    ) -> Vec<T> {
        let mut ready = Vec::new();
        let mut whole = Vec::new();
        for (number, window) in self.windows.range_mut(windows(blocks)) {
            let waiters = std::mem::take(&mut window.waiters);
            for (block, waiter) in waiters {
                if is_absent(block..block + 1) {
                    window.waiters.push((block, waiter));
                } else {
                    ready.push(waiter);
                }
            }
            if !is_absent(blocks_of(*number)) {
                whole.push(*number);
            }
        }
        for number in whole {
            self.windows.remove(&number);
        }
        ready
    }

    /// Blocks will not come: gives all that waited for them. Their windows can be asked for again.
    pub(super) fn failed(&mut self, blocks: &Range<u64>) -> Vec<T> {
        let mut failed = Vec::new();
        self.windows.retain(|number, window| {
            if !windows(blocks).contains(number) {
                return true;
            }
            let waiters = std::mem::take(&mut window.waiters);
            for (block, waiter) in waiters {
                if blocks.contains(&block) {
                    failed.push(waiter);
                } else {
                    window.waiters.push((block, waiter));
                }
            }
            !window.waiters.is_empty()
        });
        failed
    }

    /// Gives what fits, for example what has waited for too long.
    pub(super) fn take_if(&mut self, fits: impl Fn(&T) -> bool) -> Vec<T> {
        let mut taken = Vec::new();
        for window in self.windows.values_mut() {
            let waiters = std::mem::take(&mut window.waiters);
            for (block, waiter) in waiters {
                if fits(&waiter) {
                    taken.push(waiter);
                } else {
                    window.waiters.push((block, waiter));
                }
            }
        }
        taken
    }

    /// There is a new agent, who knows of nothing: gives what is to be asked of it. Read-ahead is forgotten.
    pub(super) fn begin_again(&mut self) -> Vec<Range<u64>> {
        self.windows.retain(|_, window| !window.waiters.is_empty());
        let mut ranges = Vec::new();
        for (number, window) in &mut self.windows {
            window.urgent = true;
            push(&mut ranges, *number);
        }
        ranges
    }
}

/// Adds a window, in bytes, joined with the one before.
fn push(ranges: &mut Vec<Range<u64>>, window: u64) {
    let blocks = blocks_of(window);
    let range = blocks.start * BLOCK_BYTES..blocks.end * BLOCK_BYTES;
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "lists of ranges are what is meant")]
mod tests {
    use super::*;

    const WINDOW: u64 = WINDOW_BLOCKS * BLOCK_BYTES;

    #[test]
    fn a_window_is_asked_for_once() {
        let mut waits = Waits::default();
        let absent = |_: Range<u64>| true;
        assert_eq!(waits.want(&(0..33), false, absent), [0..2 * WINDOW]);
        assert!(waits.want(&(5..6), false, absent).is_empty(), "it is under way");
        assert_eq!(waits.want(&(5..6), true, absent), [0..WINDOW], "now it is urgent");
        waits.park(5, 'a');
        assert!(waits.want(&(6..7), true, absent).is_empty());
        assert!(waits.is_waited_for(&(0..6)) && !waits.is_waited_for(&(6..500)));
        waits.park(6, 'b');
        assert_eq!(waits.arrived(&(5..6), |blocks| blocks != (5..6)), ['a']);
        assert_eq!(waits.begin_again(), [0..WINDOW], "read-ahead is forgotten");
        assert_eq!(waits.arrived(&(0..32), |_| false), ['b']);
        assert!(waits.begin_again().is_empty());
    }

    #[test]
    fn only_those_fail_that_wait_for_what_is_damaged() {
        let mut waits = Waits::default();
        assert_eq!(waits.want(&(0..10), true, |_| true), [0..WINDOW]);
        waits.park(3, 'a');
        waits.park(4, 'b');
        assert_eq!(waits.failed(&(4..9)), ['b']);
        assert_eq!(waits.take_if(|waiter| *waiter == 'a'), ['a']);
        assert!(waits.failed(&(0..9)).is_empty());
        assert_eq!(waits.want(&(0..10), true, |_| true), [0..WINDOW], "it is asked for again");
    }

    #[test]
    fn what_is_there_is_not_asked_for() {
        let mut waits = Waits::<()>::default();
        let absent = |blocks: Range<u64>| blocks.start >= 64;
        assert_eq!(waits.want(&(0..128), true, absent), [2 * WINDOW..4 * WINDOW]);
    }
}
