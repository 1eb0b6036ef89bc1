//! Writers, deleters and collectors at once, without a lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use petra_engine::collect::{CollectOptions, collect};
use petra_engine::record::SnapshotRecord;
use petra_engine::snapshot::snapshot;
use petra_engine::store::{LocalStore, MemoryStore, Store};
use petra_engine::url::{Item, SnapshotRef};
use petra_engine::{Error, Repository};
use petra_tests::lab::{assert_tidy, at_once, check, context, init, request, verify_all};
use petra_tests::volume::{Volume, noise};

fn volume(seed: u64) -> Volume {
    Volume::noise(seed, 200_000)
}

/// Writers, a deleter and collectors at once, for a while.
async fn traffic(store: Arc<dyn Store>, seconds: u64) {
    let repo = init(store).await;
    let over = Arc::new(AtomicBool::new(false));
    let mut tasks = Vec::new();
    for writer in 0..4_u64 {
        let (repo, over) = (repo.clone(), over.clone());
        tasks.push(tokio::spawn(async move {
            let mut current = volume(writer % 2);
            for round in 0.. {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                current.write(round * 7_919 % 190_000, &noise(writer * 1000 + round, 3_000));
                let run = format!("run {writer}");
                let request = request(&run, &[("v", &current)]);
                match snapshot(&repo, request, &context()).await {
                    Ok(taken) => check_unless_deleted(&repo, &taken, &current).await,
                    // A collector without patience may win more than once.
                    Err(Error::Lost { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        }));
    }
    for patience in [Duration::ZERO, Duration::from_secs(1)] {
        let (repo, over) = (repo.clone(), over.clone());
        tasks.push(tokio::spawn(async move {
            let options = CollectOptions { silent: patience, ..at_once() };
            while !over.load(Ordering::Relaxed) {
                collect(&repo, &options, &context()).await.unwrap();
                tokio::time::sleep(Duration::from_millis(30)).await;
            }
        }));
    }
    tasks.push(tokio::spawn({
        let (repo, over) = (repo.clone(), over.clone());
        async move {
            while !over.load(Ordering::Relaxed) {
                let listed = repo.snapshots(&Item::Repository).await.unwrap();
                for record in listed.iter().rev().skip(3) {
                    repo.delete(record.id, &context()).await.unwrap();
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }));
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    over.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await.unwrap();
    }
    assert!(!repo.snapshots(&Item::Repository).await.unwrap().is_empty());
    assert_eq!(verify_all(&repo, true).await.unwrap().problems, []);
    assert_tidy(&repo).await;
}

async fn check_unless_deleted(repo: &Repository, taken: &SnapshotRecord, volume: &Volume) {
    let restored = check(repo, &taken.volumes[0], volume).await;
    if repo.find(&SnapshotRef::Id(taken.id)).await.is_ok() {
        restored.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn traffic_in_memory_loses_nothing() {
    traffic(Arc::new(MemoryStore::new()), 4).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn traffic_in_a_directory_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    traffic(Arc::new(LocalStore::new(dir.path())), 4).await;
}
