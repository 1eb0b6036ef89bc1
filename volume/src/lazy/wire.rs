//! The messages between an image server and the agent, over a Unix socket.
//!
//! | bytes | field |
//! |---|---|
//! | 4 | length of the body, at most [`MAX_BODY`] |
//! | 1 | kind |
//! | 3 | zero |
//! | 8 | a number: an offset, or the number of a question |
//! | ... | body |
//!
//! The server connects and says [`Hello`]; its `/dev/fuse` descriptor goes along with the first byte. Both sides are
//! of one machine but may be of different versions, one of them upgraded under the other: a version that the other does
//! not speak ends the connection. All numbers are little-endian. A message that is not as described ends the
//! connection too, and nothing else.

use std::ops::Range;

use petra_engine::SnapshotId;

use super::presence::VolumeIdentity;
use crate::fuse::Negotiated;

/// The version of the messages.
pub const VERSION: u32 = 1;
/// The longest body: the data of one message.
pub const MAX_BODY: usize = 1 << 20;
/// Bytes before the body.
pub const HEADER_BYTES: usize = 16;
/// Ranges in one message.
pub const MAX_RANGES: usize = MAX_BODY / 16;

const MAGIC: &[u8; 8] = b"PtLazy\r\n";

/// Why a message is not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// It is not what it must look like.
    #[error("a message of kind {kind} with {body_bytes} bytes is malformed")]
    Malformed {
        /// Its kind.
        kind: u8,
        /// The length of its body.
        body_bytes: usize,
    },
    /// The other side speaks another version.
    #[error("the other side speaks version {found}, this one {VERSION}")]
    Version {
        /// Its version.
        found: u32,
    },
}

/// The header of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub kind: u8,
    /// Bytes after the header.
    pub body_bytes: usize,
    /// What this number means depends on the kind.
    pub number: u64,
}

impl Header {
    /// Reads a header.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        let mut fields = Fields(bytes);
        let len = fields.u32().unwrap_or(u32::MAX) as usize;
        let kind = fields.u32().unwrap_or(u32::MAX);
        let number = fields.u64().unwrap_or_default();
        match u8::try_from(kind) {
            Ok(kind) if len <= MAX_BODY => Ok(Self { kind, body_bytes: len, number }),
            _ => Err(WireError::Malformed { kind: kind as u8, body_bytes: len }),
        }
    }

    fn malformed(&self) -> WireError {
        WireError::Malformed { kind: self.kind, body_bytes: self.body_bytes }
    }
}

/// The first message of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The volume that it serves.
    pub volume: VolumeIdentity,
    /// What a successor needs to take the descriptor over.
    pub negotiated: Negotiated,
}

/// From the image server to the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToAgent {
    /// Who speaks. The first message, and only that.
    Hello(Hello),
    /// Someone needs a range.
    Want {
        /// Bytes of the volume.
        range: Range<u64>,
        /// A request waits for it; else it is read-ahead.
        urgent: bool,
    },
    /// The answer to [`ToServer::AskAbsent`].
    Absent {
        /// The question's number.
        question: u64,
        /// The server looked up to here.
        end: u64,
        /// Absent parts before that, in order.
        ranges: Vec<Range<u64>>,
    },
    /// The answer to [`ToServer::Flush`].
    Flushed {
        /// The question's number.
        question: u64,
        /// All that was there when it was asked is durable.
        done: bool,
    },
    /// The answer to [`ToServer::StopRecording`].
    Recorded {
        /// The question's number.
        question: u64,
        /// What was read since the volume was first mounted, in the order of the first touch.
        ranges: Vec<Range<u64>>,
    },
    /// The file system was unmounted: the descriptor is of no use any more.
    Bye,
}

