//! Snapshots of live volumes by the command line. Needs root and loop devices.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a test may panic"
)]

mod common;

use std::fs;
use std::path::PathBuf;

use common::Sandbox;
use petra_tests::pool::{can_have_pools, take_apart};

/// Takes apart what is mounted and attached, also after a panic.
struct Cleanup(PathBuf);

impl Drop for Cleanup {
    fn drop(&mut self) {
        take_apart(&self.0);
    }
}

#[test]
fn a_volume_is_snapshotted_while_it_is_mounted() {
    if !can_have_pools() {
        return;
    }
    let mut sandbox = Sandbox::new();
    let pool = sandbox.path("pool");
    sandbox.environment.push(("PETRA_POOL".into(), pool.to_str().unwrap().into()));
    let _cleanup = Cleanup(sandbox.path("").canonicalize().unwrap());
    sandbox.ok("init ./repo");
    sandbox.ok("pool init pool.img --size 4G --at pool");
    sandbox.ok("volume create data --size 64M");
    sandbox.ok("volume create other --size 64M");
    sandbox.ok("volume mount data at");
    let at = sandbox.path("at");
    fs::write(at.join("file"), vec![7; 300_000]).unwrap();

    let line = "volume snapshot data models=other ./repo#e/r --name first --label step=one \
                --hook-before true --hook-after true --rate 1G";
    let made = sandbox.json(line);
    assert_eq!(made["name"], "first");
    assert_eq!(made["labels"]["step"], "one");
    assert!(made["pause_ms"].as_u64().unwrap() < 10_000);
    let names: Vec<&str> =
        made["volumes"].as_array().unwrap().iter().map(|v| v["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["data", "models"]);
    fs::write(at.join("more"), vec![8; 300_000]).unwrap();

    // Later, and what is never uploaded.
    let waiting = sandbox.ok("volume snapshot data ./repo#e/r --later");
    let given_up = sandbox.ok("volume snapshot data ./repo#e/r --later");
    let document = sandbox.json(&format!("volume upload --give-up {given_up}"));
    assert_eq!(document["given_up"][0], given_up);
    let urls = sandbox.ok("volume upload");
    assert_eq!(urls.lines().count(), 1);
    assert_eq!(sandbox.ok("volume upload"), "");
    sandbox.fails(&format!("volume upload {waiting}"), 2, &["no upload"]);

    // One that can't be read keeps no other waiting.
    let damaged = "00000000000000000000000001";
    fs::write(pool.join(format!("uploads/{damaged}.json")), "{").unwrap();
    let behind_it = sandbox.ok("volume snapshot data ./repo#e/r --later");
    sandbox.fails("volume upload", 3, &[damaged]);
    sandbox.fails(&format!("volume upload {behind_it}"), 2, &["no upload"]);
    fs::remove_file(pool.join(format!("uploads/{damaged}.json"))).unwrap();

    // What was written is in it, and a second writer of the volume does not tear it.
    sandbox.ok(&format!("restore {urls} restored.img"));
    sandbox.ok("volume unmount data");
    let restored = sandbox.path("restored.img");
    let mounted = sandbox.path("restored");
    fs::create_dir(&mounted).unwrap();
    let mut mount = std::process::Command::new("mount");
    assert!(mount.args(["-o", "loop"]).arg(&restored).arg(&mounted).status().unwrap().success());
    assert_eq!(fs::read(mounted.join("file")).unwrap(), vec![7; 300_000]);
    assert_eq!(fs::read(mounted.join("more")).unwrap(), vec![8; 300_000]);

    let before = sandbox.ok("ls ./repo#e/r").lines().count();
    sandbox.fails("volume snapshot data ./repo#e/r --hook-before false", 2, &["hook sh -c false"]);
    sandbox.fails("volume snapshot none ./repo#e/r", 2, &["no volume \"none\""]);
    sandbox.fails("volume snapshot data data ./repo#e/r", 2, &["named twice"]);
    sandbox.fails("volume snapshot data ./repo#e", 2, &["does not name a run"]);
    assert_eq!(sandbox.ok("ls ./repo#e/r").lines().count(), before);
}
