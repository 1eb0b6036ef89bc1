//! The kernel's side of FUSE, as in `linux/fuse.h`: numbers in the machine's order. Requests are parsed with every bound
//! checked, although the kernel is trusted: a parser that is wrong about a version must not read what is not there.

use std::ops::Range;

/// The protocol's major version.
pub(super) const MAJOR: u32 = 7;
/// The oldest minor version that has all that is needed: `max_pages` (28), flags in two words (36).
pub(super) const MIN_MINOR: u32 = 36;
/// What this module speaks.
pub(super) const MINOR: u32 = 41;

pub(super) const ROOT: u64 = 1;
pub(super) const IMAGE: u64 = 2;

/// Bytes before the body of a request, and of an answer.
pub(super) const IN_HEADER: usize = 40;
pub(super) const OUT_HEADER: usize = 16;
/// Bytes before the data of a write.
pub(super) const WRITE_HEADER: usize = IN_HEADER + 40;

/// Flags of INIT.
pub(super) mod init {
    pub(crate) const ASYNC_READ: u64 = 1 << 0;
    pub(crate) const BIG_WRITES: u64 = 1 << 5;
    pub(crate) const ASYNC_DIO: u64 = 1 << 15;
    pub(crate) const PARALLEL_DIROPS: u64 = 1 << 18;
    pub(crate) const MAX_PAGES: u64 = 1 << 22;
    pub(crate) const NO_OPENDIR: u64 = 1 << 24;
    pub(crate) const EXT: u64 = 1 << 30;
    pub(crate) const HAS_RESEND: u64 = 1 << 39;
}

/// Flags of the answer to OPEN.
pub(super) mod open {
    pub(crate) const DIRECT_IO: u32 = 1 << 0;
    pub(crate) const NOFLUSH: u32 = 1 << 5;
    pub(crate) const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
}

/// Modes of FALLOCATE.
pub(super) mod falloc {
    pub(crate) const KEEP_SIZE: u32 = 1;
    pub(crate) const PUNCH_HOLE: u32 = 2;
    pub(crate) const ZERO_RANGE: u32 = 0x10;
}

/// The notice by which a successor asks for all requests that were not answered.
pub(super) const NOTIFY_RESEND: i32 = 7;

/// A request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request<'a> {
    pub(super) unique: u64,
    pub(super) node: u64,
    pub(super) operation: Operation<'a>,
}

/// What is asked.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Operation<'a> {
    Init {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u64,
    },
    Lookup {
        name: &'a [u8],
    },
    Forget,
    GetAttr,
    SetAttr,
    Open {
        flags: u32,
    },
    Read {
        offset: u64,
        len: u32,
    },
    Write {
        offset: u64,
        data: &'a [u8],
    },
    StatFs,
    Release,
    Fsync,
    Flush,
    OpenDir,
    ReadDir {
        offset: u64,
        len: u32,
    },
    Interrupt {
        of: u64,
    },
    Destroy,
    Fallocate {
        offset: u64,
        len: u64,
        mode: u32,
    },
    /// Nothing that a file system with one file needs.
    Other {
        opcode: u32,
    },
    /// Known, but not what it must look like.
    Malformed {
        opcode: u32,
    },
}

/// Reads a request; `None` if not even its header is there.
pub(super) fn parse(bytes: &[u8]) -> Option<Request<'_>> {
    let mut header = Fields(bytes);
    let (len, opcode) = (header.u32()?, header.u32()?);
    let (unique, node) = (header.u64()?, header.u64()?);
    if len as usize != bytes.len() {
        return None;
    }
    let body = bytes.get(IN_HEADER..)?;
    let operation = operation(opcode, body).unwrap_or(Operation::Malformed { opcode });
    Some(Request { unique, node, operation })
}

