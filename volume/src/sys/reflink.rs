//! Copies by reference (FICLONE, FICLONERANGE).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use rustix::ioctl::{Opcode, Setter, ioctl, opcode};

const FICLONERANGE: Opcode = opcode::write::<CloneRange>(0x94, 13);

#[repr(C)]
struct CloneRange {
    src_fd: i64,
    src_offset: u64,
    src_length: u64,
    dest_offset: u64,
}

/// Makes the whole of `to` refer to the data of `from`.
pub(crate) fn clone_file(from: &File, to: &File) -> io::Result<()> {
    Ok(rustix::fs::ioctl_ficlone(to, from)?)
}

/// Makes a range of `to` refer to the same range of `from`: all of it at one point in time. It begins and ends at block
/// boundaries, or at the end of `from`.
pub(crate) fn clone_range(from: &File, to: &File, range: Range<u64>) -> io::Result<()> {
    let argument = CloneRange {
        src_fd: from.as_raw_fd().into(),
        src_offset: range.start,
        src_length: range.end.saturating_sub(range.start),
        dest_offset: range.start,
    };
    if argument.src_length == 0 {
        // To the kernel this would mean "to the end".
        return Ok(());
    }
    // SAFETY: the opcode takes this structure, and `from` keeps its descriptor open during the call.
    Ok(unsafe { ioctl(to, Setter::<FICLONERANGE, CloneRange>::new(argument)) }?)
}
