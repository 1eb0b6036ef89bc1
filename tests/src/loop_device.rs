//! Loop devices for tests, detached whatever happens to the test.

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::require;

/// A block device over a file. Detached when dropped, also by a panic.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    _dir: TempDir,
}

impl LoopDevice {
    /// Attaches a file that `make` writes. `None` where this machine does not allow it.
    pub fn attach(make: impl FnOnce(&Path)) -> Option<Self> {
        if !require::root() {
            return None;
        }
        require::tool("losetup")?;
        let dir = tempfile::tempdir().expect("temporary directory");
        let image = dir.path().join("image");
        make(&image);
        let answer = Command::new("losetup").args(["--find", "--show"]).arg(&image).output();
        let answer = answer.expect("losetup(8)");
        if !answer.status.success() {
            require::unmet("loop devices are not allowed here");
            return None;
        }
        let path = String::from_utf8(answer.stdout).expect("a device's name");
        Some(Self { path: path.trim().into(), _dir: dir })
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // A panic in a drop would hide the first one.
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}
