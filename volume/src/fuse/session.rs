//! Mounting, reading requests, answering them.

use std::ffi::CString;
use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use memmap2::{MmapMut, MmapOptions};
use rustix::io::{Errno, readv, writev};
use rustix::mount::{MountFlags, mount};

use super::abi::{self, Attributes, Body, Operation, Request, falloc, init, open};
use crate::error::{Error, Result};

/// The name of the file.
pub const IMAGE_NAME: &str = "image";

/// What this side wants of a write at most. The kernel may know a lower bound of its own.
const MAX_WRITE: u32 = 1 << 20;
const PAGE: usize = 4096;

/// The file that is served. Called from several threads at once. Whoever takes a [`Reply`] may answer it later, from
/// another thread, so that nothing that waits keeps others from being served.
pub trait File: Send + Sync {
    /// The length, which never changes.
    fn len_bytes(&self) -> u64;

    /// True when nothing may be written.
    fn read_only(&self) -> bool;

    /// Answers with the bytes of a range, which is not empty and within the file. `buffer` is aligned to pages and
    /// has two blocks of 4 KiB more than any range needs.
    fn read(&self, range: Range<u64>, buffer: &mut [u8], reply: Reply);

    /// Writes some bytes, all within the file. They are aligned to pages in memory.
    fn write(&self, offset: u64, data: &[u8], reply: Reply);

    /// Makes a range within the file zeros.
    fn zero(&self, range: Range<u64>, how: Zeroing, reply: Reply);

    /// Makes durable all that was written and answered before.
    fn sync(&self, reply: Reply);

    /// Gives up on a request that waits; false if there is none of this number.
    fn interrupt(&self, unique: u64) -> bool;
}

/// What becomes of the space of a zeroed range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// It is given back.
    Punch,
    /// It stays allocated.
    Keep,
}

/// What kernel and server agreed on. A successor needs it, since the kernel does not say it twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The kernel's minor version of the protocol.
    pub minor: u32,
    /// Bytes of the longest read or write.
    pub max_write: u32,
    /// The kernel can send again what was not answered (6.9 and later).
    pub resend: bool,
}

impl fmt::Display for Negotiated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.minor, self.max_write, u8::from(self.resend))
    }
}

impl FromStr for Negotiated {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let fields: Vec<u32> = text.split(':').map_while(|field| field.parse().ok()).collect();
        match fields.as_slice() {
            [minor, max_write @ 4096..=MAX_WRITE, resend @ 0..=1] => {
                Ok(Self { minor: *minor, max_write: *max_write, resend: *resend == 1 })
            }
            _ => Err(Error::Request(format!("{text:?} is not what a FUSE session agrees on"))),
        }
    }
}

/// A connection to the kernel that is ready for requests.
#[derive(Debug)]
pub struct Session {
    device: Arc<OwnedFd>,
    negotiated: Negotiated,
}

