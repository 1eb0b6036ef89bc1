//! Bringing deleted snapshots back, beside collectors that give up their data (docs/protocol.md, "Deleter").

use std::sync::Arc;
use std::time::Duration;

use petra_engine::collect::{CollectOptions, collect};
use petra_engine::record::{MarkKind, SnapshotRecord};
use petra_engine::snapshot::{SnapshotRequest, snapshot};
use petra_engine::store::{MemoryStore, StoreErrorCause};
use petra_engine::url::{Item, Selector, SnapshotRef};
use petra_engine::{Context, Error, Repository, SnapshotId};
use petra_tests::host::FixedHost;
use petra_tests::lab::{
    assert_tidy, at_once, check, collect_all, context, init, name, objects, request, take,
};
use petra_tests::recording::{Fate, Gate, Operation, Recording};
use petra_tests::volume::Volume;

/// Long ago enough for nothing.
const NEVER: Duration = Duration::from_secs(1 << 40);

fn volume(seed: u64) -> Volume {
    Volume::noise(seed, 100_000)
}

async fn new_repo() -> (Arc<Recording>, Repository) {
    let store = Recording::new(Arc::new(MemoryStore::new()));
    let repo = init(store.clone()).await;
    (store, repo)
}

async fn listed(repo: &Repository) -> Vec<SnapshotId> {
    let records = repo.snapshots(&Item::Repository).await.unwrap();
    records.iter().map(|record| record.id).collect()
}

/// Deletes nothing that a living session needs.
async fn collect_patiently(repo: &Repository) {
    let options = CollectOptions { silent: NEVER, ..at_once() };
    collect(repo, &options, &context()).await.unwrap();
}

async fn assert_back(repo: &Repository, taken: &SnapshotRecord, volume: &Volume) {
    assert!(listed(repo).await.contains(&taken.id));
    check(repo, &taken.volumes[0], volume).await.unwrap();
    assert_tidy(repo).await;
    check(repo, &taken.volumes[0], volume).await.unwrap();
}

#[tokio::test]
async fn there_and_back_any_number_of_times() {
    let (_, repo) = new_repo().await;
    let ctx = context();
    let taken = take(&repo, &volume(1)).await.unwrap();
    for round in 1..4 {
        repo.delete(taken.id, &ctx).await.unwrap();
        assert_eq!(listed(&repo).await, []);
        let deleted = repo.deleted(&Item::Repository).await.unwrap();
        assert_eq!(deleted.iter().map(|deleted| &deleted.record).collect::<Vec<_>>(), [&taken]);
        let grace = CollectOptions { grace: NEVER, ..at_once() };
        collect(&repo, &grace, &ctx).await.unwrap();
        // Repeating it changes nothing.
        for _ in 0..3 {
            repo.undelete(taken.id, &ctx).await.unwrap();
            assert_eq!(objects(repo.store(), "marks/").await.len(), 2 * round);
        }
        assert_eq!(repo.deleted(&Item::Repository).await.unwrap(), []);
        assert_back(&repo, &taken, &volume(1)).await;
    }
    let state = repo.marks().await.unwrap()[&taken.id];
    assert_eq!((state.k, state.mark), (6, MarkKind::Undelete));
    repo.delete(taken.id, &ctx).await.unwrap();
    collect_all(&repo).await.unwrap();
    assert_eq!(objects(repo.store(), "packs/").await, []);
}

#[tokio::test]
async fn what_was_never_deleted_stays_as_it_is() {
    let (_, repo) = new_repo().await;
    let ctx = context();
    let taken = take(&repo, &volume(1)).await.unwrap();
    repo.undelete(taken.id, &ctx).await.unwrap();
    assert_eq!(objects(repo.store(), "marks/").await, []);
    let unknown = repo.undelete(ctx.host.new_id(), &ctx).await.unwrap_err();
    assert!(matches!(unknown, Error::Unknown { .. }), "{unknown}");
}

