//! Snapshots and what becomes of their uploads.

use std::fs;

use petra_csi::agent::{CSI_NAME, NodeAgent, TakeSnapshotRequest};
use petra_engine::url::Item;
use petra_tests::pool::hash;
use petra_tests::s3::InProcessS3;
use petra_tests::volume::noise;
use petra_volume::BackendKind;
use petra_volume::snapshot::{upload_of, upload_state};
use tonic::Code;

use crate::lab::{MIB, Node, Repo, create, kill, wait_for};

/// Large enough for a debug build to need seconds.
const LARGE: u64 = 200 * MIB;

async fn with_noise(node: &Node, name: &str, size_bytes: u64) {
    node.agent.create_volume(create(name, size_bytes, "raw")).await.unwrap();
    let image = fs::File::options().write(true).open(node.volume(name).image()).unwrap();
    for at in (0..size_bytes).step_by(16 << 20) {
        let len = (size_bytes - at).min(16 << 20) as usize;
        std::os::unix::fs::FileExt::write_all_at(&image, &noise(at, len), at).unwrap();
    }
    image.sync_all().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_is_taken_once_and_uploaded_in_the_background() {
    let Some(node) = Node::new(BackendKind::Btrfs) else { return };
    let (agent, repo) = (&node.agent, Repo::plain(&node).await);
    for name in ["a", "b"] {
        agent.create_volume(create(name, 64 * MIB, "ext4")).await.unwrap();
    }
    let at = node.mount("a");
    fs::write(at.join("file"), noise(1, 3_000_000)).unwrap();
    let taken = agent.take_snapshot(repo.take("s", &["a", "b"])).await.unwrap();
    assert_eq!((taken.experiment.as_str(), taken.run.as_str()), ("e", "r"));
    assert_eq!(taken.name, "s in the repository");
    assert_eq!(taken.metadata[CSI_NAME], "s");
    assert!(taken.members.iter().all(|member| member.size_bytes == 64 * MIB), "{taken:?}");
    assert!(taken.created_unix_ms > 1_700_000_000_000);
    node.uploaded().await;
    let snapshot = repo.snapshot(&taken).await;
    assert_eq!(snapshot.id.to_string(), taken.id);
    assert_eq!(snapshot.labels["step"], "train");
    let names: Vec<&str> = snapshot.volumes.iter().map(|volume| volume.name.as_str()).collect();
    assert_eq!(names, ["as a", "as b"]);
    // Who only wanted it to go on does not get another one.
    let going_on = TakeSnapshotRequest { go_on: true, ..repo.take("s", &["a", "b"]) };
    let ended = agent.take_snapshot(going_on).await.unwrap_err();
    assert_eq!(ended.code(), Code::NotFound, "{ended}");

    let nameless = {
        let mut take = repo.take("t", &["a"]);
        take.metadata.clear();
        take
    };
    let nowhere = {
        let mut take = repo.take("t", &["a"]);
        take.repository = None;
        take
    };
    let no_repository = {
        let mut take = repo.take("t", &["a"]);
        take.repository.as_mut().unwrap().url += "x";
        take
    };
    for (request, code) in [
        (repo.take("t", &["x"]), Code::NotFound),
        (repo.take("t", &[]), Code::InvalidArgument),
        (repo.take("t", &["a", "a"]), Code::InvalidArgument),
        (nameless, Code::InvalidArgument),
        (nowhere, Code::InvalidArgument),
        (no_repository, Code::InvalidArgument),
    ] {
        let error = agent.take_snapshot(request).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
    }
    assert!(agent.uploads().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_goes_on_after_its_process_was_killed() {
    let Some(node) = Node::new(BackendKind::Xfs) else { return };
    let (agent, repo) = (&node.agent, Repo::plain(&node).await);
    with_noise(&node, "v", LARGE).await;
    let request = repo.take("s", &["v"]);
    let taken = agent.take_snapshot(request.clone()).await.unwrap();
    let attempts = || {
        let id = taken.id.parse().unwrap();
        upload_state(&node.pool.pool, id).unwrap().map(|state| state.attempts)
    };
    for attempt in 1..=2 {
        wait_for("a session", async || attempts() == Some(attempt)).await;
        // While it is under way: the same one, and nothing else by this name.
        assert_eq!(agent.take_snapshot(request.clone()).await.unwrap(), taken);
        assert_eq!(agent.uploads().await.unwrap(), std::slice::from_ref(&taken));
        let other = agent.take_snapshot(repo.take("s", &["v", "w"])).await.unwrap_err();
        assert_eq!(other.code(), Code::AlreadyExists, "{other}");
        let in_use = agent.delete_volume("v", &[].into()).await.unwrap_err();
        assert_eq!(in_use.code(), Code::FailedPrecondition, "{in_use}");
        let pid = node.uploader(&taken.id).unwrap();
        kill(pid);
        wait_for("its end", async || node.uploader(&taken.id) != Some(pid)).await;
        // The caller asks again, and it is begun again.
        wait_for("the next process", async || {
            assert_eq!(agent.take_snapshot(request.clone()).await.unwrap(), taken);
            node.uploader(&taken.id).is_some()
        })
        .await;
    }
    node.uploaded().await;
    let snapshot = repo.snapshot(&taken).await;
    let first: petra_engine::SnapshotId = taken.id.parse().unwrap();
    assert_eq!(snapshot.id, first.nth_after(2));
    assert_eq!(repo.open.snapshots(&Item::Repository).await.unwrap().len(), 1);
    agent.delete_volume("v", &[].into()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_outlives_the_driver_or_waits_for_it() {
    let Some(node) = Node::new(BackendKind::Btrfs) else { return };
    let repo = Repo::plain(&node).await;
    with_noise(&node, "v", LARGE).await;
    let taken = node.agent.take_snapshot(repo.take("s", &["v"])).await.unwrap();
    wait_for("the process", async || node.uploader(&taken.id).is_some()).await;
    let pid = node.uploader(&taken.id);
    // Another one finds that somebody is at it.
    let next = node.restarted();
    next.start().await.unwrap();
    assert_eq!(next.take_snapshot(repo.take("s", &["v"])).await.unwrap(), taken);
    assert_eq!(node.uploader(&taken.id), pid);
    node.uploaded().await;
    assert_eq!(repo.snapshot(&taken).await.id.to_string(), taken.id);

    // One that nobody is at is begun by the next start.
    let taken = node.agent.take_snapshot(repo.take("t", &["v"])).await.unwrap();
    if let Some(pid) = node.uploader(&taken.id) {
        kill(pid);
    }
    let next = node.restarted();
    next.start().await.unwrap();
    node.uploaded().await;
    repo.snapshot(&taken).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_is_discarded_while_it_runs() {
    let Some(node) = Node::new(BackendKind::Btrfs) else { return };
    let (agent, repo) = (&node.agent, Repo::plain(&node).await);
    with_noise(&node, "v", LARGE).await;
    let taken = agent.take_snapshot(repo.take("s", &["v"])).await.unwrap();
    let id = taken.id.parse().unwrap();
    wait_for("a session", async || {
        upload_state(&node.pool.pool, id).unwrap().is_none_or(|state| state.attempts > 0)
    })
    .await;
    wait_for("its end", async || match agent.discard_upload(&taken.id).await {
        Ok(()) => true,
        Err(error) => {
            assert_eq!(error.code(), Code::Aborted, "{error}");
            false
        }
    })
    .await;
    for id in [taken.id.as_str(), "01ARZ3NDEKTSV4RRFFQ69G5FAV", "no id"] {
        agent.discard_upload(id).await.unwrap();
    }
    assert!(agent.uploads().await.unwrap().is_empty());
    // One that was faster than the word that nobody wants it has made its snapshot, which the controller deletes then.
    let made = repo.open.snapshots(&Item::Repository).await.unwrap();
    assert!(made.iter().all(|record| upload_of(record) == id), "{made:?}");
    wait_for("the end of its process", async || node.uploader(&taken.id).is_none()).await;
    agent.delete_volume("v", &[].into()).await.unwrap();
    let uploads = fs::read_dir(node.pool.pool.root().join("uploads")).unwrap();
    assert_eq!(uploads.count(), 0);
}

/// The helper process has only what the call brought.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credentials_of_the_call_reach_the_upload() {
    let Some(node) = Node::new(BackendKind::Btrfs) else { return };
    let server = InProcessS3::start();
    let access = server.access();
    let url = access.url("team");
    let store = petra_engine::store::open_with(&url, Some(&access.credentials)).await.unwrap();
    let open = petra_tests::lab::init(store).await;
    let credentials = &access.credentials;
    let secrets = [
        ("access-key-id", credentials.access_key_id.clone()),
        ("secret-access-key", credentials.secret_access_key.clone()),
    ];
    let secrets = secrets.map(|(key, value)| (key.to_owned(), value)).into();
    let message = petra_csi::agent::Repository { url: url.to_string(), secrets };
    let repo = Repo { open, message };
    with_noise(&node, "v", 8 * MIB).await;
    let taken = node.agent.take_snapshot(repo.take("s", &["v"])).await.unwrap();
    node.uploaded().await;
    let snapshot = repo.snapshot(&taken).await;

    // And the agent of a lazy clone.
    let Some(other) = Node::new(BackendKind::Xfs) else { return };
    let request = repo.clone_of(&snapshot, "c", 0);
    assert!(other.agent.create_volume(request).await.unwrap().lazy);
    other.volume("c").lock().unwrap().attach_served(other.agent.serving(), false).unwrap();
    other.hydrated("c").await;
    other.volume("c").lock().unwrap().detach().unwrap();
    assert_eq!(hash(&other.volume("c").image()), hash(&node.volume("v").image()));
    let shown = format!("{:?} {:?}", repo.message, node.agent);
    assert!(!shown.contains(&credentials.secret_access_key), "{shown}");
    let half = {
        let mut request = repo.take("t", &["v"]);
        request.repository.as_mut().unwrap().secrets.remove("secret-access-key");
        request
    };
    let error = node.agent.take_snapshot(half).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("secret-access-key"), "{error}");
}
