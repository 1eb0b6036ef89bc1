//! The life of live volumes on two machines, by the command line: here each machine is a pool. Needs root, loop devices
//! and FUSE.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a test may panic"
)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::Sandbox;
use petra_tests::pool::{can_have_pools, take_apart};
use petra_tests::s3::{Access, InProcessS3};
use petra_tests::slow::SlowWay;
use petra_tests::volume::noise;

/// Longer than any step takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Takes apart what is mounted and attached, and ends the agents, also after a panic.
struct Cleanup(PathBuf);

impl Drop for Cleanup {
    fn drop(&mut self) {
        take_apart(&self.0);
        end_agents(&self.0, "-TERM");
    }
}

/// Sends a signal to the agents of all pools below a directory.
fn end_agents(directory: &Path, signal: &str) {
    let pattern = format!("pool agent --until-idle --pool {}", directory.display());
    let _ = Command::new("pkill").args([signal, "-f", &pattern]).status();
}

/// Files with noise, which can be told apart.
fn write_files(directory: &Path, seed: u64, count: u64) {
    for n in 0..count {
        fs::write(directory.join(format!("{seed}-{n}")), noise(seed * 1000 + n, 700_000)).unwrap();
    }
}

fn has_files(directory: &Path, seed: u64, count: u64) -> bool {
    (0..count).all(|n| {
        let file = directory.join(format!("{seed}-{n}"));
        fs::read(file).is_ok_and(|bytes| bytes == noise(seed * 1000 + n, 700_000))
    })
}

fn wait_for(what: &str, mut is: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < PATIENCE, "{what} did not come");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Writes a file again and again until it is told to stop.
fn keep_writing(file: &Path, stop: &AtomicBool) {
    for seed in 0.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        fs::write(file, noise(seed, 300_000)).unwrap();
    }
}

