//! Snapshots of volumes of a pool: groups, hooks, and uploads across crashes.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use petra_engine::restore::{RestoreOptions, restore};
use petra_engine::session::Session;
use petra_engine::store::MemoryStore;
use petra_engine::target::FileTarget;
use petra_engine::url::Item;
use petra_engine::{Repository, SnapshotId};
use petra_tests::lab::{context, init, name, verify_all};
use petra_tests::pool::{TestPool, hash};
use petra_tests::recording::{Operation, Recording};
use petra_tests::volume::noise;
use petra_volume::freeze::GuardCommand;
use petra_volume::pool::{Filesystem, Recovered};
use petra_volume::snapshot::{
    GroupRequest, Hook, MAX_ATTEMPTS, Target, Upload, UploadState, discard, is_being_done, pending,
    read_ahead, resolve, take,
};
use petra_volume::{BackendKind, Error, Volume};

const MIB: u64 = 1 << 20;
const LONG: Duration = Duration::from_secs(60);

/// A request for a snapshot of some volumes under their own names.
pub fn group(volumes: &[&Volume]) -> GroupRequest {
    GroupRequest {
        target: Target {
            repository: "memory".to_owned(),
            experiment: name("e"),
            run: name("r"),
            name: None,
            labels: BTreeMap::new(),
            message: None,
            metadata: BTreeMap::new(),
        },
        volumes: volumes.iter().map(|v| (v.name().clone(), v.name().clone())).collect(),
        before: None,
        after: None,
        guard: GuardCommand::new(env!("CARGO_BIN_EXE_petra-test-freezer"), ["guard"]),
        limit: LONG,
        rate_bytes_per_s: None,
    }
}

async fn new_repo() -> Repository {
    init(Arc::new(MemoryStore::new())).await
}

/// A volume with a mounted file system.
fn mounted(lab: &TestPool, name: &str, filesystem: Filesystem) -> (Volume, PathBuf) {
    let volume = lab.create(name, 320 * MIB, filesystem);
    let at = lab.path(name);
    volume.lock().unwrap().mount(&at, false).unwrap();
    (volume, at)
}

/// Restores a volume and compares it with a file.
async fn check(
    lab: &TestPool,
    repo: &Repository,
    snapshot: SnapshotId,
    number: usize,
    image: &Path,
) {
    let reference = petra_engine::SnapshotRef::Id(snapshot);
    let record = repo.find(&reference).await.unwrap().volumes[number].clone();
    let path = lab.path("restored");
    let target = FileTarget::create(&path, record.len_bytes).unwrap();
    restore(repo, &record, target, &RestoreOptions::default(), &context()).await.unwrap();
    assert_eq!(hash(&path), hash(image));
    fs::remove_file(path).unwrap();
}

