//! Volumes on a Linux machine.
