//! A store in an S3 bucket: the object `KEY` is `PREFIX/KEY`.
//!
//! Needs a server with strongly consistent reads and listings, and `If-None-Match: *` on PUT. Objects go up in one
//! request each, so there are no parts to clean up after a crash.

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::operation::list_objects_v2::ListObjectsV2Output;
use aws_sdk_s3::operation::put_object::builders::PutObjectFluentBuilder;
use aws_sdk_s3::primitives::{ByteStream, DateTime};
use aws_sdk_s3::types::{BucketLocationConstraint, CreateBucketConfiguration};
use bytes::Bytes;

use self::failure::Failure;
use super::{Creation, Entry, MAX_OBJECT_BYTES, Page, Store, StoreError, StoreErrorCause};
use crate::error::{Error, Result};
use crate::key::Key;
use crate::url::{RepositoryUrl, S3Location};

mod connection;
mod failure;

pub use self::connection::S3Options;
use self::connection::USUAL_REGION;

/// Keys per listing request: the most that S3 gives.
const PAGE: i32 = 1000;
/// The slowest link that uploads are expected to cross.
const SLOWEST_BYTES_PER_SECOND: u64 = 256 << 10;

/// A bucket, or a prefix in one.
#[derive(Clone)]
pub struct S3Store {
    client: Client,
    location: S3Location,
    options: S3Options,
}

impl S3Store {
    /// Connects with the credentials of the AWS default chain: environment, profile, container, instance. Makes no
    /// request to the bucket.
    pub async fn connect(location: &S3Location) -> Result<Self, Error> {
        Self::connect_with(location, S3Options::default()).await
    }

    /// Connects with given credentials or limits.
    pub async fn connect_with(location: &S3Location, options: S3Options) -> Result<Self, Error> {
        let client = connection::client(location, &options).await?;
        Ok(Self { client, location: location.clone(), options })
    }

    /// Makes the bucket, or finds that there is one of this name which is ours. Prefixes need no making.
    pub async fn create_bucket(&self) -> Result<(), StoreError> {
        let region = self.client.config().region().map_or(USUAL_REGION, |region| region.as_ref());
        // AWS wants every region but this one to be spelled out.
        let place = (region != USUAL_REGION).then(|| {
            let constraint = BucketLocationConstraint::from(region);
            CreateBucketConfiguration::builder().location_constraint(constraint).build()
        });
        let request = self.client.create_bucket().bucket(&self.location.bucket);
        match request.set_create_bucket_configuration(place).send().await {
            Err(error) if failure::code(&error) == Some("BucketAlreadyOwnedByYou") => Ok(()),
            done => {
                done.map(drop).map_err(|error| self.error("create", "bucket", failure::of(&error)))
            }
        }
    }

    fn object(&self, key: &str) -> String {
        match self.location.prefix.as_str() {
            "" => key.to_owned(),
            prefix => format!("{prefix}/{key}"),
        }
    }

    fn error(&self, operation: &'static str, key: &str, failure: Failure) -> StoreError {
        let Failure { cause, detail } = failure;
        StoreError { operation, key: key.to_owned(), location: self.location(), cause, detail }
    }

    fn upload(&self, key: &Key, body: &Bytes) -> PutObjectFluentBuilder {
        self.client
            .put_object()
            .bucket(&self.location.bucket)
            .key(self.object(key.as_str()))
            .content_length(i64::try_from(body.len()).unwrap_or(i64::MAX))
            .body(ByteStream::from(body.clone()))
    }

    /// Time for one attempt of an upload: the wait for the answer begins with the first byte sent.
    fn upload_timeout(&self, body: &Bytes) -> aws_sdk_s3::config::Builder {
        let sending = Duration::from_secs(body.len() as u64 / SLOWEST_BYTES_PER_SECOND);
        let timeouts = connection::timeouts(self.options.response_timeout + sending);
        aws_sdk_s3::Config::builder().timeout_config(timeouts)
    }

    /// Reads an object or a part of it. The SDK repeats a request that failed, but not one whose answer broke off.
    async fn fetch(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        let mut attempt = 1;
        loop {
            let request = self
                .client
                .get_object()
                .bucket(&self.location.bucket)
                .key(self.object(key.as_str()));
            let answer = request.set_range(range.as_ref().map(range_header)).send().await;
            let failed = match answer {
                Ok(output) => match receive(output, range.as_ref()).await {
                    Ok(body) => return Ok(body),
                    Err(failure) => failure,
                },
                // The object ends before the range begins.
                Err(error) if range.is_some() && failure::status(&error) == Some(416) => {
                    return Ok(Bytes::new());
                }
                Err(error) => return Err(self.error("read", key.as_str(), failure::of(&error))),
            };
            if failed.cause != StoreErrorCause::Unavailable || attempt >= self.options.attempts {
                return Err(self.error("read", key.as_str(), failed));
            }
            back_off(attempt).await;
            attempt += 1;
        }
    }
}

/// Waits before attempt `attempt + 1`.
async fn back_off(attempt: u32) {
    tokio::time::sleep(Duration::from_millis(50) * 2_u32.saturating_pow(attempt.min(7))).await;
}

fn range_header(range: &Range<u64>) -> String {
    // Servers read the numbers as signed ones, and none has objects of that size.
    match range.end.checked_sub(1).filter(|last| i64::try_from(*last).is_ok()) {
        Some(last) => format!("bytes={}-{last}", range.start),
        None => format!("bytes={}-", range.start),
    }
}

