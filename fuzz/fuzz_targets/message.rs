//! What the image server and its agent say to each other, and what the kernel asks of the server.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| petra_volume::fuzzing::message(bytes));
