//! The Gear hash: its table, and the search for a place where it is small.

use std::fmt;
use std::sync::{Arc, LazyLock};

use fastcdc::v2020::{cut_gear, get_gear_with_seed};
use zeroize::Zeroizing;

use super::vectors::{Planes, Vectors, planes_of};

/// What a search goes by, lengths in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule {
    /// The first place that is tested, where the hash begins.
    pub min: usize,
    /// From here on the bound is `large`.
    pub average: usize,
    /// No chunk is longer.
    pub max: usize,
    /// Before `average`, a hash below it is a cut. A power of two.
    pub small: u32,
    /// From there on, a hash below it is a cut. A power of two.
    pub large: u32,
}

/// The table of a Gear hash: a random number for each byte. Without knowing it, nobody knows where known data is cut.
pub struct Gear {
    /// Numbers of 32 bits, as wide as the crate wants them.
    numbers: Zeroizing<[u64; 256]>,
    /// The same doubled, for the first of two bytes that the crate takes in one step.
    doubled: Zeroizing<[u64; 256]>,
    /// The same byte by byte, for vectors.
    planes: Zeroizing<Planes>,
}

impl Gear {
    /// The table of repositories without a key, which is the crate's.
    pub(super) fn public() -> Arc<Self> {
        static PUBLIC: LazyLock<Arc<Gear>> = LazyLock::new(|| {
            let (numbers, _) = get_gear_with_seed(0);
            Arc::new(Gear::new(numbers.iter().map(|number| *number as u32)))
        });
        PUBLIC.clone()
    }

    /// The table that follows from a key.
    pub fn from_key(key: &[u8; 32]) -> Self {
        let mut bytes = Zeroizing::new([0; 1024]);
        blake3::Hasher::new_keyed(key).finalize_xof().fill(bytes.as_mut_slice());
        let (numbers, _) = bytes.as_chunks();
        Self::new(numbers.iter().map(|bytes| u32::from_le_bytes(*bytes)))
    }

    fn new(from: impl Iterator<Item = u32>) -> Self {
        let mut numbers = Zeroizing::new([0; 256]);
        numbers.iter_mut().zip(from).for_each(|(to, number)| *to = u64::from(number));
        let doubled = Zeroizing::new(numbers.map(|number| number << 1));
        let planes = Zeroizing::new(planes_of(&numbers));
        Self { numbers, doubled, planes }
    }

    /// The length of the first chunk of `data`.
    pub(super) fn cut(&self, data: &[u8], rule: Rule) -> usize {
        match Vectors::detect() {
            Some(vectors) => self.cut_with(vectors, data, rule),
            None => self.cut_by_crate(data, rule),
        }
    }

    fn cut_with(&self, vectors: Vectors, data: &[u8], rule: Rule) -> usize {
        let end = data.len().min(rule.max);
        // The crate takes two bytes at a time: the last one of an odd number is not tested.
        let Some(tested) = data.get(rule.min..end & !1) else { return end };
        let center = rule.average - rule.min;
        let cut = vectors.find(&self.planes, tested, center, rule.small, rule.large);
        cut.map_or(end, |at| rule.min + at)
    }

    /// The same, slower. A hash is below a power of two where the bits from there on are zero.
    fn cut_by_crate(&self, data: &[u8], rule: Rule) -> usize {
        let Rule { min, average, max, small, large } = rule;
        let [small, large] = [small, large].map(|bound| u64::from(bound.wrapping_neg()));
        let (numbers, doubled) = (self.numbers.as_slice(), self.doubled.as_slice());
        let (small2, large2) = (small << 1, large << 1);
        cut_gear(data, min, average, max, small, large, small2, large2, numbers, doubled).1
    }
}

impl fmt::Debug for Gear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gear(secret)")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As docs/format.md says it.
    fn naive(gear: &Gear, data: &[u8], rule: Rule) -> usize {
        let end = data.len().min(rule.max);
        let mut hash = 0_u32;
        for (i, byte) in data.iter().enumerate().take(end & !1).skip(rule.min) {
            hash = (hash << 1).wrapping_add(gear.numbers[usize::from(*byte)] as u32);
            if hash < if i < rule.average { rule.small } else { rule.large } {
                return i;
            }
        }
        end
    }

    fn check(gear: &Gear, data: &[u8], rule: Rule) {
        let expected = naive(gear, data, rule);
        assert_eq!(gear.cut_by_crate(data, rule), expected);
        assert_eq!(gear.cut(data, rule), expected);
    }

    fn noise(len: usize, seed: u64) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
        bytes
    }

    #[test]
    fn every_place_around_the_borders_of_vectors() {
        let gear = Gear::public();
        for seed in 0..50 {
            let data = noise(400, seed);
            for len in 0..data.len() {
                for (min, average) in [(2, 4), (64, 128), (66, 100), (62, 258)] {
                    let rule = Rule { min, average, max: 300, small: 1 << 24, large: 1 << 26 };
                    check(&gear, &data[..len], rule);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn any_data_is_cut_as_the_format_says_and_by_the_crate(
            key: Option<[u8; 32]>,
            // Few values make hashes that come again and again.
            values in 1_u16..=256,
            seed: u64,
            len in 0_usize..5_000,
            min in 1_usize..500,
            beyond in 1_usize..500,
            and_beyond in 1_usize..3_000,
            small in 18_u32..31,
            by in 0_u32..5,
        ) {
            let gear = key.map_or_else(Gear::public, |key| Arc::new(Gear::from_key(&key)));
            let mut data = noise(len, seed);
            data.iter_mut().for_each(|byte| *byte = (u16::from(*byte) % values) as u8);
            let rule = Rule {
                min: 2 * min,
                average: 2 * (min + beyond),
                max: 2 * (min + beyond + and_beyond),
                small: 1 << small,
                large: 1 << (small + by).min(31),
            };
            check(&gear, &data, rule);
        }
    }
}
