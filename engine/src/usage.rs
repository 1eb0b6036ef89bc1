//! What experiments, runs and snapshots hold: how much is theirs alone.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use serde::Serialize;

use crate::context::Context;
use crate::error::Result;
use crate::format::node::Child;
use crate::id::{PackId, SnapshotId};
use crate::name::Name;
use crate::record::SnapshotRecord;
use crate::relocation::Relocator;
use crate::repository::Repository;
use crate::store::list_all;
use crate::url::Item;
use crate::workers::Workers;
use crate::{key, tree};

/// The space that a repository takes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Bytes of all packs, garbage included.
    pub packs_bytes: u64,
    /// Bytes of frames that some snapshot refers to.
    pub live_bytes: u64,
    /// A row for each experiment, then its runs, then their snapshots.
    pub rows: Vec<UsageRow>,
}

/// The space that one experiment, run or snapshot takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct UsageRow {
    /// The experiment.
    pub experiment: Name,
    /// The run; None in the row of an experiment.
    pub run: Option<Name>,
    /// The snapshot; None in the row of a run.
    pub snapshot: Option<SnapshotId>,
    /// The snapshot's name.
    pub name: Option<Name>,
    /// Bytes of its volumes that are not zeros.
    pub volume_bytes: u64,
    /// Bytes in the store that nothing else refers to.
    pub exclusive_bytes: u64,
}

/// Who refers to a frame or block: one owner at each level, or several.
#[derive(Clone, Copy, Debug)]
struct Owners {
    len: u32,
    snapshot: Option<u32>,
    run: Option<u32>,
    experiment: Option<u32>,
}

/// The numbers of a snapshot, its run and its experiment in the rows.
#[derive(Clone, Copy, Debug)]
struct Place {
    snapshot: u32,
    run: u32,
    experiment: u32,
}

/// A frame or block: its pack and offset.
type Piece = (PackId, u32);

/// Walks the manifests of all snapshots; `scope` says which rows to give.
pub async fn usage(repo: &Repository, scope: &Item, ctx: &Context) -> Result<Usage> {
    let packs = list_all(repo.store(), key::PACKS).await?;
    let records = repo.snapshots(&Item::Repository).await?;
    let (mut rows, places) = rows(&records);
    let stored: HashSet<PackId> =
        packs.iter().filter_map(|pack| key::parse_numbered(&pack.key, key::PACKS)).collect();
    let workers = Workers::start(ctx)?;
    let mut owners: HashMap<Piece, Owners> = HashMap::new();
    for (record, place) in records.iter().zip(&places) {
        let mut seen = HashSet::new();
        for piece in pieces(repo, record, &mut seen, &stored, &workers, ctx).await? {
            own(&mut owners, piece, *place);
        }
    }
    let mut live_bytes = 0;
    for owner in owners.values() {
        live_bytes += u64::from(owner.len);
        for row in [owner.snapshot, owner.run, owner.experiment].into_iter().flatten() {
            if let Some(row) = rows.get_mut(row as usize) {
                row.exclusive_bytes += u64::from(owner.len);
            }
        }
    }
    let shown = rows.into_iter().filter(|row| in_scope(row, scope)).collect();
    Ok(Usage { packs_bytes: packs.iter().map(|pack| pack.len).sum(), live_bytes, rows: shown })
}

