//! Whole packs.
#![no_main]

use libfuzzer_sys::fuzz_target;
use petra_engine::crypto::Keys;
use petra_engine::format::pack;
use petra_engine::{PackId, SnapshotId};

fuzz_target!(|bytes: &[u8]| {
    let id = PackId { session: SnapshotId::from_parts(0, 0), number: 0 };
    let _ = pack::read_whole(id, &Keys::none(), bytes);
});
