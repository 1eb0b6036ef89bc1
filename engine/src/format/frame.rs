//! Frames: consecutive new chunks compressed together.
//!
//! Small chunks find more duplicates but compress badly one by one; a frame gives zstd some hundred KiB of
//! context, while a lazy read still fetches little more than it asked for.
//!
//! | bytes | field |
//! |---|---|
//! | 1 | codec: 0 as it is, 1 zstd, 2, 4 or 8 zstd after splitting into that many planes |
//! | ... | the chunks, encoded |
//!
//! Arrays of numbers (checkpoints, pickles, columns) hardly compress as they are, since the few bits that repeat are
//! spread among random ones. Splitting every 2, 4 or 8 bytes into planes brings equal bytes together, as the
//! shuffle filters of HDF5 and Blosc do.

use std::cell::RefCell;

use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::{CParameter, Strategy};

use super::FormatError;
use crate::crypto;
use crate::id::PackId;

/// A frame holds chunks until one more would exceed this many bytes.
pub const TARGET_BYTES: usize = 1 << 20;

/// The largest frame, raw: one chunk of the largest size that any profile allows.
pub const MAX_BYTES: usize = 1 << 20;

/// How much longer than its raw bytes a stored frame can be: the codec, and what sealing adds where it is sealed.
pub const MAX_OVERHEAD_BYTES: usize = 1 + crypto::OVERHEAD_BYTES;

const RAW: u8 = 0;
const ZSTD: u8 = 1;
const STRIDES: [usize; 3] = [2, 4, 8];

/// Where a frame is and how long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameLocation {
    /// The pack that holds it.
    pub pack: PackId,
    /// First byte within the pack.
    pub offset: u32,
    /// Bytes in the pack: at most [`MAX_OVERHEAD_BYTES`] more than `raw_len`.
    pub stored_len: u32,
    /// Bytes of its chunks.
    pub raw_len: u32,
}

impl FrameLocation {
    /// True for lengths that no writer makes.
    pub(crate) fn is_impossible(&self) -> bool {
        u64::from(self.stored_len) > u64::from(self.raw_len) + MAX_OVERHEAD_BYTES as u64
            || self.offset.checked_add(self.stored_len).is_none()
    }
}