async fn receive(output: GetObjectOutput, range: Option<&Range<u64>>) -> Result<Bytes, Failure> {
    let wrong = |detail: String| Failure { cause: StoreErrorCause::Other, detail };
    let longest = range.map_or(MAX_OBJECT_BYTES, |range| range.end - range.start);
    let announced = output.content_length.and_then(|len| u64::try_from(len).ok());
    if let Some(range) = range {
        let start = match &output.content_range {
            Some(content) => parse_content_range(content),
            // The whole object came, which is right only when it begins and ends where the range does.
            None => Some(0),
        };
        if start != Some(range.start) || announced.is_some_and(|announced| announced > longest) {
            let got = output.content_range.as_deref().unwrap_or("the whole object");
            let (start, end) = (range.start, range.end);
            return Err(wrong(format!("asked for bytes {start} to {end}, the server sent {got}")));
        }
    }
    if let Some(announced) = announced.filter(|announced| *announced > longest) {
        return Err(wrong(format!(
            "{announced} bytes are more than any object of a repository has"
        )));
    }
    let capacity = announced.unwrap_or_default();
    let mut body = Vec::with_capacity(usize::try_from(capacity).unwrap_or_default());
    let mut stream = output.body;
    while let Some(part) = stream.next().await {
        match part {
            Ok(part) => body.extend_from_slice(&part),
            Err(error) => {
                let detail = format!("the answer broke off: {}", failure::words(&error));
                return Err(Failure { cause: StoreErrorCause::Unavailable, detail });
            }
        }
        if body.len() as u64 > longest {
            return Err(wrong(format!("more than {longest} bytes came")));
        }
    }
    match announced {
        Some(announced) if announced != body.len() as u64 => Err(Failure {
            cause: StoreErrorCause::Unavailable,
            detail: format!("the answer broke off after {} of {announced} bytes", body.len()),
        }),
        _ => Ok(body.into()),
    }
}

/// The first byte of `bytes FIRST-LAST/LEN`.
fn parse_content_range(header: &str) -> Option<u64> {
    header.strip_prefix("bytes ")?.split_once('-')?.0.trim().parse().ok()
}

#[async_trait]
impl Store for S3Store {
    fn location(&self) -> String {
        RepositoryUrl::S3(self.location.clone()).to_string()
    }

    async fn get(&self, key: &Key) -> Result<Bytes, StoreError> {
        self.fetch(key, None).await
    }

    async fn get_range(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        // HTTP has no empty ranges, and servers read numbers as signed ones. Nothing is to be had there, but whether
        // the object exists should be said all the same.
        if range.is_empty() || i64::try_from(range.start).is_err() {
            return self.fetch(key, Some(0..1)).await.map(|_| Bytes::new());
        }
        self.fetch(key, Some(range)).await
    }

    async fn put(&self, key: &Key, body: Bytes) -> Result<(), StoreError> {
        let request =
            self.upload(key, &body).customize().config_override(self.upload_timeout(&body));
        request
            .send()
            .await
            .map(drop)
            .map_err(|error| self.error("write", key.as_str(), failure::of(&error)))
    }

    async fn create(&self, key: &Key, body: Bytes) -> Result<Creation, StoreError> {
        let mut attempt = 1;
        loop {
            let request = self.upload(key, &body).if_none_match("*").customize();
            match request.config_override(self.upload_timeout(&body)).send().await {
                Ok(_) => return Ok(Creation::Created),
                Err(error) if failure::status(&error) == Some(412) => return Ok(Creation::Exists),
                // Several creates at once: the server decided none of them, or not this one.
                Err(error) if failure::is_conflict(&error) && attempt < self.options.attempts => {}
                Err(error) => return Err(self.error("create", key.as_str(), failure::of(&error))),
            }
            back_off(attempt).await;
            attempt += 1;
        }
    }

    async fn list(&self, prefix: &str, after: Option<&str>) -> Result<Page, StoreError> {
        let mut after = after.map(|after| self.object(after));
        loop {
            let request =
                self.client.list_objects_v2().bucket(&self.location.bucket).max_keys(PAGE);
            let request = request.prefix(self.object(prefix)).set_start_after(after);
            let page = request
                .send()
                .await
                .map_err(|error| self.error("list", prefix, failure::of(&error)))?;
            let more = page.is_truncated.unwrap_or_default();
            after = page.contents().last().and_then(|object| object.key.clone());
            let entries = self.entries(&page);
            // A page may hold nothing but what other programs use as folders.
            if !entries.is_empty() || !more || after.is_none() {
                return Ok(Page { entries, more });
            }
        }
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        let request = self.client.delete_object().bucket(&self.location.bucket);
        match request.key(self.object(key.as_str())).send().await {
            Ok(_) => Ok(()),
            Err(error) => match failure::of(&error) {
                // AWS answers 204, others this.
                Failure { cause: StoreErrorCause::NotFound, .. } => Ok(()),
                failure => Err(self.error("delete", key.as_str(), failure)),
            },
        }
    }
}

impl S3Store {
    fn entries(&self, page: &ListObjectsV2Output) -> Vec<Entry> {
        let base = self.object("");
        let entry = |object: &aws_sdk_s3::types::Object| {
            let key = object.key()?.strip_prefix(&base)?;
            // No object of ours is named so; consoles make such as folders.
            if key.is_empty() || key.ends_with('/') {
                return None;
            }
            let modified =
                object.last_modified.as_ref().and_then(|time: &DateTime| time.to_millis().ok());
            Some(Entry {
                key: key.to_owned(),
                len: object.size.and_then(|size| u64::try_from(size).ok()).unwrap_or_default(),
                modified_unix_ms: modified
                    .and_then(|ms| u64::try_from(ms).ok())
                    .unwrap_or_default(),
            })
        };
        page.contents().iter().filter_map(entry).collect()
    }
}

impl fmt::Debug for S3Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Store").field("location", &self.location).finish_non_exhaustive()
    }
}
