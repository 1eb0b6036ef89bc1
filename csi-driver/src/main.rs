//! Petra's CSI driver.
fn main() {}
