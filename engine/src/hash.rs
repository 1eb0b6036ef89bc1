//! BLAKE3 of many chunks at once.
//!
//! BLAKE3 cuts a message into leaves of 1 KiB and joins their values in a binary tree, two by two. A processor with wide
//! vectors hashes 8 or 16 leaves in the time of one, but the crate does that within one message only, and a chunk of some
//! 20 KiB leaves half of the lanes empty. Here the leaves of all chunks share the lanes, and so do the nodes of all trees.
//!
//! ```text
//! chunks -> leaves -> values -> pairs -> values -> ... -> one value for each chunk
//!              16 at a time        16 at a time
//! ```
//!
//! The values are those of the crate, which does the work on processors without such vectors and is the oracle of the
//! tests. Source: the BLAKE3 paper (O'Connor, Aumasson, Neves, Wilcox-O'Hearn, 2020), sections 2.1 to 2.6.

mod lanes;

use lanes::{Job, Lanes, Rest};

/// Bytes of a leaf.
const LEAF_BYTES: usize = 1024;

/// The domains of the compression function (table 3 of the paper).
mod flag {
    pub(super) const CHUNK_START: u32 = 1;
    pub(super) const CHUNK_END: u32 = 2;
    pub(super) const PARENT: u32 = 4;
    pub(super) const ROOT: u32 = 8;
    pub(super) const KEYED_HASH: u32 = 16;
}

const IV: [u32; 8] = [
    0x6A09_E667,
    0xBB67_AE85,
    0x3C6E_F372,
    0xA54F_F53A,
    0x510E_527F,
    0x9B05_688C,
    0x1F83_D9AB,
    0x5BE0_CD19,
];

/// The hash of each message, with a key or without. Messages are shorter than 4 GiB.
pub(crate) fn hash_all(key: Option<&[u8; 32]>, messages: &[&[u8]]) -> Vec<[u8; 32]> {
    match Lanes::detect() {
        // For one alone there is nothing to gain.
        Some(lanes) if messages.len() > 1 => hash_with(lanes, key, messages),
        _ => messages.iter().map(|message| hash_one(key, message)).collect(),
    }
}

/// The hash of one message.
pub(crate) fn hash_one(key: Option<&[u8; 32]>, message: &[u8]) -> [u8; 32] {
    *match key {
        None => blake3::hash(message),
        Some(key) => blake3::keyed_hash(key, message),
    }
    .as_bytes()
}

fn hash_with(lanes: Lanes, key: Option<&[u8; 32]>, messages: &[&[u8]]) -> Vec<[u8; 32]> {
    let (key, domain) = match key {
        None => (IV, 0),
        Some(key) => (words(key), flag::KEYED_HASH),
    };
    // Blocks that a message does not fill, if only because it is empty: filled with zeros.
    let rests: Vec<Option<Rest>> = messages.iter().map(|message| Rest::of(message)).collect();
    let (mut whole, mut parts) = (vec![], vec![]);
    // How many values of the level that is done each tree has, one tree behind the other.
    let mut lens = Vec::with_capacity(messages.len());
    let mut to = 0;
    for (message, rest) in messages.iter().zip(&rests) {
        let len = message.len().div_ceil(LEAF_BYTES).max(1);
        let root = if len == 1 { flag::ROOT } else { 0 };
        let (leaves, part) = message.as_chunks::<LEAF_BYTES>();
        let job = |n: usize, bytes, rest| Job {
            blocks: <[u8]>::as_chunks(bytes).0,
            rest,
            counter: n as u32,
            domain,
            first: flag::CHUNK_START,
            last: flag::CHUNK_END | root,
            to: to + n,
        };
        whole.extend(leaves.iter().enumerate().map(|(n, leaf)| job(n, leaf.as_slice(), None)));
        if leaves.len() < len {
            parts.push(job(leaves.len(), part, rest.as_ref()));
        }
        lens.push(len);
        to += len;
    }
    // Those of about the same length side by side, so that few lanes wait for others.
    parts.sort_unstable_by_key(Job::block_count);
    let mut values = vec![[0; 32]; to];
    lanes.run(&key, &whole, &mut values);
    lanes.run(&key, &parts, &mut values);
    while lens.iter().any(|len| *len > 1) {
        values = level_above(lanes, &key, domain, &values, &mut lens);
    }
    values
}

/// Joins the values of each tree two by two. One that has no neighbour goes up as it is.
fn level_above(
    lanes: Lanes,
    key: &[u32; 8],
    domain: u32,
    values: &[[u8; 32]],
    lens: &mut [usize],
) -> Vec<[u8; 32]> {
    let mut above = Vec::with_capacity(values.len() / 2 + lens.len());
    let mut jobs = Vec::with_capacity(values.len() / 2);
    let mut rest = values;
    for len in lens {
        let Some((tree, behind)) = rest.split_at_checked(*len) else { break };
        let (pairs, single) = tree.as_chunks::<2>();
        let root = if *len == 2 { flag::ROOT } else { 0 };
        for pair in pairs {
            let blocks = pair.as_flattened().as_chunks().0;
            let first = flag::PARENT | root;
            let to = above.len();
            jobs.push(Job { blocks, rest: None, counter: 0, domain, first, last: 0, to });
            above.push([0; 32]);
        }
        above.extend_from_slice(single);
        *len = pairs.len() + single.len();
        rest = behind;
    }
    lanes.run(key, &jobs, &mut above);
    above
}

fn words(bytes: &[u8; 32]) -> [u32; 8] {
    let mut words = [0; 8];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    words
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn noise(len: usize) -> Vec<u8> {
        let mut noise = vec![0; len];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        noise
    }

    fn check(key: Option<&[u8; 32]>, messages: &[&[u8]]) {
        let expected: Vec<_> = messages.iter().map(|message| hash_one(key, message)).collect();
        assert_eq!(hash_all(key, messages), expected);
        for lanes in Lanes::all() {
            assert_eq!(hash_with(lanes, key, messages), expected, "{lanes:?}");
        }
    }

    #[test]
    fn every_length_has_the_hash_of_the_crate() {
        let noise = noise(70 << 10);
        let lens = (0..=200).chain(1000..1050).chain((0..70).map(|n| n << 10));
        let around = (1..70).flat_map(|n| [(n << 10) - 1, (n << 10) + 1, (n << 10) + 64]);
        let messages: Vec<&[u8]> = lens.chain(around).map(|len| &noise[..len]).collect();
        check(None, &messages);
        check(Some(&[7; 32]), &messages);
        for message in &messages {
            check(None, &[message, message]);
        }
    }

    #[test]
    fn large_messages_and_many() {
        let noise = noise(3 << 20);
        check(None, &[&noise[..1 << 20], &noise[1 << 20..], &noise[5..]]);
        check(None, &noise.chunks(100).collect::<Vec<_>>());
        check(Some(&[1; 32]), &noise.chunks(9_000).collect::<Vec<_>>());
        check(None, &[]);
    }

    proptest! {
        #[test]
        fn any_messages_have_the_hashes_of_the_crate(
            lens in prop::collection::vec(0_usize..40_000, 0..40),
            key: Option<[u8; 32]>,
            start in 0_usize..1000,
        ) {
            let noise = noise(41_000);
            let messages: Vec<&[u8]> = lens.iter().map(|len| &noise[start..start + len]).collect();
            check(key.as_ref(), &messages);
        }
    }
}
