//! Pools and volumes on the command line. Needs root, loop devices and the tools named below.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "a test may panic and talk"
)]

mod common;

use std::fs;

use common::Sandbox;
use petra_tests::pool::{can_have_pools, take_apart};
use serde_json::Value;

/// A sandbox whose mounts end with it.
struct Pools(Sandbox);

impl Drop for Pools {
    fn drop(&mut self) {
        take_apart(&self.0.path(""));
    }
}

/// The names of an object's fields.
fn fields(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

const VOLUME: [&str; 16] = [
    "allocated_bytes",
    "base",
    "copies",
    "created",
    "device",
    "direct_io",
    "filesystem",
    "filesystem_space",
    "id",
    "lazy",
    "mounts",
    "name",
    "origin",
    "read_only",
    "sector_bytes",
    "size_bytes",
];

#[test]
fn a_volume_from_the_cradle_to_the_grave() {
    if !can_have_pools() {
        return;
    }
    let mut pools = Pools(Sandbox::new());
    let petra = &mut pools.0;
    let made = petra.json("pool init pool.img --size 2G");
    assert_eq!(fields(&made), ["backend", "id", "mounted", "pool"]);
    let root = petra.path("pool").to_str().unwrap().to_owned();
    petra.environment.push(("PETRA_POOL".to_owned(), root.clone()));
    let status = petra.json("pool status");
    assert_eq!(
        fields(&status),
        [
            "available_bytes",
            "backend",
            "created",
            "free_bytes",
            "id",
            "limit_bytes",
            "overcommit_percent",
            "pool",
            "promised_bytes",
            "reserve_bytes",
            "total_bytes",
            "volumes"
        ]
    );

    assert_eq!(petra.ok("volume create data --size 64M"), "data");
    petra.fails("volume create data --size 64M", 2, &["exists already", "choose another name"]);
    petra.fails("volume create b --size 1X", 2, &["is no size"]);
    petra.fails("volume create b --size 1T", 2, &["has no room", "petra pool status"]);
    petra.fails("volume create b/c --size 1G", 2, &["'/' separates names"]);
    petra.fails("volume mount dta at", 2, &["no volume", "did you mean \"data\"?"]);
    petra.ok("volume mount data at");
    fs::write(petra.path("at/file"), "some").unwrap();
    petra.fails("volume detach data", 2, &["in use: mounted at", "first: umount"]);
    petra.fails("volume rm data", 2, &["in use: attached to /dev/loop"]);
    let listed = petra.json("volume ls");
    assert_eq!(fields(&listed), ["unreadable", "volumes"]);
    assert_eq!(fields(&listed["volumes"][0]), VOLUME);
    assert_eq!(listed["volumes"][0]["direct_io"], true);
    let info = petra.json("volume info data");
    assert!(info["filesystem_space"]["inodes"].as_u64().unwrap() > 0);
    assert_eq!(
        fields(&info["usage"]),
        ["exclusive_bytes", "extents", "shared_bytes", "unwritten_bytes"]
    );
    assert!(petra.ok("volume info data").contains("\nmounted at"));
    petra.ok("volume unmount data");
    petra.ok("volume grow data 128M");
    petra.fails("volume grow data 64M", 2, &["volumes don't shrink"]);
    petra.ok("volume mount data at --read-only");
    assert_eq!(fs::read_to_string(petra.path("at/file")).unwrap(), "some");
    petra.ok("volume unmount data");
    let device = petra.ok("volume attach data");
    assert!(device.starts_with("/dev/loop"), "{device}");
    petra.ok("volume detach data");

    let recovered = petra.json("pool recover");
    assert_eq!(recovered["done"], serde_json::json!([]));
    fs::create_dir(format!("{root}/new/rubbish")).unwrap();
    let recovered = petra.json("pool recover");
    assert_eq!(recovered["done"][0]["did"], "deleted");

    let findings = petra.json("doctor");
    let state = |name: &str| {
        let all = findings["findings"].as_array().unwrap();
        all.iter().find(|finding| finding["name"] == name).unwrap()["health"].clone()
    };
    assert_eq!(state("pool"), "ok");
    assert_eq!(state("loop direct I/O"), "ok");

    fs::write(format!("{root}/volumes/data/volume.json"), "{\"format\": 2}").unwrap();
    let done = petra.run("volume ls");
    assert!(done.code == 0 && done.stderr.contains("has format version 2"), "{}", done.stderr);
    petra.fails("volume attach data", 2, &["has format version 2", "a newer Petra"]);
    fs::remove_file(format!("{root}/volumes/data/volume.json")).unwrap();
    petra.fails("volume rm data", 3, &["volume.json is damaged"]);
}

#[test]
fn places_that_can_be_no_pool() {
    if !can_have_pools() {
        return;
    }
    let mut pools = Pools(Sandbox::new());
    let petra = &mut pools.0;
    fs::create_dir(petra.path("full")).unwrap();
    fs::write(petra.path("full/file"), "").unwrap();
    petra.fails("pool init full", 2, &["is not empty: it holds file"]);
    petra.fails("pool init file.img --size 1M", 2, &["a pool needs at least"]);
    petra.fails("pool init file --size 1G", 2, &["no place yet", "--at DIR"]);
    petra.fails("pool init file.img --at x", 2, &["is not mounted", "leave out --at"]);
    petra.fails("pool init file.img --size 1G --filesystem zfs", 2, &["btrfs or xfs"]);
    petra.fails("pool status", 2, &["--pool"]);
    petra.fails("pool status --pool full", 2, &["no pool \"full\"", "petra pool init"]);
}
