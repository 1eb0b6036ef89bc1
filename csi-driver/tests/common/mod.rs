//! A cluster in one machine: driver processes with pools and repositories of their own, and clients.

#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(clippy::print_stderr, reason = "a test that fails tells why")]

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use petra_csi::proto::csi::controller_client::ControllerClient;
use petra_csi::proto::csi::group_controller_client::GroupControllerClient;
use petra_csi::proto::csi::identity_client::IdentityClient;
use petra_csi::proto::csi::node_client::NodeClient;
use petra_csi::proto::csi::snapshot_metadata_client::SnapshotMetadataClient;
use petra_csi::proto::csi::volume_capability::access_mode::Mode;
use petra_csi::proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use petra_csi::proto::csi::volume_content_source::{SnapshotSource, Type, VolumeSource};
use petra_csi::proto::csi::*;
use petra_tests::pool::{can_have_pools, take_apart};
use petra_tests::require;
use tempfile::TempDir;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status};

/// Longer than anything takes on a busy machine: uploads run when nobody else wants to.
pub const PATIENCE: Duration = Duration::from_secs(300);
pub const MIB: i64 = 1 << 20;

/// A machine with a pool.
pub struct Machine {
    directory: TempDir,
    drivers: Vec<Child>,
    petra: PathBuf,
    /// Environment of all processes.
    pub environment: Vec<(String, String)>,
}

