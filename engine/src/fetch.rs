//! Few large reads instead of many small ones: pieces of packs that lie close together are fetched together.

use std::ops::Range;

use bytes::Bytes;

use crate::context::Context;
use crate::error::{Error, Result};
use crate::id::PackId;
use crate::key::Key;
use crate::progress::Event;
use crate::repository::Repository;

/// Bytes that nobody asked for are fetched along rather than starting another request: at 100 MB/s and 10 ms for
/// a request, 1 MiB costs as much.
const MAX_GAP: u64 = 512 << 10;
/// No request asks for more, so that memory stays bounded and several run side by side.
pub const MAX_REQUEST: u64 = 8 << 20;

/// A piece of a pack that is needed for something.
#[derive(Clone, Copy, Debug)]
pub struct Span<T> {
    /// The pack.
    pub pack: PackId,
    /// First byte.
    pub offset: u32,
    /// Bytes.
    pub len: u32,
    /// What for.
    pub tag: T,
}

/// Some spans of one pack to fetch with one request.
#[derive(Clone, Debug)]
pub struct Request<T> {
    /// The pack.
    pub pack: PackId,
    /// The bytes to ask for.
    pub range: Range<u64>,
    /// What lies within, in the order of the pack.
    pub spans: Vec<Span<T>>,
}

/// Groups spans into requests.
pub fn coalesce<T>(mut spans: Vec<Span<T>>) -> Vec<Request<T>> {
    spans.sort_by_key(|span| (span.pack, span.offset));
    let mut requests: Vec<Request<T>> = Vec::new();
    for span in spans {
        let (start, end) = (u64::from(span.offset), u64::from(span.offset) + u64::from(span.len));
        match requests.last_mut() {
            Some(last)
                if last.pack == span.pack
                    && start <= last.range.end + MAX_GAP
                    && end.max(last.range.end) - last.range.start <= MAX_REQUEST =>
            {
                last.range.end = last.range.end.max(end);
                last.spans.push(span);
            }
            _ => requests.push(Request { pack: span.pack, range: start..end, spans: vec![span] }),
        }
    }
    requests
}

impl<T> Request<T> {
    /// Fetches the bytes. A missing pack is damage; a short one shows in [`Fetched::span`].
    pub async fn fetch(&self, repo: &Repository, ctx: &Context) -> Result<Fetched> {
        ctx.check()?;
        let key = Key::pack(self.pack);
        match repo.store().get_range(&key, self.range.clone()).await {
            Ok(bytes) => {
                ctx.progress.event(Event::Fetched { bytes: bytes.len() as u64 });
                Ok(Fetched { key, start: self.range.start, bytes })
            }
            Err(error) if error.is_not_found() => Err(Error::Missing {
                object: key.to_string(),
                needed_by: "a committed snapshot".to_owned(),
            }),
            Err(error) => Err(error.into()),
        }
    }
}

/// The answer to a [`Request`].
#[derive(Debug)]
pub struct Fetched {
    key: Key,
    start: u64,
    bytes: Bytes,
}

impl Fetched {
    /// How many bytes came.
    pub fn len_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// The bytes of one span.
    pub fn span<T>(&self, span: &Span<T>) -> Result<&[u8]> {
        let at =
            u64::from(span.offset).checked_sub(self.start).and_then(|at| usize::try_from(at).ok());
        let bytes = at.and_then(|at| self.bytes.get(at..at.checked_add(span.len as usize)?));
        bytes.ok_or_else(|| Error::Damaged {
            object: self.key.to_string(),
            detail: format!("it ends before the {} bytes at offset {}", span.len, span.offset),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::id::SnapshotId;

    proptest! {
        #[test]
        fn covers_every_span_once(
            pieces in prop::collection::vec((0_u32..3, 0_u32..60 << 20, 0_u32..2 << 20), 0..100)
        ) {
            let session = SnapshotId::from_parts(1, 1);
            let spans: Vec<Span<usize>> = pieces.iter().enumerate().map(|(tag, (number, offset, len))| {
                Span { pack: PackId { session, number: *number }, offset: *offset, len: *len, tag }
            }).collect();
            let mut seen = vec![0; spans.len()];
            for request in coalesce(spans) {
                prop_assert!(request.range.end - request.range.start <= MAX_REQUEST);
                for span in &request.spans {
                    seen[span.tag] += 1;
                    prop_assert_eq!(span.pack, request.pack);
                    let start = u64::from(span.offset);
                    prop_assert!(request.range.start <= start);
                    prop_assert!(start + u64::from(span.len) <= request.range.end);
                }
            }
            prop_assert!(seen.iter().all(|count| *count == 1));
        }
    }
}
