//! The socket, and what operators see of the calls that come through it.

#![expect(clippy::unwrap_used, reason = "in tests a panic is the right way to fail")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use petra_csi::proto::csi::identity_client::IdentityClient;
use petra_csi::proto::csi::identity_server::{Identity, IdentityServer};
use petra_csi::proto::csi::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest,
    GetPluginInfoResponse, ProbeRequest, ProbeResponse,
};
use petra_csi::socket::{self, SocketError};
use petra_csi::telemetry::{Metrics, Observe, PoolReading, Readings, Source, current_request, web};
use petra_engine::SnapshotId;
use petra_engine::record::SnapshotStats;
use petra_volume::pool::Status as Room;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::service::Routes;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status, async_trait};

/// An identity service that says which call it serves, and takes its time when probed.
#[derive(Clone, Copy, Debug)]
struct Fake;

#[async_trait]
impl Identity for Fake {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        let name = current_request().unwrap_or_default();
        Ok(Response::new(GetPluginInfoResponse { name, ..GetPluginInfoResponse::default() }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        Err(Status::internal("broken"))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        tokio::time::sleep(Duration::from_millis(500)).await;
        Ok(Response::new(ProbeResponse::default()))
    }
}

struct Running {
    metrics: Arc<Metrics>,
    end: oneshot::Sender<()>,
    serving: JoinHandle<Result<(), SocketError>>,
}

async fn serve(endpoint: &str) -> Running {
    let metrics = Metrics::new();
    let (end, ended) = oneshot::channel::<()>();
    let (endpoint, observe) = (endpoint.to_owned(), Observe::new(metrics.clone()));
    let routes = Routes::new(IdentityServer::new(Fake));
    let serving = tokio::spawn(async move {
        socket::serve(&endpoint, routes, observe, async move { drop(ended.await) }).await
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    Running { metrics, end, serving }
}

async fn connect(path: &Path) -> Channel {
    Endpoint::from_shared(format!("unix://{}", path.display())).unwrap().connect().await.unwrap()
}

#[tokio::test]
async fn calls_are_numbered_counted_and_ended() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("csi.sock");
    // What a dead process left.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let running = serve(&format!("unix://{}", path.display())).await;
    let mut client = IdentityClient::new(connect(&path).await);
    for number in ["1", "2"] {
        let answer = client.get_plugin_info(GetPluginInfoRequest {}).await.unwrap();
        assert_eq!(answer.into_inner().name, number);
    }
    let broken = client.get_plugin_capabilities(GetPluginCapabilitiesRequest {}).await;
    assert_eq!(broken.unwrap_err().code(), Code::Internal);
    // A caller that does not wait.
    let probe = client.clone();
    tokio::time::timeout(Duration::from_millis(50), async {
        probe.clone().probe(ProbeRequest {}).await
    })
    .await
    .unwrap_err();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let text = running.metrics.text(&Readings::default()).unwrap();
    for line in [
        r#"petra_csi_operations_total{method="Identity/GetPluginInfo",code="Ok"} 2"#,
        r#"petra_csi_operations_total{method="Identity/GetPluginCapabilities",code="Internal"} 1"#,
        r#"petra_csi_operations_total{method="Identity/Probe",code="Cancelled"} 1"#,
        r#"petra_csi_operations_under_way{method="Identity/Probe"} 0"#,
        r#"petra_csi_operation_duration_seconds_bucket{le="300.0",method="Identity/GetPluginInfo"} 2"#,
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }

    // The socket of a process that lives is left alone.
    let second = serve(&format!("unix:{}", path.display())).await;
    assert!(matches!(second.serving.await.unwrap(), Err(SocketError::Live(_))));

    // What is under way ends, and the socket is removed.
    let probe = tokio::spawn(async move { client.probe(ProbeRequest {}).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    running.end.send(()).unwrap();
    probe.await.unwrap().unwrap();
    running.serving.await.unwrap().unwrap();
    assert!(!path.exists());
}

#[tokio::test]
async fn endpoints_are_paths_of_sockets() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    let refused = serve(&format!("unix://{}", file.display())).await;
    assert!(matches!(refused.serving.await.unwrap(), Err(SocketError::NoSocket(_))));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    for (endpoint, path) in [("unix:///a/b", "/a/b"), ("unix:/a/b", "/a/b"), ("unix:b", "b")] {
        assert_eq!(socket::path(endpoint).unwrap(), Path::new(path));
    }
    for wrong in ["", "/a/b", "unix:", "unix://", "unix://host/a", "tcp://1:2", "unix:///a/"] {
        assert!(matches!(socket::path(wrong), Err(SocketError::Endpoint(_))), "{wrong}");
    }
}

#[derive(Debug)]
struct OnePool(Result<(), String>);

#[async_trait]
impl Source for OnePool {
    async fn read(&self) -> Readings {
        let room = Room {
            total_bytes: 1 << 30,
            free_bytes: 1 << 29,
            reserve_bytes: 5,
            promised_bytes: 6,
            limit_bytes: 7,
            volumes: 8,
        };
        let pool = PoolReading {
            node: "a".to_owned(),
            pool: "P".to_owned(),
            room,
            hydrating_volumes: 2,
            missing_bytes: 4096,
            uploads: 3,
        };
        Readings { pools: vec![pool], away: 1 }
    }

    async fn ready(&self) -> Result<(), String> {
        self.0.clone()
    }
}

/// One page, as a browser gets it.
async fn page(address: std::net::SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn pages_say_how_it_goes() {
    let metrics = Metrics::new();
    let stats = SnapshotStats {
        data_bytes: 1000,
        new_bytes: 300,
        stored_bytes: 100,
        ..SnapshotStats::default()
    };
    for _ in 0..2 {
        metrics.snapshot_uploaded(SnapshotId::from_parts(1, 1), &stats);
    }
    for (ready, code) in [(Ok(()), "200"), (Err("no pool".to_owned()), "503")] {
        let pages = web::pages(metrics.clone(), Arc::new(OnePool(ready)));
        // A port that is free now.
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (end, ended) = oneshot::channel::<()>();
        let serving = tokio::spawn(web::serve(address, pages, async move { drop(ended.await) }));
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(page(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        assert!(page(address, "/readyz").await.starts_with(&format!("HTTP/1.1 {code}")));
        assert!(page(address, "/else").await.starts_with("HTTP/1.1 404"));
        let text = page(address, "/metrics").await;
        for line in [
            "petra_snapshots_uploaded_total 1\n",
            "petra_snapshot_data_bytes_total 1000\n",
            "petra_snapshot_stored_bytes_total 100\n",
            "petra_snapshot_deduplication_ratio 10.0\n",
            "petra_pool_size_bytes{node=\"a\",pool=\"P\"} 1073741824\n",
            "petra_pool_volumes{node=\"a\",pool=\"P\"} 8\n",
            "petra_hydration_missing_bytes{node=\"a\",pool=\"P\"} 4096\n",
            "petra_uploads_pending{node=\"a\",pool=\"P\"} 3\n",
            "petra_nodes_away 1\n",
            "# EOF\n",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        end.send(()).unwrap();
        serving.await.unwrap().unwrap();
    }
}
