//! File systems of every kind on loop devices, unmounted whatever happens to the test.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::require;

/// A mounted file system over a sparse file.
#[derive(Debug)]
pub struct Disk {
    /// Holds the image and the mount point.
    dir: TempDir,
    path: PathBuf,
}

impl Disk {
    /// Makes and mounts an `ext4`, `xfs` or `btrfs`. `None` where this machine does not allow it.
    pub fn make(kind: &str, len_bytes: u64) -> Option<Self> {
        if !require::root() {
            return None;
        }
        let mkfs = require::tool(&format!("mkfs.{kind}"))?;
        let dir = tempfile::tempdir().expect("temporary directory");
        let image = dir.path().join("image");
        File::create(&image).and_then(|file| file.set_len(len_bytes)).expect("a sparse file");
        let force = if kind == "ext4" { "-F" } else { "-f" };
        let made = Command::new(mkfs).args(["-q", force]).arg(&image).output();
        let made = made.expect("mkfs(8)");
        assert!(made.status.success(), "mkfs.{kind}: {}", String::from_utf8_lossy(&made.stderr));
        let path = dir.path().join("mounted");
        std::fs::create_dir(&path).expect("a mount point");
        let mut mount = Command::new("mount");
        let done = mount.args(["-t", kind, "-o", "loop"]).arg(&image).arg(&path).status();
        if done.is_ok_and(|status| status.success()) {
            return Some(Self { dir, path });
        }
        require::unmet("mounting is not allowed here");
        None
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file below it.
    pub fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // A frozen one would keep its device for ever. A panic in a drop would hide the first one.
        let _ = Command::new("fsfreeze")
            .arg("--unfreeze")
            .arg(&self.path)
            .stderr(std::process::Stdio::null())
            .status();
        // Lazily, since a failed test may have files open. The loop device goes with the last of them.
        let _ = Command::new("umount").arg("--lazy").arg(&self.path).status();
    }
}