impl Session {
    /// Mounts a file system at a directory and agrees with the kernel on the protocol.
    pub fn mount(at: &Path) -> Result<Self> {
        let path = Path::new("/dev/fuse");
        let device = OpenOptions::new().read(true).write(true).open(path);
        let device = OwnedFd::from(device.map_err(Error::io("open", path))?);
        // Not for other users: what reads the file is a loop device, or root.
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions",
            device.as_raw_fd()
        );
        let options =
            CString::new(options).map_err(|_| Error::Internal("a NUL in mount options"))?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
        mount("petra", at, "fuse.petra", flags, options.as_c_str())
            .map_err(Error::io("mount", at))?;
        let negotiated = match negotiate(&device) {
            Ok(negotiated) => negotiated,
            Err(error) => {
                // Nothing else can be done about a mount that can't be undone.
                let _ = rustix::mount::unmount(at, rustix::mount::UnmountFlags::DETACH);
                return Err(error);
            }
        };
        Ok(Self { device: Arc::new(device), negotiated })
    }

    /// Takes over from a server that is dead: the kernel sends all requests again that it did not answer.
    pub fn resume(device: OwnedFd, negotiated: Negotiated) -> Result<Self> {
        if !negotiated.resend {
            return Err(Error::Unsupported {
                path: "/dev/fuse".into(),
                detail: "this kernel can't send requests again to a new image server (Linux 6.9 and later can)"
                    .to_owned(),
            });
        }
        let notice = abi::out_header(0, abi::NOTIFY_RESEND, 0);
        rustix::io::write(&device, &notice).map_err(Error::io("resume", "/dev/fuse"))?;
        Ok(Self { device: Arc::new(device), negotiated })
    }

    /// The descriptor, to be kept by another process as well.
    pub fn device(&self) -> Arc<OwnedFd> {
        self.device.clone()
    }

    /// What was agreed on.
    pub fn negotiated(&self) -> Negotiated {
        self.negotiated
    }

    /// Bytes that a buffer for [`File::read`] has.
    pub fn buffer_bytes(&self) -> usize {
        self.negotiated.max_write as usize + 2 * PAGE
    }

    /// Serves requests in this thread until the file system is unmounted. Several threads may do so.
    pub fn serve(&self, file: &dyn File) -> Result<()> {
        become_io_flusher();
        // The data of a write begins with a page, so that it can go on to the disk as it is.
        let first = PAGE - abi::WRITE_HEADER;
        let len = PAGE + self.negotiated.max_write as usize;
        let (mut input, mut buffer) = (resident(len)?, resident(self.buffer_bytes())?);
        loop {
            let place = input.get_mut(first..).unwrap_or_default();
            let read = match readv(&*self.device, &mut [IoSliceMut::new(place)]) {
                Ok(read) => read,
                // Interrupted, or the request was given up just now.
                Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => continue,
                Err(Errno::NODEV) => return Ok(()),
                Err(error) => return Err(Error::io("read", "/dev/fuse")(error)),
            };
            let Some(request) = input.get(first..first + read).and_then(abi::parse) else {
                tracing::warn!(read, "the kernel sent something that is no FUSE request");
                continue;
            };
            self.answer(&request, file, &mut buffer);
        }
    }

    fn answer(&self, request: &Request<'_>, file: &dyn File, buffer: &mut [u8]) {
        let reply = Reply { device: self.device.clone(), unique: request.unique, open: true };
        let attributes = |node| Attributes {
            node,
            len_bytes: if node == abi::IMAGE { file.len_bytes() } else { 0 },
            permissions: match (node, file.read_only()) {
                (abi::IMAGE, true) => 0o400,
                (abi::IMAGE, false) => 0o600,
                _ => 0o500,
            },
        };
        let within = |offset: u64, len: u64| {
            abi::range(offset, len).filter(|range| range.end <= file.len_bytes())
        };
        let is_image = request.node == abi::IMAGE;
        match request.operation {
            Operation::Lookup { name } if request.node == abi::ROOT => {
                if name == IMAGE_NAME.as_bytes() {
                    reply.body(&Body::entry(&attributes(abi::IMAGE)));
                } else {
                    reply.error(Errno::NOENT);
                }
            }
            Operation::GetAttr => reply.body(&Body::attributes(&attributes(request.node))),
            Operation::Open { flags } if is_image => {
                if flags & 3 != 0 && file.read_only() {
                    return reply.error(Errno::ROFS);
                }
                // Not through the page cache: a loop device has its own above.
                let flags = open::DIRECT_IO | open::PARALLEL_DIRECT_WRITES | open::NOFLUSH;
                reply.body(&Body::open(flags));
            }
            Operation::OpenDir => reply.body(&Body::open(0)),
            Operation::ReadDir { offset, len } => {
                let names = [(abi::ROOT, "."), (abi::ROOT, ".."), (abi::IMAGE, IMAGE_NAME)];
                reply.body(&Body::directory(&names, offset, len));
            }
            Operation::StatFs => reply.body(&Body::statfs(file.len_bytes())),
            Operation::Read { offset, len } if is_image => {
                let end = offset.saturating_add(len.into()).min(file.len_bytes());
                if len as usize > buffer.len().saturating_sub(2 * PAGE) {
                    reply.error(Errno::INVAL);
                } else if end <= offset {
                    reply.data(&[]);
                } else {
                    file.read(offset..end, buffer, reply);
                }
            }
            Operation::Write { offset, data } if is_image => {
                match within(offset, data.len() as u64) {
                    _ if file.read_only() => reply.error(Errno::ROFS),
                    Some(range) if range.is_empty() => reply.written(0),
                    Some(_) => file.write(offset, data, reply),
                    None => reply.error(Errno::NOSPC),
                }
            }
            Operation::Fallocate { offset, len, mode } if is_image => {
                let how = match mode & !falloc::KEEP_SIZE {
                    falloc::PUNCH_HOLE => Some(Zeroing::Punch),
                    falloc::ZERO_RANGE => Some(Zeroing::Keep),
                    _ => None,
                };
                match (how, within(offset, len)) {
                    _ if file.read_only() => reply.error(Errno::ROFS),
                    (None, _) => reply.error(Errno::OPNOTSUPP),
                    (Some(_), None) => reply.error(Errno::NOSPC),
                    (Some(_), Some(range)) if range.is_empty() => reply.ok(),
                    (Some(how), Some(range)) => file.zero(range, how, reply),
                }
            }
            Operation::Fsync if is_image => file.sync(reply),
            Operation::Flush | Operation::Release | Operation::Destroy => reply.ok(),
            // The file's length and owner are not for its users to change.
            Operation::SetAttr => reply.error(Errno::PERM),
            Operation::Forget => reply.none(),
            Operation::Interrupt { of } => {
                if file.interrupt(of) {
                    reply.none();
                } else {
                    // It may not wait yet, or not any more: the kernel asks again while it is open.
                    reply.error(Errno::AGAIN);
                }
            }
            Operation::Malformed { opcode } => {
                tracing::warn!(opcode, "a FUSE request that is not as expected");
                reply.error(Errno::INVAL);
            }
            // Also an INIT: there is one only, and it was answered.
            _ => reply.error(Errno::NOSYS),
        }
    }
}

