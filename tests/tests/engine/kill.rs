//! kill -9 at any moment of a snapshot or a restore: what was committed stays, and the next run just works.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use petra_engine::SnapshotId;
use petra_engine::restore::{RestoreOptions, restore};
use petra_engine::store::LocalStore;
use petra_engine::target::FileTarget;
use petra_engine::url::Item;
use petra_tests::lab::{assert_tidy, check, context, init, take, verify_all};
use petra_tests::volume::{Volume, noise};

use super::runtime;

/// How often each is killed.
const ROUNDS: u64 = 10;

fn volume(round: u64) -> Volume {
    Volume::zeros(9 << 20).with(0, &noise(0, 6 << 20)).with(round * 500_000, &noise(round, 2 << 20))
}

/// A process that snapshots or restores again and again.
fn start(verb: &str, dir: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_petra-test-child"))
        .arg(verb)
        .arg(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Lets a child work for a while, different each time, and kills it.
#[expect(clippy::print_stdout, reason = "shown when the test fails")]
fn kill_after(mut child: Child, round: u64) {
    let millis = 5 + u64::from(noise(round, 1)[0]) * 3 / 4;
    println!("round {round}: killed after {millis} ms");
    std::thread::sleep(Duration::from_millis(millis));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(LocalStore::new(&dir.path().join("repo")));
    let runtime = runtime();
    let repo = runtime.block_on(init(store));
    let mut committed: Vec<SnapshotId> = Vec::new();
    for round in 0..ROUNDS {
        volume(round).save(&dir.path().join("source"));
        kill_after(start("snapshot", dir.path()), round);
        runtime.block_on(async {
            assert_eq!(verify_all(&repo, true).await.unwrap().problems, []);
            let taken = take(&repo, &volume(round)).await.unwrap();
            check(&repo, &taken.volumes[0], &volume(round)).await.unwrap();
            let listed = repo.snapshots(&Item::Repository).await.unwrap();
            let listed: Vec<SnapshotId> = listed.iter().map(|record| record.id).collect();
            assert!(committed.iter().all(|id| listed.contains(id)), "nothing committed is lost");
            committed = listed;
        });
    }
    runtime.block_on(assert_tidy(&repo));
}

#[test]
fn a_restore() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(LocalStore::new(&dir.path().join("repo")));
    let runtime = runtime();
    let repo = runtime.block_on(init(store));
    let taken = runtime.block_on(take(&repo, &volume(1))).unwrap();
    let path = dir.path().join("target");
    for round in 0..ROUNDS {
        kill_after(start("restore", dir.path()), round);
        // A target that is there is whole.
        if path.exists() {
            assert_eq!(volume(1).difference(&path), None);
            std::fs::remove_file(&path).unwrap();
        }
        runtime.block_on(async {
            let target = FileTarget::create(&path, volume(1).len()).unwrap();
            let options = RestoreOptions::default();
            restore(&repo, &taken.volumes[0], target, &options, &context()).await.unwrap();
        });
        assert_eq!(volume(1).difference(&path), None);
        assert!(!dir.path().join("target.partial").exists());
        std::fs::remove_file(&path).unwrap();
    }
}
