//! Payloads of leaves, sealed with a right checksum so that the parser sees them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use petra_engine::format::block::{self, BlockKind};
use petra_engine::format::leaf::Leaf;

fuzz_target!(|payload: &[u8]| {
    if let Ok(leaf) = Leaf::parse(&block::seal(BlockKind::Leaf, payload)) {
        assert_eq!(Leaf::parse(&leaf.encode()).expect("what was read can be written"), leaf);
    }
});
