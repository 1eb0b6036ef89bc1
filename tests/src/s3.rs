//! S3 servers for tests, on free ports of this machine, gone with the test.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use petra_engine::store::{S3Credentials, S3Options};
use petra_engine::url::{RepositoryUrl, S3Location};
use rustix::fs::XattrFlags;
use s3s::auth::SimpleAuth;
use s3s::dto::{
    CreateBucketInput, CreateBucketOutput, DeleteObjectInput, DeleteObjectOutput, GetObjectInput,
    GetObjectOutput, ListObjectsV2Input, ListObjectsV2Output, PutObjectInput, PutObjectOutput,
};
use s3s::service::S3ServiceBuilder;
use s3s::{S3, S3Request, S3Response, S3Result};
use s3s_fs::FileSystem;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::require;

const BUCKET: &str = "petra-test";
const ACCESS_KEY_ID: &str = "petra-test-key";
const SECRET_ACCESS_KEY: &str = "petra-test-secret";
/// How long a server may take to start, on a busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// How to reach a server's bucket.
#[derive(Clone, Debug)]
pub struct Access {
    /// The server's URL.
    pub endpoint: String,
    /// A bucket that is there.
    pub bucket: String,
    /// A key that may do everything.
    pub credentials: S3Credentials,
}

impl Access {
    /// To a server at an address of this machine.
    pub fn to(address: SocketAddr) -> Self {
        let credentials = S3Credentials {
            access_key_id: ACCESS_KEY_ID.to_owned(),
            secret_access_key: SECRET_ACCESS_KEY.to_owned(),
            session_token: None,
        };
        Self { endpoint: format!("http://{address}"), bucket: BUCKET.to_owned(), credentials }
    }

    /// A prefix of the bucket; all of it for an empty one.
    pub fn location(&self, prefix: &str) -> S3Location {
        S3Location {
            bucket: self.bucket.clone(),
            prefix: prefix.to_owned(),
            endpoint: Some(self.endpoint.clone()),
            ..S3Location::default()
        }
    }

    /// The URL of a repository at a prefix of the bucket.
    pub fn url(&self, prefix: &str) -> RepositoryUrl {
        RepositoryUrl::S3(self.location(prefix))
    }

    /// What the URL does not say.
    pub fn options(&self) -> S3Options {
        S3Options { credentials: Some(self.credentials.clone()), ..S3Options::default() }
    }

    /// The same for another process, through its environment.
    pub fn environment(&self) -> [(&'static str, String); 3] {
        [
            ("AWS_ACCESS_KEY_ID", self.credentials.access_key_id.clone()),
            ("AWS_SECRET_ACCESS_KEY", self.credentials.secret_access_key.clone()),
            ("AWS_EC2_METADATA_DISABLED", "true".to_owned()),
        ]
    }
}

/// What a server makes of `If-None-Match`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Creates {
    /// One of several creates wins.
    Exclusive,
    /// Each looks first and writes then, so that several win when they race: as the server comes.
    Racing,
    /// The condition is ignored.
    Unconditional,
    /// The condition is not known.
    Refused,
}

/// A server inside the test's process, always there.
#[derive(Debug)]
pub struct InProcessS3 {
    access: Access,
    runtime: Option<Runtime>,
    dir: Arc<TempDir>,
}

impl InProcessS3 {
    /// Starts a server with an empty bucket.
    pub fn start() -> Self {
        Self::start_with(Creates::Exclusive)
    }

    /// The same with creates of this kind.
    pub fn start_with(creates: Creates) -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        std::fs::create_dir(dir.path().join(BUCKET)).expect("bucket");
        Self::serve(Arc::new(dir), creates)
    }

    /// Another endpoint for the same objects.
    pub fn endpoint(&self, creates: Creates) -> Self {
        Self::serve(Arc::clone(&self.dir), creates)
    }

    fn serve(dir: Arc<TempDir>, creates: Creates) -> Self {
        let files = FileSystem::new(dir.path()).expect("file system");
        let server = Server { files, creates, turn: tokio::sync::Mutex::default() };
        let mut service = S3ServiceBuilder::new(server);
        service.set_auth(SimpleAuth::from_single(ACCESS_KEY_ID, SECRET_ACCESS_KEY));
        let service = service.build();
        // A runtime of its own, so that it serves synchronous tests and other processes too.
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("runtime");
        let listener = TcpListener::bind("127.0.0.1:0").expect("free port");
        listener.set_nonblocking(true).expect("non-blocking socket");
        let access = Access::to(listener.local_addr().expect("address"));
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("listener");
            while let Ok((connection, _)) = listener.accept().await {
                let service = service.clone();
                tokio::spawn(async move {
                    let server = Builder::new(TokioExecutor::new());
                    // A client may hang up at any time.
                    let _ = server.serve_connection(TokioIo::new(connection), service).await;
                });
            }
        });
        Self { access, runtime: Some(runtime), dir }
    }

    /// How to reach it.
    pub fn access(&self) -> &Access {
        &self.access
    }

    /// Where the bucket's objects are, as files.
    pub fn directory(&self) -> PathBuf {
        self.dir.path().join(BUCKET)
    }
}

