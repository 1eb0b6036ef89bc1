//! Petra.
fn main() {}
