//! What any snapshot of data that is all new has to do, and nothing else: read, cut, hash, write. Petra's share of the
//! hardware is this loop's time divided by that of a snapshot of the same file (`benches/run hardware`).
//!
//! `bare_loop FILE DIRECTORY [THREADS]` reads the file in segments, each thread one at a time, while two more write the chunks
//! to files of 32 MiB, past the page cache and synced, as the store in a directory does. There is no index, no compression,
//! no format.

#![expect(clippy::expect_used, reason = "a measurement that can't run has nothing to report")]
#![expect(clippy::indexing_slicing, reason = "nothing foreign is read")]

use std::fs::{File, OpenOptions};
use std::hint::black_box;
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};

use petra_engine::ChunkId;
use petra_engine::chunker::Chunking;
use petra_engine::format::SEGMENT_BYTES;
use rustix::fs::OFlags;

const READ_BYTES: usize = 512 << 10;
const FILE_BYTES: usize = 32 << 20;
/// Threads that write while the others go on, as many as a snapshot has packs under way.
const WRITERS: usize = 2;
/// What O_DIRECT asks of lengths and places in memory.
const ALIGNMENT: usize = 4096;

/// Buffers that writers take.
type Full = Mutex<Receiver<Buffer>>;

fn main() {
    let mut words = std::env::args_os().skip(1);
    let mut path = || PathBuf::from(words.next().expect("FILE DIRECTORY [THREADS]"));
    let (image, directory) = (path(), path());
    let threads = words.next().map_or(2, |n| n.to_string_lossy().parse().expect("a number"));
    let image = File::open(image).expect("the file can be opened");
    let len = image.metadata().expect("the file has a length").len();
    let (full, to_write) = sync_channel(1);
    let (empty, to_fill) = channel();
    let (to_write, to_fill) = (Mutex::new(to_write), Mutex::new(to_fill));
    for _ in 0..threads + WRITERS + 1 {
        empty.send(Buffer::new()).expect("nobody has hung up");
    }
    let (next_segment, next_file) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..WRITERS {
            let empty = empty.clone();
            let (to_write, directory, next_file) = (&to_write, &directory, &next_file);
            scope.spawn(move || write_all(to_write, &empty, directory, next_file));
        }
        for _ in 0..threads {
            let full = full.clone();
            let (image, to_fill, next_segment) = (&image, &to_fill, &next_segment);
            scope.spawn(move || {
                let fresh = || to_fill.lock().expect("no panic").recv().expect("a buffer");
                let mut buffer = fresh();
                let mut write = |chunk: &[u8]| {
                    buffer.bytes.extend_from_slice(chunk);
                    if buffer.bytes.len() >= FILE_BYTES {
                        full.send(std::mem::replace(&mut buffer, fresh())).expect("a writer");
                    }
                };
                loop {
                    let start = next_segment.fetch_add(1, Ordering::Relaxed) * SEGMENT_BYTES;
                    if start >= len {
                        break;
                    }
                    segment(image, start, (start + SEGMENT_BYTES).min(len), &mut write);
                }
                full.send(buffer).expect("a writer");
            });
        }
        drop(full);
    });
}

/// Writes each buffer to a file of its own.
fn write_all(full: &Full, empty: &Sender<Buffer>, directory: &Path, next_file: &AtomicU64) {
    while let Ok(mut buffer) = { full.lock().expect("no panic").recv() } {
        let len = (buffer.bytes.len() - buffer.from).next_multiple_of(ALIGNMENT);
        buffer.bytes.resize(buffer.from + len, 0);
        let number = next_file.fetch_add(1, Ordering::Relaxed);
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).custom_flags(OFlags::DIRECT.bits().cast_signed());
        let mut file = options.open(directory.join(number.to_string())).expect("a new file");
        file.write_all(&buffer.bytes[buffer.from..]).expect("room for what is written");
        file.sync_all().expect("what is written is durable");
        buffer.bytes.truncate(buffer.from);
        // The one who fills may have ended.
        let _ = empty.send(buffer);
    }
}

/// Bytes for a file, aligned from a place on.
struct Buffer {
    bytes: Vec<u8>,
    from: usize,
}

impl Buffer {
    fn new() -> Self {
        let mut bytes: Vec<u8> = Vec::with_capacity(FILE_BYTES + (1 << 20) + 2 * ALIGNMENT);
        let from = bytes.as_ptr().align_offset(ALIGNMENT);
        bytes.resize(from, 0);
        Self { bytes, from }
    }
}

fn segment(image: &File, start: u64, end: u64, write: &mut impl FnMut(&[u8])) {
    let cutter = Chunking::default().cutter();
    let mut window = Vec::with_capacity(READ_BYTES + cutter.max_len());
    let mut at = start;
    while at < end || !window.is_empty() {
        let have = window.len();
        let more = READ_BYTES.min((end - at) as usize);
        window.resize(have + more, 0);
        image.read_exact_at(&mut window[have..], at).expect("the file can be read");
        at += more as u64;
        let mut done = 0;
        while window.len() - done >= cutter.max_len() || (at == end && done < window.len()) {
            let chunk = &window[done..done + cutter.first(&window[done..])];
            black_box(ChunkId::of(chunk));
            write(chunk);
            done += chunk.len();
        }
        window.drain(..done);
    }
}
