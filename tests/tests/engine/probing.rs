//! Real endpoints that keep create-if-absent, and some that do not (docs/protocol.md, "Probing").

use std::sync::Arc;

use petra_engine::chunker::Chunking;
use petra_engine::record::Writers;
use petra_engine::store::{S3Store, Store, StoreErrorCause};
use petra_engine::url::Item;
use petra_engine::{Error, ErrorKind, Repository};
use petra_tests::lab::{assert_tidy, check, collect_all, context, init, objects, take};
use petra_tests::s3::{Access, Creates, InProcessS3, VersityGw};
use petra_tests::volume::Volume;

async fn connect(access: &Access) -> Arc<dyn Store> {
    Arc::new(S3Store::connect_with(&access.location("team"), access.options()).await.unwrap())
}

fn volume() -> Volume {
    Volume::noise(1, 100_000)
}

fn assert_refused<T: std::fmt::Debug>(result: Result<T, Error>, access: &Access) {
    let error = result.unwrap_err();
    assert!(error.to_string().contains(&access.endpoint), "{error}");
    assert_eq!(error.kind(), ErrorKind::Fix, "{error}");
    let Error::Store(error) = error else { panic!("{error}") };
    assert_eq!(error.cause, StoreErrorCause::NotExclusive, "{error}");
}

async fn story(access: &Access) {
    init(connect(access).await).await;
    let repo = Repository::open(connect(access).await).await.unwrap();
    let taken = take(&repo, &volume()).await.unwrap();
    repo.delete(taken.id, &context()).await.unwrap();
    repo.undelete(taken.id, &context()).await.unwrap();
    check(&repo, &taken.volumes[0], &volume()).await.unwrap();
    assert_eq!(objects(repo.store(), "probe/").await, []);
    assert_tidy(&repo).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_in_this_process_passes() {
    story(InProcessS3::start().access()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_server_passes() {
    if let Some(server) = VersityGw::start() {
        story(server.access()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_repository_is_made_at_an_endpoint_that_ignores_or_refuses_conditions() {
    for creates in [Creates::Unconditional, Creates::Refused] {
        let server = InProcessS3::start_with(creates);
        let store = connect(server.access()).await;
        let made = Repository::init(store.clone(), Chunking::default(), &context()).await;
        assert_refused(made, server.access());
        assert_eq!(objects(&*store, "").await, []);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_writer_works_at_any_endpoint() {
    for creates in [Creates::Unconditional, Creates::Refused, Creates::Racing] {
        let server = InProcessS3::start_with(creates);
        let store = connect(server.access()).await;
        let chunking = Chunking::default();
        Repository::init_for(Writers::Single, store.clone(), chunking, &context()).await.unwrap();
        let repo = Repository::open(store).await.unwrap();
        assert_eq!(repo.config().writers, Writers::Single);
        let first = take(&repo, &volume()).await.unwrap();
        let changed = volume().with(7, b"changed");
        let second = take(&repo, &changed).await.unwrap();
        repo.delete(first.id, &context()).await.unwrap();
        repo.undelete(first.id, &context()).await.unwrap();
        check(&repo, &first.volumes[0], &volume()).await.unwrap();
        repo.delete(first.id, &context()).await.unwrap();
        collect_all(&repo).await.unwrap();
        let late = repo.undelete(first.id, &context()).await.unwrap_err();
        assert!(matches!(late, Error::Purged { .. }), "{late}");
        check(&repo, &second.volumes[0], &changed).await.unwrap();
        assert_tidy(&repo).await;
    }
}

/// The same objects through another endpoint, as behind a proxy that loses headers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_a_bad_endpoint_a_repository_can_only_be_read() {
    let good = InProcessS3::start();
    let repo = init(connect(good.access()).await).await;
    let (old, taken) =
        (take(&repo, &volume()).await.unwrap(), take(&repo, &volume()).await.unwrap());
    repo.delete(old.id, &context()).await.unwrap();
    let before = objects(repo.store(), "").await;
    for creates in [Creates::Unconditional, Creates::Refused] {
        let server = good.endpoint(creates);
        let access = server.access();
        let open = async || Repository::open(connect(access).await).await.unwrap();
        let repo = open().await;
        let listed = repo.snapshots(&Item::Repository).await.unwrap();
        assert_eq!(listed, std::slice::from_ref(&taken));
        check(&repo, &taken.volumes[0], &volume()).await.unwrap();
        // Each is the first write of its own.
        let ctx = context();
        assert_refused(take(&open().await, &volume()).await, access);
        assert_refused(open().await.delete(taken.id, &ctx).await, access);
        assert_refused(open().await.undelete(old.id, &ctx).await, access);
        assert_refused(open().await.set_policy(None, None, &ctx).await, access);
        assert_refused(collect_all(&open().await).await, access);
    }
    assert_eq!(objects(repo.store(), "").await, before, "nothing was written");
    repo.undelete(old.id, &context()).await.unwrap();
    assert_tidy(&repo).await;
}