#[tokio::test]
async fn after_a_purge_it_is_too_late() {
    let (_, repo) = new_repo().await;
    let host = Arc::new(FixedHost::new(9, 1_767_225_600_000));
    let ctx = Context { host: host.clone(), ..context() };
    let taken = snapshot(&repo, request("r", &[("v", &volume(1))]), &ctx).await.unwrap();
    repo.delete(taken.id, &ctx).await.unwrap();
    host.advance(60_000);
    collect(&repo, &at_once(), &ctx).await.unwrap();
    host.advance(60_000);
    let marks = objects(repo.store(), "marks/").await;
    let by_id = SnapshotRef::Id(taken.id);
    for error in [
        repo.undelete(taken.id, &ctx).await.unwrap_err(),
        repo.find_deleted(&by_id).await.unwrap_err(),
    ] {
        let Error::Purged { snapshot, at } = error else { panic!("{error}") };
        let at = at.map(|at| at.to_string());
        assert_eq!((snapshot, at.as_deref()), (taken.id, Some("2026-01-01T00:01:00Z")));
    }
    assert_eq!(objects(repo.store(), "marks/").await, marks);
    assert_eq!(repo.deleted(&Item::Repository).await.unwrap(), []);
}

/// A collector that buries removes the marks, so that the key of the Undelete is free again: the graves say that it is
/// too late, whenever the burial comes.
#[tokio::test]
async fn after_a_burial_it_is_too_late_as_well() {
    let mut raced = 0;
    for n in 0.. {
        let (store, repo) = new_repo().await;
        let taken = take(&repo, &volume(1)).await.unwrap();
        repo.delete(taken.id, &context()).await.unwrap();
        let gate = Gate::default();
        store.nth(n, Fate::Pause(gate.clone()));
        let undeleting = tokio::spawn({
            let (repo, id) = (repo.clone(), taken.id);
            async move { repo.undelete(id, &context()).await }
        });
        let reached = tokio::time::timeout(Duration::from_secs(5), gate.reached());
        let met = tokio::select! {
            reached = reached => reached.is_ok(),
            () = async { while !undeleting.is_finished() { tokio::task::yield_now().await } } => false,
        };
        if !met {
            undeleting.await.unwrap().unwrap();
            break;
        }
        let before = listed(&repo).await;
        let collector = Repository::open(store.clone()).await.unwrap();
        let options = CollectOptions { bury_from: 1, ..at_once() };
        collect(&collector, &options, &context()).await.unwrap();
        gate.open();
        let undeleted = undeleting.await.unwrap();
        match undeleted {
            Ok(()) => assert_eq!(before, [taken.id], "request {n}: it was back before"),
            Err(Error::Purged { snapshot, .. }) => {
                raced += 1;
                assert_eq!(snapshot, taken.id);
                assert_eq!(listed(&repo).await, []);
                assert_eq!(objects(repo.store(), "marks/").await, [], "request {n}");
                let again = repo.undelete(taken.id, &context()).await.unwrap_err();
                assert!(matches!(again, Error::Purged { at: None, .. }), "{again}");
                let found = repo.find_deleted(&SnapshotRef::Id(taken.id)).await.unwrap_err();
                assert!(matches!(found, Error::Purged { at: None, .. }), "{found}");
            }
            Err(error) => panic!("request {n}: {error}"),
        }
        assert_tidy(&repo).await;
    }
    assert!(raced > 2, "{raced} burials came in between");
}

