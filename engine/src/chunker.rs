//! Where chunks begin and end.
//!
//! FastCDC (Xia et al., USENIX ATC 2016; "The Design of Fast Content-Defined Chunking", TPDS 2020) cuts where a
//! rolling Gear hash of the last bytes is small, so that an insertion moves only the cuts near it. The cut
//! points are part of the format: golden vectors in the tests pin them. The `fastcdc` crate finds them on any
//! processor and is the oracle of the tests; one with wide vectors searches 64 bytes at a time.

mod gear;
mod vectors;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::format::{BLOCK_BYTES, frame};

pub use gear::Gear;
use gear::Rule;

/// A cut before the average length takes so many bits of zeros more than the average asks for, and one behind it so
/// many fewer.
const NORMALISATION: u32 = 2;

/// How a repository splits volumes. Chosen at `init`; all snapshots of a repository agree on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "algorithm", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Chunking {
    /// FastCDC with a hash of 32 bits, normalisation level 2. Lengths in bytes.
    #[serde(rename = "fastcdc-32-2")]
    FastCdc {
        /// No chunk is shorter, but the last one before zeros.
        min: u32,
        /// The length that normalisation aims at.
        average: u32,
        /// No chunk is longer.
        max: u32,
    },
    /// Every chunk has this length, but the last one before zeros: for volumes whose content never moves, as
    /// those of databases.
    Fixed {
        /// Bytes.
        len: u32,
    },
}

impl Default for Chunking {
    fn default() -> Self {
        Self::FastCdc { min: 4 << 10, average: 16 << 10, max: 64 << 10 }
    }
}

impl Chunking {
    /// Checks that the lengths make sense.
    pub fn validate(self) -> Result<Self> {
        let ok = match self {
            Self::FastCdc { min, average, max } => {
                min >= 2048
                    && min < average
                    && average < max
                    && average.is_power_of_two()
                    && min % 2 == 0
                    && max % 2 == 0
                    && max as usize <= frame::MAX_BYTES
            }
            Self::Fixed { len } => {
                (len as usize).is_multiple_of(BLOCK_BYTES)
                    && len > 0
                    && len as usize <= frame::MAX_BYTES
            }
        };
        if ok {
            Ok(self)
        } else {
            Err(Error::Request(format!("chunking '{self}' is out of range")))
        }
    }

    /// The longest chunk, in bytes.
    pub fn max_len(self) -> usize {
        match self {
            Self::FastCdc { max, .. } => max as usize,
            Self::Fixed { len } => len as usize,
        }
    }

    /// The function that finds cuts.
    pub fn cutter(self) -> Cutter {
        let cut = match self {
            Self::FastCdc { min, average, max } => {
                let one_in = |bytes: u32| 1 << (u32::BITS - bytes);
                Cut::Content(
                    Gear::public(),
                    Rule {
                        min: min as usize,
                        average: average as usize,
                        max: max as usize,
                        small: one_in(average.ilog2() + NORMALISATION),
                        large: one_in(average.ilog2() - NORMALISATION),
                    },
                )
            }
            Self::Fixed { len } => Cut::Every(len as usize),
        };
        Cutter(cut)
    }
}

/// `cdc`, `cdc-AVERAGE` (a quarter and four times of it are the bounds) or `fixed-LENGTH`, in KiB.
impl FromStr for Chunking {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let unknown = || {
            Error::Request(format!(
                "chunking '{text}' is not known: 'cdc', 'cdc-16k' and 'fixed-16k' are examples"
            ))
        };
        let kib = |number: &str| {
            let kib = number.trim_end_matches(['k', 'K']).parse::<u32>().ok();
            kib.and_then(|kib| kib.checked_mul(1024)).ok_or_else(unknown)
        };
        match text.split_once('-') {
            None if text == "cdc" => Ok(Self::default()),
            Some(("cdc", average)) => {
                let average = kib(average)?;
                Self::FastCdc { min: average / 4, average, max: average.saturating_mul(4) }
                    .validate()
            }
            Some(("fixed", len)) => Self::Fixed { len: kib(len)? }.validate(),
            _ => Err(unknown()),
        }
    }
}

impl fmt::Display for Chunking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FastCdc { min, average, max } => {
                write!(f, "cdc {}/{}/{} KiB", min >> 10, average >> 10, max >> 10)
            }
            Self::Fixed { len } => write!(f, "fixed {} KiB", len >> 10),
        }
    }
}

