//! The files of a pool: the states of pool, volumes and uploads, and presence maps; and the kernel's list of mounts.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| petra_volume::fuzzing::pool_file(bytes));