fn copies(volume: &Volume) -> usize {
    fs::read_dir(volume.directory().join("copies")).map_or(0, Iterator::count)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_is_one_point_in_time() {
    for kind in [BackendKind::Btrfs, BackendKind::Xfs] {
        let Some(lab) = TestPool::new(kind) else { return };
        let (a, at_a) = mounted(&lab, "a", Filesystem::Ext4);
        let (b, at_b) = mounted(&lab, "b", Filesystem::Xfs);
        let raw = lab.create("raw", 8 * MIB, Filesystem::Raw);
        let device = raw.lock().unwrap().attach(false).unwrap().device;
        fs::OpenOptions::new()
            .write(true)
            .open(device)
            .unwrap()
            .write_all_at(&noise(1, 1 << 20), 4096)
            .unwrap();
        // Writes a number to the second volume only once it is in the first one.
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let writer = {
            let (stop, at_a, at_b) = (stop.clone(), at_a.clone(), at_b.clone());
            std::thread::spawn(move || {
                let mut n = 0_u64;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    n += 1;
                    for at in [&at_a, &at_b] {
                        fs::write(at.join("number.new"), n.to_string()).unwrap();
                        fs::File::open(at.join("number.new")).unwrap().sync_all().unwrap();
                        fs::rename(at.join("number.new"), at.join("number")).unwrap();
                    }
                    fs::write(at_a.join(format!("file-{}", n % 50)), noise(n, 30_000)).unwrap();
                }
            })
        };
        std::thread::sleep(Duration::from_millis(500));
        let repo = new_repo().await;
        for round in 0..3 {
            let mut taken = take(&lab.pool, &group(&[&a, &b, &raw])).unwrap();
            assert!(taken.pause > Duration::ZERO && taken.pause < Duration::from_secs(5));
            let state: UploadState = taken.upload.state().clone();
            let record = taken.upload.run(&repo, &context()).await.unwrap();
            assert_eq!(pending(&lab.pool).unwrap(), []);
            for (number, volume) in [&a, &b, &raw].into_iter().enumerate() {
                assert_eq!(record.volumes[number].name, *volume.name());
                assert_eq!(copies(volume), 1, "only the base is kept");
                let base = volume.state().unwrap().base.unwrap();
                assert_eq!((base.snapshot, base.copy), (record.id, state.volumes[number].copy));
                check(&lab, &repo, record.id, number, &volume.copy_image(base.copy)).await;
            }
            // The copies hold consistent file systems whose numbers agree.
            let numbers: Vec<u64> = [(&a, "ext4"), (&b, "xfs")]
                .into_iter()
                .map(|(volume, kind)| {
                    let copy = volume.state().unwrap().base.unwrap().copy;
                    number_in(&lab, &volume.copy_image(copy), kind)
                })
                .collect();
            assert!(numbers[0] == numbers[1] || numbers[0] == numbers[1] + 1, "{numbers:?}");
            assert!(round == 0 || record.parent.is_some());
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        writer.join().unwrap();
    }
}

/// The number that the file system in a copy holds, read through a mount that changes nothing.
fn number_in(lab: &TestPool, copy: &Path, kind: &str) -> u64 {
    let clone = lab.path("copy.img");
    fs::copy(copy, &clone).unwrap();
    let at = lab.path("copy");
    fs::create_dir_all(&at).unwrap();
    let options = if kind == "xfs" { "loop,nouuid" } else { "loop" };
    let mut mount = std::process::Command::new("mount");
    assert!(mount.args(["-o", options]).arg(&clone).arg(&at).status().unwrap().success());
    let number = fs::read_to_string(at.join("number")).unwrap().parse().unwrap();
    assert!(std::process::Command::new("umount").arg(&at).status().unwrap().success());
    fs::remove_file(clone).unwrap();
    number
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_goes_on_in_another_process() {
    let Some(lab) = TestPool::new(BackendKind::Btrfs) else { return };
    let (volume, at) = mounted(&lab, "v", Filesystem::Ext4);
    fs::write(at.join("file"), noise(1, 300_000)).unwrap();
    let repo = new_repo().await;
    let taken = take(&lab.pool, &group(&[&volume])).unwrap();
    let id = taken.upload.id();
    let busy = Upload::open(&lab.pool, id).unwrap_err();
    assert!(matches!(busy, Error::Busy { .. }), "{busy}");
    let copy = taken.upload.state().volumes[0].copy;
    drop(taken);

    let other = lab.reopened();
    assert_eq!(other.recover().unwrap().done, []);
    assert_eq!(pending(&other).unwrap(), [id]);
    let record = Upload::open(&other, id).unwrap().run(&repo, &context()).await.unwrap();
    check(&lab, &repo, record.id, 0, &volume.copy_image(copy)).await;
    assert_eq!(pending(&other).unwrap(), []);
    assert!(matches!(Upload::open(&other, id), Err(Error::Unknown { .. })));
}

/// A crash between the commit and what comes after it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_that_was_committed_is_not_done_again() {
    let Some(lab) = TestPool::new(BackendKind::Xfs) else { return };
    let volume = lab.create("v", 8 * MIB, Filesystem::Raw);
    let repo = new_repo().await;
    for noted in [false, true] {
        let mut taken = take(&lab.pool, &group(&[&volume])).unwrap();
        let record = taken.upload.run(&repo, &context()).await.unwrap();
        // As it was before the copy became the base.
        let mut state = taken.upload.state().clone();
        assert_eq!(state.sessions, [record.id]);
        if !noted {
            state.committed = None;
        }
        volume.lock().unwrap().change(|state| state.base = None).unwrap();
        let path = lab.pool.root().join(format!("uploads/{}.json", state.id));
        fs::write(path, serde_json(&state)).unwrap();
        drop(taken);
        let again = Upload::open(&lab.pool, state.id).unwrap().run(&repo, &context()).await;
        assert_eq!(again.unwrap().id, record.id);
        let base = volume.state().unwrap().base.unwrap();
        assert_eq!((base.snapshot, base.copy), (record.id, state.volumes[0].copy));
    }
    assert_eq!(repo.snapshots(&Item::Repository).await.unwrap().len(), 2);
    assert_eq!(verify_all(&repo, true).await.unwrap().problems, []);
}

/// Whoever knows the upload finds its snapshot, whatever became of the first attempts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_leads_to_its_snapshot() {
    let Some(lab) = TestPool::new(BackendKind::Btrfs) else { return };
    let volume = lab.create("v", 8 * MIB, Filesystem::Raw);
    let repo = new_repo().await;
    for aborted in [0, 1, 2] {
        let mut taken = take(&lab.pool, &group(&[&volume])).unwrap();
        let id = taken.upload.id();
        let missing = resolve(&repo, id, MAX_ATTEMPTS).await.unwrap_err();
        assert!(matches!(missing, petra_engine::Error::Unknown { .. }), "{missing}");
        for k in 0..aborted {
            // A collector takes the session for dead.
            let (e, r) = (name("e"), name("r"));
            let settled = Session::settle(&repo, id.nth_after(k), &e, &r, &context()).await;
            assert_eq!(settled.unwrap(), None);
        }
        let record = taken.upload.run(&repo, &context()).await.unwrap();
        assert_eq!(record.id, id.nth_after(aborted));
        assert_eq!(resolve(&repo, id, MAX_ATTEMPTS).await.unwrap(), record);
        let few = resolve(&repo, id, aborted).await;
        assert_eq!(few.is_ok(), aborted == 0, "not among the first {aborted}");
        repo.delete(record.id, &context()).await.unwrap();
        let gone = resolve(&repo, id, MAX_ATTEMPTS).await.unwrap_err();
        assert!(matches!(gone, petra_engine::Error::Unknown { .. }), "{gone}");
    }
    assert_eq!(verify_all(&repo, true).await.unwrap().problems, []);
}

