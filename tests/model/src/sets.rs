//! Small sets in machine words: of sessions and clones, and of places in packs.

use std::fmt;
use std::ops::{BitAnd, BitOr, BitOrAssign, Sub, SubAssign};

/// Sessions a configuration can have.
pub const SESSIONS: usize = 5;
/// Clones a configuration can have; clone `c` has the id `SESSIONS + c`.
pub const CLONES: usize = 2;
/// Chunks that matter in a pack: the first stands for the session's own data and metadata, the second for data
/// that other snapshots may go on using without it.
pub const CHUNKS: usize = 2;

/// A set of sessions and clones. A session, its snapshot, its marks and its pack share one number.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ids(pub u8);

/// A set of places: chunk `c` of pack `p` is the place `p * CHUNKS + c`.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Places(pub u16);

impl Ids {
    /// The empty set.
    pub const NONE: Self = Self(0);
    /// All sessions.
    pub const ALL_SESSIONS: Self = Self((1 << SESSIONS) - 1);

    /// The set of one id.
    pub const fn one(id: usize) -> Self {
        Self(1 << id)
    }

    /// The id of a clone.
    pub const fn clone(clone: usize) -> Self {
        Self::one(SESSIONS + clone)
    }

    /// Whether the id is in the set.
    pub const fn has(self, id: usize) -> bool {
        self.0 & (1 << id) != 0
    }

    /// Whether nothing is in the set.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether all of it is in the other set.
    pub const fn within(self, other: Self) -> bool {
        self.0 & !other.0 == 0
    }

    /// Its ids, from the lowest.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..u8::BITS as usize).filter(move |id| self.has(*id))
    }

    /// All subsets, from the full one to the empty one.
    pub fn subsets(self) -> impl Iterator<Item = Self> {
        let mut next = Some(self.0);
        std::iter::from_fn(move || {
            let this = next?;
            next = this.checked_sub(1).map(|below| below & self.0);
            Some(Self(this))
        })
    }
}

impl Places {
    /// The empty set.
    pub const NONE: Self = Self(0);
    /// The second chunk of every pack.
    pub const SECOND: Self = Self(0b10_1010_1010);

    /// One place.
    pub const fn one(pack: usize, chunk: usize) -> Self {
        Self(1 << (pack * CHUNKS + chunk))
    }

    /// All places of a pack.
    pub const fn of(pack: usize) -> Self {
        Self(((1 << CHUNKS) - 1) << (pack * CHUNKS))
    }

    /// Whether nothing is in the set.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether all of it is in the other set.
    pub const fn within(self, other: Self) -> bool {
        self.0 & !other.0 == 0
    }

    /// The same chunks in another pack; the set must be of one pack.
    pub fn moved_to(self, pack: usize) -> Self {
        let chunks =
            (0..SESSIONS).fold(0, |all, from| all | (self & Self::of(from)).0 >> (from * CHUNKS));
        Self(chunks << (pack * CHUNKS))
    }

    /// All subsets, from the full one to the empty one.
    pub fn subsets(self) -> impl Iterator<Item = Self> {
        let mut next = Some(self.0);
        std::iter::from_fn(move || {
            let this = next?;
            next = this.checked_sub(1).map(|below| below & self.0);
            Some(Self(this))
        })
    }

    /// The packs that it touches.
    pub fn packs(self) -> Ids {
        (0..SESSIONS)
            .filter(|pack| !(self & Self::of(*pack)).is_empty())
            .fold(Ids::NONE, |all, pack| all | Ids::one(pack))
    }
}

macro_rules! set_operators {
    ($set:ty) => {
        impl BitOr for $set {
            type Output = Self;
            fn bitor(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }
        }
        impl BitAnd for $set {
            type Output = Self;
            fn bitand(self, other: Self) -> Self {
                Self(self.0 & other.0)
            }
        }
        impl Sub for $set {
            type Output = Self;
            fn sub(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }
        }
        impl BitOrAssign for $set {
            fn bitor_assign(&mut self, other: Self) {
                self.0 |= other.0;
            }
        }
        impl SubAssign for $set {
            fn sub_assign(&mut self, other: Self) {
                self.0 &= !other.0;
            }
        }
    };
}
set_operators!(Ids);
set_operators!(Places);

impl fmt::Debug for Ids {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name =
            |id| if id < SESSIONS { format!("{id}") } else { format!("clone {}", id - SESSIONS) };
        f.debug_set().entries(self.iter().map(|id| Bare(name(id)))).finish()
    }
}

impl fmt::Debug for Places {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let places = (0..SESSIONS * CHUNKS).filter(|place| self.0 & (1 << place) != 0);
        f.debug_set()
            .entries(places.map(|place| Bare(format!("{}.{}", place / CHUNKS, place % CHUNKS))))
            .finish()
    }
}

/// Text without quotes.
struct Bare(String);

impl fmt::Debug for Bare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
