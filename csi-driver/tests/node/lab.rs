//! A node with a pool, and its calls in short.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use petra_csi::locks::Locks;
use petra_csi::node::{Node, ReadOnlyClone, ReadOnlyClones};
use petra_csi::proto::csi::node_server::Node as _;
use petra_csi::proto::csi::volume_capability::access_mode::Mode;
use petra_csi::proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use petra_csi::proto::csi::{
    CapacityRange, NodeExpandVolumeRequest, NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse,
    NodePublishVolumeRequest, NodeStageVolumeRequest, NodeUnpublishVolumeRequest,
    NodeUnstageVolumeRequest, VolumeCapability,
};
use petra_tests::pool::{TestPool, loop_devices_below};
use petra_volume::pool::{CreateRequest, Filesystem, Pool};
use petra_volume::programs::Programs;
use petra_volume::volume::Serving;
use petra_volume::{BackendKind, Volume};
use tonic::{Code, Request, Status};

pub const MIB: u64 = 1 << 20;

/// A node with a pool of its own.
pub struct Lab {
    pub node: Node,
    pub clones: Arc<Clones>,
    pub pool: TestPool,
}

/// What makes volumes that many nodes read: empty ones, with an ext4.
#[derive(Debug)]
pub struct Clones {
    pool: Pool,
    pub made: Mutex<Vec<ReadOnlyClone>>,
    pub kept: Mutex<Vec<(String, HashMap<String, String>)>>,
}

#[tonic::async_trait]
impl ReadOnlyClones for Clones {
    async fn clone_read_only(&self, request: ReadOnlyClone) -> Result<(), Status> {
        let create = CreateRequest::new(request.name.clone(), 16 * MIB, Filesystem::Ext4);
        self.pool.create(create).map_err(petra_csi::failure::of_volume)?;
        self.made.lock().unwrap().push(request);
        Ok(())
    }

    async fn keep_secrets(
        &self,
        repository: &str,
        secrets: &HashMap<String, String>,
    ) -> Result<(), Status> {
        self.kept.lock().unwrap().push((repository.to_owned(), secrets.clone()));
        Ok(())
    }
}

/// How a volume is used: a file system with these flags, or a block device.
#[derive(Clone, Debug)]
pub struct How(VolumeCapability);

impl How {
    pub fn mount(flags: &[&str]) -> Self {
        let mount_flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let mount = MountVolume { mount_flags, ..MountVolume::default() };
        Self::new(AccessType::Mount(mount))
    }

    pub fn block() -> Self {
        Self::new(AccessType::Block(BlockVolume {}))
    }

    pub fn mode(mut self, mode: Mode) -> Self {
        self.0.access_mode = Some(AccessMode { mode: mode.into() });
        self
    }

    fn new(access_type: AccessType) -> Self {
        let capability = VolumeCapability { access_type: Some(access_type), access_mode: None };
        Self(capability).mode(Mode::SingleNodeMultiWriter)
    }
}

impl From<How> for Option<VolumeCapability> {
    fn from(how: How) -> Self {
        Some(how.0)
    }
}

impl Lab {
    pub fn new() -> Option<Self> {
        Some(Self::over(TestPool::new(BackendKind::Btrfs)?, "/no/petra".into()))
    }

    /// A node over a pool, whose processes are started from this program.
    pub fn over(pool: TestPool, program: PathBuf) -> Self {
        let clones = Arc::new(Clones {
            pool: pool.pool.clone(),
            made: Mutex::default(),
            kept: Mutex::default(),
        });
        let node = node(&pool.pool, program, clones.clone());
        Self { node, clones, pool }
    }

    /// The node's process anew: all that it had in memory is gone.
    pub fn restart(&mut self) {
        self.node = node(&self.pool.reopened(), "/no/petra".into(), self.clones.clone());
    }

    /// A path beside the pool, as a string.
    pub fn path(&self, name: &str) -> String {
        self.pool.path(name).to_str().unwrap().to_owned()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.pool.path(name)
    }

    pub fn id(&self, volume: &Volume) -> String {
        format!("{}/{}", self.pool.pool.state().id, volume.name())
    }

    pub async fn stage(&self, id: &str, at: &str, how: How) -> Result<(), Code> {
        self.stage_with(id, at, how, &[]).await
    }

    pub async fn stage_with(
        &self,
        id: &str,
        at: &str,
        how: How,
        secrets: &[(&str, &str)],
    ) -> Result<(), Code> {
        let secrets = secrets.iter().map(|(key, value)| ((*key).into(), (*value).into()));
        let request = NodeStageVolumeRequest {
            volume_id: id.into(),
            staging_target_path: self.place(at),
            volume_capability: how.into(),
            secrets: secrets.collect(),
            ..Default::default()
        };
        code(self.node.node_stage_volume(Request::new(request)).await)
    }

