//! Repositories of every format version, as they were written: they stay readable.
//!
//! `PETRA_WRITE_FIXTURE=1 cargo test -p petra-tests --test engine fixtures` writes that of this version anew, which
//! is right only before the version is released.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use petra_engine::restore::{RestoreOptions, stream};
use petra_engine::snapshot::{SnapshotRequest, snapshot};
use petra_engine::store::LocalStore;
use petra_engine::url::{Item, Selector, SnapshotRef};
use petra_engine::{Context, Repository};
use petra_tests::host::FixedHost;
use petra_tests::lab::{
    check, context, init_encrypted, init_with, name, request, secret, verify_all,
};
use petra_tests::volume::{Volume, noise, prose};

/// Snapshot, volume, and the BLAKE3 hash of its bytes.
const VOLUMES: [(&str, &str, &str); 4] = [
    ("before", "workspace", "a111413b6a8cdfda4018c6e87310c5550bb01c0364546eb661b1eeb81abc41f0"),
    ("before", "data", "4e50750cb44387322741c3215ea52e6a36fc72224fb00e88b1a5de79fa912871"),
    ("after", "workspace", "fa83fdc37f7d9b713dfb76f0525e5832286cc27158a20b1080044d8102c9f4f6"),
    ("after", "data", "4e50750cb44387322741c3215ea52e6a36fc72224fb00e88b1a5de79fa912871"),
];

fn directory(encrypted: bool) -> PathBuf {
    let name = if encrypted { "fixtures/v1-encrypted" } else { "fixtures/v1" };
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// A context whose clock stands at the first second of 2026, and which is the same each time.
fn fixed_context() -> (Arc<FixedHost>, Context) {
    let host = Arc::new(FixedHost::new(1, 1_767_225_600_000));
    let mut ctx = Context { host: host.clone(), ..context() };
    ctx.limits.threads = 1;
    (host, ctx)
}

/// Every kind of object and extent: text, noise, numbers, long and short zeros, two segments, a deleted snapshot.
async fn write(directory: &Path, encrypted: bool) {
    let (host, ctx) = fixed_context();
    let store = Arc::new(LocalStore::new(directory));
    let repo =
        if encrypted { init_encrypted(store, &ctx).await } else { init_with(store, &ctx).await };
    let numbers: Vec<u8> = (0..6_000_u32).flat_map(|n| (n * n / 7).to_le_bytes()).collect();
    let workspace = Volume::zeros((64 << 20) + 70_001)
        .with(0, &prose(1, 80_000))
        .with(100_000, &noise(2, 30_000))
        .with(64 << 20, &prose(3, 70_001));
    let data = Volume::zeros(90_000).with(5_000, &numbers);
    let steps = [
        ("before", workspace.clone(), data.clone()),
        ("deleted", workspace.clone(), data.clone().with(0, b"deleted")),
        ("after", workspace.with(50_000, &prose(4, 9_000)), data),
    ];
    for (step, workspace, data) in steps {
        host.advance(60_000);
        let request = SnapshotRequest {
            name: Some(name(step)),
            labels: BTreeMap::from([("step".to_owned(), step.to_owned())]),
            message: Some(format!("as it was {step}")),
            metadata: BTreeMap::from([("image".to_owned(), "notebook:1".to_owned())]),
            ..request("run 1", &[("workspace", &workspace), ("data", &data)])
        };
        let taken = snapshot(&repo, request, &ctx).await.unwrap();
        check(&repo, &taken.volumes[0], &workspace).await.unwrap();
        check(&repo, &taken.volumes[1], &data).await.unwrap();
        if step == "deleted" {
            repo.delete(taken.id, &ctx).await.unwrap();
        }
    }
}

/// All files below a directory.
fn files(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut open = vec![directory.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                let name = path.strip_prefix(directory).unwrap().to_owned();
                found.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// Takes a stream's hash.
#[derive(Clone, Default)]
struct Hash(Arc<std::sync::Mutex<blake3::Hasher>>);

impl std::io::Write for Hash {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn version_1_restores() {
    restores(false).await;
}

/// Its passphrase is `test`.
#[tokio::test]
async fn version_1_encrypted_restores() {
    restores(true).await;
}

async fn restores(encrypted: bool) {
    let directory = directory(encrypted);
    if std::env::var("PETRA_WRITE_FIXTURE").is_ok() {
        // There is none before the first time.
        let _ = std::fs::remove_dir_all(&directory);
        write(&directory, encrypted).await;
    }
    let store = Arc::new(LocalStore::new(&directory));
    let repo = match encrypted {
        true => Repository::unlock(store, &secret("test")).await.unwrap(),
        false => Repository::open(store).await.unwrap(),
    };
    assert_eq!(verify_all(&repo, true).await.unwrap().problems, []);
    let listed = repo.snapshots(&Item::Repository).await.unwrap();
    let names: Vec<_> = listed.iter().map(|record| record.name.clone().unwrap()).collect();
    assert_eq!(names, [name("before"), name("after")]);
    for (text, volume, expected) in VOLUMES {
        let (experiment, run) = (name("e"), name("run 1"));
        let selector = Selector::Text(name(text));
        let found = repo.find(&SnapshotRef::InRun { experiment, run, selector }).await.unwrap();
        assert_eq!(found.labels["step"], text);
        assert_eq!(found.metadata["image"], "notebook:1");
        let hash = Hash::default();
        let (record, options) = (found.volume(&name(volume)).unwrap(), RestoreOptions::default());
        stream(&repo, record, Box::new(hash.clone()), &options, &context()).await.unwrap();
        let actual = hash.0.lock().unwrap().finalize().to_hex();
        assert_eq!(actual.as_str(), expected, "{text}/{volume}");
    }
}

/// A difference means that the format has changed, or the output of zstd.
#[tokio::test]
async fn what_is_written_today_is_version_1() {
    for encrypted in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), encrypted).await;
        let (now, then) = (files(dir.path()), files(&directory(encrypted)));
        let names = |files: &BTreeMap<PathBuf, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&now), names(&then));
        for (name, body) in &then {
            assert!(now[name] == *body, "{} is not what it was", name.display());
        }
    }
}
