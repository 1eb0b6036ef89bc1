//! All packs, and which parts of them are needed.
//!
//! What is needed of a pack is kept as a bit for each of its granules. With few packs a granule is some bytes, with a
//! million some ten KiB: memory is bounded, and the estimate of garbage as good as it allows.

use crate::context::Context;
use crate::error::Result;
use crate::id::PackId;
use crate::key;
use crate::repository::Repository;
use crate::store::list_each;

/// Memory for the bits of all packs.
const BITS_BYTES: usize = 64 << 20;
/// The smallest granule: less tells nothing more, since chunks are longer.
const MIN_GRANULE_LOG: u32 = 8;

/// A pack that is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StoredPack {
    pub id: PackId,
    pub len: u64,
    /// About how many bytes of it are needed, if any. Never too few.
    pub needed: u64,
}

/// All packs that were listed.
#[derive(Debug)]
pub(super) struct Inventory {
    /// Sorted by id.
    packs: Vec<(PackId, u32)>,
    granule_log: u32,
    words: usize,
    bits: Vec<u64>,
}

impl Inventory {
    /// Lists the packs.
    pub async fn list(repo: &Repository, ctx: &Context) -> Result<Self> {
        ctx.check()?;
        let mut packs = Vec::new();
        list_each(repo.store(), key::PACKS, |entry| {
            if let Some(id) = key::parse_numbered(&entry.key, key::PACKS) {
                packs.push((id, u32::try_from(entry.len).unwrap_or(u32::MAX)));
            }
        })
        .await?;
        Ok(Self::of(packs))
    }

    pub fn of(mut packs: Vec<(PackId, u32)>) -> Self {
        packs.sort_unstable();
        packs.shrink_to_fit();
        let longest = packs.iter().map(|(_, len)| *len).max().unwrap_or(0);
        let words_each = (BITS_BYTES / 8 / packs.len().max(1)).max(1) as u64;
        let mut granule_log = MIN_GRANULE_LOG;
        while u64::from(longest) >> granule_log >= 64 * words_each {
            granule_log += 1;
        }
        let words = (u64::from(longest) >> granule_log) as usize / 64 + 1;
        let bits = vec![0; words * packs.len()];
        Self { packs, granule_log, words, bits }
    }

    /// Notes that a part of a pack is needed.
    pub fn need(&mut self, pack: PackId, start: u64, end: u64) {
        // A pack that is not listed was written later, or is gone: nobody asks for it here.
        let Ok(at) = self.packs.binary_search_by_key(&pack, |(id, _)| *id) else { return };
        let first = self.words * at;
        let Some(bits) = self.bits.get_mut(first..first + self.words) else { return };
        for granule in
            start >> self.granule_log..=end.max(start + 1).saturating_sub(1) >> self.granule_log
        {
            if let Some(word) = bits.get_mut((granule / 64) as usize) {
                *word |= 1 << (granule % 64);
            }
        }
    }

    /// True for a pack that was listed.
    pub fn has(&self, pack: PackId) -> bool {
        self.packs.binary_search_by_key(&pack, |(id, _)| *id).is_ok()
    }

    /// All packs, in the order of their ids.
    pub fn iter(&self) -> impl Iterator<Item = StoredPack> {
        self.packs.iter().zip(self.bits.chunks(self.words)).map(|((id, len), bits)| {
            let granules: u64 = bits.iter().map(|word| u64::from(word.count_ones())).sum();
            let len = u64::from(*len);
            StoredPack { id: *id, len, needed: (granules << self.granule_log).min(len.max(1)) }
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::id::SnapshotId;

    fn pack(number: u32) -> PackId {
        PackId { session: SnapshotId::from_parts(1, 1), number }
    }

    #[test]
    fn memory_is_bounded_with_a_million_packs() {
        let packs = (0..1_000_000).map(|n| (pack(n), 33 << 20)).collect();
        let inventory = Inventory::of(packs);
        assert!(inventory.bits.len() * 8 <= BITS_BYTES, "{}", inventory.bits.len());
    }

    proptest! {
        #[test]
        fn never_takes_needed_bytes_for_garbage(
            len in 1_u32..1 << 22,
            parts in prop::collection::vec((0_u32..1 << 22, 1_u32..1 << 16), 0..20),
        ) {
            let mut inventory = Inventory::of(vec![(pack(0), 10), (pack(3), len), (pack(5), 1 << 22)]);
            let mut naive = vec![false; len as usize];
            for (start, part) in parts {
                let (start, end) = (start % len, (start % len + part).min(len));
                inventory.need(pack(3), u64::from(start), u64::from(end));
                naive[start as usize..end as usize].fill(true);
            }
            inventory.need(pack(4), 0, 10);
            let needed = naive.iter().filter(|needed| **needed).count() as u64;
            let found: Vec<_> = inventory.iter().collect();
            prop_assert_eq!((found[0].needed, found[2].needed), (0, 0));
            prop_assert!(found[1].needed >= needed);
            prop_assert_eq!(found[1].needed == 0, needed == 0);
            // Each part costs at most a granule at both ends.
            prop_assert!(found[1].needed <= needed + 40 * (1 << MIN_GRANULE_LOG));
        }
    }
}