thread_local! {
    // A zstd context is some hundred KiB to set up, so each worker thread keeps its own.
    static DECODER: RefCell<Option<(Decompressor<'static>, Vec<u8>)>> = const { RefCell::new(None) };
}

/// Compresses frames.
pub struct FrameEncoder {
    compressor: Compressor<'static>,
    planes: Vec<u8>,
}

impl FrameEncoder {
    /// An encoder for one worker.
    pub fn new() -> std::io::Result<Self> {
        let mut compressor = Compressor::new(1)?;
        // Stores less than level 1 in little more time: matches of less than six bytes are hardly worth their search
        // (docs/format.md has the table).
        for parameter in [
            CParameter::WindowLog(20),
            CParameter::Strategy(Strategy::ZSTD_fast),
            CParameter::HashLog(15),
            CParameter::MinMatch(6),
            // The leaf has the length, and the chunks' ids are a better checksum.
            CParameter::ContentSizeFlag(false),
            CParameter::ChecksumFlag(false),
        ] {
            compressor.set_parameter(parameter)?;
        }
        Ok(Self { compressor, planes: Vec::new() })
    }

    /// Puts the stored form of `raw` into `out`. zstd runs at most once, and not at all where a look at the data says
    /// that it is random.
    pub fn encode(&mut self, raw: &[u8], out: &mut Vec<u8>) {
        // Less than a thirty-second saved is not worth the time of every later read.
        let limit = raw.len() - raw.len() / 32;
        let done = match look(raw) {
            Look::Random => false,
            Look::Numbers(stride) => {
                split(raw, stride, &mut self.planes);
                compress(&mut self.compressor, stride as u8, &self.planes, limit, out)
            }
            Look::Other => compress(&mut self.compressor, ZSTD, raw, limit, out),
        };
        if !done {
            out.clear();
            out.push(RAW);
            out.extend_from_slice(raw);
        }
    }
}

/// Compresses into `out` after a codec byte; false if that takes more than `limit` bytes.
fn compress(
    compressor: &mut Compressor<'static>,
    codec: u8,
    data: &[u8],
    limit: usize,
    out: &mut Vec<u8>,
) -> bool {
    out.clear();
    out.resize(1 + limit, codec);
    // zstd gives up as soon as the output can't fit, so incompressible data costs little.
    let written = out.get_mut(1..).map(|place| compressor.compress_to_buffer(data, place));
    match written {
        Some(Ok(len)) => {
            out.truncate(1 + len);
            true
        }
        _ => false,
    }
}

/// Decodes a stored frame into `out`. Its chunks are still to be verified.
pub fn decode(stored: &[u8], raw_len: u32, out: &mut Vec<u8>) -> Result<(), FormatError> {
    let raw_len = raw_len as usize;
    if raw_len > MAX_BYTES {
        return Err(FormatError::invalid(format!("a frame of {raw_len} bytes")));
    }
    let Some((codec, data)) = stored.split_first() else {
        return Err(FormatError::invalid("an empty frame"));
    };
    let len = match (*codec, usize::from(*codec)) {
        (RAW, _) => {
            out.clear();
            out.extend_from_slice(data);
            data.len()
        }
        (ZSTD, _) => decompress(data, raw_len, out, None)?,
        (_, stride) if STRIDES.contains(&stride) => decompress(data, raw_len, out, Some(stride))?,
        (codec, _) => {
            return Err(FormatError::invalid(format!("a frame of unknown codec {codec}")));
        }
    };
    if len != raw_len {
        return Err(FormatError::invalid(format!(
            "{raw_len} bytes expected in a frame, {len} found"
        )));
    }
    Ok(())
}

fn decompress(
    data: &[u8],
    raw_len: usize,
    out: &mut Vec<u8>,
    stride: Option<usize>,
) -> Result<usize, FormatError> {
    let bad = |error: std::io::Error| FormatError::invalid(format!("zstd: {error}"));
    DECODER.with(|slot| {
        let mut slot = slot.borrow_mut();
        let (decompressor, planes) = match &mut *slot {
            Some(decoder) => decoder,
            empty => empty.insert((Decompressor::new().map_err(bad)?, Vec::new())),
        };
        let mut into = |place: &mut Vec<u8>| {
            place.clear();
            place.resize(raw_len, 0);
            decompressor.decompress_to_buffer(data, place.as_mut_slice()).map_err(bad)
        };
        let Some(stride) = stride else { return into(out) };
        let len = into(planes)?;
        join(planes, stride, out);
        Ok(len)
    })
}

/// Elements that are split or joined before those behind them, so that they stay in the processor's first cache from plane
/// to plane.
const ELEMENTS: usize = 1024;

/// Splits elements of `stride` bytes into planes: all first bytes, then all second bytes, and so on. Bytes after
/// the last whole element stay at the end.
fn split(raw: &[u8], stride: usize, planes: &mut Vec<u8>) {
    planes.clear();
    planes.resize(raw.len(), 0);
    match stride {
        2 => split_with::<2>(raw, planes, |from, bits| (u16::from_le_bytes(from) >> bits) as u8),
        4 => split_with::<4>(raw, planes, |from, bits| (u32::from_le_bytes(from) >> bits) as u8),
        _ => split_with::<8>(raw, planes, |from, bits| (u64::from_le_bytes(from) >> bits) as u8),
    }
}

/// `byte` gives what is left of an element after a shift by so many bits. Compilers make vector instructions of shifts, not
/// of indices.
fn split_with<const STRIDE: usize>(
    raw: &[u8],
    planes: &mut [u8],
    byte: impl Fn([u8; STRIDE], usize) -> u8,
) {
    let (elements, rest) = raw.as_chunks::<STRIDE>();
    let (body, tail) = planes.split_at_mut(raw.len() - rest.len());
    tail.copy_from_slice(rest);
    for (part, from) in elements.chunks(ELEMENTS).enumerate() {
        for (n, plane) in body.chunks_exact_mut(elements.len()).enumerate() {
            let to = plane.iter_mut().skip(part * ELEMENTS);
            to.zip(from).for_each(|(to, from)| *to = byte(*from, 8 * n));
        }
    }
}

/// The inverse of [`split`].
fn join(planes: &[u8], stride: usize, raw: &mut Vec<u8>) {
    raw.clear();
    raw.resize(planes.len(), 0);
    match stride {
        2 => join_with::<2>(planes, raw, |to, byte, bits| {
            (u16::from_le_bytes(to) | u16::from(byte) << bits).to_le_bytes()
        }),
        4 => join_with::<4>(planes, raw, |to, byte, bits| {
            (u32::from_le_bytes(to) | u32::from(byte) << bits).to_le_bytes()
        }),
        _ => join_with::<8>(planes, raw, |to, byte, bits| {
            (u64::from_le_bytes(to) | u64::from(byte) << bits).to_le_bytes()
        }),
    }
}

/// `with` gives an element with one more byte, at so many bits. `raw` is all zeros.
fn join_with<const STRIDE: usize>(
    planes: &[u8],
    raw: &mut [u8],
    with: impl Fn([u8; STRIDE], u8, usize) -> [u8; STRIDE],
) {
    let (elements, rest) = raw.as_chunks_mut::<STRIDE>();
    let (body, tail) = planes.split_at(planes.len() - rest.len());
    rest.copy_from_slice(tail);
    let count = elements.len();
    for (part, to) in elements.chunks_mut(ELEMENTS).enumerate() {
        for (n, plane) in body.chunks_exact(count).enumerate() {
            let from = plane.iter().skip(part * ELEMENTS);
            to.iter_mut().zip(from).for_each(|(to, byte)| *to = with(*to, *byte, 8 * n));
        }
    }
}

/// What a frame seems to hold, by a look at some of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// Compressed or encrypted data, for which zstd would take longer than for any other.
    Random,
    /// Numbers of this many bytes.
    Numbers(usize),
    /// Anything else: zstd finds out.
    Other,
}