/// From the agent to the image server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToServer<'a> {
    /// The server's hello was accepted.
    Welcome,
    /// Data of the volume: whole blocks, but for its last one.
    Data {
        /// The first byte.
        offset: u64,
        /// The bytes.
        bytes: &'a [u8],
    },
    /// A range holds zeros.
    Zeros(Range<u64>),
    /// A range can't be read, and waiting would not help.
    Failed {
        /// Bytes of the volume.
        range: Range<u64>,
        /// What is missing or damaged, shortened to [`MAX_REASON`] bytes.
        reason: String,
    },
    /// Which parts of a range are absent?
    AskAbsent {
        /// Tells the answer from others.
        question: u64,
        /// Bytes of the volume.
        range: Range<u64>,
    },
    /// Make durable what is there.
    Flush {
        /// Tells the answer from others.
        question: u64,
    },
    /// Give the ranges that were read so far, and note no more.
    StopRecording {
        /// Tells the answer from others.
        question: u64,
    },
}

/// The longest reason of a failure.
pub const MAX_REASON: usize = 1024;

fn message(kind: u8, number: u64, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_BYTES + body.len());
    out.extend_from_slice(&(body.len() as u32).to_le_bytes());
    out.extend_from_slice(&u32::from(kind).to_le_bytes());
    out.extend_from_slice(&number.to_le_bytes());
    out.extend_from_slice(body);
    out
}

/// The header of [`ToServer::Data`], for senders that have the bytes elsewhere.
pub fn data_header(offset: u64, bytes: usize) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    let out = message(DATA, offset, &[]);
    header.copy_from_slice(&out);
    let (len, _) = header.split_at_mut(4);
    len.copy_from_slice(&(bytes as u32).to_le_bytes());
    header
}

const HELLO: u8 = 1;
const WANT: u8 = 2;
const ABSENT: u8 = 3;
const FLUSHED: u8 = 4;
const RECORDED: u8 = 5;
const BYE: u8 = 6;

const WELCOME: u8 = 64;
/// [`ToServer::Data`]: the only kind with a long body of bytes.
pub const DATA: u8 = 65;
const ZEROS: u8 = 66;
const FAILED: u8 = 67;
const ASK_ABSENT: u8 = 68;
const FLUSH: u8 = 69;
const STOP_RECORDING: u8 = 70;

impl ToAgent {
    /// The bytes to send.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Hello(Hello { volume, negotiated }) => {
                let mut body = MAGIC.to_vec();
                body.extend_from_slice(&volume.id.to_bytes());
                body.extend_from_slice(&volume.len_bytes.to_le_bytes());
                body.extend_from_slice(&negotiated.minor.to_le_bytes());
                body.extend_from_slice(&negotiated.max_write.to_le_bytes());
                body.extend_from_slice(&u32::from(negotiated.resend).to_le_bytes());
                message(HELLO, VERSION.into(), &body)
            }
            Self::Want { range, urgent } => {
                let mut body = range.end.to_le_bytes().to_vec();
                body.extend_from_slice(&u32::from(*urgent).to_le_bytes());
                message(WANT, range.start, &body)
            }
            Self::Absent { question, end, ranges } => {
                let mut body = end.to_le_bytes().to_vec();
                put_ranges(&mut body, ranges);
                message(ABSENT, *question, &body)
            }
            Self::Flushed { question, done } => {
                message(FLUSHED, *question, &u32::from(*done).to_le_bytes())
            }
            Self::Recorded { question, ranges } => {
                let mut body = Vec::new();
                put_ranges(&mut body, ranges);
                message(RECORDED, *question, &body)
            }
            Self::Bye => message(BYE, 0, &[]),
        }
    }

    /// Reads a message.
    pub fn decode(header: Header, body: &[u8]) -> Result<Self, WireError> {
        if header.kind == HELLO && header.number != u64::from(VERSION) {
            let found = u32::try_from(header.number).unwrap_or(u32::MAX);
            return Err(WireError::Version { found });
        }
        Self::read(header, body).ok_or_else(|| header.malformed())
    }

    fn read(header: Header, body: &[u8]) -> Option<Self> {
        let number = header.number;
        let mut fields = Fields(body);
        let message = match header.kind {
            HELLO => {
                if fields.take::<8>()? != *MAGIC {
                    return None;
                }
                let id = SnapshotId::from_bytes(fields.take()?);
                let volume = VolumeIdentity { id, len_bytes: fields.u64()? };
                let (minor, max_write) = (fields.u32()?, fields.u32()?);
                let negotiated = Negotiated { minor, max_write, resend: fields.flag()? };
                Self::Hello(Hello { volume, negotiated })
            }
            WANT => {
                let range = fields.range_from(number)?;
                Self::Want { range, urgent: fields.flag()? }
            }
            ABSENT => {
                let end = fields.u64()?;
                Self::Absent { question: number, end, ranges: fields.ranges()? }
            }
            FLUSHED => Self::Flushed { question: number, done: fields.flag()? },
            RECORDED => Self::Recorded { question: number, ranges: fields.ranges()? },
            BYE => Self::Bye,
            _ => return None,
        };
        fields.0.is_empty().then_some(message)
    }
}

