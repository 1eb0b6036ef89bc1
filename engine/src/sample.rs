//! Looking at a part of the data, chosen by chance: often a little rather than rarely all of it.
//!
//! Each frame is chosen by itself, by a hash of its place and a seed. So one seed chooses the same frames again, and
//! different seeds choose independently: after n verifications of a share s, all but (1 - s)^n has been read.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use crate::error::{Error, Result};
use crate::id::PackId;

/// A whole, in the unit of [`Share`].
const WHOLE: u32 = 1_000_000;

/// A share of a whole, in millionths: more than nothing, at most all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share(u32);

/// Which part of the data to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Sample {
    /// How much of it.
    pub share: Share,
    /// Which: another seed chooses other frames.
    pub seed: u32,
}

impl Sample {
    /// True for what begins at this place if it is chosen.
    pub fn has(&self, pack: PackId, offset: u32) -> bool {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"petra sample 1\n").update(&self.seed.to_le_bytes());
        hasher.update(&pack.session.to_bytes()).update(&pack.number.to_le_bytes());
        hasher.update(&offset.to_le_bytes());
        let mut bytes = [0; 8];
        hasher.finalize_xof().fill(&mut bytes);
        // The hash as a fraction of 2^64 is below the share.
        let scaled = (u128::from(u64::from_le_bytes(bytes)) * u128::from(WHOLE)) >> 64;
        scaled < u128::from(self.share.0)
    }
}

/// `5%`, `0.1 %` or `100%`.
impl FromStr for Share {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let percent = text.strip_suffix('%').and_then(|number| number.trim().parse::<f64>().ok());
        let millionths = percent.map(|percent| (percent * f64::from(WHOLE) / 100.0).round());
        match millionths {
            Some(n) if (1.0..=f64::from(WHOLE)).contains(&n) => Ok(Self(n as u32)),
            _ => Err(Error::Request(format!(
                "'{text}' is not a share: write it as 5%, more than nothing and at most 100%"
            ))),
        }
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", f64::from(self.0) * 100.0 / f64::from(WHOLE))
    }
}

/// As a fraction: 0.05.
impl Serialize for Share {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(f64::from(self.0) / f64::from(WHOLE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::SnapshotId;

    #[test]
    fn shares_as_people_write_them() {
        for (text, millionths) in [
            ("5%", 50_000),
            ("0.1%", 1_000),
            ("100 %", 1_000_000),
            ("0.0001%", 1),
            ("33.3%", 333_000),
        ] {
            assert_eq!(text.parse::<Share>().unwrap(), Share(millionths), "{text}");
        }
        for wrong in ["", "%", "5", "0%", "-1%", "101%", "NaN%", "inf%", "0.00001%"] {
            assert!(wrong.parse::<Share>().is_err(), "{wrong}");
        }
        assert_eq!("12.5%".parse::<Share>().unwrap().to_string(), "12.5%");
    }

    #[test]
    fn chooses_about_the_share_and_in_the_end_everything() {
        let session = SnapshotId::from_parts(1, 1);
        let places: Vec<(PackId, u32)> = (0..10_000)
            .map(|n| (PackId { session, number: n / 100 }, n % 100 * 1_000_000))
            .collect();
        let chosen = |seed, text: &str| {
            let sample = Sample { share: text.parse().unwrap(), seed };
            let has: Vec<bool> = places.iter().map(|(pack, at)| sample.has(*pack, *at)).collect();
            has
        };
        let count = |has: &[bool]| has.iter().filter(|has| **has).count();
        // The number is fixed by the seed: 500 expected, with a standard deviation of 22.
        assert!((400..600).contains(&count(&chosen(7, "5%"))));
        assert_eq!(chosen(7, "5%"), chosen(7, "5%"));
        assert_ne!(chosen(7, "5%"), chosen(8, "5%"));
        assert_eq!(count(&chosen(7, "100%")), places.len());
        let mut seen = vec![false; places.len()];
        for seed in 0..400 {
            seen.iter_mut().zip(chosen(seed, "5%")).for_each(|(seen, has)| *seen |= has);
        }
        assert!(seen.iter().all(|seen| *seen));
    }
}
