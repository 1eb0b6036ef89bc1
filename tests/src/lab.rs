//! Small repositories to try things on.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use petra_engine::chunker::Chunking;
use petra_engine::collect::{CollectOptions, CollectReport, collect};
use petra_engine::context::{Context, Limits};
use petra_engine::crypto::Cost;
use petra_engine::record::{SnapshotRecord, VolumeRecord, Writers};
use petra_engine::restore::{RestoreOptions, RestoreReport, stream};
use petra_engine::snapshot::{Parent, SnapshotRequest, snapshot};
use petra_engine::source::Source;
use petra_engine::store::{Entry, Store};
use petra_engine::url::Item;
use petra_engine::verify::{VerifyOptions, VerifyReport, verify};
use petra_engine::{Name, NewKey, Repository, Result, Secret};

use crate::volume::{Comparison, Volume};

/// A context that does not take the whole machine.
pub fn context() -> Context {
    let limits = Limits { threads: 2, requests: 4, packs_in_flight: 2, index_chunks: 1 << 16 };
    Context { limits, ..Context::default() }
}

/// A name.
pub fn name(text: &str) -> Name {
    Name::new("test", text).expect("a name")
}

/// A repository with small chunks, so that small volumes have many.
pub async fn init(store: Arc<dyn Store>) -> Repository {
    init_with(store, &context()).await
}

/// The same with a context.
pub async fn init_with(store: Arc<dyn Store>, ctx: &Context) -> Repository {
    let chunking: Chunking = "cdc-8k".parse().expect("a chunking");
    Repository::init(store, chunking, ctx).await.expect("a new repository")
}

/// An encrypted one, which [`key`] opens.
pub async fn init_encrypted(store: Arc<dyn Store>, ctx: &Context) -> Repository {
    let chunking: Chunking = "cdc-8k".parse().expect("a chunking");
    let key = key("test");
    Repository::init_encrypted(Writers::Many, store, chunking, &key, ctx)
        .await
        .expect("a new repository")
}

/// A key with this passphrase, which is cheap to try.
pub fn key(passphrase: &str) -> NewKey {
    let cost = Cost { memory_kib: 64, passes: 1, lanes: 1 };
    NewKey { cost, ..NewKey::new(secret(passphrase)) }
}

/// A passphrase.
pub fn secret(passphrase: &str) -> Secret {
    Secret::passphrase(passphrase.as_bytes().to_vec()).expect("a passphrase")
}

/// A request for a snapshot of some volumes in experiment `e`.
pub fn request(run: &str, volumes: &[(&str, &Volume)]) -> SnapshotRequest {
    let source = |volume: &Volume| Arc::new(volume.clone()) as Arc<dyn Source>;
    request_of(run, volumes.iter().map(|(n, volume)| (name(n), source(volume))).collect())
}

/// A request for a snapshot of some sources in experiment `e`.
pub fn request_of(run: &str, volumes: Vec<(Name, Arc<dyn Source>)>) -> SnapshotRequest {
    SnapshotRequest {
        experiment: name("e"),
        run: name(run),
        name: None,
        labels: BTreeMap::new(),
        message: None,
        metadata: BTreeMap::new(),
        parent: Parent::Auto,
        volumes,
    }
}

/// Takes a snapshot of one volume, `v`, in run `r`.
pub async fn take(repo: &Repository, volume: &Volume) -> Result<SnapshotRecord> {
    snapshot(repo, request("r", &[("v", volume)]), &context()).await
}

/// Restores a volume and compares every byte.
pub async fn check(repo: &Repository, record: &VolumeRecord, volume: &Volume) -> Result<()> {
    let out = Box::new(Comparison::with(volume));
    stream(repo, record, out, &RestoreOptions::default(), &context()).await.map(|_| ())
}

/// Restores what is whole and compares it; gives the report.
pub async fn check_rest(
    repo: &Repository,
    record: &VolumeRecord,
    volume: &Volume,
    excused: Vec<Range<u64>>,
) -> Result<RestoreReport> {
    let out = Box::new(Comparison::except(volume, excused));
    let options = RestoreOptions { keep_going: true, ..RestoreOptions::default() };
    stream(repo, record, out, &options, &context()).await
}

/// A verification of everything.
pub async fn verify_all(repo: &Repository, read_data: bool) -> Result<VerifyReport> {
    verify(repo, &Item::Repository, &VerifyOptions { read_data, sample: None }, &context()).await
}

/// A collection without any patience.
pub fn at_once() -> CollectOptions {
    CollectOptions { grace: Duration::ZERO, silent: Duration::ZERO, ..CollectOptions::default() }
}

/// Collects without any patience.
pub async fn collect_all(repo: &Repository) -> Result<CollectReport> {
    collect(repo, &at_once(), &context()).await
}

/// All objects below a prefix.
pub async fn objects(store: &dyn Store, prefix: &str) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    loop {
        let after = entries.last().map(|entry| entry.key.clone());
        let page = store.list(prefix, after.as_deref()).await.expect("a listing");
        entries.extend(page.entries);
        if !page.more {
            return entries;
        }
    }
}

/// Checks that all snapshots are whole, and that a collection leaves no pack that they do not need.
pub async fn assert_tidy(repo: &Repository) {
    let found = verify_all(repo, true).await.expect("a verification");
    assert_eq!(found.problems, [], "before the collection");
    collect_all(repo).await.expect("a collection");
    let found = verify_all(repo, true).await.expect("a verification");
    assert_eq!(found.problems, [], "after the collection");
    let packs = objects(repo.store(), "packs/").await;
    assert_eq!(packs.len() as u64, found.packs, "{packs:?} are stored");
}
