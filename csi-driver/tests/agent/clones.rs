//! Volumes from snapshots and from volumes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::join_all;
use petra_csi::agent::{CreateVolumeRequest, ExpandVolumeRequest, NodeAgent, Source};
use petra_engine::record::SnapshotRecord;
use petra_tests::pool::volume_name;
use petra_tests::volume::noise;
use petra_volume::BackendKind;
use tonic::Code;

use crate::lab::{MIB, Node, PASSPHRASE, Repo, create, kill, wait_for};

/// A snapshot of a volume with a file in it.
async fn snapshot(node: &Node, repo: &Repo) -> SnapshotRecord {
    node.agent.create_volume(create("source", 64 * MIB, "ext4")).await.unwrap();
    let at = node.mount("source");
    fs::write(at.join("file"), noise(1, 5_000_000)).unwrap();
    let taken = node.agent.take_snapshot(repo.take("s", &["source"])).await.unwrap();
    node.uploaded().await;
    repo.snapshot(&taken).await
}

fn has_file(at: &Path) -> bool {
    fs::read(at.join("file")).is_ok_and(|bytes| bytes == noise(1, 5_000_000))
}

fn total_bytes(node: &Node, name: &str) -> u64 {
    node.volume(name).stats().unwrap().filesystem_space.unwrap().total_bytes
}

