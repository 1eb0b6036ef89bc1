//! Policies in a repository, and deleting by them.

use std::collections::BTreeMap;
use std::sync::Arc;

use petra_engine::record::SnapshotRecord;
use petra_engine::retention::{Policy, PruneOptions, Reason, prune};
use petra_engine::snapshot::{SnapshotRequest, snapshot};
use petra_engine::store::MemoryStore;
use petra_engine::url::Item;
use petra_engine::{Context, Error, Repository};
use petra_tests::host::FixedHost;
use petra_tests::lab::{assert_tidy, context, init, name, objects, request};
use petra_tests::recording::{Fate, Gate, Operation, Recording};
use petra_tests::volume::Volume;

const DAY_MS: u64 = 24 * 60 * 60 * 1000;

async fn new_repo() -> (Arc<Recording>, Repository, Arc<FixedHost>, Context) {
    let store = Recording::new(Arc::new(MemoryStore::new()));
    let repo = init(store.clone()).await;
    let host = Arc::new(FixedHost::new(5, 1_767_225_600_000));
    let ctx = Context { host: host.clone(), ..context() };
    (store, repo, host, ctx)
}

async fn take_at(
    repo: &Repository,
    experiment: &str,
    phase: &str,
    ctx: &Context,
) -> SnapshotRecord {
    let volume = Volume::noise(1, 20_000);
    let labels = BTreeMap::from([("phase".to_owned(), phase.to_owned())]);
    let request =
        SnapshotRequest { experiment: name(experiment), labels, ..request("r", &[("v", &volume)]) };
    snapshot(repo, request, ctx).await.unwrap()
}

fn last(n: u32) -> Policy {
    Policy { keep_last: n, ..Policy::default() }
}

async fn left(repo: &Repository) -> Vec<SnapshotRecord> {
    repo.snapshots(&Item::Repository).await.unwrap()
}

#[tokio::test]
async fn what_no_rule_keeps_is_deleted_and_can_come_back() {
    let (store, repo, host, ctx) = new_repo().await;
    let mut taken = Vec::new();
    for n in 0..5 {
        host.advance(DAY_MS);
        taken.push(take_at(&repo, "e", if n == 1 { "final" } else { "initial" }, &ctx).await);
    }
    let mut options = PruneOptions {
        policy: Some(Policy { keep_labels: vec!["phase=final".parse().unwrap()], ..last(2) }),
        dry_run: true,
    };
    store.reset();
    let said = prune(&repo, &Item::Repository, &options, &ctx).await.unwrap();
    assert!(!store.log().iter().any(|call| call.is_write()), "a dry run changes nothing");
    let kept: Vec<bool> = said.iter().map(|choice| choice.is_kept()).collect();
    assert_eq!(kept, [false, true, false, true, true]);
    options.dry_run = false;
    let run = Item::Run { experiment: name("e"), run: name("r") };
    assert_eq!(prune(&repo, &run, &options, &ctx).await.unwrap(), said);
    assert_eq!(left(&repo).await, [taken[1].clone(), taken[3].clone(), taken[4].clone()]);
    let deleted = repo.deleted(&Item::Repository).await.unwrap();
    assert_eq!(
        deleted.iter().map(|deleted| deleted.record.id).collect::<Vec<_>>(),
        [taken[0].id, taken[2].id]
    );
    // Once more changes nothing.
    let again = prune(&repo, &run, &options, &ctx).await.unwrap();
    assert!(again.iter().all(|choice| choice.is_kept()));
    repo.undelete(taken[0].id, &ctx).await.unwrap();
    assert_eq!(left(&repo).await.len(), 4);
    assert_tidy(&repo).await;
}

