//! Payloads of relocations, sealed with a right checksum so that the parser sees them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use petra_engine::format::block::{self, BlockKind};
use petra_engine::format::relocation::Relocation;

fuzz_target!(|payload: &[u8]| {
    if let Ok(relocation) = Relocation::parse(&block::seal(BlockKind::Relocation, payload)) {
        let again = Relocation::parse(&relocation.encode());
        assert_eq!(again.expect("what was read can be written"), relocation);
        for run in &relocation.runs {
            assert!(relocation.chunk(run.old_frame, run.old_start, run.len).is_some());
        }
    }
});