/// Says that what this thread allocates must not wait for writes that may come back to it: for all threads on whose work
/// a request waits. Refused to a process without CAP_SYS_RESOURCE, which can do without while memory is not short.
pub(crate) fn become_io_flusher() {
    let _ = rustix::process::configure_io_flusher_behavior(true);
}

/// Memory that begins with a page and stays in memory. The kernel copies requests and answers from and to it: when a
/// page has to be brought in first and the process is killed at that moment, the request is lost with an I/O error
/// instead of going to the successor.
pub(crate) fn resident(bytes: usize) -> Result<MmapMut> {
    let memory = MmapOptions::new().len(bytes).populate().map_anon();
    let memory = memory.map_err(Error::io("allocate a buffer for", "/dev/fuse"))?;
    // Beyond a limit of the process it may be swapped out, which is slower and a little less safe.
    let _ = memory.lock();
    Ok(memory)
}

/// Answers the kernel's first request.
fn negotiate(device: &OwnedFd) -> Result<Negotiated> {
    let io = |action| Error::io(action, "/dev/fuse");
    let mut input = vec![0; 2 * PAGE];
    let read = loop {
        match rustix::io::read(device, input.as_mut_slice()) {
            Err(Errno::INTR) => {}
            read => break read.map_err(io("read"))?,
        }
    };
    let request = input.get(..read).and_then(abi::parse);
    let Some((unique, Operation::Init { major, minor, max_readahead, flags })) =
        request.map(|request| (request.unique, request.operation))
    else {
        return Err(Error::Internal("the kernel's first FUSE request is not INIT"));
    };
    if major != abi::MAJOR || minor < abi::MIN_MINOR {
        return Err(Error::Unsupported {
            path: "/dev/fuse".into(),
            detail: format!(
                "the kernel speaks FUSE {major}.{minor}, 7.{} or later is needed",
                abi::MIN_MINOR
            ),
        });
    }
    let wanted = init::ASYNC_READ
        | init::BIG_WRITES
        | init::ASYNC_DIO
        | init::PARALLEL_DIROPS
        | init::MAX_PAGES
        | init::NO_OPENDIR
        | init::EXT
        | init::HAS_RESEND;
    let agreed = flags & wanted;
    // Without larger requests the kernel sends 32 pages at most.
    let max_write = if agreed & init::MAX_PAGES == 0 { 128 << 10 } else { MAX_WRITE };
    let body = Body::init(max_readahead, agreed, max_write);
    let header = abi::out_header(unique, 0, body.0.len());
    writev(device, &[IoSlice::new(&header), IoSlice::new(&body.0)]).map_err(io("answer"))?;
    Ok(Negotiated { minor, max_write, resend: agreed & init::HAS_RESEND != 0 })
}

/// The answer that a request waits for. One that is dropped is an I/O error: nobody may wait for ever.
#[derive(Debug)]
pub struct Reply {
    device: Arc<OwnedFd>,
    unique: u64,
    open: bool,
}

impl Reply {
    /// The request's number.
    pub fn unique(&self) -> u64 {
        self.unique
    }

    /// What was read.
    pub fn data(self, bytes: &[u8]) {
        self.send(0, bytes);
    }

    /// So many bytes were written.
    pub fn written(self, bytes: u32) {
        self.body(&Body::written(bytes));
    }

    /// Done.
    pub fn ok(self) {
        self.send(0, &[]);
    }

    /// Not done.
    pub fn error(self, error: Errno) {
        self.send(-error.raw_os_error(), &[]);
    }

    fn body(self, body: &Body) {
        self.send(0, &body.0);
    }

    fn none(mut self) {
        self.open = false;
    }

    fn send(mut self, error: i32, body: &[u8]) {
        self.open = false;
        self.write(error, body);
    }

    fn write(&self, error: i32, body: &[u8]) {
        let header = abi::out_header(self.unique, error, body.len());
        let parts = [IoSlice::new(&header), IoSlice::new(body)];
        match writev(&*self.device, &parts) {
            // Nobody waits any more: the request was given up, or the file system unmounted.
            Ok(_) | Err(Errno::NOENT | Errno::NODEV) => {}
            Err(error) => {
                let error = io::Error::from(error);
                tracing::warn!(%error, unique = self.unique, "a FUSE request can't be answered");
            }
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if self.open {
            self.write(-Errno::IO.raw_os_error(), &[]);
        }
    }
}
