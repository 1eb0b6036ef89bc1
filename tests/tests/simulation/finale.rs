//! What must hold when all is over, nothing goes wrong any more, and one lone collector has been through.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use petra_engine::collect::{CollectOptions, collect};
use petra_engine::context::{Context, Limits};
use petra_engine::format::node::Child;
use petra_engine::id::PackId;
use petra_engine::key::{self, Key};
use petra_engine::record::{Decision, SnapshotRecord};
use petra_engine::url::Item;
use petra_engine::verify::{VerifyOptions, verify};
use petra_engine::{Error, Repository, SnapshotId, tree};
use petra_tests::lab::{at_once, objects};
use petra_tests::simulated::Process;

use crate::actor::{Actor, Policy, context};
use crate::oracle::{END, Oracle};

/// Compares the repository with the model.
pub async fn check(judge: &Arc<Process>, oracle: &Oracle, rng: fastrand::Rng) {
    if let Err(error) = try_check(judge, oracle, rng).await {
        oracle.violation(format!("in the end: {error}"));
    }
}

async fn try_check(judge: &Arc<Process>, oracle: &Oracle, rng: fastrand::Rng) -> Result<(), Error> {
    let limits = Limits { threads: 0, requests: 4, packs_in_flight: 1, index_chunks: 1 << 10 };
    let ctx = context(judge, limits);
    let repo = Repository::open(judge.store()).await?;
    let listed = repo.snapshots(&Item::Repository).await?;
    oracle.check_listing(END, END, &listed);
    oracle.count_doubts(&listed);
    let mut reader = Actor {
        process: judge.clone(),
        repo: repo.clone(),
        ctx: ctx.clone(),
        oracle: oracle.clone(),
        rng,
        pace: Duration::ZERO,
        policy: Policy::default(),
        volumes: vec![],
    };
    for record in &listed {
        reader.restore(record, true).await;
    }
    verify_all(&repo, oracle, &listed, &ctx).await?;

    let at_once = CollectOptions { max_waste_percent: None, bury_from: 1, ..at_once() };
    collect(&repo, &at_once, &ctx).await?;
    let clones = clones(&repo).await?;
    oracle.saw("clone left", clones.len() as u64);
    let mut pinned = Vec::new();
    for clone in &clones {
        pinned.extend(commit(&repo, clone.1).await?);
    }
    let kept = walk(&repo, &pinned, &ctx, true).await?;
    check_packs(&repo, oracle, &listed, &kept, &ctx).await?;
    verify_all(&repo, oracle, &listed, &ctx).await?;

    // Somebody ends the clones that nobody ended, and compacts.
    for (clone, _) in &clones {
        repo.store().put(&Key::end(*clone), "ended".into()).await?;
    }
    let and_compact = CollectOptions { max_waste_percent: Some(0), ..at_once };
    let report = collect(&repo, &and_compact, &ctx).await?;
    oracle.saw("pack compacted in the end", report.compacted_packs);
    check_packs(&repo, oracle, &listed, &BTreeSet::new(), &ctx).await?;
    for left in objects(repo.store(), key::PINS).await {
        oracle.violation(format!("{} is left", left.key));
    }
    let entries = objects(repo.store(), key::RUNS).await.len();
    if entries != listed.len() {
        oracle.violation(format!("{entries} entries for {} snapshots", listed.len()));
    }
    if repo.snapshots(&Item::Repository).await? != listed {
        oracle.violation("the last collection changed the listing".to_owned());
    }
    for record in &listed {
        reader.restore(record, true).await;
    }
    let dry_run = CollectOptions { dry_run: true, ..at_once };
    let report = collect(&repo, &dry_run, &ctx).await?;
    if (report.purged, report.aborted_sessions, report.deleted_packs) != (0, 0, 0) {
        oracle.violation(format!("a second collection would find {report:?}"));
    }
    verify_all(&repo, oracle, &listed, &ctx).await
}

async fn verify_all(
    repo: &Repository,
    oracle: &Oracle,
    listed: &[SnapshotRecord],
    ctx: &Context,
) -> Result<(), Error> {
    let options = VerifyOptions { read_data: true, sample: None };
    let report = verify(repo, &Item::Repository, &options, ctx).await?;
    for problem in &report.problems {
        oracle.violation(format!("in the end: {problem:?}"));
    }
    if report.snapshots != listed.len() as u64 {
        let (checked, listed) = (report.snapshots, listed.len());
        oracle.violation(format!("{checked} snapshots were verified, {listed} are listed"));
    }
    Ok(())
}

