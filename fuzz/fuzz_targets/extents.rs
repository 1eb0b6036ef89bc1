//! Extent maps as a kernel gives them, and what differs between two of them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use petra_volume::fuzzing;

fuzz_target!(|bytes: &[u8]| {
    // Small numbers, which meet each other, and now and then one at the end of all.
    let number = |byte: u8| match byte {
        0xff => u64::MAX - 4095,
        byte => u64::from(byte) << 10,
    };
    let extents: Vec<[u64; 4]> = bytes
        .as_chunks::<5>()
        .0
        .iter()
        .map(|[logical, physical, length, low, high]| {
            let flags = u64::from(u16::from_le_bytes([*low, *high]));
            [number(*logical), number(*physical), number(*length), flags]
        })
        .collect();
    let (a, b) = extents.split_at(extents.len() / 2);
    fuzzing::extent_maps([a, b]);
});