    pub async fn unstage(&self, id: &str, at: &str) -> Result<(), Code> {
        let request =
            NodeUnstageVolumeRequest { volume_id: id.into(), staging_target_path: self.place(at) };
        code(self.node.node_unstage_volume(Request::new(request)).await)
    }

    /// Publishes what is staged at `staging`.
    pub async fn publish(&self, id: &str, at: &str, how: How, readonly: bool) -> Result<(), Code> {
        self.publish_from(id, "staging", at, how, readonly).await
    }

    pub async fn publish_from(
        &self,
        id: &str,
        staging: &str,
        at: &str,
        how: How,
        readonly: bool,
    ) -> Result<(), Code> {
        let request = NodePublishVolumeRequest {
            volume_id: id.into(),
            staging_target_path: self.place(staging),
            target_path: self.place(at),
            volume_capability: how.into(),
            readonly,
            ..Default::default()
        };
        code(self.node.node_publish_volume(Request::new(request)).await)
    }

    pub async fn unpublish(&self, id: &str, at: &str) -> Result<(), Code> {
        let request =
            NodeUnpublishVolumeRequest { volume_id: id.into(), target_path: self.place(at) };
        code(self.node.node_unpublish_volume(Request::new(request)).await)
    }

    pub async fn expand(&self, id: &str, at: &str, size: u64) -> Result<u64, Code> {
        let range = CapacityRange { required_bytes: size.try_into().unwrap(), limit_bytes: 0 };
        let request = NodeExpandVolumeRequest {
            volume_id: id.into(),
            volume_path: self.place(at),
            capacity_range: Some(range),
            ..Default::default()
        };
        let expanded = self.node.node_expand_volume(Request::new(request)).await;
        expanded
            .map(|expanded| expanded.into_inner().capacity_bytes.try_into().unwrap())
            .map_err(|status| tell(&status))
    }

    pub async fn stats(&self, id: &str, at: &str) -> Result<NodeGetVolumeStatsResponse, Code> {
        let request = NodeGetVolumeStatsRequest {
            volume_id: id.into(),
            volume_path: self.place(at),
            ..Default::default()
        };
        let stats = self.node.node_get_volume_stats(Request::new(request)).await;
        stats.map(tonic::Response::into_inner).map_err(|status| tell(&status))
    }

    /// What is wrong with a volume, as its condition says.
    pub async fn trouble(&self, id: &str, at: &str) -> Option<String> {
        let condition = self.stats(id, at).await.unwrap().volume_condition.unwrap();
        condition.abnormal.then_some(condition.message)
    }

    /// Nothing is attached any more.
    pub fn is_clean(&self) -> bool {
        loop_devices_below(self.pool.pool.root()).is_empty()
    }

    /// A field of a call: a path beside the pool, but for what stands for something else.
    fn place(&self, at: &str) -> String {
        if at.is_empty() || at.contains('/') { at.to_owned() } else { self.path(at) }
    }
}

fn node(pool: &Pool, program: PathBuf, clones: Arc<Clones>) -> Node {
    let programs = Programs::new(program, vec![]);
    let serving = Serving { programs, patience: Duration::from_secs(60) };
    Node::new(pool.clone(), serving, "node-1".to_owned(), Locks::default(), clones, 0)
}

fn code<T>(answer: Result<T, Status>) -> Result<(), Code> {
    answer.map(drop).map_err(|status| tell(&status))
}

/// Shows what was said, for the one who reads why a test failed.
fn tell(status: &Status) -> Code {
    println!("{:?}: {}", status.code(), status.message());
    assert!(!status.message().is_empty());
    status.code()
}

/// Writes a file that is on the disk when this returns.
pub fn write(path: &Path, bytes: &[u8]) {
    let file = fs::File::create(path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, bytes, 0).unwrap();
    file.sync_all().unwrap();
}

/// The options of the topmost mount at a place.
pub fn options(at: &Path) -> Option<Vec<String>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let at = at.to_str().unwrap();
    let line = mounts.lines().rfind(|line| line.split(' ').nth(4) == Some(at))?;
    Some(line.split(' ').nth(5)?.split(',').map(str::to_owned).collect())
}

pub fn mounts_at(at: &Path) -> usize {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let at = at.to_str().unwrap();
    mounts.lines().filter(|line| line.split(' ').nth(4) == Some(at)).count()
}

/// True where this process may grow a mounted ext4, which root in a container may not.
pub fn may_grow_ext4() -> bool {
    const CAP_SYS_RESOURCE: u64 = 24;
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(line.trim(), 16).unwrap() >> CAP_SYS_RESOURCE & 1 == 1
}