fn operation(opcode: u32, body: &[u8]) -> Option<Operation<'_>> {
    let mut fields = Fields(body);
    Some(match opcode {
        1 => Operation::Lookup { name: body.split(|byte| *byte == 0).next()? },
        2 | 42 => Operation::Forget,
        3 => Operation::GetAttr,
        4 => Operation::SetAttr,
        14 => Operation::Open { flags: fields.u32()? },
        15 | 28 => {
            let (_handle, offset, len) = (fields.u64()?, fields.u64()?, fields.u32()?);
            match opcode {
                15 => Operation::Read { offset, len },
                _ => Operation::ReadDir { offset, len },
            }
        }
        16 => {
            let (_handle, offset, len) = (fields.u64()?, fields.u64()?, fields.u32()?);
            let data = body.get(WRITE_HEADER - IN_HEADER..)?;
            Operation::Write { offset, data: data.get(..len as usize)? }
        }
        17 => Operation::StatFs,
        18 | 29 => Operation::Release,
        20 => Operation::Fsync,
        25 => Operation::Flush,
        26 => {
            let (major, minor) = (fields.u32()?, fields.u32()?);
            let (max_readahead, low) = (fields.u32()?, fields.u32()?);
            let high = if u64::from(low) & init::EXT == 0 { 0 } else { fields.u32()? };
            let flags = u64::from(low) | u64::from(high) << 32;
            Operation::Init { major, minor, max_readahead, flags }
        }
        27 => Operation::OpenDir,
        36 => Operation::Interrupt { of: fields.u64()? },
        38 => Operation::Destroy,
        43 => {
            let (_handle, offset, len) = (fields.u64()?, fields.u64()?, fields.u64()?);
            Operation::Fallocate { offset, len, mode: fields.u32()? }
        }
        opcode => Operation::Other { opcode },
    })
}

/// Numbers, one after the other.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*first)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_ne_bytes)
    }
}

/// The header of an answer with so many bytes after it. `error` is 0, or an error's number below 0.
pub(super) fn out_header(unique: u64, error: i32, body_bytes: usize) -> [u8; OUT_HEADER] {
    let body = Body::default().u32((OUT_HEADER + body_bytes) as u32).u32(error.cast_unsigned());
    let mut out = [0; OUT_HEADER];
    out.copy_from_slice(&body.u64(unique).0);
    out
}

/// The bodies of answers.
#[derive(Debug, Default)]
pub(super) struct Body(pub(super) Vec<u8>);

impl Body {
    fn u16(mut self, value: u16) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn zeros(mut self, bytes: usize) -> Self {
        self.0.resize(self.0.len() + bytes, 0);
        self
    }

    /// `fuse_init_out`.
    pub(super) fn init(max_readahead: u32, flags: u64, max_write: u32) -> Self {
        let max_pages = u16::try_from(max_write / 4096).unwrap_or(u16::MAX);
        // Reads that wait for data count as well, and must not keep others out: a loop device has 128 at most.
        let (max_background, congestion) = (512, 384);
        Self::default()
            .u32(MAJOR)
            .u32(MINOR)
            .u32(max_readahead)
            .u32(flags as u32)
            .u16(max_background)
            .u16(congestion)
            .u32(max_write)
            .u32(1)
            .u16(max_pages)
            .u16(0)
            .u32((flags >> 32) as u32)
            .zeros(28)
    }

    /// `fuse_open_out`.
    pub(super) fn open(flags: u32) -> Self {
        Self::default().u64(0).u32(flags).u32(0)
    }

    /// `fuse_entry_out`.
    pub(super) fn entry(attributes: &Attributes) -> Self {
        let valid = VALID_SECONDS;
        Self::default().u64(attributes.node).u64(0).u64(valid).u64(valid).u64(0).attr(attributes)
    }

    /// `fuse_attr_out`.
    pub(super) fn attributes(attributes: &Attributes) -> Self {
        Self::default().u64(VALID_SECONDS).u64(0).attr(attributes)
    }

    fn attr(self, of: &Attributes) -> Self {
        let (kind, links) = if of.node == ROOT { (0o040_000, 2) } else { (0o100_000, 1) };
        self.u64(of.node)
            .u64(of.len_bytes)
            .u64(of.len_bytes.div_ceil(512))
            .zeros(3 * 8 + 3 * 4)
            .u32(kind | of.permissions)
            .u32(links)
            .zeros(3 * 4)
            .u32(4096)
            .u32(0)
    }