/// The operations that Petra uses, on files.
struct Server {
    files: FileSystem,
    creates: Creates,
    /// Creates take turns, where they are exclusive.
    turn: tokio::sync::Mutex<()>,
}

type Answer<T> = S3Result<S3Response<T>>;

#[async_trait]
impl S3 for Server {
    async fn create_bucket(&self, ask: S3Request<CreateBucketInput>) -> Answer<CreateBucketOutput> {
        self.files.create_bucket(ask).await
    }

    async fn get_object(&self, ask: S3Request<GetObjectInput>) -> Answer<GetObjectOutput> {
        self.files.get_object(ask).await
    }

    async fn put_object(&self, mut ask: S3Request<PutObjectInput>) -> Answer<PutObjectOutput> {
        let is_create = ask.input.if_none_match.is_some();
        let _turn = match self.creates {
            Creates::Exclusive if is_create => Some(self.turn.lock().await),
            Creates::Refused if is_create => {
                return Err(s3s::s3_error!(NotImplemented, "no conditions here"));
            }
            Creates::Unconditional => {
                ask.input.if_none_match = None;
                None
            }
            Creates::Exclusive | Creates::Racing | Creates::Refused => None,
        };
        self.files.put_object(ask).await
    }

    async fn list_objects_v2(
        &self,
        ask: S3Request<ListObjectsV2Input>,
    ) -> Answer<ListObjectsV2Output> {
        self.files.list_objects_v2(ask).await
    }

    async fn delete_object(&self, ask: S3Request<DeleteObjectInput>) -> Answer<DeleteObjectOutput> {
        self.files.delete_object(ask).await
    }
}

impl Drop for InProcessS3 {
    fn drop(&mut self) {
        // Waiting for it is not allowed in asynchronous tests, and not needed.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A versitygw process, killed when dropped: a server of its own, with exclusive creates.
#[derive(Debug)]
pub struct VersityGw {
    access: Access,
    process: Child,
    _dir: TempDir,
}

impl VersityGw {
    /// Starts a server with an empty bucket; `None` where it is not installed.
    pub fn start() -> Option<Self> {
        let program = require::tool("versitygw")?;
        let dir = tempfile::tempdir().expect("temporary directory");
        let (data, sidecar) = (dir.path().join("data"), dir.path().join("sidecar"));
        std::fs::create_dir_all(data.join(BUCKET)).expect("bucket");
        std::fs::create_dir(&sidecar).expect("directory");
        // Another process may take a port between its being found free and its use.
        for _ in 0..5 {
            let address = free_address();
            let access = Access::to(address);
            let mut command = Command::new(&program);
            command
                .env("ROOT_ACCESS_KEY_ID", ACCESS_KEY_ID)
                .env("ROOT_SECRET_ACCESS_KEY", SECRET_ACCESS_KEY);
            command.args([
                "--quiet",
                "--health",
                "/health",
                "--port",
                &address.to_string(),
                "posix",
            ]);
            if !has_user_attributes(&data) {
                command.arg("--sidecar").arg(&sidecar);
            }
            command.arg(&data).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            let mut process = command.spawn().expect("versitygw");
            if answers(address, &mut process) {
                return Some(Self { access, process, _dir: dir });
            }
            // It may have ended by itself.
            let _ = process.kill();
            let _ = process.wait();
        }
        panic!("versitygw did not start");
    }

    /// How to reach it.
    pub fn access(&self) -> &Access {
        &self.access
    }
}

impl Drop for VersityGw {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// An address of this machine where nothing listens now.
pub fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("free port");
    listener.local_addr().expect("address")
}

fn answers(address: SocketAddr, process: &mut Child) -> bool {
    let start = Instant::now();
    while start.elapsed() < START_TIMEOUT && process.try_wait().is_ok_and(|ended| ended.is_none()) {
        if is_healthy(address).unwrap_or(false) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    false
}

fn is_healthy(address: SocketAddr) -> std::io::Result<bool> {
    let mut connection = TcpStream::connect(address)?;
    connection.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(connection, "GET /health HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = [0; 12];
    connection.read_exact(&mut answer)?;
    Ok(&answer == b"HTTP/1.1 200")
}

/// Whether a filesystem keeps the extended attributes that versitygw stores its metadata in.
fn has_user_attributes(dir: &Path) -> bool {
    rustix::fs::setxattr(dir, "user.petra-test", b"1", XattrFlags::empty()).is_ok()
        && rustix::fs::removexattr(dir, "user.petra-test").is_ok()
}
