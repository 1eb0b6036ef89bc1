//! Stored frames.
#![no_main]

use libfuzzer_sys::fuzz_target;
use petra_engine::format::frame;

fuzz_target!(|input: (u32, &[u8])| {
    let (raw_len, stored) = input;
    let mut raw = Vec::new();
    if frame::decode(stored, raw_len, &mut raw).is_ok() {
        assert_eq!(raw.len(), raw_len as usize);
    }
});
