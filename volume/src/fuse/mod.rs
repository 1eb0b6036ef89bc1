//! A file system with one file, `image`, served from this process through `/dev/fuse`.
//!
//! | module | what it knows |
//! |---|---|
//! | `abi` | the bytes of the kernel's requests and of the answers to them |
//! | `session` | mounting, the loop that reads requests, and answering them |
//!
//! Our own and not a library's, since a server that was killed must have a successor: it takes over the descriptor
//! that someone kept, asks the kernel to send again what was not answered, and goes on
//! ([`Session::resume`]). That works only while all threads read one descriptor: requests read from a clone of it die
//! with the process.

mod abi;
mod session;

/// Whatever a kernel might ask.
#[cfg(fuzzing)]
pub(crate) fn parse(request: &[u8]) {
    let _ = abi::parse(request);
}

pub use session::{File, IMAGE_NAME, Negotiated, Reply, Session, Zeroing};
pub(crate) use session::{become_io_flusher, resident};
