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

#[test]
fn a_clone_on_another_machine_starts_before_its_data_is_there() {
    if !can_have_pools() {
        return;
    }
    let mut sandbox = Sandbox::new();
    let home = sandbox.path("").canonicalize().unwrap();
    let _cleanup = Cleanup(home.clone());
    sandbox.ok("init ./repo");
    sandbox.ok("pool init near.img --size 4G --at near");
    sandbox.ok("pool init far.img --size 4G --at far --filesystem xfs");
    let pool = |name: &str| format!("--pool {}", home.join(name).display());
    let (near, far) = (pool("near"), pool("far"));

    // A group, written while it is snapshotted.
    sandbox.ok(&format!("volume create {near} work --size 512M"));
    sandbox.ok(&format!("volume create {near} data --size 512M --filesystem xfs"));
    sandbox.ok(&format!("volume mount {near} work at-work"));
    sandbox.ok(&format!("volume mount {near} data at-data"));
    write_files(&home.join("at-work"), 1, 60);
    write_files(&home.join("at-data"), 2, 10);
    let stop = AtomicBool::new(false);
    let busy = home.join("at-work/busy");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for seed in 0.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                fs::write(&busy, noise(seed, 300_000)).unwrap();
            }
        });
        sandbox.ok(&format!("volume snapshot {near} work data ./repo#e/r --name first"));
        stop.store(true, Ordering::Relaxed);
    });

    // By reference where the copy is, lazily elsewhere.
    let made = sandbox.json(&format!("clone {near} ./repo#e/r/first/work again"));
    assert_eq!(made["how"], "reference");
    sandbox.ok(&format!("volume mount {near} again at-again"));
    assert!(has_files(&home.join("at-again"), 1, 60));
    let made = sandbox.json(&format!("clone {far} ./repo#e/r/first/work there"));
    assert_eq!(made["how"], "lazy");
    sandbox.ok(&format!("volume mount {far} there at-there"));

    // Without an agent, what is missing waits for the next one.
    end_agents(&home, "-KILL");
    std::thread::scope(|scope| {
        let read = scope.spawn(|| has_files(&home.join("at-there"), 1, 60));
        std::thread::sleep(Duration::from_millis(300));
        // Whoever attaches a lazy clone makes sure that there is an agent.
        sandbox.ok(&format!("clone {far} ./repo#e/r/first/data other"));
        sandbox.ok(&format!("volume mount {far} other at-other"));
        assert!(read.join().unwrap());
    });
    assert!(has_files(&home.join("at-other"), 2, 10));
    sandbox.fails("clone ./repo#e/r/first x --pool nowhere", 2, &["no pool"]);
    sandbox.fails(&format!("clone {far} ./repo#e/r/first x"), 2, &["has 2 volumes"]);

    // The snapshot goes, and the clone does not mind.
    write_files(&home.join("at-there"), 3, 20);
    sandbox.ok("rm ./repo#e/r/first");
    sandbox.ok("gc ./repo --grace 0");
    let hydrated = |sandbox: &mut Sandbox| {
        wait_for("the last of the data", || {
            sandbox.json(&format!("volume info {far} there"))["lazy"] == false
        });
    };
    hydrated(&mut sandbox);
    assert!(has_files(&home.join("at-there"), 1, 60) && has_files(&home.join("at-there"), 3, 20));

    // A snapshot of the clone, brought back on the first machine.
    sandbox.ok(&format!("volume snapshot {far} there ./repo#e/r --name second"));
    sandbox.ok(&format!("mount {near} ./repo#e/r/second at-back"));
    assert!(has_files(&home.join("at-back"), 1, 60) && has_files(&home.join("at-back"), 3, 20));
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
        fs::read_dir(home.join("repo/pins")).map_or(true, |mut pins| {
            pins.all(|owner| fs::read_dir(owner.unwrap().path()).map_or(true, |d| d.count() == 0))
        })
    });
    sandbox.ok("verify ./repo --read-data");
}
