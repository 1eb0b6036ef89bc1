//! Agents on other nodes: who is let in, who is found, what happens when a node is away, and when two calls want the same.

#![expect(clippy::unwrap_used, reason = "in tests a panic is the right way to fail")]

mod authority;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use authority::{Authority, write};
use petra_csi::agent::nodes::Nodes;
use petra_csi::agent::remote::RemoteAgent;
use petra_csi::agent::server::serve;
use petra_csi::agent::tls::{CONTROLLER, NODE, Tls};
use petra_csi::agent::{
    AnnotateVolumeRequest, CreateVolumeRequest, ExpandVolumeRequest, NodeAgent, NodeInfo,
    TakeSnapshotRequest, Upload, Volume,
};
use petra_csi::controller::{Controller, Services};
use petra_csi::proto::csi;
use petra_csi::proto::csi::controller_server::Controller as _;
use petra_csi::proto::csi::volume_capability::access_mode::Mode;
use petra_csi::proto::csi::volume_capability::{AccessMode, AccessType, MountVolume};
use petra_csi::repositories::Repositories;
use petra_csi::telemetry::{Metrics, Observe, Readings, Source};
use petra_engine::{Context, SnapshotId};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::{Code, Request, Status};

/// A node of which nothing is real but its name.
#[derive(Debug)]
struct Fake {
    node: &'static str,
    pool: SnapshotId,
    volumes: Mutex<BTreeMap<String, Volume>>,
    /// How long it takes to delete something.
    slow: Duration,
}

impl Fake {
    fn new(node: &'static str, number: u64) -> Self {
        let pool = SnapshotId::from_parts(number, 7);
        Self { node, pool, volumes: Mutex::default(), slow: Duration::ZERO }
    }
}

#[async_trait]
impl NodeAgent for Fake {
    async fn info(&self) -> Result<NodeInfo, Status> {
        Ok(NodeInfo {
            node: self.node.to_owned(),
            pool: self.pool.to_string(),
            available_bytes: 7,
            ..NodeInfo::default()
        })
    }

    async fn create_volume(&self, request: CreateVolumeRequest) -> Result<Volume, Status> {
        let volume = Volume {
            name: request.name.clone(),
            size_bytes: request.size_bytes,
            metadata: request.metadata,
            ..Volume::default()
        };
        self.volumes.lock().unwrap().insert(request.name, volume.clone());
        Ok(volume)
    }

    async fn delete_volume(&self, name: &str, _: &HashMap<String, String>) -> Result<(), Status> {
        tokio::time::sleep(self.slow).await;
        self.volumes.lock().unwrap().remove(name);
        Ok(())
    }

    async fn volume(&self, name: &str) -> Result<Volume, Status> {
        let found = self.volumes.lock().unwrap().get(name).cloned();
        found.ok_or_else(|| Status::not_found(format!("no volume {name:?}")))
    }

    async fn volumes(&self) -> Result<Vec<Volume>, Status> {
        Ok(self.volumes.lock().unwrap().values().cloned().collect())
    }

    async fn expand_volume(&self, _: ExpandVolumeRequest) -> Result<Volume, Status> {
        Err(Status::resource_exhausted("no room"))
    }

    async fn annotate_volume(&self, request: AnnotateVolumeRequest) -> Result<Volume, Status> {
        self.volume(&request.name).await
    }

    async fn take_snapshot(&self, request: TakeSnapshotRequest) -> Result<Upload, Status> {
        Ok(Upload { name: request.name, ..Upload::default() })
    }

    async fn uploads(&self) -> Result<Vec<Upload>, Status> {
        Ok(vec![Upload::default()])
    }

    async fn discard_upload(&self, _: &str) -> Result<(), Status> {
        Ok(())
    }

    async fn repositories(&self) -> Result<Vec<String>, Status> {
        Ok(vec![format!("file:///of-{}", self.node)])
    }

