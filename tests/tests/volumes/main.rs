//! Tests of live volumes on real file systems. They need root, and loop devices.

mod pool;