/// Bytes that are looked at.
const SAMPLE_BYTES: usize = 16 << 10;
/// They are taken from this many places to see whether all is random, and from one to find numbers.
const PLACES: usize = 8;
/// Bits for each byte above which each place must be. 2 KiB of random bytes have 7.91 on average, of text below 6.
const RANDOM_BITS: f32 = 7.8;
/// Bits for each byte above which zstd can hardly find anything but numbers.
const DENSE_BITS: f32 = 6.5;
/// Bits for each byte that planes must promise to save.
const WORTH_BITS: f32 = 0.2;

fn look(raw: &[u8]) -> Look {
    let place_bytes = SAMPLE_BYTES / PLACES;
    if raw.len() < SAMPLE_BYTES {
        return Look::Other;
    }
    let step = (raw.len() - place_bytes) / (PLACES - 1);
    let mut places = (0..PLACES).filter_map(|n| raw.get(n * step..n * step + place_bytes));
    if places.all(|place| entropy(place.iter()) > RANDOM_BITS) {
        return Look::Random;
    }
    plane_stride(raw).map_or(Look::Other, Look::Numbers)
}

/// How many planes to split into, if that promises to save something: compares the entropy of the bytes with the mean
/// entropy of the planes, on a sample from the middle.
fn plane_stride(raw: &[u8]) -> Option<usize> {
    let start = raw.len().saturating_sub(SAMPLE_BYTES) / 2 / 8 * 8;
    let sample = raw.get(start..)?.get(..SAMPLE_BYTES)?;
    let whole = entropy(sample.iter());
    if whole < DENSE_BITS {
        return None;
    }
    let mut best = None;
    let mut least = whole - WORTH_BITS;
    for stride in STRIDES {
        // Few bytes in a plane look more orderly than they are (Miller and Madow's correction).
        let bias =
            255.0 * (stride as f32 - 1.0) / (2.0 * SAMPLE_BYTES as f32 * std::f32::consts::LN_2);
        let planes = (0..stride).map(|n| entropy(sample.iter().skip(n).step_by(stride)));
        let mean = planes.sum::<f32>() / stride as f32 + bias;
        if mean < least {
            (best, least) = (Some(stride), mean);
        }
    }
    best
}