impl<'a> ToServer<'a> {
    /// The bytes to send.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Welcome => message(WELCOME, VERSION.into(), &[]),
            Self::Data { offset, bytes } => message(DATA, *offset, bytes),
            Self::Zeros(range) => message(ZEROS, range.start, &range.end.to_le_bytes()),
            Self::Failed { range, reason } => {
                let mut body = range.end.to_le_bytes().to_vec();
                body.extend_from_slice(reason.as_bytes());
                message(FAILED, range.start, &body)
            }
            Self::AskAbsent { question, range } => {
                let mut body = range.start.to_le_bytes().to_vec();
                body.extend_from_slice(&range.end.to_le_bytes());
                message(ASK_ABSENT, *question, &body)
            }
            Self::Flush { question } => message(FLUSH, *question, &[]),
            Self::StopRecording { question } => message(STOP_RECORDING, *question, &[]),
        }
    }

    /// Reads a message.
    pub fn decode(header: Header, body: &'a [u8]) -> Result<Self, WireError> {
        if header.kind == WELCOME && header.number != u64::from(VERSION) {
            let found = u32::try_from(header.number).unwrap_or(u32::MAX);
            return Err(WireError::Version { found });
        }
        Self::read(header, body).ok_or_else(|| header.malformed())
    }

    fn read(header: Header, body: &'a [u8]) -> Option<Self> {
        let number = header.number;
        let mut fields = Fields(body);
        let message = match header.kind {
            WELCOME => Self::Welcome,
            DATA => {
                number.checked_add(body.len() as u64)?;
                fields = Fields(&[]);
                Self::Data { offset: number, bytes: body }
            }
            ZEROS => Self::Zeros(fields.range_from(number)?),
            FAILED => {
                let range = fields.range_from(number)?;
                let reason = fields.0.get(..fields.0.len().min(MAX_REASON))?;
                fields = Fields(&[]);
                // What is no text is longer as text.
                let mut reason = String::from_utf8_lossy(reason).into_owned();
                reason.truncate(reason.floor_char_boundary(MAX_REASON));
                Self::Failed { range, reason }
            }
            ASK_ABSENT => {
                let start = fields.u64()?;
                Self::AskAbsent { question: number, range: fields.range_from(start)? }
            }
            FLUSH => Self::Flush { question: number },
            STOP_RECORDING => Self::StopRecording { question: number },
            _ => return None,
        };
        fields.0.is_empty().then_some(message)
    }
}

fn put_ranges(body: &mut Vec<u8>, ranges: &[Range<u64>]) {
    // What does not fit is found by the next question.
    for range in ranges.iter().take(MAX_RANGES - 1) {
        body.extend_from_slice(&range.start.to_le_bytes());
        body.extend_from_slice(&range.end.to_le_bytes());
    }
}

struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*first)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn flag(&mut self) -> Option<bool> {
        match self.u32()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }

    /// A range that is not empty, whose start is known.
    fn range_from(&mut self, start: u64) -> Option<Range<u64>> {
        let end = self.u64()?;
        (start < end).then_some(start..end)
    }

    fn ranges(&mut self) -> Option<Vec<Range<u64>>> {
        let mut ranges = Vec::with_capacity(self.0.len() / 16);
        while !self.0.is_empty() {
            let start = self.u64()?;
            ranges.push(self.range_from(start)?);
        }
        Some(ranges)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_range() -> impl Strategy<Value = Range<u64>> {
        (any::<u32>(), 1..u32::MAX)
            .prop_map(|(start, len)| u64::from(start)..u64::from(start) + u64::from(len))
    }

    fn any_to_agent() -> impl Strategy<Value = ToAgent> {
        let ranges = || prop::collection::vec(any_range(), 0..20);
        let hello = (any::<[u8; 16]>(), any::<u64>(), any::<u32>(), any::<u32>(), any::<bool>());
        prop_oneof![
            hello.prop_map(|(id, len_bytes, minor, max_write, resend)| {
                let volume = VolumeIdentity { id: SnapshotId::from_bytes(id), len_bytes };
                ToAgent::Hello(Hello {
                    volume,
                    negotiated: Negotiated { minor, max_write, resend },
                })
            }),
            (any_range(), any::<bool>())
                .prop_map(|(range, urgent)| ToAgent::Want { range, urgent }),
            (any::<u64>(), any::<u64>(), ranges())
                .prop_map(|(question, end, ranges)| ToAgent::Absent { question, end, ranges }),
            (any::<u64>(), ranges())
                .prop_map(|(question, ranges)| ToAgent::Recorded { question, ranges }),
            (any::<u64>(), any::<bool>())
                .prop_map(|(question, done)| ToAgent::Flushed { question, done }),
            Just(ToAgent::Bye),
        ]
    }

    fn split(bytes: &[u8]) -> (Header, &[u8]) {
        let (header, body) = bytes.split_first_chunk().unwrap();
        let header = Header::parse(header).unwrap();
        assert_eq!(header.body_bytes, body.len());
        (header, body)
    }

    #[test]
    fn reasons_are_text_of_bounded_length() {
        let body = [4096_u64.to_le_bytes().as_slice(), &[0xff; 2000]].concat();
        let header = Header { kind: FAILED, body_bytes: body.len(), number: 0 };
        let message = ToServer::decode(header, &body).unwrap();
        let ToServer::Failed { reason, .. } = &message else { panic!("{message:?}") };
        assert!(reason.len() <= MAX_REASON && reason.len() > MAX_REASON - 4, "{}", reason.len());
        let again = message.encode();
        let (header, body) = again.split_first_chunk().unwrap();
        assert_eq!(ToServer::decode(Header::parse(header).unwrap(), body), Ok(message));
    }

    proptest! {
        #[test]
        fn to_the_agent_and_back(message in any_to_agent()) {
            let bytes = message.encode();
            let (header, body) = split(&bytes);
            prop_assert_eq!(ToAgent::decode(header, body), Ok(message));
        }

        #[test]
        fn to_the_server_and_back(
            range in any_range(), question: u64, offset: u32, bytes: Vec<u8>, reason in ".{0,50}"
        ) {
            let data = ToServer::Data { offset: offset.into(), bytes: &bytes };
            let header = data_header(offset.into(), bytes.len());
            prop_assert!(data.encode().starts_with(&header));
            for message in [
                ToServer::Welcome,
                data,
                ToServer::Zeros(range.clone()),
                ToServer::Failed { range: range.clone(), reason },
                ToServer::AskAbsent { question, range },
                ToServer::Flush { question },
                ToServer::StopRecording { question },
            ] {
                let bytes = message.encode();
                let (header, body) = split(&bytes);
                prop_assert_eq!(ToServer::decode(header, body), Ok(message));
            }
        }

        #[test]
        fn garbage_is_refused_without_a_panic(
            head: [u8; HEADER_BYTES], kind in 0_u8..80, number: u64, body: Vec<u8>
        ) {
            let _ = Header::parse(&head);
            let header = Header { kind, body_bytes: body.len(), number };
            let _ = ToAgent::decode(header, &body);
            let _ = ToServer::decode(header, &body);
        }
    }

    #[test]
    fn another_version_is_named() {
        let header = Header { kind: HELLO, body_bytes: 0, number: 2 };
        assert_eq!(ToAgent::decode(header, &[]), Err(WireError::Version { found: 2 }));
        let header = Header { kind: WELCOME, body_bytes: 0, number: 9 };
        assert_eq!(ToServer::decode(header, &[]), Err(WireError::Version { found: 9 }));
    }
}