    async fn note_repository(&self, url: &str) -> Result<(), Status> {
        Err(Status::invalid_argument(format!("{url} is noted by nobody")))
    }
}

/// A node that serves.
struct Running {
    address: SocketAddr,
    metrics: Arc<Metrics>,
    end: Option<oneshot::Sender<()>>,
    serving: JoinHandle<()>,
}

impl Running {
    async fn start(agent: Fake, certificates: &Path) -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap(), agent, certificates).await
    }

    async fn start_at(address: SocketAddr, agent: Fake, certificates: &Path) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let tls = Tls::open(certificates).unwrap();
        let metrics = Metrics::new();
        let observe = Observe::new(metrics.clone());
        let (end, ended) = oneshot::channel();
        let serving = tokio::spawn(async move {
            let shutdown = async move { drop(ended.await) };
            serve(listener, tls, Arc::new(agent), observe, shutdown).await.unwrap();
        });
        Self { address, metrics, end: Some(end), serving }
    }

    fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    async fn stop(mut self) -> SocketAddr {
        self.end.take().unwrap().send(()).unwrap();
        self.serving.await.unwrap();
        self.address
    }
}

#[tokio::test]
async fn a_second_call_on_a_volume_is_told_to_come_again() {
    let mut node = Fake::new("a", 1);
    node.slow = Duration::from_secs(60);
    let nodes = Arc::new(Nodes::local(Arc::new(node)));
    let context = Context::default();
    let controller = Controller::new(nodes, Repositories::default(), Metrics::new(), context);
    let services = Services(Arc::new(controller));
    let access_mode = Some(AccessMode { mode: Mode::SingleNodeWriter.into() });
    let access_type = Some(AccessType::Mount(MountVolume::default()));
    let capability = csi::VolumeCapability { access_mode, access_type };
    let create = csi::CreateVolumeRequest {
        name: "v".to_owned(),
        volume_capabilities: vec![capability.clone()],
        ..Default::default()
    };
    let made = services.create_volume(Request::new(create.clone())).await.unwrap().into_inner();
    let volume_id = made.volume.unwrap().volume_id;
    let delete = Request::new(csi::DeleteVolumeRequest {
        volume_id: volume_id.clone(),
        ..Default::default()
    });
    let deleting = tokio::spawn({
        let services = services.clone();
        async move { services.delete_volume(delete).await }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let expand = csi::ControllerExpandVolumeRequest {
        volume_id: volume_id.clone(),
        capacity_range: Some(csi::CapacityRange { required_bytes: 1 << 31, limit_bytes: 0 }),
        ..Default::default()
    };
    let modify =
        csi::ControllerModifyVolumeRequest { volume_id: volume_id.clone(), ..Default::default() };
    let publish = csi::ControllerPublishVolumeRequest {
        volume_id: volume_id.clone(),
        node_id: "a".to_owned(),
        volume_capability: Some(capability),
        ..Default::default()
    };
    let unpublish = csi::ControllerUnpublishVolumeRequest {
        volume_id: volume_id.clone(),
        node_id: "a".to_owned(),
        ..Default::default()
    };
    let delete = csi::DeleteVolumeRequest { volume_id, ..Default::default() };
    for refused in [
        services.create_volume(Request::new(create)).await.map(drop),
        services.delete_volume(Request::new(delete)).await.map(drop),
        services.controller_expand_volume(Request::new(expand)).await.map(drop),
        services.controller_modify_volume(Request::new(modify)).await.map(drop),
        services.controller_publish_volume(Request::new(publish)).await.map(drop),
        services.controller_unpublish_volume(Request::new(unpublish)).await.map(drop),
    ] {
        assert_eq!(refused.unwrap_err().code(), Code::Aborted);
    }
    deleting.abort();
}

#[tokio::test]
async fn calls_and_answers_arrive() {
    let authority = Authority::new();
    let node = Running::start(Fake::new("a", 1), &authority.issue(NODE)).await;
    let tls = Tls::open(authority.issue(CONTROLLER)).unwrap();
    let agent = RemoteAgent::new(&node.url(), tls).unwrap();
    assert_eq!(agent.info().await.unwrap().node, "a");

    let metadata = [("csi.name".to_owned(), "pvc-1".to_owned())].into();
    let request = CreateVolumeRequest {
        name: "v".to_owned(),
        size_bytes: 4096,
        metadata,
        ..CreateVolumeRequest::default()
    };
    let made = agent.create_volume(request).await.unwrap();
    assert_eq!(made, agent.volume("v").await.unwrap());
    assert_eq!(agent.volumes().await.unwrap(), [made]);
    agent.delete_volume("v", &[].into()).await.unwrap();
    // What the node says is what the caller hears.
    let error = agent.volume("v").await.unwrap_err();
    assert_eq!((error.code(), error.message()), (Code::NotFound, "no volume \"v\""));
    let error = agent.expand_volume(ExpandVolumeRequest::default()).await.unwrap_err();
    assert_eq!((error.code(), error.message()), (Code::ResourceExhausted, "no room"));
    let snapshot = TakeSnapshotRequest { name: "s".to_owned(), ..TakeSnapshotRequest::default() };
    assert_eq!(agent.take_snapshot(snapshot).await.unwrap().name, "s");
    assert_eq!(agent.uploads().await.unwrap().len(), 1);
    agent.discard_upload("x").await.unwrap();

    let text = node.metrics.text(&Readings::default()).unwrap();
    for line in [
        r#"petra_csi_operations_total{method="NodeAgent/GetVolume",code="Ok"} 1"#,
        r#"petra_csi_operations_total{method="NodeAgent/GetVolume",code="NotFound"} 1"#,
        r#"petra_csi_operation_duration_seconds_count{method="NodeAgent/GetVolume"} 2"#,
        r#"petra_csi_operations_under_way{method="NodeAgent/GetVolume"} 0"#,
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    node.stop().await;
}

#[tokio::test]
async fn only_a_controller_of_the_same_authority_is_let_in() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let node = Running::start(Fake::new("a", 1), &ours.issue(NODE)).await;
    let refused = async |directory: PathBuf| {
        let agent = RemoteAgent::new(&node.url(), Tls::open(directory).unwrap()).unwrap();
        let error = agent.info().await.unwrap_err();
        assert_eq!(error.code(), Code::Unavailable, "{error}");
    };
    // Another authority, which the client trusts as little as the node does.
    refused(theirs.issue(CONTROLLER)).await;
    // The client trusts the node, but the node not the client.
    let stranger = theirs.issue(CONTROLLER);
    std::fs::write(stranger.join("ca.pem"), &ours.pem).unwrap();
    refused(stranger).await;
    // A node is no controller.
    refused(ours.issue(NODE)).await;
    // A controller is no node.
    let false_node = Running::start(Fake::new("b", 2), &ours.issue(CONTROLLER)).await;
    let tls = Tls::open(ours.issue(CONTROLLER)).unwrap();
    let agent = RemoteAgent::new(&false_node.url(), tls.clone()).unwrap();
    assert_eq!(agent.info().await.unwrap_err().code(), Code::Unavailable);

    // Without any certificate, and without TLS.
    let mut roots = rustls::RootCertStore::empty();
    let pem = std::fs::read(ours.issue("x").join("ca.pem")).unwrap();
    let ca = rustls::pki_types::pem::PemObject::from_pem_slice(&pem).unwrap();
    roots.add(ca).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let nobody = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = tokio::net::TcpStream::connect(node.address).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(nobody));
    let name = rustls::pki_types::ServerName::try_from(NODE).unwrap();
    // In TLS 1.3 the client hears of it after it has sent its part.
    let mut stream = connector.connect(name, stream).await.unwrap();
    let read = tokio::io::AsyncReadExt::read(&mut stream, &mut [0; 1]).await;
    assert!(read.is_err(), "{read:?}");
    let plain = tonic::transport::Endpoint::from_shared(format!("http://{}", node.address));
    let mut plain = petra_csi::proto::agent::node_agent_client::NodeAgentClient::new(
        plain.unwrap().connect_lazy(),
    );
    plain.get_info(petra_csi::proto::agent::GetInfoRequest {}).await.unwrap_err();

    // And all of this kept nobody else out.
    RemoteAgent::new(&node.url(), tls).unwrap().info().await.unwrap();
}

#[tokio::test]
async fn nodes_are_found_by_pool_and_by_name() {
    let authority = Authority::new();
    let certificates = authority.issue(NODE);
    let a = Running::start(Fake::new("a", 1), &certificates).await;
    let b = Running::start(Fake::new("b", 2), &certificates).await;
    let (pool_a, pool_b) = (SnapshotId::from_parts(1, 7), SnapshotId::from_parts(2, 7));
    let tls = Tls::open(authority.issue(CONTROLLER)).unwrap();
    let nodes = Nodes::remote([a.url(), b.url()], tls.clone()).unwrap();

    let everyone = nodes.all().await;
    let names: Vec<_> = everyone.there.iter().map(|node| node.info.node.as_str()).collect();
    assert_eq!((names, everyone.away.len()), (vec!["a", "b"], 0));
    assert_eq!(nodes.by_pool(pool_b).await.unwrap().info().await.unwrap().node, "b");
    assert_eq!(nodes.by_node("a").await.unwrap().info.pool, pool_a.to_string());
    let nowhere = SnapshotId::from_parts(3, 7);
    assert_eq!(nodes.by_pool(nowhere).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(nodes.by_node("c").await.unwrap_err().code(), Code::NotFound);

    // A node that is away is not one that never was.
    let agent_b = nodes.by_pool(pool_b).await.unwrap();
    let address = b.stop().await;
    assert_eq!(agent_b.info().await.unwrap_err().code(), Code::Unavailable);
    tokio::time::sleep(Duration::from_millis(5100)).await;
    let error = nodes.by_pool(pool_b).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains("node b"), "{error}");
    assert_eq!(nodes.by_pool(nowhere).await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(nodes.by_node("b").await.unwrap_err().code(), Code::Unavailable);
    let everyone = nodes.all().await;
    assert_eq!(everyone.there.len(), 1);
    assert_eq!(everyone.away.iter().map(|away| away.node.as_str()).collect::<Vec<_>>(), ["b"]);
    assert_eq!(nodes.read().await.away, 1);
    nodes.by_pool(pool_a).await.unwrap();

    // Another node at its address is not taken for it.
    let other = Running::start_at(address, Fake::new("c", 3), &certificates).await;
    let error = agent_b.delete_volume("v", &[].into()).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(nodes.by_pool(nowhere).await.unwrap().info().await.unwrap().node, "c");
    other.stop().await;

    // It comes back, and is found at once.
    let b = Running::start_at(address, Fake::new("b", 2), &certificates).await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(nodes.by_pool(pool_b).await.unwrap().info().await.unwrap().node, "b");
    b.stop().await;
    a.stop().await;
}

#[tokio::test]
async fn a_name_may_stand_for_fewer_nodes_than_there_are() {
    let authority = Authority::new();
    let node = Running::start(Fake::new("a", 1), &authority.issue(NODE)).await;
    let tls = Tls::open(authority.issue(CONTROLLER)).unwrap();
    let url = format!("https://localhost:{}", node.address.port());
    let nodes = Nodes::remote([url], tls.clone()).unwrap();
    nodes.by_pool(SnapshotId::from_parts(1, 7)).await.unwrap();
    let error = nodes.by_pool(SnapshotId::from_parts(2, 7)).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    let nodes = Nodes::remote(["https://nobody.invalid:1"], tls).unwrap();
    assert_eq!(
        nodes.by_pool(SnapshotId::from_parts(1, 7)).await.unwrap_err().code(),
        Code::Unavailable
    );
    assert_eq!(nodes.all().await.away.len(), 1);
}

#[tokio::test]
async fn a_node_in_this_process_needs_no_network() {
    let nodes = Nodes::local(Arc::new(Fake::new("here", 1)));
    nodes.by_pool(SnapshotId::from_parts(1, 7)).await.unwrap();
    let error = nodes.by_pool(SnapshotId::from_parts(2, 7)).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    assert_eq!(nodes.by_node("here").await.unwrap().info.available_bytes, 7);
}

#[tokio::test]
async fn what_is_under_way_may_end() {
    let authority = Authority::new();
    let slow = Fake { slow: Duration::from_millis(600), ..Fake::new("a", 1) };
    let node = Running::start(slow, &authority.issue(NODE)).await;
    let tls = Tls::open(authority.issue(CONTROLLER)).unwrap();
    let agent = RemoteAgent::new(&node.url(), tls).unwrap();
    agent.info().await.unwrap();
    let deletion = tokio::spawn(async move { agent.delete_volume("v", &[].into()).await });
    tokio::time::sleep(Duration::from_millis(200)).await;
    node.stop().await;
    deletion.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_node_that_comes_soon_is_waited_for() {
    let authority = Authority::new();
    let certificates = authority.issue(NODE);
    let node = Running::start(Fake::new("a", 1), &certificates).await;
    let tls = Tls::open(authority.issue(CONTROLLER)).unwrap();
    let url = node.url();
    let address = node.stop().await;
    let agent = RemoteAgent::new(&url, tls).unwrap();
    let asked = tokio::spawn(async move { agent.info().await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let node = Running::start_at(address, Fake::new("a", 1), &certificates).await;
    assert_eq!(asked.await.unwrap().unwrap().node, "a");
    node.stop().await;
}

#[test]
fn certificates_that_are_none_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    Tls::open(directory.path()).unwrap_err();
    let authority = Authority::new();
    let good = authority.issue(NODE);
    for file in ["ca.pem", "cert.pem", "key.pem"] {
        let kept = std::fs::read(good.join(file)).unwrap();
        for wrong in [
            &b""[..],
            b"nonsense",
            b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        ] {
            std::fs::write(good.join(file), wrong).unwrap();
            let error = Tls::open(&good).unwrap_err().to_string();
            assert!(!error.contains("AAAA"), "{error}");
        }
        std::fs::write(good.join(file), kept).unwrap();
        Tls::open(&good).unwrap();
    }
    // A key of another certificate.
    let key = std::fs::read(authority.issue(CONTROLLER).join("key.pem")).unwrap();
    std::fs::write(good.join("key.pem"), key).unwrap();
    Tls::open(&good).unwrap_err();
}

#[tokio::test]
async fn the_certificates_that_we_hand_out_are_good() {
    if petra_tests::require::tool("openssl").is_none() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/certificates");
    let made = std::process::Command::new(script).arg("--directory").arg(directory.path()).output();
    let made = made.unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let side = |name: &str| {
        let read = |file: &str| std::fs::read_to_string(directory.path().join(file)).unwrap();
        let certificates = directory.path().join(name);
        let (certificate, key) = (read(&format!("{name}.crt")), read(&format!("{name}.key")));
        write(&certificates, &read("ca.crt"), &certificate, &key);
        certificates
    };
    let node = Running::start(Fake::new("a", 1), &side("node")).await;
    let tls = Tls::open(side("controller")).unwrap();
    RemoteAgent::new(&node.url(), tls).unwrap().info().await.unwrap();
    // They are for one side each.
    let tls = Tls::open(side("node")).unwrap();
    let refused = RemoteAgent::new(&node.url(), tls).unwrap().info().await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    node.stop().await;
}
