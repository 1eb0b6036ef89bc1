//! The search for a small hash, 64 places at once.
//!
//! A hash of 32 bits depends on the 32 bytes up to its place only: h(i) = GEAR\[i\] + 2 GEAR\[i - 1\] + 4 GEAR\[i - 2\] + ...,
//! where GEAR\[i\] stands for the number of the byte at i. So no place has to wait for the one before: such sums over 4
//! bytes are joined to sums over 8, those to sums over 16, and those over 32.
//!
//! ```text
//! 64 bytes -> numbers, four vectors: lane L of vector v has place 4 L + v
//!          -> sums within a lane: vector 3 has sums over 4 bytes
//!          -> with one lane before: 8 bytes -> with two: 16 -> with four: 32, the hashes of vector 3
//!          -> the hash of the lane before, and the sum within the lane: those of the other vectors
//! ```
//!
//! Lanes that are shifted in are those of the 64 bytes before, or zeros, as nothing is hashed before the first place.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "others have no kernel"))]

/// Bytes that are looked at at once.
const BLOCK_BYTES: usize = 64;

/// The first bytes of all 256 numbers (the low ones), the second ones, and so on: each is looked up in a vector.
pub(super) type Planes = [[u8; 256]; 4];

/// The planes of the low 32 bits of the numbers.
pub(super) fn planes_of(numbers: &[u64; 256]) -> Planes {
    [0, 8, 16, 24].map(|shift| numbers.map(|number| (number >> shift) as u8))
}

/// A processor that has what it takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Vectors(());