/// One row for everything, in the order of names, and the place of each record in them.
fn rows(records: &[SnapshotRecord]) -> (Vec<UsageRow>, Vec<Place>) {
    let mut sorted: BTreeMap<&Name, BTreeMap<&Name, Vec<usize>>> = BTreeMap::new();
    for (n, record) in records.iter().enumerate() {
        sorted.entry(&record.experiment).or_default().entry(&record.run).or_default().push(n);
    }
    let mut rows: Vec<UsageRow> = Vec::new();
    let mut places = vec![Place { snapshot: 0, run: 0, experiment: 0 }; records.len()];
    let row = |experiment: &Name, run, snapshot, name, volume_bytes| UsageRow {
        experiment: experiment.clone(),
        run,
        snapshot,
        name,
        volume_bytes,
        exclusive_bytes: 0,
    };
    for (experiment, runs) in sorted {
        let experiment_at = rows.len();
        rows.push(row(experiment, None, None, None, 0));
        for (run, snapshots) in runs {
            let run_at = rows.len();
            rows.push(row(experiment, Some(run.clone()), None, None, 0));
            for n in snapshots {
                let (Some(record), Some(place)) = (records.get(n), places.get_mut(n)) else {
                    continue;
                };
                let bytes = record.volumes.iter().map(|volume| volume.data_bytes).sum();
                *place = Place {
                    snapshot: rows.len() as u32,
                    run: run_at as u32,
                    experiment: experiment_at as u32,
                };
                let name = record.name.clone();
                rows.push(row(experiment, Some(run.clone()), Some(record.id), name, bytes));
                for at in [run_at, experiment_at] {
                    if let Some(row) = rows.get_mut(at) {
                        row.volume_bytes += bytes;
                    }
                }
            }
        }
    }
    (rows, places)
}

/// The frames and blocks of a snapshot that `seen` does not have yet, with their lengths.
async fn pieces(
    repo: &Repository,
    record: &SnapshotRecord,
    seen: &mut HashSet<Piece>,
    stored: &HashSet<PackId>,
    workers: &Workers,
    ctx: &Context,
) -> Result<Vec<(Piece, u32)>> {
    let is_there = |pack| stored.contains(&pack);
    let mut now = Relocator { repo, is_there: &is_there, packs: BTreeSet::new() };
    let mut pieces = Vec::new();
    for volume in &record.volumes {
        let segments = tree::segments(repo, volume, ctx).await?;
        if let Some(unreadable) = segments.unreadable.into_iter().next() {
            return Err(unreadable.error);
        }
        for node in segments.nodes {
            let node = now.block(node).await?;
            pieces.push(((node.pack, node.offset), node.len));
        }
        let mut fresh = Vec::new();
        for (segment, child) in segments.leaves.into_iter().enumerate() {
            let Child::Block { block, data_bytes } = child else { continue };
            let block = now.block(block).await?;
            pieces.push(((block.pack, block.offset), block.len));
            // By place, not by content: leaves of equal content may list different frames.
            if seen.insert((block.pack, block.offset)) {
                fresh.push((segment, Child::Block { block, data_bytes }));
            }
        }
        for batch in fresh.chunks(tree::BATCH_SEGMENTS) {
            ctx.check()?;
            let batch = batch.to_vec();
            for (_, leaf) in tree::leaves(repo, volume.len_bytes, batch, workers, ctx).await? {
                let Some(leaf) = leaf? else { continue };
                let leaf = now.leaf(leaf).await?;
                pieces.extend(leaf.frames.iter().map(|f| ((f.pack, f.offset), f.stored_len)));
            }
        }
    }
    Ok(pieces)
}

fn own(owners: &mut HashMap<Piece, Owners>, (piece, len): (Piece, u32), place: Place) {
    let Place { snapshot, run, experiment } = place;
    let alone =
        Owners { len, snapshot: Some(snapshot), run: Some(run), experiment: Some(experiment) };
    let known = owners.entry(piece).or_insert(alone);
    known.snapshot = known.snapshot.filter(|owner| *owner == snapshot);
    known.run = known.run.filter(|owner| *owner == run);
    known.experiment = known.experiment.filter(|owner| *owner == experiment);
}

fn in_scope(row: &UsageRow, scope: &Item) -> bool {
    match scope {
        Item::Experiment(experiment) => row.experiment == *experiment,
        Item::Run { experiment, run } => {
            row.experiment == *experiment && row.run.as_ref() == Some(run)
        }
        Item::Repository | Item::Snapshot { .. } => true,
    }
}