/// Both compete for one key: whoever creates it first wins, and the other one sees it.
#[tokio::test]
async fn an_undelete_and_a_purge_have_one_winner() {
    for undelete_first in [true, false] {
        let (store, repo) = new_repo().await;
        let taken = take(&repo, &volume(1)).await.unwrap();
        repo.delete(taken.id, &context()).await.unwrap();
        let gate = Gate::default();
        let key = format!("marks/{}/000002", taken.id);
        store.first(move |call| call.is(Operation::Create, &key), Fate::Pause(gate.clone()));
        if undelete_first {
            let collecting = tokio::spawn({
                let repo = repo.clone();
                async move { collect_all(&repo).await }
            });
            gate.reached().await;
            repo.undelete(taken.id, &context()).await.unwrap();
            gate.open();
            let report = collecting.await.unwrap().unwrap();
            assert_eq!((report.purged, report.deleted_packs), (0, 0));
            assert_back(&repo, &taken, &volume(1)).await;
        } else {
            let undeleting = tokio::spawn({
                let (repo, id) = (repo.clone(), taken.id);
                async move { repo.undelete(id, &context()).await }
            });
            gate.reached().await;
            collect_all(&repo).await.unwrap();
            gate.open();
            let error = undeleting.await.unwrap().unwrap_err();
            assert!(matches!(error, Error::Purged { .. }), "{error}");
            assert_eq!(listed(&repo).await, []);
            assert_eq!(objects(repo.store(), "packs/").await, []);
        }
    }
}

#[tokio::test]
async fn two_undeletes_at_once_are_one() {
    let (store, repo) = new_repo().await;
    let taken = take(&repo, &volume(1)).await.unwrap();
    repo.delete(taken.id, &context()).await.unwrap();
    let gate = Gate::default();
    store.first(|call| call.is(Operation::Create, "marks/"), Fate::Pause(gate.clone()));
    let undeleting = tokio::spawn({
        let (repo, id) = (repo.clone(), taken.id);
        async move { repo.undelete(id, &context()).await }
    });
    gate.reached().await;
    repo.undelete(taken.id, &context()).await.unwrap();
    gate.open();
    undeleting.await.unwrap().unwrap();
    assert_eq!(objects(repo.store(), "marks/").await.len(), 2);
    assert_back(&repo, &taken, &volume(1)).await;
}

/// What was answered is true for ever, however collectors, an undelete and a writer that reuses its data interleave.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beside_collectors_and_a_writer_each_answer_holds() {
    let (mut won, mut lost) = (0, 0);
    for round in 0..60_u64 {
        let (store, repo) = new_repo().await;
        let taken = take(&repo, &volume(1)).await.unwrap();
        repo.delete(taken.id, &context()).await.unwrap();
        // Rounds differ in how late the undelete is, in requests.
        let patience = round % 12;
        let mut seen = 0;
        store.rule(move |_, call| {
            seen += u64::from(call.is(Operation::List, "marks/"));
            let is_early = seen <= patience && call.is(Operation::Create, "marks/");
            if is_early { Fate::Delay(Duration::from_millis(patience)) } else { Fate::Pass }
        });
        let next = volume(1).with(10, b"next");
        let (undeleted, (), (), written) = tokio::join!(
            async {
                tokio::time::sleep(Duration::from_micros(300 * (round % 7))).await;
                repo.undelete(taken.id, &context()).await
            },
            collect_patiently(&repo),
            collect_patiently(&repo),
            take(&repo, &next),
        );
        store.reset();
        let written = written.unwrap();
        match undeleted {
            Ok(()) => {
                won += 1;
                assert_back(&repo, &taken, &volume(1)).await;
            }
            Err(Error::Purged { .. }) => {
                lost += 1;
                assert_eq!(listed(&repo).await, [written.id]);
            }
            Err(error) => panic!("{error}"),
        }
        assert_back(&repo, &written, &next).await;
    }
    assert!(won > 0 && lost > 0, "{won} undeletes won, {lost} lost: both must be tried");
}

#[tokio::test]
async fn a_fault_at_any_request_can_be_repeated_away() {
    for fate in [Fate::Fail(StoreErrorCause::Unavailable), Fate::LoseAnswer] {
        for n in 0.. {
            let (store, repo) = new_repo().await;
            let taken = take(&repo, &volume(1)).await.unwrap();
            repo.delete(taken.id, &context()).await.unwrap();
            store.nth(n, fate.clone());
            let first = repo.undelete(taken.id, &context()).await;
            let met = store.log().len() > n;
            store.reset();
            assert_eq!(first.is_err(), met, "request {n}");
            repo.undelete(taken.id, &context()).await.unwrap();
            assert_eq!(objects(repo.store(), "marks/").await.len(), 2);
            assert_back(&repo, &taken, &volume(1)).await;
            if !met {
                break;
            }
        }
    }
}

