//! An agent on another node.

use std::error::Error;
use std::fmt;
use std::future::Future;
use std::time::Duration;

use async_trait::async_trait;
use hyper_util::rt::TokioIo;
use petra_engine::SnapshotId;
use tokio::time::{sleep, timeout};
use tonic::codegen::http::Uri;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};

use super::tls::{Tls, TlsError};
use super::{
    AnnotateVolumeRequest, CreateVolumeRequest, ExpandVolumeRequest, MAX_ANSWER_BYTES,
    MAX_REQUEST_BYTES, NodeAgent, NodeInfo, TakeSnapshotRequest, Upload, Volume,
};
use crate::proto::agent::node_agent_client::NodeAgentClient;
use crate::proto::agent::{
    DeleteVolumeRequest, DiscardUploadRequest, GetInfoRequest, GetVolumeRequest,
    ListRepositoriesRequest, ListUploadsRequest, ListVolumesRequest, NoteRepositoryRequest,
};
use crate::repositories::Secrets;
use crate::telemetry;

/// The metadata by which a call says which pool it is for.
pub const POOL: &str = "petra-pool";
/// The metadata by which a call says on behalf of which call of a controller it is made.
pub const REQUEST: &str = "petra-request";

/// For what is answered from what a node has at hand.
const SHORT: Duration = Duration::from_secs(30);
/// For what makes file systems or talks to a repository. Callers give up earlier, and come again.
const LONG: Duration = Duration::from_secs(300);
/// How often a call is begun again that did not get as far as the node.
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_millis(250);
/// How often a node is asked whether it still lives, and how long it may take to answer: a call to one that is gone
/// fails after both.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
const ALIVE_WITHIN: Duration = Duration::from_secs(5);

/// An agent on another node, which is connected to when it is called.
#[derive(Clone)]
pub struct RemoteAgent {
    address: Address,
    pool: Option<MetadataValue<Ascii>>,
    client: NodeAgentClient<Channel>,
}

/// Where an agent listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// A name or number.
    pub host: String,
    /// The port.
    pub port: u16,
}

/// No address of an agent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not https://HOST:PORT")]
pub struct AddressError(String);

impl Address {
    /// Understands `https://HOST:PORT`.
    pub fn parse(url: &str) -> Result<Self, AddressError> {
        let wrong = || AddressError(url.to_owned());
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        let authority = uri.authority().ok_or_else(wrong)?;
        let nothing_else = matches!(uri.path(), "" | "/") && uri.query().is_none();
        if uri.scheme_str() != Some("https") || !nothing_else || url.contains('@') {
            return Err(wrong());
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() {
            return Err(wrong());
        }
        Ok(Self { host: host.to_owned(), port: authority.port_u16().ok_or_else(wrong)? })
    }

    /// True for what needs no looking up.
    pub fn is_number(&self) -> bool {
        self.host.parse::<std::net::IpAddr>().is_ok()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Debug for RemoteAgent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RemoteAgent({})", self.address)
    }
}

/// A connection that could not be made: nothing was sent.
#[derive(Debug, thiserror::Error)]
#[error("the node at {address} can't be reached")]
struct NotSent {
    address: Address,
    #[source]
    cause: TlsError,
}

impl RemoteAgent {
    /// The agent at `https://HOST:PORT`.
    pub fn new(url: &str, tls: Tls) -> Result<Self, AddressError> {
        Ok(Self::at(Address::parse(url)?, tls))
    }

    /// The agent at an address.
    pub fn at(address: Address, tls: Tls) -> Self {
        let to = address.clone();
        let connect = tower::service_fn(move |_: Uri| {
            let (tls, address) = (tls.clone(), to.clone());
            async move {
                match tls.connect(&address.host, address.port).await {
                    Ok(stream) => Ok(TokioIo::new(stream)),
                    Err(cause) => Err(NotSent { address, cause }),
                }
            }
        });
        // TLS is the connector's, so the scheme is that of what it carries.
        let channel = Endpoint::from_static("http://node.petra.internal")
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(ALIVE_WITHIN)
            .keep_alive_while_idle(true)
            .connect_with_connector_lazy(connect);
        let client = NodeAgentClient::new(channel)
            .max_decoding_message_size(MAX_ANSWER_BYTES)
            .max_encoding_message_size(MAX_REQUEST_BYTES);
        Self { address, pool: None, client }
    }

    /// The same agent, if it has this pool: calls fail with `UNAVAILABLE` where another node has taken over the address.
    pub fn of_pool(&self, pool: SnapshotId) -> Self {
        Self { pool: pool.to_string().parse().ok(), ..self.clone() }
    }

