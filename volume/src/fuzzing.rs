//! Ways for fuzzers to the parsers that are no part of the interface. Only built with `--cfg fuzzing`.

use std::io;
use std::path::Path;

use petra_engine::SnapshotId;

use crate::extents::{ExtentMap, differing};
use crate::fuse;
use crate::lazy::presence::{Medium, VolumeIdentity, read_durable};
use crate::lazy::wire::{HEADER_BYTES, Header, ToAgent, ToServer};
use crate::pool::state;
use crate::snapshot::UploadState;
use crate::sys::fiemap::FiemapExtent;
use crate::sys::mounts;

/// A file of a pool, taken for each of those that it could be.
pub fn pool_file(bytes: &[u8]) {
    let path = Path::new("/pool/file");
    let _ = state::parse::<state::PoolState>(bytes, path);
    let _ = state::parse::<state::VolumeState>(bytes, path);
    let _ = state::parse::<UploadState>(bytes, path);
    for blocks in [1, 40_000] {
        let identity =
            VolumeIdentity { id: SnapshotId::from_parts(1, 1), len_bytes: blocks * 4096 };
        let _ = read_durable(Bytes(bytes), path, identity);
    }
    mounts::parse_all(bytes);
}

/// Bytes as a file that can't be written.
struct Bytes<'a>(&'a [u8]);

impl Medium for Bytes<'_> {
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let there = self.0.get(offset as usize..).unwrap_or_default();
        let len = there.len().min(buf.len());
        let (data, past) = buf.split_at_mut(len);
        data.copy_from_slice(there.get(..len).unwrap_or_default());
        past.fill(0);
        Ok(())
    }

    fn write(&self, _bytes: &[u8], _offset: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A message between image server and agent in either direction, and a request of the kernel.
///
/// # Panics
/// If a message that was understood is another one when it is written and read again.
pub fn message(bytes: &[u8]) {
    fuse::parse(bytes);
    let Some((header, body)) = bytes.split_first_chunk::<HEADER_BYTES>() else { return };
    let Ok(header) = Header::parse(header) else { return };
    let again = |bytes: Vec<u8>| {
        let (header, body) = bytes.split_first_chunk::<HEADER_BYTES>()?;
        Some((Header::parse(header).ok()?, body.to_vec()))
    };
    if let Ok(message) = ToAgent::decode(header, body) {
        let (header, body) = again(message.encode()).unwrap_or((header, vec![]));
        assert_eq!(ToAgent::decode(header, &body).as_ref(), Ok(&message));
    }
    if let Ok(message) = ToServer::decode(header, body) {
        let (header, body) = again(message.encode()).unwrap_or((header, vec![]));
        assert_eq!(ToServer::decode(header, &body).as_ref(), Ok(&message));
    }
}

/// Two extent maps of a file of 64 KiB, as a kernel gives them: the place in the file, the place on the disk, the length
/// and the flags of each extent.
///
/// # Panics
/// If what differs is not in order, or is not all of what one of them says nothing about.
pub fn extent_maps(maps: [&[[u64; 4]]; 2]) {
    const LEN: u64 = 64 << 10;
    let [a, b] = maps.map(|extents| {
        let extents = extents.iter().map(|[logical, physical, length, flags]| {
            let mut extent = FiemapExtent::default();
            (extent.logical, extent.physical) = (*logical, *physical);
            (extent.length, extent.flags) = (*length, *flags as u32);
            extent
        });
        ExtentMap::of(0..LEN, extents)
    });
    let found = differing(&a, &b);
    assert!(found.iter().all(|range| range.start < range.end && range.end <= LEN));
    assert!(found.iter().zip(found.iter().skip(1)).all(|(one, next)| one.end < next.start));
    assert_eq!(found, differing(&b, &a), "which map is the first makes no difference");
}