/// The id of a session that died is never used again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_attempt_has_an_id_of_its_own() {
    let Some(lab) = TestPool::new(BackendKind::Btrfs) else { return };
    let volume = lab.create("v", 8 * MIB, Filesystem::Raw);
    let repo = new_repo().await;
    let taken = take(&lab.pool, &group(&[&volume])).unwrap();
    // As a process leaves it that was killed in its third attempt.
    let mut state = taken.upload.state().clone();
    drop(taken);
    (state.attempts, state.sessions) = (3, vec![state.id.nth_after(2)]);
    let path = lab.pool.root().join(format!("uploads/{}.json", state.id));
    fs::write(path, serde_json(&state)).unwrap();
    let record = Upload::open(&lab.pool, state.id).unwrap().run(&repo, &context()).await.unwrap();
    assert_eq!(record.id, state.id.nth_after(3));
    assert_eq!(resolve(&repo, state.id, MAX_ATTEMPTS).await.unwrap(), record);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_that_nobody_wants_is_given_up() {
    let Some(lab) = TestPool::new(BackendKind::Btrfs) else { return };
    let volume = lab.create("v", 64 * MIB, Filesystem::Raw);
    fs::write(volume.image(), noise(1, 64 << 20)).unwrap();
    let repo = new_repo().await;
    let left = || fs::read_dir(lab.pool.root().join("uploads")).unwrap().count();

    // While it is under way.
    let slow = GroupRequest { rate_bytes_per_s: Some(4 << 20), ..group(&[&volume]) };
    let mut taken = take(&lab.pool, &slow).unwrap();
    let id = taken.upload.id();
    assert!(is_being_done(&lab.pool, id).unwrap());
    let pool = lab.pool.clone();
    let discarding = tokio::task::spawn_blocking(move || {
        while let Err(error) = discard(&pool, id) {
            assert!(matches!(error, Error::Busy { .. }), "{error}");
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    let begun = Instant::now();
    let error = taken.upload.run(&repo, &context()).await.unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(10));
    drop(taken);
    discarding.await.unwrap();
    assert_eq!((copies(&volume), left()), (0, 0));
    assert!(repo.snapshots(&Item::Repository).await.unwrap().is_empty());

    // While nobody works on it, and when there is none.
    let id = take(&lab.pool, &group(&[&volume])).unwrap().upload.id();
    assert!(!is_being_done(&lab.pool, id).unwrap());
    for _ in 0..2 {
        discard(&lab.pool, id).unwrap();
        assert_eq!((copies(&volume), left()), (0, 0));
    }
}

fn serde_json(state: &UploadState) -> String {
    serde_json::to_string(state).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_taking_that_crashed_leaves_nothing() {
    let Some(lab) = TestPool::new(BackendKind::Btrfs) else { return };
    let volume = lab.create("v", 8 * MIB, Filesystem::Raw);
    let taken = take(&lab.pool, &group(&[&volume])).unwrap();
    let mut state = taken.upload.state().clone();
    drop(taken);
    assert_eq!(copies(&volume), 1);
    state.ready = false;
    let path = lab.pool.root().join(format!("uploads/{}.json", state.id));
    fs::write(&path, serde_json(&state)).unwrap();
    assert!(matches!(Upload::open(&lab.pool, state.id), Err(Error::Unknown { .. })));
    let done = lab.pool.recover().unwrap().done;
    assert_eq!(done, [Recovered::Deleted { path }]);
    assert_eq!((copies(&volume), pending(&lab.pool).unwrap().len()), (0, 0));
    assert_eq!(fs::read_dir(lab.pool.root().join("uploads")).unwrap().count(), 0);
}

/// Two uploads of one volume that end in the wrong order: the newer copy stays the base.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_upload_does_not_replace_a_newer_base() {
    let Some(lab) = TestPool::new(BackendKind::Btrfs) else { return };
    let volume = lab.create("v", 8 * MIB, Filesystem::Raw);
    let repo = new_repo().await;
    let mut first = take(&lab.pool, &group(&[&volume])).unwrap();
    let mut second = take(&lab.pool, &group(&[&volume])).unwrap();
    let record = second.upload.run(&repo, &context()).await.unwrap();
    first.upload.run(&repo, &context()).await.unwrap();
    assert_eq!(volume.state().unwrap().base.unwrap().snapshot, record.id);
    assert_eq!(copies(&volume), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hooks_run_around_the_freeze() {
    let Some(lab) = TestPool::new(BackendKind::Btrfs) else { return };
    let (volume, at) = mounted(&lab, "v", Filesystem::Xfs);
    let file = at.join("order");
    let say = |what: &str| Hook::shell(format!("echo {what} >> {}", file.display()), LONG);
    let hooked = GroupRequest {
        before: Some(say("before")),
        after: Some(say("after")),
        ..group(&[&volume])
    };
    let taken = take(&lab.pool, &hooked).unwrap();
    assert!(taken.hook_failure.is_none());
    assert_eq!(fs::read_to_string(&file).unwrap(), "before\nafter\n");
    taken.upload.give_up().unwrap();
    assert_eq!(copies(&volume), 0);

    let failing = GroupRequest { before: Some(Hook::shell("exit 1", LONG)), ..hooked.clone() };
    assert!(matches!(take(&lab.pool, &failing), Err(Error::Tool { .. })));
    assert_eq!(fs::read_to_string(&file).unwrap(), "before\nafter\nafter\n");
    assert_eq!(copies(&volume), 0);
    let unhappy = GroupRequest { after: Some(Hook::shell("exit 1", LONG)), ..group(&[&volume]) };
    let taken = take(&lab.pool, &unhappy).unwrap();
    assert!(matches!(taken.hook_failure, Some(Error::Tool { .. })));
    taken.upload.give_up().unwrap();

    // One that needs what is frozen would wait for ever: its limit ends that, and no copy is left.
    let nothing = GroupRequest { limit: Duration::from_millis(1), ..group(&[&volume]) };
    let begun = Instant::now();
    let taken = take(&lab.pool, &nothing);
    assert!(begun.elapsed() < LONG);
    if let Err(error) = taken {
        assert!(matches!(error, Error::Thawed { .. }), "{error}");
        assert_eq!(copies(&volume), 0);
    }
    fs::write(at.join("writable"), b"again").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_or_name_is_there_once() {
    let Some(lab) = TestPool::new(BackendKind::Btrfs) else { return };
    let volume = lab.create("v", 8 * MIB, Filesystem::Raw);
    for volumes in [
        vec![],
        vec![(name("v"), name("x")), (name("v"), name("y"))],
        vec![(name("v"), name("x")), (name("w"), name("x"))],
    ] {
        let error = take(&lab.pool, &GroupRequest { volumes, ..group(&[&volume]) }).unwrap_err();
        assert!(matches!(error, Error::Request(_)), "{error}");
    }
    let volumes = vec![(name("v"), name("x")), (name("w"), name("y"))];
    let error = take(&lab.pool, &GroupRequest { volumes, ..group(&[&volume]) }).unwrap_err();
    assert!(matches!(error, Error::Unknown { .. }), "{error}");
    assert_eq!(copies(&volume), 0);
}

/// What is known of one volume's past must not be taken for another's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volumes_that_change_names_are_read_anew() {
    let Some(lab) = TestPool::new(BackendKind::Xfs) else { return };
    let (a, b) =
        (lab.create("a", 8 * MIB, Filesystem::Raw), lab.create("b", 8 * MIB, Filesystem::Raw));
    for (volume, seed) in [(&a, 1), (&b, 2)] {
        let image = fs::OpenOptions::new().write(true).open(volume.image()).unwrap();
        image.write_all_at(&noise(seed, 1 << 20), 0).unwrap();
    }
    let repo = new_repo().await;
    take(&lab.pool, &group(&[&a, &b])).unwrap().upload.run(&repo, &context()).await.unwrap();
    let volumes = vec![(name("a"), name("b")), (name("b"), name("a"))];
    let mut swapped = take(&lab.pool, &GroupRequest { volumes, ..group(&[]) }).unwrap();
    let record = swapped.upload.run(&repo, &context()).await.unwrap();
    for (number, volume) in [&a, &b].into_iter().enumerate() {
        let copy = volume.state().unwrap().base.unwrap().copy;
        check(&lab, &repo, record.id, number, &volume.copy_image(copy)).await;
    }
}

/// What the volumes of a group are compared with is known before their copies are taken, whatever they are called.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_past_of_a_group_is_read_ahead() {
    let Some(lab) = TestPool::new(BackendKind::Btrfs) else { return };
    let volumes = ["a", "b", "c"].map(|name| lab.create(name, 8 * MIB, Filesystem::Raw));
    let write = |volume: &Volume, seed, offset| {
        let image = fs::OpenOptions::new().write(true).open(volume.image()).unwrap();
        image.write_all_at(&noise(seed, 1 << 20), offset).unwrap();
    };
    for (seed, volume) in (1..).zip(&volumes) {
        write(volume, seed, 0);
    }
    let store = Recording::new(Arc::new(MemoryStore::new()));
    let repo = init(store.clone()).await;
    let [a, b, c] = &volumes;
    take(&lab.pool, &group(&[a, b])).unwrap().upload.run(&repo, &context()).await.unwrap();
    // One has another name in the snapshot from now on, one has no past, and one has another one.
    take(&lab.pool, &group(&[c])).unwrap().upload.run(&repo, &context()).await.unwrap();
    let names = [("a", "z"), ("b", "b"), ("c", "c")];
    for volumes in [&names[..2], &names[..], &names[1..]] {
        let named = volumes.iter().map(|(volume, as_name)| (name(volume), name(as_name)));
        let request = GroupRequest { volumes: named.collect(), ..group(&[]) };
        write(b, fastrand::u64(..), 2 * MIB);
        let ahead = read_ahead(&lab.pool, &request, &repo, &context()).await.unwrap();
        let mut taken = take(&lab.pool, &request).unwrap();
        taken.upload.set_ahead(ahead);
        store.reset();
        let record = taken.upload.run(&repo, &context()).await.unwrap();
        let read = store.log().iter().filter(|c| c.is(Operation::GetRange, "packs/")).count();
        assert_eq!(read, 0, "{volumes:?}");
        for (number, (volume, _)) in volumes.iter().enumerate() {
            let volume = lab.pool.volume(&name(volume)).unwrap();
            let copy = volume.state().unwrap().base.unwrap().copy;
            check(&lab, &repo, record.id, number, &volume.copy_image(copy)).await;
        }
    }
}