#[tokio::test]
async fn the_policy_is_the_given_one_or_the_stored_one_or_the_standard() {
    let (_, repo, host, ctx) = new_repo().await;
    for _ in 0..4 {
        take_at(&repo, "e", "initial", &ctx).await;
        take_at(&repo, "f", "initial", &ctx).await;
        host.advance(1000);
    }
    host.advance(100 * DAY_MS);
    let going = async |policy: Option<Policy>| {
        let options = PruneOptions { policy, dry_run: true };
        let choices = prune(&repo, &Item::Repository, &options, &ctx).await.unwrap();
        let going = choices.iter().filter(|choice| !choice.is_kept());
        going.map(|choice| choice.record.experiment.to_string()).collect::<Vec<_>>().join("")
    };
    assert_eq!(going(None).await, "ef", "the standard keeps three");
    repo.set_policy(Some(&name("f")), Some(last(1)), &ctx).await.unwrap();
    assert_eq!(going(None).await, "efff");
    repo.set_policy(None, Some(last(2)), &ctx).await.unwrap();
    assert_eq!(going(None).await, "eefff");
    assert_eq!(going(Some(last(3))).await, "ef", "what is given goes before");
    assert_eq!(going(Some(Policy::default())).await, "", "no rule keeps everything");
    repo.set_policy(Some(&name("f")), None, &ctx).await.unwrap();
    assert_eq!(going(None).await, "eeff");
    repo.set_policy(None, None, &ctx).await.unwrap();
    assert_eq!(going(None).await, "ef");
    let policies = repo.policies().await.unwrap();
    assert_eq!(policies.for_others(), &Policy::standard());
    assert!(policies.changed.is_some());
    assert_eq!(objects(repo.store(), "policies/").await.len(), 4, "none is ever changed");
}

#[tokio::test]
async fn two_who_set_policies_at_once_both_do() {
    let (store, repo, _, ctx) = new_repo().await;
    let gate = Gate::default();
    store.first(|call| call.is(Operation::Create, "policies/"), Fate::Pause(gate.clone()));
    let slow = tokio::spawn({
        let (repo, ctx) = (repo.clone(), ctx.clone());
        async move { repo.set_policy(None, Some(last(7)), &ctx).await }
    });
    gate.reached().await;
    repo.set_policy(Some(&name("e")), Some(last(1)), &ctx).await.unwrap();
    gate.open();
    let policies = slow.await.unwrap().unwrap();
    assert_eq!(policies, repo.policies().await.unwrap());
    assert_eq!(policies.of(&name("e")), &last(1));
    assert_eq!(policies.of(&name("f")), &last(7));
}

/// The answer of the first attempt got lost: the second one meets its own object or makes another.
#[tokio::test]
async fn setting_a_policy_can_be_repeated() {
    let (store, repo, _, ctx) = new_repo().await;
    store.first(|call| call.is(Operation::Create, "policies/"), Fate::LoseAnswer);
    repo.set_policy(None, Some(last(4)), &ctx).await.unwrap_err();
    repo.set_policy(None, Some(last(4)), &ctx).await.unwrap();
    assert_eq!(repo.policies().await.unwrap().for_others(), &last(4));
}

#[tokio::test]
async fn what_can_not_be_pruned_is_refused() {
    let (_, repo, _, ctx) = new_repo().await;
    let taken = take_at(&repo, "e", "initial", &ctx).await;
    let snapshot = petra_engine::SnapshotRef::Id(taken.id);
    let options = PruneOptions { policy: Some(last(1)), dry_run: false };
    for (scope, expected) in [
        (Item::Snapshot { snapshot, volume: None }, "policies are for runs"),
        (Item::Experiment(name("nothing")), "no experiment"),
    ] {
        let error = prune(&repo, &scope, &options, &ctx).await.unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    let choices = prune(&repo, &Item::Repository, &options, &ctx).await.unwrap();
    assert_eq!(choices[0].reasons, [Reason::Last]);
    let cancelled = context();
    cancelled.cancel.cancel();
    take_at(&repo, "e", "initial", &ctx).await;
    let error = prune(&repo, &Item::Repository, &options, &cancelled).await.unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
    assert_eq!(left(&repo).await.len(), 2);
}