/// Snapshots `names` of run `r`, deleted in this order a minute apart, and one of run `s`.
async fn with_deleted(repo: &Repository, names: &[&str]) -> Vec<SnapshotRecord> {
    let host = Arc::new(FixedHost::new(3, 1_767_225_600_000));
    let ctx = Context { host: host.clone(), ..context() };
    let mut taken = Vec::new();
    for (n, text) in names.iter().enumerate() {
        let run = request("r", &[("v", &volume(n as u64))]);
        let request = SnapshotRequest { name: Some(name(text)), ..run };
        taken.push(snapshot(repo, request, &ctx).await.unwrap());
    }
    let other = snapshot(repo, request("s", &[("v", &volume(9))]), &ctx).await.unwrap();
    for record in taken.iter().chain([&other]) {
        host.advance(60_000);
        repo.delete(record.id, &ctx).await.unwrap();
    }
    taken
}

fn in_run(selector: Selector) -> SnapshotRef {
    SnapshotRef::InRun { experiment: name("e"), run: name("r"), selector }
}

#[tokio::test]
async fn deleted_snapshots_are_found_by_what_they_were_called() {
    let (_, repo) = new_repo().await;
    let taken = with_deleted(&repo, &["a", "b", "a"]).await;
    let find = async |text: &str| {
        let found = repo.find_deleted(&in_run(Selector::Text(name(text)))).await;
        found.map(|found| found.record.id)
    };
    assert_eq!(find("a").await.unwrap(), taken[2].id, "the last one of this name");
    assert_eq!(find("b").await.unwrap(), taken[1].id);
    let id = taken[0].id.to_string();
    assert_eq!(find(&id).await.unwrap(), taken[0].id);
    let others = taken[1..].iter().map(|record| record.id.to_string());
    let unique = (1..26).find(|n| others.clone().all(|other| other[..*n] != id[..*n])).unwrap();
    assert_eq!(find(&id[..unique]).await.unwrap(), taken[0].id);
    let Error::Ambiguous { matches, .. } = find("0").await.unwrap_err() else { panic!() };
    assert_eq!(matches.len(), 3);
    let latest = repo.find_deleted(&in_run(Selector::Latest)).await.unwrap();
    assert_eq!(latest.record.id, taken[2].id);
    assert_eq!(latest.at.to_string(), "2026-01-01T00:03:00Z");
    assert_eq!(latest.until(Duration::from_secs(60)).to_string(), "2026-01-01T00:04:00Z");
    let Error::Unknown { what, known, .. } = find("c").await.unwrap_err() else { panic!() };
    assert_eq!((what, known.join(" ")), ("deleted snapshot", "a b a".to_owned()));
}

#[tokio::test]
async fn each_scope_lists_its_own() {
    let (_, repo) = new_repo().await;
    let taken = with_deleted(&repo, &["a", "b"]).await;
    let count = async |item: Item| repo.deleted(&item).await.unwrap().len();
    let run = Item::Run { experiment: name("e"), run: name("r") };
    assert_eq!(count(Item::Repository).await, 3);
    assert_eq!(count(Item::Experiment(name("e"))).await, 3);
    assert_eq!(count(run.clone()).await, 2);
    assert_eq!(count(Item::Experiment(name("f"))).await, 0);
    repo.undelete(taken[0].id, &context()).await.unwrap();
    assert_eq!(count(run).await, 1);
    // A snapshot that is there is none that could come back.
    let there = repo.find_deleted(&SnapshotRef::Id(taken[0].id)).await.unwrap_err();
    assert!(matches!(there, Error::Unknown { what: "deleted snapshot", .. }), "{there}");
}
