//! The compression function for as many leaves or nodes at once as a vector has lanes.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "others have no kernels"))]

/// Bytes that are compressed at once. Leaves consist of them, and an inner node is one.
pub(super) const BLOCK_BYTES: usize = 64;

/// A leaf or an inner node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Job<'a> {
    /// Its whole blocks.
    pub blocks: &'a [[u8; BLOCK_BYTES]],
    /// A last one.
    pub rest: Option<&'a Rest>,
    /// The number of the leaf within its message.
    pub counter: u32,
    /// Flags of all blocks.
    pub domain: u32,
    /// Further flags of the first block.
    pub first: u32,
    /// Further flags of the last one.
    pub last: u32,
    /// The place of its value.
    pub to: usize,
}

impl<'a> Job<'a> {
    /// At least one.
    pub(super) fn block_count(&self) -> usize {
        self.blocks.len() + usize::from(self.rest.is_some())
    }

    /// A block, its length and flags; the last one again where it has no more.
    fn block(&self, n: usize) -> (&'a [u8; BLOCK_BYTES], u32, u32) {
        let last = if n + 1 == self.block_count() { self.last } else { 0 };
        let flags = self.domain | last | if n == 0 { self.first } else { 0 };
        match (self.blocks.get(n), self.rest) {
            (Some(block), _) => (block, BLOCK_BYTES as u32, flags),
            (None, Some(rest)) => (&rest.block, rest.len, flags),
            (None, None) => (&NOTHING.block, 0, flags),
        }
    }
}

/// The bytes of a message behind its last whole block, followed by zeros.
#[derive(Debug)]
pub(super) struct Rest {
    block: [u8; BLOCK_BYTES],
    len: u32,
}

static NOTHING: Rest = Rest { block: [0; BLOCK_BYTES], len: 0 };

impl Rest {
    /// Of a message; None where the last block is a whole one.
    pub(super) fn of(message: &[u8]) -> Option<Self> {
        let (blocks, bytes) = message.as_chunks::<BLOCK_BYTES>();
        if bytes.is_empty() && !blocks.is_empty() {
            return None;
        }
        let mut rest = Self { len: bytes.len() as u32, ..NOTHING };
        rest.block.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(rest)
    }
}

const IV: [u32; 4] = [super::IV[0], super::IV[1], super::IV[2], super::IV[3]];

/// What the processor has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lanes(Width);

#[derive(Clone, Copy, Debug)]
enum Width {
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Lanes {
    /// The widest lanes of this processor; None if it has not more of them than the crate fills with one message.
    pub(super) fn detect() -> Option<Self> {
        Self::all().next()
    }

    /// All that this processor has, the widest first.
    pub(super) fn all() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let all = [
            std::is_x86_feature_detected!("avx512f").then_some(Self(Width::Avx512)),
            std::is_x86_feature_detected!("avx2").then_some(Self(Width::Avx2)),
        ];
        #[cfg(not(target_arch = "x86_64"))]
        let all = [None];
        all.into_iter().flatten()
    }

    /// Does the jobs and puts their values into their places.
    pub(super) fn run(self, key: &[u32; 8], jobs: &[Job<'_>], values: &mut [[u8; 32]]) {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Width::Avx512 => {
                // SAFETY: only a processor with AVX-512 has these lanes.
                in_groups(jobs, values, |group| unsafe { avx512::values(key, group) });
            }
            #[cfg(target_arch = "x86_64")]
            Width::Avx2 => {
                // SAFETY: only a processor with AVX2 has these lanes.
                in_groups(jobs, values, |group| unsafe { avx2::values(key, group) });
            }
        }
    }
}