/// Finds the end of the chunk at the front of some data.
#[derive(Clone, Debug)]
pub struct Cutter(Cut);

#[derive(Clone, Debug)]
enum Cut {
    Content(Arc<Gear>, Rule),
    Every(usize),
}

impl Cutter {
    /// The same with another table than the public one.
    #[must_use]
    pub fn with_gear(self, gear: Arc<Gear>) -> Self {
        match self.0 {
            Cut::Content(_, rule) => Self(Cut::Content(gear, rule)),
            Cut::Every(_) => self,
        }
    }

    /// The longest chunk, in bytes.
    pub fn max_len(&self) -> usize {
        match &self.0 {
            Cut::Content(_, rule) => rule.max,
            Cut::Every(len) => *len,
        }
    }

    /// The length of the first chunk of `data`, which must hold at least [`Chunking::max_len`] bytes or end where
    /// the data ends. Between 1 and `data.len()` for data that is not empty.
    ///
    /// Where the result is less than `data.len()` it does not depend on what follows, however short the data: a cut
    /// shows at the latest when the two bytes behind it are there.
    pub fn first(&self, data: &[u8]) -> usize {
        match &self.0 {
            Cut::Content(gear, rule) => gear.cut(data, *rule),
            Cut::Every(len) => data.len().min(*len),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that are the same on every machine, for ever.
    fn sample(len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new().update(b"petra chunker").finalize_xof().fill(&mut bytes);
        bytes
    }

    fn cuts(chunking: Chunking, data: &[u8]) -> Vec<usize> {
        cuts_of(&chunking.cutter(), data)
    }

    fn cuts_of(cutter: &Cutter, mut data: &[u8]) -> Vec<usize> {
        let mut lens = Vec::new();
        while !data.is_empty() {
            let len = cutter.first(data);
            lens.push(len);
            data = &data[len..];
        }
        lens
    }

    #[test]
    fn golden_cut_points() {
        assert_eq!(cuts(Chunking::default(), &sample(200_000)), GOLDEN);
    }

    #[test]
    fn golden_cut_points_with_a_key() {
        let gear = Arc::new(Gear::from_key(&[7; 32]));
        let cutter = Chunking::default().cutter().with_gear(gear);
        assert_eq!(cuts_of(&cutter, &sample(200_000)), KEYED);
    }

    #[test]
    fn a_cut_does_not_depend_on_what_follows() {
        let data = sample(70_000);
        let gear = Arc::new(Gear::from_key(&[7; 32]));
        let small = Chunking::FastCdc { min: 2048, average: 4096, max: 8192 };
        let cutters = [
            Chunking::default().cutter(),
            Chunking::default().cutter().with_gear(gear),
            small.cutter(),
            Chunking::Fixed { len: 8192 }.cutter(),
        ];
        for cutter in cutters {
            for data in [&data[..], &data[1..], &[0; 70_000]] {
                let cut = cutter.first(data);
                for len in (1..cut + 2).rev().take(5_000).chain(cut + 2..cut + 3_000) {
                    let Some(front) = data.get(..len) else { break };
                    let found = cutter.first(front);
                    assert!(found == cut || (found == len && len < cut + 2), "{cut} {found} {len}");
                }
            }
        }
    }

    #[test]
    fn names_of_profiles() {
        assert_eq!("cdc".parse::<Chunking>().unwrap(), Chunking::default());
        assert_eq!("cdc-16k".parse::<Chunking>().unwrap(), Chunking::default());
        assert_eq!("fixed-16k".parse::<Chunking>().unwrap(), Chunking::Fixed { len: 16384 });
        for bad in
            ["", "cdc-", "cdc-33k", "fixed-0", "fixed-3k", "fixed-2048k", "rabin", "cdc-9999999k"]
        {
            assert!(bad.parse::<Chunking>().is_err(), "{bad}");
        }
    }

    const KEYED: &[usize] =
        &[6579, 18673, 6118, 25143, 31048, 19273, 16613, 20213, 18069, 9678, 24399, 4194];

    const GOLDEN: &[usize] =
        &[28739, 16737, 21227, 11398, 17882, 17568, 16403, 17119, 17061, 31221, 4645];
}
