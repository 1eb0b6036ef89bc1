//! Payloads of nodes, sealed with a right checksum so that the parser sees them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use petra_engine::format::block::{self, BlockKind};
use petra_engine::format::node::Node;

fuzz_target!(|payload: &[u8]| {
    if let Ok(node) = Node::parse(&block::seal(BlockKind::Node, payload)) {
        assert_eq!(Node::parse(&node.encode()).expect("what was read can be written"), node);
    }
});
