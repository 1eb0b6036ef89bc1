//! An agent for a controller elsewhere: any [`NodeAgent`], over gRPC with mutual TLS.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{OnceCell, Semaphore, mpsc};
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status, async_trait};

use super::remote::POOL;
use super::tls::{Tls, TlsError};
use super::{MAX_ANSWER_BYTES, MAX_REQUEST_BYTES, NodeAgent};
use crate::proto::agent::node_agent_server::{NodeAgent as Service, NodeAgentServer};
use crate::proto::agent::{
    AnnotateVolumeRequest, CreateVolumeRequest, DeleteVolumeRequest, DeleteVolumeResponse,
    DiscardUploadRequest, DiscardUploadResponse, ExpandVolumeRequest, GetInfoRequest,
    GetVolumeRequest, ListRepositoriesRequest, ListRepositoriesResponse, ListUploadsRequest,
    ListUploadsResponse, ListVolumesRequest, ListVolumesResponse, NodeInfo, NoteRepositoryRequest,
    NoteRepositoryResponse, TakeSnapshotRequest, Upload, Volume,
};
use crate::shutdown::{END_LIMIT, serve_until};
use crate::telemetry::Observe;

/// Handshakes at the same time. Who is not let in holds a place for a few seconds at most.
const MAX_HANDSHAKES: usize = 32;
/// Calls at the same time, on one connection.
const MAX_CALLS: u32 = 64;
/// A controller that does not answer for so long is gone.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// After a failure to accept: too many open files, for example.
const RETRY: Duration = Duration::from_millis(100);
/// Serves an agent until `shutdown`, and then ends the calls that are under way.
pub async fn serve(
    listener: TcpListener,
    tls: Tls,
    agent: Arc<dyn NodeAgent>,
    observe: Observe,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), tonic::transport::Error> {
    let (sender, connections) = mpsc::channel(1);
    let accepting = tokio::spawn(accept(listener, tls, sender));
    let service = NodeAgentServer::new(Served { agent, pool: OnceCell::new() })
        .max_decoding_message_size(MAX_REQUEST_BYTES)
        .max_encoding_message_size(MAX_ANSWER_BYTES);
    let server = Server::builder()
        .layer(observe)
        .max_concurrent_streams(MAX_CALLS)
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .add_service(service);
    let incoming = ReceiverStream::new(connections);
    let served =
        serve_until(shutdown, |end| server.serve_with_incoming_shutdown(incoming, end)).await;
    accepting.abort();
    served
}

type Connection = Result<tokio_rustls::server::TlsStream<tokio::net::TcpStream>, TlsError>;

/// Lets controllers in. Handshakes go on side by side: a slow one holds up nobody.
async fn accept(listener: TcpListener, tls: Tls, connections: mpsc::Sender<Connection>) {
    let places = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    while let Ok(place) = places.clone().acquire_owned().await {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "no connection could be accepted");
                sleep(RETRY).await;
                continue;
            }
        };
        let (tls, connections) = (tls.clone(), connections.clone());
        tokio::spawn(async move {
            let _place = place;
            match tls.accept(stream).await {
                // The server may have ended.
                Ok(stream) => drop(timeout(END_LIMIT, connections.send(Ok(stream))).await),
                Err(error) => {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::warn!(%from, %error, cause, "a client was refused");
                }
            }
        });
    }
}

/// The agent behind the wire.
#[derive(Debug)]
struct Served {
    agent: Arc<dyn NodeAgent>,
    pool: OnceCell<String>,
}

impl Served {
    /// The agent, if it has the pool that the call is for: addresses pass from one node to another.
    async fn agent<T>(&self, request: &Request<T>) -> Result<&dyn NodeAgent, Status> {
        if let Some(wanted) = request.metadata().get(POOL) {
            let pool = self
                .pool
                .get_or_try_init(|| async { Ok::<_, Status>(self.agent.info().await?.pool) })
                .await?;
            if wanted.as_bytes() != pool.as_bytes() {
                return Err(Status::unavailable(format!(
                    "another node has this address now: it has the pool {pool}"
                )));
            }
        }
        Ok(self.agent.as_ref())
    }
}

#[async_trait]
impl Service for Served {
    async fn get_info(
        &self,
        request: Request<GetInfoRequest>,
    ) -> Result<Response<NodeInfo>, Status> {
        Ok(Response::new(self.agent(&request).await?.info().await?))
    }

    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<Volume>, Status> {
        let agent = self.agent(&request).await?;
        Ok(Response::new(agent.create_volume(request.into_inner()).await?))
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        let agent = self.agent(&request).await?;
        let DeleteVolumeRequest { name, secrets } = request.get_ref();
        agent.delete_volume(name, secrets).await?;
        Ok(Response::new(DeleteVolumeResponse {}))
    }

    async fn get_volume(
        &self,
        request: Request<GetVolumeRequest>,
    ) -> Result<Response<Volume>, Status> {
        let agent = self.agent(&request).await?;
        Ok(Response::new(agent.volume(&request.get_ref().name).await?))
    }

    async fn list_volumes(
        &self,
        request: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesResponse>, Status> {
        let volumes = self.agent(&request).await?.volumes().await?;
        Ok(Response::new(ListVolumesResponse { volumes }))
    }

    async fn expand_volume(
        &self,
        request: Request<ExpandVolumeRequest>,
    ) -> Result<Response<Volume>, Status> {
        let agent = self.agent(&request).await?;
        Ok(Response::new(agent.expand_volume(request.into_inner()).await?))
    }

    async fn annotate_volume(
        &self,
        request: Request<AnnotateVolumeRequest>,
    ) -> Result<Response<Volume>, Status> {
        let agent = self.agent(&request).await?;
        Ok(Response::new(agent.annotate_volume(request.into_inner()).await?))
    }

    async fn take_snapshot(
        &self,
        request: Request<TakeSnapshotRequest>,
    ) -> Result<Response<Upload>, Status> {
        let agent = self.agent(&request).await?;
        Ok(Response::new(agent.take_snapshot(request.into_inner()).await?))
    }

    async fn list_uploads(
        &self,
        request: Request<ListUploadsRequest>,
    ) -> Result<Response<ListUploadsResponse>, Status> {
        let uploads = self.agent(&request).await?.uploads().await?;
        Ok(Response::new(ListUploadsResponse { uploads }))
    }

    async fn discard_upload(
        &self,
        request: Request<DiscardUploadRequest>,
    ) -> Result<Response<DiscardUploadResponse>, Status> {
        let agent = self.agent(&request).await?;
        agent.discard_upload(&request.get_ref().id).await?;
        Ok(Response::new(DiscardUploadResponse {}))
    }

    async fn list_repositories(
        &self,
        request: Request<ListRepositoriesRequest>,
    ) -> Result<Response<ListRepositoriesResponse>, Status> {
        let urls = self.agent(&request).await?.repositories().await?;
        Ok(Response::new(ListRepositoriesResponse { urls }))
    }

    async fn note_repository(
        &self,
        request: Request<NoteRepositoryRequest>,
    ) -> Result<Response<NoteRepositoryResponse>, Status> {
        let agent = self.agent(&request).await?;
        agent.note_repository(&request.get_ref().url).await?;
        Ok(Response::new(NoteRepositoryResponse {}))
    }
}