/// Shannon's entropy of single bytes, in bits for each.
fn entropy<'a>(bytes: impl Iterator<Item = &'a u8>) -> f32 {
    let mut counts = [0_u32; 256];
    let mut total = 0_u32;
    for byte in bytes {
        if let Some(count) = counts.get_mut(usize::from(*byte)) {
            *count += 1;
        }
        total += 1;
    }
    let total = total.max(1) as f32;
    let bits = |count: &u32| {
        let share = *count as f32 / total;
        if *count == 0 { 0.0 } else { -share * share.log2() }
    };
    counts.iter().map(bits).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn round_trip(raw: &[u8]) -> (u8, usize) {
        let (mut stored, mut back) = (Vec::new(), Vec::new());
        FrameEncoder::new().unwrap().encode(raw, &mut stored);
        decode(&stored, raw.len() as u32, &mut back).unwrap();
        assert!(back == raw);
        assert!(stored.len() <= raw.len() + 1);
        (stored[0], stored.len())
    }

    fn random(len: usize) -> Vec<u8> {
        let mut random = vec![0; len];
        blake3::Hasher::new().finalize_xof().fill(&mut random);
        random
    }

    #[test]
    fn stores_what_does_not_shrink_as_it_is() {
        assert_eq!(round_trip(&random(100_000)), (RAW, 100_001));
        let (codec, len) = round_trip(&b"petra ".repeat(10_000));
        assert!(codec == ZSTD && len < 1_000);
    }

    #[test]
    fn splits_numbers_into_planes() {
        // The upper half of each number repeats, the lower half is random.
        let numbers: Vec<u8> = random(150_000)
            .chunks(3)
            .flat_map(|low| [low[0], low[1], low[2], 0x3c ^ (low[0] >> 7)])
            .collect();
        let (codec, len) = round_trip(&numbers);
        assert_eq!(codec, 4);
        assert!(len < numbers.len() * 82 / 100, "{len} of {}", numbers.len());
    }

    #[test]
    fn looks_at_all_of_a_frame_before_it_takes_it_for_random() {
        let mut mixed = random(TARGET_BYTES);
        assert_eq!(look(&mixed), Look::Random);
        let text = b"a line of text that repeats\n".repeat(5_000);
        mixed.splice(..text.len(), text);
        assert_eq!(look(&mixed), Look::Other);
    }

    #[test]
    fn planes_have_one_byte_of_each_element() {
        for stride in STRIDES {
            for len in [0, 1, stride, 3 * stride + 1, ELEMENTS * stride, 5_003 * stride + 1] {
                let raw = random(len);
                let (mut planes, mut back) = (Vec::new(), Vec::new());
                split(&raw, stride, &mut planes);
                let (whole, rest) = raw.split_at(len / stride * stride);
                let expected = (0..stride).flat_map(|n| whole.iter().skip(n).step_by(stride));
                assert!(planes.iter().eq(expected.chain(rest)), "{len} bytes by {stride}");
                join(&planes, stride, &mut back);
                assert!(back == raw, "{len} bytes by {stride}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_round_trip(raw: Vec<u8>) {
            prop_assume!(!raw.is_empty());
            round_trip(&raw);
        }

        #[test]
        fn planes_join_again(raw: Vec<u8>, stride in prop::sample::select(STRIDES.to_vec())) {
            let (mut planes, mut back) = (Vec::new(), Vec::new());
            split(&raw, stride, &mut planes);
            join(&planes, stride, &mut back);
            prop_assert_eq!(back, raw);
        }

        #[test]
        fn foreign_bytes_never_panic(stored: Vec<u8>, codec in 0_u8..10, raw_len in 0_u32..10_000) {
            let _ = decode(&[&[codec], stored.as_slice()].concat(), raw_len, &mut Vec::new());
        }
    }
}
