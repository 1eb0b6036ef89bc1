//! Buffers of packs and requests: large, and soon given back.
//!
//! Such memory is new to the process each time, and the kernel hands it out a page at a time: of a snapshot of few
//! changes that took a quarter of all processor time. Huge pages are a five-hundredth as many.

use rustix::mm::{Advice, madvise};

/// Where a huge page begins, for the processors that Petra runs on mostly.
const HUGE_PAGE_BYTES: usize = 2 << 20;
/// Where memory may begin that is written past the page cache as it is, on whatever disk.
const PAGE_BYTES: usize = 4 << 10;

/// An empty buffer, in huge pages where the system has some.
pub(crate) fn buffer(capacity: usize) -> Vec<u8> {
    let mut buffer: Vec<u8> = Vec::with_capacity(capacity);
    let spare = buffer.spare_capacity_mut();
    let skip = spare.as_ptr().align_offset(HUGE_PAGE_BYTES);
    if let Some(whole) = spare.get_mut(skip..) {
        let len = whole.len() / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
        if len > 0 {
            // SAFETY: the range lies within memory that this buffer owns, and the advice changes neither what it
            // holds nor who may use it.
            //
            // A hint only: without huge pages all is as it was.
            let _ = unsafe { madvise(whole.as_mut_ptr().cast(), len, Advice::LinuxHugepage) };
        }
    }
    buffer
}

/// The place of the first page in a buffer.
pub(crate) fn first_page(buffer: &[u8]) -> usize {
    buffer.as_ptr().addr().next_multiple_of(PAGE_BYTES) - buffer.as_ptr().addr()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_hold_what_they_are_for() {
        for len in [0, 1, HUGE_PAGE_BYTES - 1, 5 * HUGE_PAGE_BYTES + 17] {
            let mut buffer = buffer(len);
            assert!(buffer.is_empty() && buffer.capacity() >= len);
            buffer.extend((0..len).map(|n| n as u8));
            assert!(buffer.iter().enumerate().all(|(n, byte)| *byte == n as u8));
        }
    }
}
