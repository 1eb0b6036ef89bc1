//! Block devices and images in use. Needs root and the tools named below.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "a test may panic and talk"
)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::Sandbox;
use petra_tests::require;

/// True where loop devices can be made; says what is missing elsewhere.
fn can_attach() -> bool {
    let tools = ["losetup", "mkfs.ext4", "mount", "umount"];
    require::root() && tools.iter().all(|name| require::tool(name).is_some())
}

/// A loop device on an image, until the end of the test.
struct Loop(PathBuf);

impl Loop {
    fn attach(image: &Path) -> Self {
        let output =
            Command::new("losetup").args(["--find", "--show"]).arg(image).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self(String::from_utf8(output.stdout).unwrap().trim().into())
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// A mounted file system, until the end of the test.
struct Mount(PathBuf);

impl Mount {
    fn new(device: &Path, at: PathBuf) -> Self {
        std::fs::create_dir(&at).unwrap();
        assert!(Command::new("mount").arg(device).arg(&at).status().unwrap().success());
        Self(at)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_block_device_as_source_and_target() {
    if !can_attach() {
        return;
    }
    let mut petra = Sandbox::with_story();
    let disk = Loop::attach(&petra.volume("disk.img", 8 << 20, 2 << 20, 4));
    let small = Loop::attach(&petra.volume("small.img", 1 << 20, 1 << 20, 5));

    petra.ok(&format!("restore ./repo#iris/run-1/initial/workspace {}", disk.path()));
    petra.ok(&format!("snapshot {} ./repo#iris/run-1 --name device", disk.path()));
    petra.ok("restore ./repo#iris/run-1/device copy.img");
    petra.assert_same("copy.img", "work-before.img");
    let [a, b] = ["initial", "device"].map(|name| {
        petra.json(&format!("info ./repo#iris/run-1/{name}/workspace"))["volume"]["content"].clone()
    });
    assert_eq!(a, b);

    petra.fails(
        &format!("restore ./repo#iris/run-1/initial/workspace {}", small.path()),
        2,
        &["the device has 1048576 bytes, the volume 8388608", "at least as large"],
    );
}

#[test]
fn what_is_in_use_is_not_overwritten() {
    if !can_attach() {
        return;
    }
    let mut petra = Sandbox::with_story();
    let image = petra.volume("disk.img", 16 << 20, 0, 4);
    assert!(Command::new("mkfs.ext4").arg("-q").arg(&image).status().unwrap().success());
    let disk = Loop::attach(&image);
    let restore = "restore ./repo#iris/run-1/initial/workspace";
    let attached = format!("attached to {}", disk.path());
    {
        let mount = Mount::new(&disk.0, petra.path("mnt"));
        let mounted = format!("mounted at {}", mount.0.canonicalize().unwrap().display());
        petra.fails(&format!("{restore} {}", disk.path()), 2, &[&mounted, "hint: first: umount "]);
        petra.fails(&format!("{restore} disk.img --in-place"), 2, &[&mounted, &attached]);

        let done = petra.run("snapshot disk.img ./repo#iris/run-1");
        assert_eq!(done.code, 0, "{}", done.stderr);
        assert!(done.stderr.contains("warning: disk.img is mounted at"), "{}", done.stderr);
        assert!(done.stderr.contains("may be torn; freeze or unmount it first"), "{}", done.stderr);
    }
    petra.fails(&format!("{restore} disk.img --in-place"), 2, &[&attached, "losetup -d"]);
    drop(disk);
    petra.ok(&format!("{restore} disk.img --in-place"));
    petra.assert_same("disk.img", "work-before.img");
}
