//! Every request of every operation fails, loses its answer or is the last before a crash.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use petra_engine::progress::{Event, Progress};
use petra_engine::restore::{RestoreOptions, restore, stream};
use petra_engine::snapshot::snapshot;
use petra_engine::source::Source;
use petra_engine::store::{MemoryStore, StoreErrorCause};
use petra_engine::target::FileTarget;
use petra_engine::url::Item;
use petra_engine::{Error, Repository, SnapshotId};
use petra_tests::lab::{
    assert_tidy, check, collect_all, context, init, name, request, request_of, take, verify_all,
};
use petra_tests::recording::{Fate, Operation, Recording};
use petra_tests::volume::{Volume, noise};

/// How a request can go wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// It is refused.
    Refused,
    /// It and all after it are refused: the store went away.
    Away,
    /// It is done, but not acknowledged.
    Unacknowledged,
    /// The process dies before it.
    Crash,
}

const FAULTS: [Fault; 4] = [Fault::Refused, Fault::Away, Fault::Unacknowledged, Fault::Crash];

fn first() -> Volume {
    Volume::noise(1, 200_000)
}

fn second() -> Volume {
    first().with(30_000, &noise(2, 20_000))
}

fn third() -> Volume {
    second().with(80_000, &noise(3, 5_000))
}

