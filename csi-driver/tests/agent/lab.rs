//! A node with a pool, and a repository beside it.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use petra_csi::agent::local::LocalAgent;
use petra_csi::agent::{
    CSI_NAME, CreateVolumeRequest, NodeAgent, Repository, SnapshotMember, SnapshotSource, Source,
    TakeSnapshotRequest, Upload,
};
use petra_engine::record::{SnapshotRecord, Writers};
use petra_engine::store::LocalStore;
use petra_engine::{Repository as Open, SnapshotId};
use petra_tests::lab::{context, init, key};
use petra_tests::pool::{TestPool, volume_name};
use petra_tests::require;
use petra_volume::snapshot::{MAX_ATTEMPTS, resolve};
use petra_volume::volume::DEFAULT_PATIENCE;
use petra_volume::{BackendKind, Volume};

pub const MIB: u64 = 1 << 20;
pub const PASSPHRASE: &str = "correct horse battery staple";
/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// A node. What it has started ends with it.
pub struct Node {
    pub agent: LocalAgent,
    run: PathBuf,
    pub pool: TestPool,
}

impl Node {
    /// `None` where this machine allows no pools.
    pub fn new(kind: BackendKind) -> Option<Self> {
        let petra = petra()?;
        let pool = TestPool::new(kind)?;
        let agent =
            LocalAgent::new(pool.pool.clone(), "here", &petra, 0, DEFAULT_PATIENCE).unwrap();
        let run = pool.pool.run_directory().unwrap();
        Some(Self { agent, run, pool })
    }

    /// As after a restart of the driver.
    pub fn restarted(&self) -> LocalAgent {
        LocalAgent::new(self.pool.reopened(), "here", &petra().unwrap(), 0, DEFAULT_PATIENCE)
            .unwrap()
    }

    pub fn volume(&self, name: &str) -> Volume {
        self.pool.pool.volume(&volume_name(name)).unwrap()
    }

    /// Mounts a volume, and gives where.
    pub fn mount(&self, name: &str) -> PathBuf {
        let at = self.pool.path(&format!("at {name}"));
        let mut locked = self.volume(name).lock().unwrap();
        locked.attach_served(self.agent.serving(), false).unwrap();
        locked.mount(&at, false).unwrap();
        at
    }

    pub fn unmount(&self, name: &str) {
        let mut locked = self.volume(name).lock().unwrap();
        locked.unmount().unwrap();
        locked.detach().unwrap();
    }

    /// Waits until all data of a lazy volume is here.
    pub async fn hydrated(&self, name: &str) {
        wait_for("hydration", async || !self.agent.volume(name).await.unwrap().lazy).await;
    }

    /// Waits until there are no uploads.
    pub async fn uploaded(&self) {
        wait_for("the upload", async || self.agent.uploads().await.unwrap().is_empty()).await;
    }

    /// The process that works on an upload.
    pub fn uploader(&self, id: &str) -> Option<u32> {
        self.processes()
            .into_iter()
            .find(|(_, line)| line.contains("upload") && line.contains(id))
            .map(|(pid, _)| pid)
    }

    /// The helper processes of this pool, with their command lines.
    pub fn processes(&self) -> Vec<(u32, String)> {
        let root = self.pool.pool.root().to_string_lossy().into_owned();
        let mut found = vec![];
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            if pid != std::process::id() && line.contains(&root) {
                found.push((pid, line));
            }
        }
        found
    }

    /// What the helper processes said, for whoever looks into a failure.
    fn show_logs(&self) {
        for entry in fs::read_dir(&self.run).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().ends_with(".log") {
                let log = fs::read_to_string(entry.path()).unwrap_or_default();
                eprintln!("{}:\n{log}", entry.path().display());
            }
        }
    }

    /// Where sockets, logs and secrets are.
    pub fn run(&self) -> &Path {
        &self.run
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        petra_tests::pool::take_apart(&self.pool.path(""));
        if std::thread::panicking() {
            self.show_logs();
        }
        // In an orderly way as far as it goes, so that image servers end before their mounts are taken away.
        for volume in self.pool.pool.volumes().unwrap_or_default() {
            if let Ok(mut locked) = volume.lock() {
                let _ = locked.unmount().and_then(|()| locked.detach());
            }
        }
        // Image servers have ended with their mounts; agents and uploads have not.
        for (pid, _) in self.processes() {
            kill(pid);
        }
        let _ = fs::remove_dir_all(&self.run);
    }
}