#[test]
fn a_clone_on_another_machine_starts_before_its_data_is_there() {
    if !can_have_pools() {
        return;
    }
    let server = InProcessS3::start();
    let way =
        SlowWay::to(server.access().endpoint.strip_prefix("http://").unwrap().parse().unwrap());
    let mut sandbox = Sandbox::new();
    let variables = server.access().environment();
    sandbox.environment = variables.map(|(name, value)| (name.to_owned(), value)).into();
    let home = sandbox.path("").canonicalize().unwrap();
    let _cleanup = Cleanup(home.clone());
    // One repository, which the second machine is far from.
    let url = |access: &Access| {
        let Access { endpoint, bucket, .. } = access;
        format!("s3://{bucket}/repo?endpoint={endpoint}&region=us-east-1")
    };
    let (repo, far_repo) = (url(server.access()), url(&Access::to(way.address())));
    sandbox.ok(&format!("init {repo}"));
    sandbox.ok("pool init near.img --size 4G --at near");
    sandbox.ok("pool init far.img --size 4G --at far --filesystem xfs");
    let pool = |name: &str| format!("--pool {}", home.join(name).display());
    let (near, far) = (pool("near"), pool("far"));

    // A group, written while it is snapshotted.
    sandbox.ok(&format!("volume create {near} work --size 512M"));
    sandbox.ok(&format!("volume create {near} data --size 512M --filesystem xfs"));
    sandbox.ok(&format!("volume mount {near} work at-work"));
    sandbox.ok(&format!("volume mount {near} data at-data"));
    write_files(&home.join("at-work"), 1, 100);
    write_files(&home.join("at-data"), 2, 10);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for volume in ["at-work", "at-data"] {
            let (busy, stop) = (home.join(volume).join("busy"), &stop);
            scope.spawn(move || keep_writing(&busy, stop));
        }
        sandbox.ok(&format!("volume snapshot {near} work data {repo}#e/r --name first"));
        stop.store(true, Ordering::Relaxed);
    });

    // By reference where the copy is, lazily elsewhere.
    let made = sandbox.json(&format!("clone {near} {repo}#e/r/first/work again"));
    assert_eq!(made["how"], "reference");
    sandbox.ok(&format!("volume mount {near} again at-again"));
    assert!(has_files(&home.join("at-again"), 1, 100));
    way.limit(4 << 20);
    let made = sandbox.json(&format!("clone {far} {far_repo}#e/r/first/work there"));
    assert_eq!(made["how"], "lazy");
    sandbox.ok(&format!("volume mount {far} there at-there --patience 120"));
    let info =
        |sandbox: &mut Sandbox, volume: &str| sandbox.json(&format!("volume info {far} {volume}"));
    assert_eq!(info(&mut sandbox, "there")["sector_bytes"], 4096);

    // Without an agent, what is missing waits for the next one.
    end_agents(&home, "-KILL");
    std::thread::scope(|scope| {
        let read = scope.spawn(|| has_files(&home.join("at-there"), 1, 3));
        std::thread::sleep(Duration::from_millis(300));
        // Whoever attaches a lazy clone makes sure that there is an agent.
        sandbox.ok(&format!("clone {far} {far_repo}#e/r/first/data other"));
        sandbox.ok(&format!("volume mount {far} other at-other"));
        assert!(read.join().unwrap());
    });
    sandbox.fails("clone ./repo#e/r/first x --pool nowhere", 2, &["no pool"]);
    sandbox.fails(&format!("clone {far} {repo}#e/r/first x"), 2, &["has 2 volumes"]);

    // The snapshot goes while most of its data is still there alone, and the clone does not mind.
    way.limit(64 << 10);
    write_files(&home.join("at-there"), 3, 20);
    sandbox.ok(&format!("rm {repo}#e/r/first"));
    sandbox.ok(&format!("gc {repo} --grace 0"));
    assert_eq!(info(&mut sandbox, "there")["lazy"], true, "some of it has to come yet");
    way.limit(0);
    for volume in ["there", "other"] {
        wait_for("the last of the data", || info(&mut sandbox, volume)["lazy"] == false);
    }
    assert!(has_files(&home.join("at-there"), 1, 100) && has_files(&home.join("at-there"), 3, 20));
    assert!(has_files(&home.join("at-other"), 2, 10));

    // Snapshots of the clone, the second one incremental, brought back on the first machine.
    sandbox.ok(&format!("volume snapshot {far} there {far_repo}#e/r --name second"));
    write_files(&home.join("at-there"), 4, 3);
    let begun = Instant::now();
    sandbox.ok(&format!("volume snapshot {far} there {far_repo}#e/r --name third --rate 256K"));
    // At this rate, to read all of it takes six minutes on any machine.
    assert!(begun.elapsed() < Duration::from_secs(300), "{:?}", begun.elapsed());
    sandbox.ok(&format!("mount {near} {repo}#e/r/third at-back"));
    for (seed, count) in [(1, 100), (3, 20), (4, 3)] {
        assert!(has_files(&home.join("at-back"), seed, count), "files {seed}");
    }
    sandbox.ok(&format!("unmount {near} at-back"));

    // Attached again it needs no server, and the pins are gone with what needed them.
    sandbox.ok(&format!("volume unmount {far} there"));
    sandbox.ok(&format!("volume mount {far} there at-there"));
    assert!(has_files(&home.join("at-there"), 3, 20));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(home.join("far/volumes/there/lazy").to_str().unwrap()));
    for volume in ["there", "other"] {
        sandbox.ok(&format!("volume unmount {far} {volume}"));
        sandbox.ok(&format!("volume rm {far} {volume}"));
    }
    wait_for("the end of the pins", || {
        fs::read_dir(server.directory().join("repo/pins")).map_or(true, |mut pins| {
            pins.all(|owner| fs::read_dir(owner.unwrap().path()).map_or(true, |d| d.count() == 0))
        })
    });
    sandbox.ok(&format!("verify {repo} --read-data"));
}