async fn packs(repo: &Repository) -> BTreeSet<PackId> {
    let entries = objects(repo.store(), key::PACKS).await;
    entries.iter().filter_map(|entry| key::parse_numbered(&entry.key, key::PACKS)).collect()
}

/// Clones that pin something, and what.
async fn clones(repo: &Repository) -> Result<Vec<(SnapshotId, SnapshotId)>, Error> {
    let mut clones = Vec::new();
    for entry in objects(repo.store(), key::PINS).await {
        let key = Key::from_listing(entry.key);
        let pin: petra_engine::record::Pin =
            petra_engine::format::envelope::unseal("pin", &key, &repo.store().get(&key).await?)
                .map_err(|error| error.of(&key))?;
        let owner = key::parse_numbered(key.as_str(), key::PINS);
        clones.extend(
            owner.iter().flat_map(|owner| pin.snapshots.iter().map(|s| (owner.session, *s))),
        );
    }
    Ok(clones)
}

async fn commit(repo: &Repository, id: SnapshotId) -> Result<Option<SnapshotRecord>, Error> {
    Ok(match repo.decision(id).await? {
        Some(Decision::Commit { snapshot, .. }) => Some(*snapshot),
        _ => None,
    })
}

/// Checks that nothing is stored but what snapshots need, and `kept`.
async fn check_packs(
    repo: &Repository,
    oracle: &Oracle,
    listed: &[SnapshotRecord],
    kept: &BTreeSet<PackId>,
    ctx: &Context,
) -> Result<(), Error> {
    let needed = walk(repo, listed, ctx, false).await?;
    let mut moves = Vec::new();
    for entry in objects(repo.store(), key::SNAPS).await {
        let Some(id) = key::parse_id(&entry.key, key::SNAPS) else { continue };
        if let Some(Decision::Compaction { moves: moved, .. }) = repo.decision(id).await? {
            moves.extend(moved.iter().map(|moved| (id, moved.source)));
        }
    }
    let stored = packs(repo).await;
    for pack in needed.difference(&stored) {
        if !moves.iter().any(|(_, source)| source == pack) {
            oracle.violation(format!("pack {pack} is needed and gone"));
        }
    }
    // What a compaction copied is needed as what it copied is.
    let mut copiers: BTreeSet<SnapshotId> = BTreeSet::new();
    let is_allowed = |pack: &PackId, copiers: &BTreeSet<SnapshotId>| {
        needed.contains(pack) || kept.contains(pack) || copiers.contains(&pack.session)
    };
    loop {
        let before = copiers.len();
        for (copier, source) in &moves {
            if is_allowed(source, &copiers) {
                copiers.insert(*copier);
            }
        }
        if copiers.len() == before {
            break;
        }
    }
    for pack in stored.iter().filter(|pack| !is_allowed(pack, &copiers)) {
        oracle.violation(format!("pack {pack} is left, and nothing needs it"));
    }
    Ok(())
}

/// The packs that snapshots refer to, found without the collector's help: all, or as far as they are there.
async fn walk(
    repo: &Repository,
    records: &[SnapshotRecord],
    ctx: &Context,
    tolerant: bool,
) -> Result<BTreeSet<PackId>, Error> {
    let mut packs = BTreeSet::new();
    for volume in records.iter().flat_map(|record| &record.volumes) {
        packs.extend(volume.root.iter().map(|root| root.pack));
        let segments = tree::segments(repo, volume, ctx).await?;
        if let Some(unreadable) = segments.unreadable.into_iter().next().filter(|_| !tolerant) {
            return Err(unreadable.error);
        }
        packs.extend(segments.nodes.iter().map(|node| node.pack));
        for (segment, child) in segments.leaves.into_iter().enumerate() {
            let Child::Block { block, .. } = child else { continue };
            packs.insert(block.pack);
            let range = tree::segment_range(volume.len_bytes, segment);
            match tree::read_leaf(repo, &block, range.end - range.start).await {
                Ok(leaf) => packs.extend(leaf.frames.iter().map(|frame| frame.pack)),
                Err(error) if !tolerant => return Err(error),
                Err(_) => {}
            }
        }
    }
    Ok(packs)
}
