//! What people and clusters give as keys, and sealed bytes that no key of ours sealed.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use petra_engine::access::Access;
use petra_engine::context::Host;
use petra_engine::crypto::{Keys, Piece, Slot};
use petra_engine::format::block::BlockKind;
use petra_engine::format::envelope;
use petra_engine::format::pack::PackKind;
use petra_engine::key::{self, Key};
use petra_engine::record::kind;
use petra_engine::{PackId, Secret, SnapshotId};

/// Always the same: a find must be found again.
#[derive(Debug)]
struct Still;

impl Host for Still {
    fn unix_ms(&self) -> u64 {
        1
    }

    fn random(&self) -> u128 {
        2
    }
}

fuzz_target!(|bytes: &[u8]| {
    let secret = Secret::key_file(bytes.to_vec());
    let session = SnapshotId::from_parts(1, 2);
    let at = Key::slot(session);
    let slot = envelope::seal_json(kind::KEY, &at, bytes);
    if let (Ok(slot), Ok(secret)) =
        (envelope::unseal::<Slot>(kind::KEY, &at, &slot), Secret::key_file(vec![b'k'; 64]))
    {
        let _ = slot.unwrap(&at, &secret);
    }
    drop(secret);

    let keys = Keys::generate(&Still);
    let mut opened = Vec::new();
    let footer = Piece::Footer(PackId { session, number: 1 }, PackKind::Data);
    for piece in [Piece::Frame, Piece::Block(BlockKind::Leaf), footer] {
        let _ = keys.open(piece, bytes, &mut opened);
    }
    let _ = keys.open_object(kind::PIN, &at, bytes);

    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let secrets: BTreeMap<String, String> = text
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let _ = Access::from_secrets(&secrets);
    // Keys of listings are foreign too.
    for prefix in [key::PACKS, key::PINS, key::SNAPS, key::ENDS] {
        let _ = key::parse_numbered(text, prefix);
        let _ = key::parse_id(text, prefix);
    }
    let _ = (key::parse_catalogued(text), key::parse_policies(text));
});
