//! Small filesystems for tests, unmounted whatever happens to the test.

use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::require;

/// A filesystem in memory. Unmounted when dropped, also by a panic.
#[derive(Debug)]
pub struct Tmpfs {
    dir: TempDir,
}

impl Tmpfs {
    /// Mounts one, with the options of mount(8). `None` where this machine does not allow it.
    pub fn mount(options: &str) -> Option<Self> {
        if !require::root() {
            return None;
        }
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut mount = Command::new("mount");
        let done =
            mount.args(["-t", "tmpfs", "-o", options, "petra-test"]).arg(dir.path()).status();
        if done.is_ok_and(|status| status.success()) {
            return Some(Self { dir });
        }
        require::unmet("mounting is not allowed here");
        None
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Changes its options.
    pub fn remount(&self, options: &str) {
        let mut mount = Command::new("mount");
        let status = mount.args(["-o", &format!("remount,{options}")]).arg(self.path()).status();
        assert!(status.expect("mount(8)").success(), "remounting with {options}");
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily, since a failed test may have files open. A panic in a drop would hide the first one.
        let _ = Command::new("umount").arg("--lazy").arg(self.path()).status();
    }
}