/// Runs `work` with a fault at its `n`-th request: what it gave, if it did not crash there, and whether it came so
/// far.
async fn with_fault<T>(
    store: &Recording,
    n: usize,
    fault: Fault,
    work: impl Future<Output = T>,
) -> (Option<T>, bool) {
    match fault {
        Fault::Refused => store.nth(n, Fate::Fail(StoreErrorCause::Denied)),
        Fault::Away => store.from_nth(n, Fate::Fail(StoreErrorCause::Unavailable)),
        Fault::Unacknowledged => store.nth(n, Fate::LoseAnswer),
        Fault::Crash => store.from_nth(n, Fate::Hang),
    }
    let mut work = Box::pin(work);
    let done = loop {
        tokio::select! {
            done = &mut work => break Some(done),
            () = tokio::time::sleep(Duration::from_millis(1)) => {
                if fault == Fault::Crash && store.log().len() > n {
                    break None;
                }
            }
        }
    };
    let met = store.log().len() > n;
    drop(work);
    if fault == Fault::Crash {
        // Tasks of the dropped work notice.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    store.reset();
    (done, met)
}

async fn new_repo() -> (Arc<Recording>, Repository, SnapshotId) {
    let store = Recording::new(Arc::new(MemoryStore::new()));
    let repo = init(store.clone()).await;
    let id = take(&repo, &first()).await.unwrap().id;
    (store, repo, id)
}

/// All that is listed restores, and is one of what was snapshotted.
async fn assert_whole(repo: &Repository, volumes: &[Volume], at: &str) {
    assert_eq!(verify_all(repo, true).await.unwrap().problems, [], "{at}");
    for record in repo.snapshots(&Item::Repository).await.unwrap() {
        let volume = volumes.iter().find(|volume| {
            record.message.is_none() && { volume.len() == record.volumes[0].len_bytes }
        });
        assert!(volume.is_some(), "{at}");
        let mut whole = false;
        for volume in volumes {
            whole |= check(repo, &record.volumes[0], volume).await.is_ok();
        }
        assert!(whole, "{at}: {} has other bytes", record.id);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_survives_a_fault_at_every_request() {
    for fault in FAULTS {
        for n in 0.. {
            let at = format!("{fault:?} at request {n}");
            let (store, repo, old) = new_repo().await;
            let volume = second();
            let (taken, met) = with_fault(&store, n, fault, take(&repo, &volume)).await;
            // Ids of one millisecond have any order.
            let (first_one, others): (Vec<_>, Vec<_>) = repo
                .snapshots(&Item::Repository)
                .await
                .unwrap()
                .into_iter()
                .partition(|record| record.id == old);
            assert_eq!(first_one.len(), 1, "{at}");
            match taken {
                Some(Ok(taken)) => assert_eq!(others, [taken], "{at}"),
                // Only a store that went away may leave it open whether the commit was done.
                Some(Err(_)) if fault != Fault::Away => assert_eq!(others, [], "{at}"),
                _ => {}
            }
            assert_whole(&repo, &[first(), second()], &at).await;
            let next = take(&repo, &third()).await.unwrap();
            check(&repo, &next.volumes[0], &third()).await.unwrap();
            assert!(next.parent.is_some(), "{at}: the next one is incremental");
            // What changed, and chunks around it.
            assert!(next.stats.new_bytes < 120_000, "{at}: {:?}", next.stats);
            assert_tidy(&repo).await;
            if !met {
                break;
            }
            assert!(n < 100, "a snapshot makes fewer requests");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collection_survives_a_fault_at_every_request() {
    for fault in FAULTS {
        for n in 0.. {
            let at = format!("{fault:?} at request {n}");
            let (store, repo, old) = new_repo().await;
            let kept = take(&repo, &second()).await.unwrap();
            repo.delete(old, &context()).await.unwrap();
            let (_, met) = with_fault(&store, n, fault, collect_all(&repo)).await;
            check(&repo, &kept.volumes[0], &second()).await.unwrap();
            assert_whole(&repo, &[first(), second()], &at).await;
            assert_tidy(&repo).await;
            if !met {
                break;
            }
            assert!(n < 100, "a collection makes fewer requests");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delete_survives_a_fault_at_every_request() {
    for fault in FAULTS {
        for n in 0.. {
            let (store, repo, old) = new_repo().await;
            let ctx = context();
            let (_, met) = with_fault(&store, n, fault, repo.delete(old, &ctx)).await;
            let listed = repo.snapshots(&Item::Repository).await.unwrap().len();
            assert!(listed <= 1, "{fault:?} at request {n}");
            repo.delete(old, &ctx).await.unwrap();
            assert_eq!(repo.snapshots(&Item::Repository).await.unwrap(), []);
            assert_tidy(&repo).await;
            if !met {
                break;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_store_says_so_and_stays_whole() {
    for room in [0, 300, 1_000, 10_000, 22_000, 30_000] {
        let (store, repo, _) = new_repo().await;
        store.full_after(room);
        let failed = take(&repo, &second()).await;
        store.reset();
        if let Err(error) = failed {
            let Error::Store(error) = error else { panic!("{error}") };
            assert_eq!(error.cause, StoreErrorCause::Full);
        }
        assert_whole(&repo, &[first(), second()], &format!("{room} bytes")).await;
        assert_tidy(&repo).await;
    }
}

/// Cancels as soon as it is read at some place.
#[derive(Debug)]
struct Cancelling {
    volume: Volume,
    at: u64,
    token: tokio_util::sync::CancellationToken,
}

impl Source for Cancelling {
    fn len_bytes(&self) -> u64 {
        self.volume.len_bytes()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> petra_engine::Result<()> {
        if offset >= self.at {
            self.token.cancel();
        }
        self.volume.read_at(buf, offset)
    }

    fn next_data(&self, from: u64) -> petra_engine::Result<Option<std::ops::Range<u64>>> {
        self.volume.next_data(from)
    }

    fn check_unchanged(&self) -> petra_engine::Result<()> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_snapshot_is_not_there() {
    let (_, repo, old) = new_repo().await;
    let volume = Volume::noise(5, 3 << 20);
    for at in [0, 1 << 20, 2 << 20] {
        let ctx = context();
        let source = Cancelling { volume: volume.clone(), at, token: ctx.cancel.clone() };
        let request = request_of("r", vec![(name("v"), Arc::new(source))]);
        let error = snapshot(&repo, request, &ctx).await.unwrap_err();
        assert!(matches!(error, Error::Cancelled), "{error}");
        let listed = repo.snapshots(&Item::Repository).await.unwrap();
        assert_eq!(listed.iter().map(|record| record.id).collect::<Vec<_>>(), [old]);
    }
    // What was cancelled before does not stand in the way of finding a parent.
    let next = take(&repo, &second()).await.unwrap();
    assert_eq!(next.parent, Some(old));
    assert_tidy(&repo).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_or_failed_restore_leaves_no_file() {
    let (store, repo, _) = new_repo().await;
    let volume = Volume::noise(5, 40 << 20);
    let taken = take(&repo, &volume).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("target");
    for round in 0..20 {
        let ctx = context();
        let token = ctx.cancel.clone();
        let mut data_requests = 0;
        store.rule(move |_, call| {
            data_requests += usize::from(call.is(Operation::GetRange, "packs/"));
            match data_requests {
                n if n < 3 + round % 4 => Fate::Pass,
                _ if round % 2 == 0 => Fate::Fail(StoreErrorCause::Unavailable),
                _ => {
                    token.cancel();
                    Fate::Pass
                }
            }
        });
        let target = FileTarget::create(&path, volume.len()).unwrap();
        let options = RestoreOptions::default();
        let error = restore(&repo, &taken.volumes[0], target, &options, &ctx).await.unwrap_err();
        assert!(matches!(error, Error::Cancelled | Error::Store(_)), "{error}");
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// Who drops a snapshot's future wants it to end, not to go on where nobody sees it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_snapshot_stores_no_more() {
    let (store, repo, _) = new_repo().await;
    let gate = petra_tests::recording::Gate::default();
    let volume = Volume::noise(7, 70 << 20);
    store.first(|call| call.is(Operation::Put, "packs/"), Fate::Pause(gate.clone()));
    let running = tokio::spawn({
        let repo = repo.clone();
        async move { take(&repo, &volume).await }
    });
    gate.reached().await;
    running.abort();
    assert!(running.await.unwrap_err().is_cancelled());
    tokio::time::sleep(Duration::from_millis(20)).await;
    let before = store.log().len();
    gate.open();
    tokio::time::sleep(Duration::from_millis(1_000)).await;
    assert_eq!(store.log().len(), before, "{:?}", store.log());
    store.reset();
    assert_tidy(&repo).await;
}

#[derive(Debug)]
struct Panicking;

impl Progress for Panicking {
    fn event(&self, event: Event<'_>) {
        assert!(!matches!(event, Event::Processed { .. }), "on purpose");
    }
}

/// A defect in a worker is an error of its operation, not the end of the process or a wait for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_in_a_worker_is_an_error() {
    let (_, repo, _) = new_repo().await;
    let record = repo.snapshots(&Item::Repository).await.unwrap().remove(0);
    let ctx = petra_engine::Context { progress: Arc::new(Panicking), ..context() };
    let out = Box::new(std::io::sink());
    let restored = stream(&repo, &record.volumes[0], out, &RestoreOptions::default(), &ctx).await;
    assert!(matches!(restored, Err(Error::Internal(_))), "{restored:?}");
    let taken = snapshot(&repo, request("r", &[("v", &second())]), &ctx).await;
    assert!(matches!(taken, Err(Error::Internal(_))), "{taken:?}");
    assert_eq!(repo.snapshots(&Item::Repository).await.unwrap(), [record]);
}