/// Calls `values_of` for as many jobs as there are lanes, with the last one again for lanes that are left.
fn in_groups<const LANES: usize>(
    jobs: &[Job<'_>],
    values: &mut [[u8; 32]],
    values_of: impl Fn(&[&Job<'_>; LANES]) -> [[u32; LANES]; 8],
) {
    for group in jobs.chunks(LANES) {
        let Some(last) = group.last() else { continue };
        let words = values_of(&std::array::from_fn(|lane| group.get(lane).unwrap_or(last)));
        for (lane, job) in group.iter().enumerate() {
            let Some(value) = values.get_mut(job.to) else { continue };
            for (bytes, words) in value.as_chunks_mut::<4>().0.iter_mut().zip(&words) {
                *bytes = words.get(lane).copied().unwrap_or_default().to_le_bytes();
            }
        }
    }
}

/// A block of each job.
struct Given<'a, const LANES: usize> {
    blocks: [&'a [u8; BLOCK_BYTES]; LANES],
    lens: [u32; LANES],
    flags: [u32; LANES],
}

impl<'a, const LANES: usize> Given<'a, LANES> {
    fn new() -> Self {
        Self { blocks: [&NOTHING.block; LANES], lens: [0; LANES], flags: [0; LANES] }
    }

    // Not inlined: with the features around it, compilers would gather references with slow vector instructions.
    #[inline(never)]
    fn set(&mut self, jobs: &[&Job<'a>; LANES], n: usize) {
        let lanes = self.blocks.iter_mut().zip(&mut self.lens).zip(&mut self.flags).zip(jobs);
        for (((block, len), flags), job) in lanes {
            (*block, *len, *flags) = job.block(n);
        }
    }
}

/// The values of as many jobs as a vector has lanes, word by word, by a processor's instructions. `rotate` and `transposed`
/// are around it.
#[cfg(target_arch = "x86_64")]
macro_rules! values_with {
    (
        $feature:literal, $lanes:literal, $vector:ty, $splat:ident, $load:ident, $store:ident, $add:ident, $xor:ident,
        $and:ident
    ) => {
        const LANES: usize = $lanes;

        type Vector = $vector;

        #[target_feature(enable = $feature)]
        pub(super) fn values(key: &[u32; 8], jobs: &[&Job<'_>; LANES]) -> [[u32; LANES]; 8] {
            let counts = jobs.map(Job::block_count);
            let (least, most) = counts.iter().fold((usize::MAX, 0), |(least, most), count| {
                (least.min(*count), most.max(*count))
            });
            let counter = load(&jobs.map(|job| job.counter));
            // Loops over vectors, since closures would not have the feature.
            let mut value = [splat(0); 8];
            for (vector, word) in value.iter_mut().zip(key) {
                *vector = splat(*word);
            }
            let mut given = Given::new();
            for n in 0..most {
                given.set(jobs, n);
                let (lens, flags) = (load(&given.lens), load(&given.flags));
                let next = compressed(&value, &transposed(&given.blocks), counter, lens, flags);
                if n < least {
                    value = next;
                    continue;
                }
                let goes_on = load(&counts.map(|count| if n < count { u32::MAX } else { 0 }));
                for (old, new) in value.iter_mut().zip(next) {
                    *old = xor(*old, and(xor(*old, new), goes_on));
                }
            }
            let mut words = [[0; LANES]; 8];
            for (words, vector) in words.iter_mut().zip(value) {
                *words = store(vector);
            }
            words
        }

        #[target_feature(enable = $feature)]
        #[inline]
        fn compressed(
            value: &[Vector; 8],
            words: &[Vector; 16],
            counter: Vector,
            len: Vector,
            flags: Vector,
        ) -> [Vector; 8] {
            let [a, b, c, d, e, f, g, h] = *value;
            let [i, j, k, l] = [splat(IV[0]), splat(IV[1]), splat(IV[2]), splat(IV[3])];
            let mut state = [a, b, c, d, e, f, g, h, i, j, k, l, counter, splat(0), len, flags];
            let mut words = *words;
            round(&mut state, &mut words);
            round(&mut state, &mut words);
            round(&mut state, &mut words);
            round(&mut state, &mut words);
            round(&mut state, &mut words);
            round(&mut state, &mut words);
            round(&mut state, &mut words);
            let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = state;
            [xor(a, i), xor(b, j), xor(c, k), xor(d, l), xor(e, m), xor(f, n), xor(g, o), xor(h, p)]
        }

        /// A round, and the order of words for the next one.
        #[target_feature(enable = $feature)]
        #[inline]
        fn round(state: &mut [Vector; 16], words: &mut [Vector; 16]) {
            let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *words;
            let [s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15] = state;
            mix([s0, s4, s8, s12], a, b);
            mix([s1, s5, s9, s13], c, d);
            mix([s2, s6, s10, s14], e, f);
            mix([s3, s7, s11, s15], g, h);
            mix([s0, s5, s10, s15], i, j);
            mix([s1, s6, s11, s12], k, l);
            mix([s2, s7, s8, s13], m, n);
            mix([s3, s4, s9, s14], o, p);
            *words = [c, g, d, k, h, a, e, n, b, l, m, f, j, o, p, i];
        }

        /// The paper's G.
        #[target_feature(enable = $feature)]
        #[inline]
        fn mix([a, b, c, d]: [&mut Vector; 4], x: Vector, y: Vector) {
            *a = add(add(*a, *b), x);
            *d = rotate::<16, 16>(xor(*d, *a));
            *c = add(*c, *d);
            *b = rotate::<12, 20>(xor(*b, *c));
            *a = add(add(*a, *b), y);
            *d = rotate::<8, 24>(xor(*d, *a));
            *c = add(*c, *d);
            *b = rotate::<7, 25>(xor(*b, *c));
        }

        #[target_feature(enable = $feature)]
        #[inline]
        fn splat(word: u32) -> Vector {
            $splat(word.cast_signed())
        }

        #[target_feature(enable = $feature)]
        #[inline]
        fn load(words: &[u32; LANES]) -> Vector {
            // SAFETY: the reference is to as many bytes as a vector has; no alignment is needed.
            unsafe { $load(words.as_ptr().cast()) }
        }

        #[target_feature(enable = $feature)]
        #[inline]
        fn store(vector: Vector) -> [u32; LANES] {
            let mut words = [0; LANES];
            // SAFETY: the reference is to as many bytes as a vector has; no alignment is needed.
            unsafe { $store(words.as_mut_ptr().cast(), vector) };
            words
        }

        #[target_feature(enable = $feature)]
        #[inline]
        fn add(a: Vector, b: Vector) -> Vector {
            $add(a, b)
        }

        #[target_feature(enable = $feature)]
        #[inline]
        fn xor(a: Vector, b: Vector) -> Vector {
            $xor(a, b)
        }

        #[target_feature(enable = $feature)]
        #[inline]
        fn and(a: Vector, b: Vector) -> Vector {
            $and(a, b)
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{BLOCK_BYTES, Given, IV, Job};

    values_with! {
        "avx512f", 16, __m512i, _mm512_set1_epi32, _mm512_loadu_si512, _mm512_storeu_si512, _mm512_add_epi32,
        _mm512_xor_si512, _mm512_and_si512
    }

    /// To the right by so many bits, which is to the left by `LEFT`.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn rotate<const RIGHT: i32, const LEFT: i32>(a: Vector) -> Vector {
        _mm512_ror_epi32::<RIGHT>(a)
    }

    /// The words of all blocks: first words, second words, and so on.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn transposed(blocks: &[&[u8; BLOCK_BYTES]; LANES]) -> [Vector; 16] {
        let mut rows = [splat(0); LANES];
        for (row, block) in rows.iter_mut().zip(blocks) {
            // SAFETY: the reference is to 64 bytes; no alignment is needed.
            *row = unsafe { _mm512_loadu_si512(block.as_ptr().cast()) };
        }
        // Of each four rows: words k, 4 + k, 8 + k and 12 + k for k from 0 to 3.
        let mut quads = [[splat(0); 4]; 4];
        for (quad, rows) in quads.iter_mut().zip(rows.as_chunks::<4>().0) {
            let [a, b, c, d] = *rows;
            let low = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
            let high = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
            *quad = [
                _mm512_unpacklo_epi64(low.0, low.1),
                _mm512_unpackhi_epi64(low.0, low.1),
                _mm512_unpacklo_epi64(high.0, high.1),
                _mm512_unpackhi_epi64(high.0, high.1),
            ];
        }
        let [[a0, a1, a2, a3], [b0, b1, b2, b3], [c0, c1, c2, c3], [d0, d1, d2, d3]] = quads;
        let [w0, w4, w8, w12] = joined(a0, b0, c0, d0);
        let [w1, w5, w9, w13] = joined(a1, b1, c1, d1);
        let [w2, w6, w10, w14] = joined(a2, b2, c2, d2);
        let [w3, w7, w11, w15] = joined(a3, b3, c3, d3);
        [w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15]
    }

    /// The first quarters of all four, the second ones, and so on.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn joined(a: Vector, b: Vector, c: Vector, d: Vector) -> [Vector; 4] {
        let even = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0x88>(c, d));
        let odd = (_mm512_shuffle_i32x4::<0xdd>(a, b), _mm512_shuffle_i32x4::<0xdd>(c, d));
        [
            _mm512_shuffle_i32x4::<0x88>(even.0, even.1),
            _mm512_shuffle_i32x4::<0x88>(odd.0, odd.1),
            _mm512_shuffle_i32x4::<0xdd>(even.0, even.1),
            _mm512_shuffle_i32x4::<0xdd>(odd.0, odd.1),
        ]
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::{BLOCK_BYTES, Given, IV, Job};

    values_with! {
        "avx2", 8, __m256i, _mm256_set1_epi32, _mm256_loadu_si256, _mm256_storeu_si256, _mm256_add_epi32,
        _mm256_xor_si256, _mm256_and_si256
    }

    /// To the right by so many bits, which is to the left by `LEFT`.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn rotate<const RIGHT: i32, const LEFT: i32>(a: Vector) -> Vector {
        // The order of the bytes of four words, and the same for the others.
        let sixteen = _mm256_broadcastsi128_si256(_mm_set_epi64x(
            0x0d0c_0f0e_0908_0b0a,
            0x0504_0706_0100_0302,
        ));
        let eight = _mm256_broadcastsi128_si256(_mm_set_epi64x(
            0x0c0f_0e0d_080b_0a09,
            0x0407_0605_0003_0201,
        ));
        match RIGHT {
            16 => _mm256_shuffle_epi8(a, sixteen),
            8 => _mm256_shuffle_epi8(a, eight),
            _ => _mm256_or_si256(_mm256_srli_epi32::<RIGHT>(a), _mm256_slli_epi32::<LEFT>(a)),
        }
    }

    /// The words of all blocks: first words, second words, and so on.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn transposed(blocks: &[&[u8; BLOCK_BYTES]; LANES]) -> [Vector; 16] {
        let mut words = [splat(0); 16];
        for (half, words) in words.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let mut rows = [splat(0); LANES];
            for (row, block) in rows.iter_mut().zip(blocks) {
                // SAFETY: each half of the 64 bytes of the reference has 32; no alignment is needed.
                *row = unsafe { _mm256_loadu_si256(block.as_ptr().cast::<Vector>().add(half)) };
            }
            // Of each four rows: words k and 4 + k of this half, for k from 0 to 3.
            let mut quads = [[splat(0); 4]; 2];
            for (quad, rows) in quads.iter_mut().zip(rows.as_chunks::<4>().0) {
                let [a, b, c, d] = *rows;
                let low = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
                let high = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
                *quad = [
                    _mm256_unpacklo_epi64(low.0, low.1),
                    _mm256_unpackhi_epi64(low.0, low.1),
                    _mm256_unpacklo_epi64(high.0, high.1),
                    _mm256_unpackhi_epi64(high.0, high.1),
                ];
            }
            let [[a0, a1, a2, a3], [b0, b1, b2, b3]] = quads;
            *words = [
                _mm256_permute2x128_si256::<0x20>(a0, b0),
                _mm256_permute2x128_si256::<0x20>(a1, b1),
                _mm256_permute2x128_si256::<0x20>(a2, b2),
                _mm256_permute2x128_si256::<0x20>(a3, b3),
                _mm256_permute2x128_si256::<0x31>(a0, b0),
                _mm256_permute2x128_si256::<0x31>(a1, b1),
                _mm256_permute2x128_si256::<0x31>(a2, b2),
                _mm256_permute2x128_si256::<0x31>(a3, b3),
            ];
        }
        words
    }
}
