//! Pools for tests, on loop devices over files, taken apart whatever happens to the test.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use petra_engine::Name;
use petra_engine::context::SystemHost;
use petra_volume::pool::{CreateRequest, Filesystem, InitRequest, Place};
use petra_volume::{BackendKind, Pool, Volume};
use tempfile::TempDir;

use crate::require;

/// A pool of its own. What is mounted or attached in it goes when it is dropped, also by a panic.
#[derive(Debug)]
pub struct TestPool {
    /// The pool.
    pub pool: Pool,
    directory: TempDir,
}

impl TestPool {
    /// A pool of 8 GiB, which take room only as they are filled. `None` where this machine does not allow it.
    pub fn new(kind: BackendKind) -> Option<Self> {
        Self::with_size(kind, 8 << 30)
    }

    /// A pool of this size in bytes.
    pub fn with_size(kind: BackendKind, size_bytes: u64) -> Option<Self> {
        Self::with(kind, size_bytes, |_| {})
    }

    /// A pool that is made in another way than by default.
    pub fn with(
        kind: BackendKind,
        size_bytes: u64,
        adjust: impl FnOnce(&mut InitRequest),
    ) -> Option<Self> {
        if !can_have_pools() {
            return None;
        }
        let directory = tempfile::tempdir().expect("temporary directory");
        let at = directory.path().join("pool");
        let file = directory.path().join("pool.img");
        let mut request = InitRequest::new(Place::File { file, size_bytes, at });
        request.filesystem = Some(kind);
        adjust(&mut request);
        let made = Pool::init(&request, Arc::new(SystemHost)).expect("a new pool");
        Some(Self { pool: made.pool, directory })
    }

    /// A directory beside the pool, for mount points and files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A new volume.
    pub fn create(&self, name: &str, size_bytes: u64, filesystem: Filesystem) -> Volume {
        let request = CreateRequest::new(volume_name(name), size_bytes, filesystem);
        self.pool.create(request).expect("a new volume")
    }

    /// Opens the pool as another process would.
    pub fn reopened(&self) -> Pool {
        Pool::open(self.pool.root(), Arc::new(SystemHost)).expect("the pool")
    }
}

impl Drop for TestPool {
    fn drop(&mut self) {
        // A panic in a drop would hide the first one, so what fails here is left.
        take_apart(self.directory.path());
    }
}

/// True where this machine allows pools; says what is missing otherwise.
pub fn can_have_pools() -> bool {
    let tools = ["mkfs.btrfs", "mkfs.xfs", "mkfs.ext4"];
    if !require::root() || tools.iter().any(|tool| require::tool(tool).is_none()) {
        return false;
    }
    if !Path::new("/dev/loop-control").exists() {
        require::unmet("there are no loop devices here");
        return false;
    }
    true
}

/// A volume's name.
pub fn volume_name(name: &str) -> Name {
    Name::new("volume", name).expect("a name")
}

/// Unmounts everything below a directory and detaches the devices of files in it.
pub fn take_apart(directory: &Path) {
    const ROUNDS: usize = 5;
    for at in mounts_below(directory) {
        // A frozen file system can't be unmounted.
        let _ = Command::new("fsfreeze").arg("--unfreeze").arg(&at).output();
    }
    // What stands on what is taken away layer by layer.
    for round in 1..=ROUNDS {
        for at in mounts_below(directory) {
            let mut umount = Command::new("umount");
            if round == ROUNDS {
                // Not before: then the devices on what was in it can't be found any more.
                umount.arg("--lazy");
            }
            let _ = umount.arg(&at).output();
        }
        for device in loop_devices_below(directory) {
            let _ = Command::new("losetup").arg("--detach").arg(device).output();
        }
    }
}

/// The mounts below a directory, the last first.
fn mounts_below(directory: &Path) -> Vec<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    let points = points.map(|at| PathBuf::from(at.replace("\\040", " ")));
    let mut points: Vec<PathBuf> = points.filter(|at| at.starts_with(directory)).collect();
    points.reverse();
    points
}

/// The loop devices that stand on files below a directory.
pub fn loop_devices_below(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir("/sys/block") else { return vec![] };
    let devices = entries.flatten().filter(|entry| {
        std::fs::read_to_string(entry.path().join("loop/backing_file"))
            .is_ok_and(|file| Path::new(file.trim_end()).starts_with(directory))
    });
    devices.map(|entry| Path::new("/dev").join(entry.file_name())).collect()
}

/// The BLAKE3 hash of a file, read around what other tests have in the page cache.
pub fn hash(path: &Path) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    let file = File::open(path).expect("a file to hash");
    hasher.update_reader(file).expect("a file that can be read");
    hasher.finalize()
}
