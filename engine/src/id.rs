//! Identifiers: one type for each thing that has one.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use ulid::Ulid;

macro_rules! serde_as_text {
    ($name:ident) => {
        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

/// A snapshot, and the writer session that makes it: a ULID, so ids sort by the time of their making.
///
/// Order is for people (`@latest`, listings). Safety never depends on it.
///
/// Kept as bytes: a number of 128 bits would be aligned to 16, and all that names a pack grow by half.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotId([u8; 16]);

impl SnapshotId {
    /// Builds an id from a time and random bits; see [`Host::new_id`](crate::context::Host::new_id).
    pub fn from_parts(unix_ms: u64, random: u128) -> Self {
        Self(Ulid::from_parts(unix_ms, random).to_bytes())
    }

    /// Milliseconds since the Unix epoch when the id was drawn, by the writer's clock.
    pub fn unix_ms(self) -> u64 {
        self.ulid().timestamp_ms()
    }

    /// The 16 bytes that binary objects store.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0
    }

    /// The inverse of [`to_bytes`](Self::to_bytes).
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    fn ulid(self) -> Ulid {
        Ulid::from_bytes(self.0)
    }

    /// The id that lies `k` after this one: of the same millisecond, with `k` more in its random part, which begins again
    /// after its largest number. As good as a fresh one for whoever drew this, and found by whoever knows it.
    #[must_use]
    pub fn nth_after(self, k: u32) -> Self {
        let all = u128::from_be_bytes(self.to_bytes());
        let random = (all & RANDOM).wrapping_add(u128::from(k)) & RANDOM;
        Self::from_bytes((all & !RANDOM | random).to_be_bytes())
    }

    /// How far this one lies after another: the `k` of [`nth_after`](Self::nth_after). None where no `k` leads here.
    pub fn distance_after(self, first: Self) -> Option<u32> {
        let [ours, theirs] = [self, first].map(|id| u128::from_be_bytes(id.to_bytes()));
        if ours & !RANDOM != theirs & !RANDOM {
            return None;
        }
        u32::try_from((ours & RANDOM).wrapping_sub(theirs & RANDOM) & RANDOM).ok()
    }
}

/// The random bits of an id; the others are its time.
const RANDOM: u128 = (1 << 80) - 1;

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ulid().fmt(f)
    }
}

impl fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ulid().fmt(f)
    }
}

impl FromStr for SnapshotId {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const SHAPE: &str = "a snapshot id is 26 capital letters and digits";
        let id = Ulid::from_string(text).map(|id| Self(id.to_bytes())).map_err(|_| SHAPE)?;
        // One id has one spelling: keys and URLs are compared as text.
        if id.to_string() == text { Ok(id) } else { Err(SHAPE) }
    }
}

serde_as_text!(SnapshotId);

macro_rules! hash_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 32]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = &'static str;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                blake3::Hash::from_hex(text.as_bytes())
                    .map(|hash| Self(*hash.as_bytes()))
                    .map_err(|_| "a hash is 64 hexadecimal digits")
            }
        }

        serde_as_text!($name);
    };
}

hash_type! {
    /// The name of a chunk: the BLAKE3 hash of its bytes, keyed in an encrypted repository.
    ChunkId
}

hash_type! {
    /// The content digest of a volume or of a part of its manifest: covers chunk ids, lengths and holes, never
    /// where they are stored. Equal digests in one repository mean equal bytes.
    Digest
}

impl ChunkId {
    /// Names a chunk of a repository that is not encrypted; see [`Keys::chunk_id`](crate::crypto::Keys::chunk_id).
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

/// A pack: the session that wrote it and its number within that session. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackId {
    /// The session that made the pack.
    pub session: SnapshotId,
    /// Counts from 0 within the session.
    pub number: u32,
}

impl fmt::Display for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{:06}", self.session, self.number)
    }
}

impl FromStr for PackId {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const SHAPE: &str = "a pack is named SESSION/NUMBER";
        let (session, number) = text.split_once('/').ok_or(SHAPE)?;
        let id = Self {
            session: session.parse().map_err(|_| SHAPE)?,
            number: number.parse().map_err(|_| SHAPE)?,
        };
        // One pack has one spelling: `1` and `000001` must not both be accepted.
        if id.to_string() == text { Ok(id) } else { Err(SHAPE) }
    }
}

serde_as_text!(PackId);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ids_after_an_id(ms in 0_u64..1 << 48, random: u128, k: u32, other: u32) {
            let first = SnapshotId::from_parts(ms, random);
            let later = first.nth_after(k);
            prop_assert_eq!(later.unix_ms(), ms);
            prop_assert_eq!(later.distance_after(first), Some(k));
            prop_assert_eq!(first.nth_after(other) == later, other == k);
            prop_assert_eq!(first.nth_after(0), first);
            prop_assert_eq!(SnapshotId::from_parts(ms ^ 1, random).distance_after(first), None);
            prop_assert_eq!(later.to_string().parse(), Ok(later));
        }
    }

    #[test]
    fn the_last_random_number_is_followed_by_the_first() {
        let last = SnapshotId::from_parts(7, u128::MAX);
        assert_eq!(last.nth_after(1), SnapshotId::from_parts(7, 0));
        assert_eq!(last.nth_after(3).distance_after(last), Some(3));
        assert_eq!(last.distance_after(last.nth_after(1)), None, "that is the long way round");
    }
}