    /// Where it is.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Makes a call, and makes it again while nothing of it was sent.
    async fn call<T, R, F>(
        &self,
        limit: Duration,
        message: T,
        send: impl Fn(NodeAgentClient<Channel>, Request<T>) -> F,
    ) -> Result<R, Status>
    where
        T: Clone,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let attempts = async {
            let mut attempt = 1;
            loop {
                let mut request = Request::new(message.clone());
                if let Some(pool) = &self.pool {
                    request.metadata_mut().insert(POOL, pool.clone());
                }
                if let Some(id) = telemetry::current_request()
                    && let Ok(id) = id.parse()
                {
                    request.metadata_mut().insert(REQUEST, id);
                }
                match send(self.client.clone(), request).await {
                    Ok(response) => return Ok(response.into_inner()),
                    Err(status) if attempt < ATTEMPTS && not_sent(&status).is_some() => {
                        attempt += 1;
                        sleep(PAUSE).await;
                    }
                    Err(status) => return Err(self.explain(status)),
                }
            }
        };
        timeout(limit, attempts).await.unwrap_or_else(|_| {
            let seconds = limit.as_secs();
            let text = format!("the node at {} did not answer for {seconds} s", self.address);
            Err(Status::deadline_exceeded(text))
        })
    }

    /// Says what failed between here and there, and leaves what the node said as it is.
    fn explain(&self, status: Status) -> Status {
        if let Some(not_sent) = not_sent(&status) {
            let mut text = not_sent.to_string();
            let mut cause: Option<&dyn Error> = Some(&not_sent.cause);
            while let Some(error) = cause {
                text = format!("{text}: {error}");
                cause = error.source();
            }
            return Status::unavailable(text);
        }
        let broken = status.source().is_some()
            && matches!(status.code(), Code::Unknown | Code::Internal | Code::Cancelled);
        if broken {
            let text = format!("the connection to the node at {} broke", self.address);
            return Status::unavailable(format!("{text}: {}", status.message()));
        }
        status
    }
}

fn not_sent(status: &Status) -> Option<&NotSent> {
    let mut cause = status.source();
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        cause = error.source();
    }
    None
}

#[async_trait]
impl NodeAgent for RemoteAgent {
    async fn info(&self) -> Result<NodeInfo, Status> {
        self.call(SHORT, GetInfoRequest {}, |mut client, request| async move {
            client.get_info(request).await
        })
        .await
    }

    async fn create_volume(&self, request: CreateVolumeRequest) -> Result<Volume, Status> {
        self.call(LONG, request, |mut client, request| async move {
            client.create_volume(request).await
        })
        .await
    }

    async fn delete_volume(&self, name: &str, secrets: &Secrets) -> Result<(), Status> {
        let request = DeleteVolumeRequest { name: name.to_owned(), secrets: secrets.clone() };
        self.call(LONG, request, |mut client, request| async move {
            client.delete_volume(request).await
        })
        .await
        .map(|_| ())
    }

    async fn volume(&self, name: &str) -> Result<Volume, Status> {
        let request = GetVolumeRequest { name: name.to_owned() };
        self.call(
            SHORT,
            request,
            |mut client, request| async move { client.get_volume(request).await },
        )
        .await
    }

    async fn volumes(&self) -> Result<Vec<Volume>, Status> {
        self.call(SHORT, ListVolumesRequest {}, |mut client, request| async move {
            client.list_volumes(request).await
        })
        .await
        .map(|answer| answer.volumes)
    }

    async fn expand_volume(&self, request: ExpandVolumeRequest) -> Result<Volume, Status> {
        self.call(LONG, request, |mut client, request| async move {
            client.expand_volume(request).await
        })
        .await
    }

    async fn annotate_volume(&self, request: AnnotateVolumeRequest) -> Result<Volume, Status> {
        self.call(SHORT, request, |mut client, request| async move {
            client.annotate_volume(request).await
        })
        .await
    }

    async fn take_snapshot(&self, request: TakeSnapshotRequest) -> Result<Upload, Status> {
        self.call(LONG, request, |mut client, request| async move {
            client.take_snapshot(request).await
        })
        .await
    }

    async fn uploads(&self) -> Result<Vec<Upload>, Status> {
        self.call(SHORT, ListUploadsRequest {}, |mut client, request| async move {
            client.list_uploads(request).await
        })
        .await
        .map(|answer| answer.uploads)
    }

    async fn discard_upload(&self, id: &str) -> Result<(), Status> {
        let request = DiscardUploadRequest { id: id.to_owned() };
        self.call(LONG, request, |mut client, request| async move {
            client.discard_upload(request).await
        })
        .await
        .map(|_| ())
    }

    async fn repositories(&self) -> Result<Vec<String>, Status> {
        self.call(SHORT, ListRepositoriesRequest {}, |mut client, request| async move {
            client.list_repositories(request).await
        })
        .await
        .map(|answer| answer.urls)
    }

    async fn note_repository(&self, url: &str) -> Result<(), Status> {
        let request = NoteRepositoryRequest { url: url.to_owned() };
        self.call(SHORT, request, |mut client, request| async move {
            client.note_repository(request).await
        })
        .await
        .map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_https_with_a_port() {
        let address = Address::parse("https://petra-node.petra.svc:9810").unwrap();
        assert_eq!((address.host.as_str(), address.port), ("petra-node.petra.svc", 9810));
        assert_eq!(Address::parse("https://[::1]:9810/").unwrap().to_string(), "[::1]:9810");
        for wrong in [
            "",
            "http://h:1",
            "https://h",
            "h:1",
            "https://:1",
            "https://h:1/x",
            "https://u@h:1",
            "https://h:1?x",
        ] {
            assert_eq!(Address::parse(wrong), Err(AddressError(wrong.to_owned())));
        }
    }
}