impl Machine {
    /// A machine with a repository at `path("repository")`. None where this machine does not allow it.
    pub fn new() -> Option<Self> {
        if !can_have_pools() {
            return None;
        }
        let petra = program("petra");
        if !petra.exists() {
            require::unmet("the program petra is not built: cargo build -p petra");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let machine = Self { directory, drivers: vec![], petra, environment: vec![] };
        machine.petra(&["init", &machine.repository()]);
        Some(machine)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn repository(&self) -> String {
        format!("file://{}", self.path("repository").display())
    }

    /// Runs the command line, which must succeed.
    pub fn petra(&self, words: &[&str]) -> String {
        let mut command = Command::new(&self.petra);
        command.args(words).envs(self.environment.iter().cloned());
        let done = command.output().unwrap();
        let stderr = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "petra {words:?}: {stderr}");
        String::from_utf8(done.stdout).unwrap()
    }

    /// Makes a pool of 16 GiB, which take room only as they are filled.
    pub fn pool(&self, name: &str, filesystem: &str) -> PathBuf {
        let at = self.path(name);
        let image = self.path(&format!("{name}.img"));
        let (image, at_text) = (image.to_str().unwrap(), at.to_str().unwrap());
        let size = ["--size", "16G", "--overcommit", "100000", "--filesystem", filesystem];
        self.petra(&[&["pool", "init", image, "--at", at_text], &size[..]].concat());
        at
    }

    /// The command that starts a driver at a socket.
    pub fn driver(&self, socket: &str, options: &[&str]) -> Command {
        let mut command = Command::new(program("petra-csi"));
        command.arg(format!("--endpoint=unix://{}", self.path(socket).display()));
        command.arg(format!("--petra={}", self.petra.display()));
        command.arg(format!("--repository=main={}", self.repository()));
        command.args(options).envs(self.environment.iter().cloned());
        let log = self.path(&format!("{socket}.log"));
        let log = File::options().create(true).append(true).open(log).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        command
    }

    /// Starts a driver, and waits until it answers.
    pub async fn start(&mut self, socket: &str, options: &[&str]) -> Client {
        let child = self.driver(socket, options).spawn().unwrap();
        self.drivers.push(child);
        self.connect(socket).await
    }

    /// Controller and node in one, with the pool `pool`.
    pub async fn start_all(&mut self) -> Client {
        self.launch_all();
        self.connect("all.sock").await
    }

    /// The same, without waiting for it.
    pub fn launch_all(&mut self) {
        let pool = format!("--pool={}", self.path("pool").display());
        let options = ["--role=all", "--node-name=here", &pool];
        self.drivers.push(self.driver("all.sock", &options).spawn().unwrap());
    }

    pub async fn connect(&self, socket: &str) -> Client {
        let begun = Instant::now();
        loop {
            if let Ok(client) = Client::connect(&self.path(socket)).await {
                return client;
            }
            assert!(begun.elapsed() < PATIENCE, "no driver: {}", self.log(socket));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Ends the last driver that was started, by a signal.
    pub fn end_driver(&mut self, signal: &str) {
        let mut driver = self.drivers.pop().unwrap();
        let id = driver.id().to_string();
        Command::new("kill").args([signal, &id]).status().unwrap();
        driver.wait().unwrap();
    }

    pub fn log(&self, socket: &str) -> String {
        fs::read_to_string(self.path(&format!("{socket}.log"))).unwrap_or_default()
    }

    /// What is left of volumes, uploads, devices and mounts.
    pub fn left(&self) -> Vec<String> {
        let mut left = vec![];
        for entry in fs::read_dir(self.directory.path()).unwrap().flatten() {
            for kind in ["volumes", "new", "trash"] {
                let inside = fs::read_dir(entry.path().join(kind)).into_iter().flatten().flatten();
                left.extend(inside.map(|found| found.path().display().to_string()));
            }
            let uploads =
                fs::read_dir(entry.path().join("uploads")).into_iter().flatten().flatten();
            let uploads = uploads.filter(|f| f.path().extension().is_some_and(|e| e == "json"));
            left.extend(uploads.map(|found| found.path().display().to_string()));
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let home = self.directory.path().to_str().unwrap();
        for at in mounts.lines().filter_map(|line| line.split(' ').nth(4)) {
            // The pools themselves are at the top.
            if at.strip_prefix(home).is_some_and(|at| at.matches('/').count() > 1) {
                left.push(format!("mount {at}"));
            }
        }
        for device in fs::read_dir("/sys/block").unwrap().flatten() {
            let file = fs::read_to_string(device.path().join("loop/backing_file"));
            let file = file.unwrap_or_default();
            if file.starts_with(home) && !file.trim_end().ends_with(".img") {
                left.push(format!("loop device of {}", file.trim_end()));
            }
        }
        left
    }

    /// Fails if something is left that should have gone. What is deleted in the background gets some time.
    pub async fn assert_nothing_left(&self) {
        wait_until("everything is gone", || self.left().is_empty()).await;
    }

    /// Pins in the repository that have not been ended.
    pub fn pins(&self) -> usize {
        let owners = fs::read_dir(self.path("repository/pins")).into_iter().flatten().flatten();
        owners.map(|owner| fs::read_dir(owner.path()).map_or(0, Iterator::count)).sum()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for socket in ["all.sock", "controller.sock", "near.sock", "far.sock"] {
                let log = self.log(socket);
                let lines: Vec<_> = log.lines().collect();
                eprintln!("{socket}:\n{}", lines[lines.len().saturating_sub(30)..].join("\n"));
            }
        }
        for driver in &mut self.drivers {
            let _ = driver.kill();
            let _ = driver.wait();
        }
        let home = self.directory.path().display().to_string();
        for pattern in [format!("volume upload.*{home}"), format!("pool agent.*{home}")] {
            let _ = Command::new("pkill").args(["-f", &pattern]).status();
        }
        take_apart(self.directory.path());
    }
}

/// A program of this build, which is beside the directory of its tests and examples.
fn program(name: &str) -> PathBuf {
    let directory = std::env::current_exe().unwrap();
    directory.ancestors().nth(2).unwrap().join(name)
}

/// Waits until something is so.
pub async fn wait_until(what: &str, mut is: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < PATIENCE, "{what}: it is not");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Calls to a driver.
#[derive(Clone)]
pub struct Client {
    pub identity: IdentityClient<Channel>,
    pub controller: ControllerClient<Channel>,
    pub groups: GroupControllerClient<Channel>,
    pub metadata: SnapshotMetadataClient<Channel>,
    pub node: NodeClient<Channel>,
}

impl Client {
    pub async fn connect(socket: &Path) -> Result<Self, Status> {
        let socket = socket.to_owned();
        let connect = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://driver");
        let channel = endpoint.connect_with_connector(connect).await;
        let channel = channel.map_err(|error| Status::unavailable(error.to_string()))?;
        let mut identity = IdentityClient::new(channel.clone());
        if identity.probe(ProbeRequest {}).await?.into_inner().ready == Some(false) {
            return Err(Status::unavailable("not ready"));
        }
        Ok(Self {
            identity,
            controller: ControllerClient::new(channel.clone()),
            groups: GroupControllerClient::new(channel.clone()),
            metadata: SnapshotMetadataClient::new(channel.clone()),
            node: NodeClient::new(channel),
        })
    }

    /// A volume, made by what a provisioner would say.
    pub async fn create(&self, request: CreateVolumeRequest) -> Result<Volume, Status> {
        let made = self.controller.clone().create_volume(request).await?;
        Ok(made.into_inner().volume.unwrap())
    }

    pub async fn delete(&self, volume_id: &str) -> Result<(), Status> {
        let request = DeleteVolumeRequest { volume_id: volume_id.to_owned(), ..Default::default() };
        self.controller.clone().delete_volume(request).await.map(drop)
    }

    pub async fn snapshot(&self, volume_id: &str, name: &str) -> Result<Snapshot, Status> {
        let request = CreateSnapshotRequest {
            source_volume_id: volume_id.to_owned(),
            name: name.to_owned(),
            ..Default::default()
        };
        let taken = self.controller.clone().create_snapshot(request).await?;
        Ok(taken.into_inner().snapshot.unwrap())
    }

    /// A snapshot that is uploaded.
    pub async fn ready_snapshot(&self, volume_id: &str, name: &str) -> Snapshot {
        let begun = Instant::now();
        let first = self.snapshot(volume_id, name).await.unwrap();
        loop {
            let now = self.snapshot(volume_id, name).await.unwrap();
            assert_eq!(now.snapshot_id, first.snapshot_id);
            assert_eq!(now.creation_time, first.creation_time);
            if now.ready_to_use {
                return now;
            }
            assert!(begun.elapsed() < PATIENCE, "the snapshot is never uploaded");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    pub async fn delete_snapshot(&self, id: &str) -> Result<(), Status> {
        let request = DeleteSnapshotRequest { snapshot_id: id.to_owned(), ..Default::default() };
        self.controller.clone().delete_snapshot(request).await.map(drop)
    }

    /// Stages and publishes a volume, and gives where it is.
    pub async fn publish(
        &self,
        machine: &Machine,
        volume_id: &str,
        capability: &VolumeCapability,
        name: &str,
    ) -> Result<PathBuf, Status> {
        let staging = machine.path(&format!("staging-{name}"));
        let target = machine.path(&format!("target-{name}"));
        fs::create_dir_all(&staging).unwrap();
        let (staging, target_text) = (text(&staging), text(&target));
        let stage = NodeStageVolumeRequest {
            volume_id: volume_id.to_owned(),
            staging_target_path: staging.clone(),
            volume_capability: Some(capability.clone()),
            ..Default::default()
        };
        self.node.clone().node_stage_volume(stage).await?;
        let publish = NodePublishVolumeRequest {
            volume_id: volume_id.to_owned(),
            staging_target_path: staging,
            target_path: target_text,
            volume_capability: Some(capability.clone()),
            ..Default::default()
        };
        self.node.clone().node_publish_volume(publish).await?;
        Ok(target)
    }

    pub async fn unpublish(
        &self,
        machine: &Machine,
        volume_id: &str,
        name: &str,
    ) -> Result<(), Status> {
        let unpublish = NodeUnpublishVolumeRequest {
            volume_id: volume_id.to_owned(),
            target_path: text(&machine.path(&format!("target-{name}"))),
        };
        self.node.clone().node_unpublish_volume(unpublish).await?;
        let unstage = NodeUnstageVolumeRequest {
            volume_id: volume_id.to_owned(),
            staging_target_path: text(&machine.path(&format!("staging-{name}"))),
        };
        self.node.clone().node_unstage_volume(unstage).await.map(drop)
    }
}

/// Does a call again while it is told to come again.
pub async fn persistently<T, F: Future<Output = Result<T, Status>>>(
    mut call: impl FnMut() -> F,
) -> Result<T, Status> {
    let begun = Instant::now();
    loop {
        match call().await {
            Err(status)
                if matches!(status.code(), Code::Aborted | Code::Unavailable)
                    && begun.elapsed() < PATIENCE =>
            {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            done => return done,
        }
    }
}

pub fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

pub fn mounted(filesystem: &str, mode: Mode) -> VolumeCapability {
    let mount = MountVolume { fs_type: filesystem.to_owned(), ..Default::default() };
    VolumeCapability {
        access_mode: Some(AccessMode { mode: mode.into() }),
        access_type: Some(AccessType::Mount(mount)),
    }
}

pub fn block() -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
        access_type: Some(AccessType::Block(BlockVolume {})),
    }
}

pub fn writer() -> VolumeCapability {
    mounted("ext4", Mode::SingleNodeWriter)
}

/// A volume to make.
pub fn wanted(name: &str, bytes: i64, capability: &VolumeCapability) -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: name.to_owned(),
        capacity_range: Some(CapacityRange { required_bytes: bytes, limit_bytes: 0 }),
        volume_capabilities: vec![capability.clone()],
        ..Default::default()
    }
}

pub fn from_snapshot(mut request: CreateVolumeRequest, id: &str) -> CreateVolumeRequest {
    let source = SnapshotSource { snapshot_id: id.to_owned() };
    request.volume_content_source =
        Some(VolumeContentSource { r#type: Some(Type::Snapshot(source)) });
    request
}

pub fn from_volume(mut request: CreateVolumeRequest, id: &str) -> CreateVolumeRequest {
    let source = VolumeSource { volume_id: id.to_owned() };
    request.volume_content_source =
        Some(VolumeContentSource { r#type: Some(Type::Volume(source)) });
    request
}

/// Only on this node.
pub fn on_node(mut request: CreateVolumeRequest, node: &str) -> CreateVolumeRequest {
    let segments = HashMap::from([(petra_csi::TOPOLOGY.to_owned(), node.to_owned())]);
    let topology = vec![Topology { segments }];
    request.accessibility_requirements =
        Some(TopologyRequirement { requisite: topology.clone(), preferred: topology });
    request
}