    /// `fuse_statfs_out`.
    pub(super) fn statfs(len_bytes: u64) -> Self {
        let blocks = len_bytes.div_ceil(4096);
        Self::default()
            .u64(blocks)
            .u64(0)
            .u64(0)
            .u64(1)
            .u64(0)
            .u32(4096)
            .u32(255)
            .u32(4096)
            .zeros(28)
    }

    /// `fuse_write_out`.
    pub(super) fn written(bytes: u32) -> Self {
        Self::default().u32(bytes).u32(0)
    }

    /// Entries of the directory, from the `offset`-th on, as far as they fit.
    pub(super) fn directory(names: &[(u64, &str)], offset: u64, len: u32) -> Self {
        let mut body = Self::default();
        for (n, (node, name)) in names.iter().enumerate().skip(offset as usize) {
            let kind = if *node == ROOT { 4 } else { 8 };
            let padding = name.len().next_multiple_of(8) - name.len();
            if body.0.len() + 24 + name.len() + padding > len as usize {
                break;
            }
            body = body.u64(*node).u64(n as u64 + 1).u32(name.len() as u32).u32(kind);
            body.0.extend_from_slice(name.as_bytes());
            body = body.zeros(padding);
        }
        body
    }
}

/// Nothing changes but by this server, so the kernel need not ask again.
const VALID_SECONDS: u64 = 1 << 30;

/// What `stat` shows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attributes {
    pub(super) node: u64,
    pub(super) len_bytes: u64,
    pub(super) permissions: u32,
}

/// The range of a request, if it has an end.
pub(super) fn range(offset: u64, len: u64) -> Option<Range<u64>> {
    Some(offset..offset.checked_add(len)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request(opcode: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&((IN_HEADER + body.len()) as u32).to_ne_bytes());
        bytes.extend_from_slice(&opcode.to_ne_bytes());
        bytes.extend_from_slice(&7_u64.to_ne_bytes());
        bytes.extend_from_slice(&IMAGE.to_ne_bytes());
        bytes.resize(IN_HEADER, 0);
        bytes.extend_from_slice(body);
        bytes
    }

    #[test]
    fn a_write_has_its_data() {
        let mut body = Vec::new();
        body.extend_from_slice(&0_u64.to_ne_bytes());
        body.extend_from_slice(&4096_u64.to_ne_bytes());
        body.extend_from_slice(&3_u32.to_ne_bytes());
        body.resize(40, 0);
        body.extend_from_slice(b"abc");
        let bytes = request(16, &body);
        let write = Operation::Write { offset: 4096, data: b"abc" };
        assert_eq!(parse(&bytes), Some(Request { unique: 7, node: IMAGE, operation: write }));
        body.pop();
        let short = request(16, &body);
        assert_eq!(parse(&short).unwrap().operation, Operation::Malformed { opcode: 16 });
    }

    #[test]
    fn answers_have_the_sizes_of_the_kernel() {
        let attributes = Attributes { node: IMAGE, len_bytes: 1, permissions: 0o600 };
        assert_eq!(Body::init(0, 0, 1 << 20).0.len(), 64);
        assert_eq!(Body::entry(&attributes).0.len(), 128);
        assert_eq!(Body::attributes(&attributes).0.len(), 104);
        assert_eq!(Body::statfs(1).0.len(), 80);
        assert_eq!(Body::open(0).0.len(), 16);
        let names = [(ROOT, "."), (ROOT, ".."), (IMAGE, "image")];
        assert_eq!(Body::directory(&names, 1, 4096).0.len(), 2 * 32);
        assert_eq!(Body::directory(&names, 0, 40).0.len(), 32);
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_without_a_panic(
            opcode in 0_u32..60, body in prop::collection::vec(any::<u8>(), 0..100)
        ) {
            let _ = parse(&body);
            prop_assert!(parse(&request(opcode, &body)).is_some());
        }
    }
}