impl Vectors {
    /// AVX-512 with bytes that are looked up in vectors (VBMI): Intel's Ice Lake, AMD's Zen 4, and later.
    pub(super) fn detect() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        let found = std::is_x86_feature_detected!("avx512f")
            && std::is_x86_feature_detected!("avx512bw")
            && std::is_x86_feature_detected!("avx512vbmi")
            && std::is_x86_feature_detected!("bmi2");
        #[cfg(not(target_arch = "x86_64"))]
        let found = false;
        found.then_some(Self(()))
    }

    /// The first place of `data` whose hash is less than `small`, or less than `large` from `center` on.
    pub(super) fn find(
        self,
        planes: &Planes,
        data: &[u8],
        center: usize,
        small: u32,
        large: u32,
    ) -> Option<usize> {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `detect` has found all features, and nothing else makes this value.
        unsafe {
            avx512::find(planes, data, center, small, large)
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = (planes, data, center, small, large);
            None
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{BLOCK_BYTES, Planes};

    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,bmi2")]
    pub(super) fn find(
        planes: &Planes,
        data: &[u8],
        center: usize,
        small: u32,
        large: u32,
    ) -> Option<usize> {
        let tables = tables(planes);
        let mut before = Before::new();
        let (blocks, rest) = data.as_chunks::<BLOCK_BYTES>();
        let mut at = 0;
        for block in blocks {
            let hashes = hashes(numbers(block, &tables), &mut before);
            if let Some(found) = first(&hashes, center.saturating_sub(at), small, large) {
                return Some(at + found);
            }
            at += BLOCK_BYTES;
        }
        let mut block = [0; BLOCK_BYTES];
        block.get_mut(..rest.len())?.copy_from_slice(rest);
        let hashes = hashes(numbers(&block, &tables), &mut before);
        let found = first(&hashes, center.saturating_sub(at), small, large)?;
        (found < rest.len()).then_some(at + found)
    }

    /// A quarter of a plane in each vector.
    type Tables = [[__m512i; 4]; 4];

    #[target_feature(enable = "avx512f")]
    #[inline]
    fn tables(planes: &Planes) -> Tables {
        let mut tables = [[_mm512_setzero_si512(); 4]; 4];
        for (table, plane) in tables.iter_mut().zip(planes) {
            for (quarter, bytes) in table.iter_mut().zip(plane.as_chunks().0) {
                *quarter = load(bytes);
            }
        }
        tables
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    fn load(bytes: &[u8; BLOCK_BYTES]) -> __m512i {
        // SAFETY: the reference is to as many bytes as a vector has; no alignment is needed.
        unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
    }

    /// The numbers of all bytes: lane L of vector v has that of byte 4 L + v.
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    #[inline]
    fn numbers(block: &[u8; BLOCK_BYTES], tables: &Tables) -> [__m512i; 4] {
        // Within 16 bytes, those of one vector side by side.
        let order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        let bytes = _mm512_shuffle_epi8(load(block), _mm512_broadcast_i32x4(order));
        let [a, b, c, d] = tables;
        let [a, b, c, d] =
            [looked_up(bytes, a), looked_up(bytes, b), looked_up(bytes, c), looked_up(bytes, d)];
        let low = (_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, d));
        let high = (_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, d));
        [
            _mm512_unpacklo_epi16(low.0, low.1),
            _mm512_unpackhi_epi16(low.0, low.1),
            _mm512_unpacklo_epi16(high.0, high.1),
            _mm512_unpackhi_epi16(high.0, high.1),
        ]
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    #[inline]
    fn looked_up(bytes: __m512i, [a, b, c, d]: &[__m512i; 4]) -> __m512i {
        // Seven bits choose from two vectors, the eighth says which two.
        let low = _mm512_permutex2var_epi8(*a, bytes, *b);
        let high = _mm512_permutex2var_epi8(*c, bytes, *d);
        _mm512_mask_blend_epi8(_mm512_movepi8_mask(bytes), low, high)
    }

    /// Sums over 4, 8, 16 and 32 bytes, up to the last byte of each lane, of the block before.
    struct Before([__m512i; 4]);

    impl Before {
        #[target_feature(enable = "avx512f")]
        #[inline]
        fn new() -> Self {
            Self([_mm512_setzero_si512(); 4])
        }
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    fn hashes(numbers: [__m512i; 4], before: &mut Before) -> [__m512i; 4] {
        let [n0, n1, n2, n3] = numbers;
        let [before4, before8, before16, before32] = before.0;
        let sum1 = n0;
        let sum2 = sum::<1>(sum1, n1);
        let sum3 = sum::<1>(sum2, n2);
        let sum4 = sum::<1>(sum3, n3);
        let sum8 = sum::<4>(_mm512_alignr_epi32::<15>(sum4, before4), sum4);
        let sum16 = sum::<8>(_mm512_alignr_epi32::<14>(sum8, before8), sum8);
        let sum32 = sum::<16>(_mm512_alignr_epi32::<12>(sum16, before16), sum16);
        before.0 = [sum4, sum8, sum16, sum32];
        let lane_before = _mm512_alignr_epi32::<15>(sum32, before32);
        [
            sum::<1>(lane_before, sum1),
            sum::<2>(lane_before, sum2),
            sum::<3>(lane_before, sum3),
            sum32,
        ]
    }

    /// What comes earlier, further to the left by the bytes that come later.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn sum<const BYTES: u32>(earlier: __m512i, later: __m512i) -> __m512i {
        _mm512_add_epi32(_mm512_slli_epi32::<BYTES>(earlier), later)
    }

    /// The first place of the block with a hash below its bound.
    #[target_feature(enable = "avx512f,bmi2")]
    #[inline]
    fn first(hashes: &[__m512i; 4], center: usize, small: u32, large: u32) -> Option<usize> {
        let [a, b, c, d] = *hashes;
        let least = _mm512_min_epu32(_mm512_min_epu32(a, b), _mm512_min_epu32(c, d));
        let bound = if center < BLOCK_BYTES { large } else { small };
        if _mm512_cmplt_epu32_mask(least, _mm512_set1_epi32(bound.cast_signed())) == 0 {
            return None;
        }
        let mut places = below(hashes, bound);
        if center < BLOCK_BYTES {
            // Before the center it takes more.
            places &= below(hashes, small) | (u64::MAX << center);
        }
        (places != 0).then(|| places.trailing_zeros() as usize)
    }

    /// A bit for each place.
    #[target_feature(enable = "avx512f,bmi2")]
    #[inline]
    fn below(hashes: &[__m512i; 4], bound: u32) -> u64 {
        let bound = _mm512_set1_epi32(bound.cast_signed());
        let mut places = 0;
        for (vector, hashes) in hashes.iter().enumerate() {
            let lanes = u64::from(_mm512_cmplt_epu32_mask(*hashes, bound));
            places |= _pdep_u64(lanes, 0x1111_1111_1111_1111 << vector);
        }
        places
    }
}