/// How many pins there are in a repository.
fn pins(repo: &Repo) -> usize {
    let path = PathBuf::from(repo.message.url.strip_prefix("file://").unwrap()).join("pins");
    let owners = fs::read_dir(path).map(|owners| owners.flatten().collect()).unwrap_or(vec![]);
    owners.iter().map(|owner| fs::read_dir(owner.path()).map_or(0, Iterator::count)).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_becomes_volumes_here_and_elsewhere() {
    let Some(node) = Node::new(BackendKind::Btrfs) else { return };
    let Some(other) = Node::new(BackendKind::Xfs) else { return };
    let repo = Repo::encrypted(&node).await;
    let snapshot = snapshot(&node, &repo).await;
    for (node, is_lazy) in [(&node, false), (&other, true)] {
        let agent = &node.agent;
        let request = repo.clone_of(&snapshot, "c", 300 * MIB);
        let calls = (0..3).map(|_| agent.create_volume(request.clone()));
        let made: Vec<_> = join_all(calls).await.into_iter().map(Result::unwrap).collect();
        assert!(made.iter().all(|volume| volume == &made[0]), "{made:?}");
        assert_eq!((made[0].lazy, made[0].size_bytes), (is_lazy, 300 * MIB));
        assert_eq!(made[0].origin, format!("{}#@{}", repo.message.url, snapshot.id));
        assert_eq!(pins(&repo), usize::from(is_lazy), "the slower calls have let go of theirs");
        assert_eq!(fs::metadata(node.volume("c").image()).unwrap().len(), 300 * MIB);

        let smaller = repo.clone_of(&snapshot, "x", 63 * MIB);
        let other_size = repo.clone_of(&snapshot, "c", 301 * MIB);
        let mut no_volume = repo.clone_of(&snapshot, "x", 0);
        let mut no_snapshot = repo.clone_of(&snapshot, "x", 0);
        if let (Some(Source::Snapshot(a)), Some(Source::Snapshot(b))) =
            (&mut no_volume.source, &mut no_snapshot.source)
        {
            "other".clone_into(&mut a.volume);
            "01ARZ3NDEKTSV4RRFFQ69G5FAV".clone_into(&mut b.snapshot);
        }
        for (request, code) in [
            (smaller, Code::OutOfRange),
            (other_size, Code::AlreadyExists),
            (create("c", 300 * MIB, "ext4"), Code::AlreadyExists),
            (no_volume, Code::NotFound),
            (no_snapshot, Code::NotFound),
        ] {
            let error = agent.create_volume(request.clone()).await.unwrap_err();
            assert_eq!(error.code(), code, "{request:?}: {error}");
        }
        if is_lazy {
            let expand = ExpandVolumeRequest { name: "c".to_owned(), size_bytes: 400 * MIB };
            let error = agent.expand_volume(expand).await.unwrap_err();
            assert_eq!(error.code(), Code::Unavailable, "{error}");
        }
        let at = node.mount("c");
        assert!(has_file(&at));
        fs::write(at.join("own"), noise(2, 1_000_000)).unwrap();
        node.hydrated("c").await;
        node.unmount("c");
        let expand = ExpandVolumeRequest { name: "c".to_owned(), size_bytes: 400 * MIB };
        assert_eq!(agent.expand_volume(expand).await.unwrap().size_bytes, 400 * MIB);
        let at = node.mount("c");
        assert!(has_file(&at) && fs::read(at.join("own")).unwrap() == noise(2, 1_000_000));
        assert!(total_bytes(node, "c") > 64 * MIB);
        node.unmount("c");
        agent.delete_volume("c", &[].into()).await.unwrap();
        wait_for("the end of the pin", async || pins(&repo) == 0).await;
    }
    // One that is deleted before its data came lets go of the snapshot, too.
    other.agent.create_volume(repo.clone_of(&snapshot, "d", 0)).await.unwrap();
    assert_eq!(pins(&repo), 1);
    // The machine was restarted meanwhile: the secrets are those of this call.
    fs::remove_dir_all(other.run().join("secrets")).unwrap();
    other.agent.delete_volume("d", &repo.message.secrets).await.unwrap();
    wait_for("the end of the pin", async || pins(&repo) == 0).await;
    assert!(other.pool.pool.noted_pins().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clone_that_no_pod_uses_is_filled_for_its_snapshot() {
    let Some(node) = Node::new(BackendKind::Btrfs) else { return };
    let Some(other) = Node::new(BackendKind::Xfs) else { return };
    let repo = Repo::plain(&node).await;
    let snapshot = snapshot(&node, &repo).await;
    let is_served = |name: &str| other.volume(name).lazy_directory().join("image").exists();
    let state = |name: &str| other.volume(name).state().unwrap();

    // A snapshot, a copy and a larger size, each of a clone that was never used: they are there when all its data is.
    for name in ["s", "c", "g"] {
        other.agent.create_volume(repo.clone_of(&snapshot, name, 0)).await.unwrap();
    }
    let copy = CreateVolumeRequest {
        source: Some(Source::Volume("c".to_owned())),
        ..create("d", 0, "ext4")
    };
    let grow = ExpandVolumeRequest { name: "g".to_owned(), size_bytes: 100 * MIB };
    let refused = other.agent.take_snapshot(repo.take("two", &["s"])).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    wait_for("a snapshot", async || {
        other.agent.take_snapshot(repo.take("two", &["s"])).await.is_ok()
    })
    .await;
    wait_for("a copy", async || other.agent.create_volume(copy.clone()).await.is_ok()).await;
    wait_for("growth", async || other.agent.expand_volume(grow.clone()).await.is_ok()).await;
    assert!(has_file(&other.mount("d")));
    other.uploaded().await;
    for name in ["s", "c", "g"] {
        wait_for("the end of its server", async || !is_served(name) && state(name).lazy.is_none())
            .await;
        assert!(other.volume(name).attachment().unwrap().is_none());
        assert!(has_file(&other.mount(name)));
        other.unmount(name);
    }
    wait_for("the end of the pins", async || pins(&repo) == 0).await;
    // Nobody has mounted one that was lazy, so nobody knows what a mount needs.
    assert_eq!(repo.open.start_list(snapshot.id, 1).await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fills_a_clone_is_in_nobodys_way() {
    let Some(node) = Node::new(BackendKind::Btrfs) else { return };
    let Some(other) = Node::new(BackendKind::Xfs) else { return };
    let repo = Repo::plain(&node).await;
    let snapshot = snapshot(&node, &repo).await;
    for name in ["c", "d", "e"] {
        other.agent.create_volume(repo.clone_of(&snapshot, name, 0)).await.unwrap();
    }
    // While the repository is away nothing comes.
    let (here, away) = (node.pool.path("repo"), node.pool.path("away"));
    fs::rename(&here, &away).unwrap();
    let is_served = |name: &str| other.volume(name).lazy_directory().join("image").exists();
    for name in ["c", "d", "e"] {
        let grow = ExpandVolumeRequest { name: name.to_owned(), size_bytes: 100 * MIB };
        let refused = other.agent.expand_volume(grow).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable, "{refused}");
        assert!(is_served(name));
    }
    // A pod gets it, and when that has ended it is filled on.
    let attach = || other.volume("c").lock().unwrap().attach_served(other.agent.serving(), false);
    attach().unwrap();
    assert!(other.volume("c").attachment().unwrap().is_some());
    other.volume("c").lock().unwrap().detach().unwrap();
    assert!(!is_served("c"));
    // It is deleted as any other, and as other volumes are.
    petra_volume::clones::delete(other.volume("e").lock().unwrap(), true).unwrap();
    // So it is after everything has died.
    for (pid, line) in other.processes() {
        if line.contains("agent") || line.contains("image-server") {
            kill(pid);
        }
    }
    other.agent.delete_volume("d", &[].into()).await.unwrap();
    let restarted = other.restarted();
    restarted.start().await.unwrap();
    wait_for("a server", async || is_served("c")).await;
    fs::rename(&away, &here).unwrap();
    let grow = ExpandVolumeRequest { name: "c".to_owned(), size_bytes: 100 * MIB };
    wait_for("growth", async || restarted.expand_volume(grow.clone()).await.is_ok()).await;
    assert!(has_file(&other.mount("c")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_in_use_is_cloned() {
    let Some(node) = Node::new(BackendKind::Btrfs) else { return };
    let agent = &node.agent;
    agent.create_volume(create("source", 64 * MIB, "ext4")).await.unwrap();
    let at = node.mount("source");
    fs::write(at.join("file"), noise(1, 5_000_000)).unwrap();
    let stop = AtomicBool::new(false);
    let copy = |name: &str, size_bytes| CreateVolumeRequest {
        source: Some(Source::Volume("source".to_owned())),
        ..create(name, size_bytes, "ext4")
    };
    let handle = tokio::runtime::Handle::current();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for seed in 0.. {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                fs::write(at.join("busy"), noise(seed, 300_000)).unwrap();
            }
        });
        std::thread::sleep(Duration::from_millis(200));
        let made = tokio::task::block_in_place(|| {
            handle.block_on(join_all((0..3).map(|_| agent.create_volume(copy("c", 200 * MIB)))))
        });
        stop.store(true, Ordering::Relaxed);
        let made: Vec<_> = made.into_iter().map(Result::unwrap).collect();
        assert!(made.iter().all(|volume| volume == &made[0]), "{made:?}");
        assert_eq!((made[0].size_bytes, made[0].filesystem.as_str()), (200 * MIB, "ext4"));
    });
    for (request, code) in [
        (copy("x", 63 * MIB), Code::OutOfRange),
        (copy("c", 201 * MIB), Code::AlreadyExists),
        (
            CreateVolumeRequest { source: Some(Source::Volume("none".to_owned())), ..copy("x", 0) },
            Code::NotFound,
        ),
    ] {
        let error = agent.create_volume(request.clone()).await.unwrap_err();
        assert_eq!(error.code(), code, "{request:?}: {error}");
    }
    assert!(has_file(&node.mount("c")));
    assert!(total_bytes(&node, "c") > 150 * MIB);
    assert_eq!(fs::read_dir(node.volume("source").directory().join("copies")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secrets_of_a_call_serve_the_processes_behind_it() {
    let Some(node) = Node::new(BackendKind::Btrfs) else { return };
    let Some(other) = Node::new(BackendKind::Btrfs) else { return };
    let repo = Repo::encrypted(&node).await;
    let mut locked_out = repo.take("s", &["source"]);
    locked_out.repository.as_mut().unwrap().secrets.clear();
    node.agent.create_volume(create("source", 64 * MIB, "ext4")).await.unwrap();
    let error = node.agent.take_snapshot(locked_out).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    let snapshot = snapshot(&node, &repo).await;

    let mut wrong = repo.clone_of(&snapshot, "c", 0);
    if let Some(Source::Snapshot(source)) = &mut wrong.source {
        let secrets = &mut source.repository.as_mut().unwrap().secrets;
        secrets.insert("passphrase".to_owned(), "another one".to_owned());
    }
    let error = other.agent.create_volume(wrong).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(!error.message().contains("another one"), "{error}");
    assert!(!other.run().join("secrets").exists(), "what opens nothing is not kept");
    other.agent.create_volume(repo.clone_of(&snapshot, "c", 0)).await.unwrap();
    let (url, secrets) = (&repo.message.url, &repo.message.secrets);
    other.agent.keep_secrets(url, secrets).await.unwrap();
    other.agent.keep_secrets(url, &[].into()).await.unwrap();
    let wrong = [("passphrase".to_owned(), "another one".to_owned())].into();
    let error = other.agent.keep_secrets(url, &wrong).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    let at = other.mount("c");
    assert!(has_file(&at));
    other.hydrated("c").await;

    // Kept for later calls, in memory, for root alone, and in no log.
    let mut later = repo.clone_of(&snapshot, "later", 0);
    if let Some(Source::Snapshot(source)) = &mut later.source {
        source.repository.as_mut().unwrap().secrets.clear();
    }
    other.agent.create_volume(later).await.unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for node in [&node, &other] {
        let secrets = node.run().join("secrets");
        assert_eq!(mode(&secrets), 0o700);
        let files: Vec<_> = fs::read_dir(&secrets).unwrap().flatten().collect();
        assert_eq!(files.len(), 1);
        assert_eq!(mode(&files[0].path()), 0o600);
        for entry in fs::read_dir(node.run()).unwrap().flatten() {
            if entry.file_name().to_string_lossy().ends_with(".log") {
                let log = fs::read_to_string(entry.path()).unwrap();
                assert!(!log.contains(PASSPHRASE), "{log}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_nodes_read_one_snapshot() {
    let Some(node) = Node::new(BackendKind::Btrfs) else { return };
    let repo = Repo::plain(&node).await;
    let snapshot = snapshot(&node, &repo).await;
    // Whoever made the volume holds the snapshot by a pin, so that it may be deleted meanwhile.
    repo.open.delete(snapshot.id, &petra_tests::lab::context()).await.unwrap();
    let Some(other) = Node::new(BackendKind::Btrfs) else { return };
    for node in [&node, &other] {
        let name = || volume_name("ro-01ARZ3NDEKTSV4RRFFQ69G5FAV");
        let agent = &node.agent;
        let calls = (0..3).map(|_| agent.clone_read_only(&repo.message, snapshot.id, 1, name()));
        for made in join_all(calls).await {
            assert!(made.unwrap().state().unwrap().ephemeral);
        }
        for (number, code) in [(0, Code::AlreadyExists), (2, Code::AlreadyExists)] {
            let made = agent.clone_read_only(&repo.message, snapshot.id, number, name()).await;
            assert_eq!(made.unwrap_err().code(), code);
        }
        let missing = agent.clone_read_only(&repo.message, snapshot.id, 2, volume_name("x")).await;
        assert_eq!(missing.unwrap_err().code(), Code::NotFound);
        let at = node.pool.path("at");
        let mut locked = node.volume(name().as_str()).lock().unwrap();
        locked.attach_served(agent.serving(), true).unwrap();
        locked.mount(&at, true).unwrap();
        assert!(has_file(&at));
        assert!(fs::write(at.join("file"), "x").is_err());
        locked.unmount().unwrap();
        locked.detach().unwrap();
        drop(locked);
        // They are not the controller's.
        let listed = agent.volumes().await.unwrap();
        assert!(listed.iter().all(|volume| volume.name == "source"), "{listed:?}");
    }
}