/// As kill -9 does.
pub fn kill(pid: u32) {
    let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
}

/// The program of the helper processes.
fn petra() -> Option<PathBuf> {
    let test = std::env::current_exe().unwrap();
    // Tests are in `deps`, programs above it.
    let petra = test.parent().and_then(Path::parent).unwrap().join("petra");
    if !petra.exists() {
        require::unmet("petra is not built: cargo build -p petra");
        return None;
    }
    Some(petra)
}

/// A repository in a directory of a node.
pub struct Repo {
    pub open: Open,
    pub message: Repository,
}

impl Repo {
    pub async fn plain(node: &Node) -> Self {
        let path = node.pool.path("repo");
        let open = init(Arc::new(LocalStore::new(&path))).await;
        Self { open, message: message(&path, &[]) }
    }

    pub async fn encrypted(node: &Node) -> Self {
        let path = node.pool.path("encrypted");
        let store = Arc::new(LocalStore::new(&path));
        let (chunking, key) = ("cdc-8k".parse().unwrap(), key(PASSPHRASE));
        let made = Open::init_encrypted(Writers::Many, store, chunking, &key, &context()).await;
        let open = made.unwrap();
        Self { open, message: message(&path, &[("passphrase", PASSPHRASE)]) }
    }

    /// The snapshot that an upload has made.
    pub async fn snapshot(&self, upload: &Upload) -> SnapshotRecord {
        let id: SnapshotId = upload.id.parse().unwrap();
        resolve(&self.open, id, MAX_ATTEMPTS).await.unwrap()
    }

    /// A request for a snapshot of some volumes.
    pub fn take(&self, name: &str, volumes: &[&str]) -> TakeSnapshotRequest {
        let member = |volume: &&str| SnapshotMember {
            volume: (*volume).to_owned(),
            name: format!("as {volume}"),
        };
        TakeSnapshotRequest {
            repository: Some(self.message.clone()),
            experiment: "e".to_owned(),
            run: "r".to_owned(),
            name: format!("{name} in the repository"),
            labels: HashMap::from([("step".to_owned(), "train".to_owned())]),
            metadata: HashMap::from([(CSI_NAME.to_owned(), name.to_owned())]),
            members: volumes.iter().map(member).collect(),
            go_on: false,
        }
    }

    /// A request for a volume from a snapshot.
    pub fn clone_of(
        &self,
        snapshot: &SnapshotRecord,
        name: &str,
        size_bytes: u64,
    ) -> CreateVolumeRequest {
        let source = SnapshotSource {
            repository: Some(self.message.clone()),
            snapshot: snapshot.id.to_string(),
            volume: snapshot.volumes[0].name.to_string(),
            origin: format!("{}#@{}", self.message.url, snapshot.id),
        };
        CreateVolumeRequest {
            source: Some(Source::Snapshot(source)),
            ..create(name, size_bytes, "ext4")
        }
    }
}

pub fn message(path: &Path, secrets: &[(&str, &str)]) -> Repository {
    let pairs = secrets.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    Repository { url: format!("file://{}", path.display()), secrets: pairs.collect() }
}

/// A request for an empty volume.
pub fn create(name: &str, size_bytes: u64, filesystem: &str) -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: name.to_owned(),
        size_bytes,
        filesystem: filesystem.to_owned(),
        metadata: HashMap::from([(CSI_NAME.to_owned(), format!("csi {name}"))]),
        source: None,
    }
}

pub async fn wait_for(what: &str, is: impl AsyncFn() -> bool) {
    let begun = Instant::now();
    while !is().await {
        assert!(begun.elapsed() < PATIENCE, "{what} did not come");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
