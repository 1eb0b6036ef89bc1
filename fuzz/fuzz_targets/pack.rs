//! Whole packs: as they are, and with a right checksum, so that the parser of footers sees what comes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use petra_engine::crypto::Keys;
use petra_engine::format::pack::{self, END_MAGIC, HEADER_BYTES, PackBuilder, PackKind};
use petra_engine::{PackId, SnapshotId};

fuzz_target!(|input: (bool, u16, &[u8])| {
    let (is_data, body_bytes, bytes) = input;
    let id = PackId { session: SnapshotId::from_parts(0, 0), number: 0 };
    let keys = Keys::none();
    let _ = pack::read_whole(id, &keys, bytes);

    let kind = if is_data { PackKind::Data } else { PackKind::Manifest };
    let (_, made) = PackBuilder::within(id, kind, &keys, Vec::new()).finish();
    let mut made = made.to_vec();
    made.resize(HEADER_BYTES, 0);
    let checksum = pack::footer_checksum(&made, bytes);
    made.resize(HEADER_BYTES + usize::from(body_bytes), 0);
    made.extend_from_slice(bytes);
    made.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    made.extend_from_slice(checksum.as_bytes());
    made.extend_from_slice(END_MAGIC);
    let _ = pack::read_whole(id, &keys, &made);
});
