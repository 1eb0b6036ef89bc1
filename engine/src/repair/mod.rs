//! Repairing what can be repaired, and saying what is lost (docs/protocol.md, "Repair").

use std::collections::HashSet;
use std::sync::Arc;

use serde::Serialize;

use crate::context::Context;
use crate::error::Result;
use crate::id::{PackId, SnapshotId};
use crate::key::{self, Key};
use crate::name::Name;
use crate::record::SnapshotRecord;
use crate::repository::Repository;
use crate::source::Source;
use crate::store::list_each;
use crate::survey::Survey;
use crate::verify::Problem;

mod damage;
mod heal;
mod small;

use damage::Damage;

/// How to repair.
#[derive(Clone, Debug, Default)]
pub struct RepairOptions {
    /// Only say what would be done.
    pub dry_run: bool,
    /// Volumes that may still have what was lost, with the names that they bear in snapshots.
    pub sources: Vec<(Name, Arc<dyn Source>)>,
}

/// What a repair did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RepairReport {
    /// Snapshots that the catalogue did not lead to, and does again.
    pub listed: Vec<SnapshotId>,
    /// Entries of the catalogue that led to nothing, and were removed.
    pub unlisted: Vec<String>,
    /// Damaged marks that were written again, since their number tells what they said.
    pub rewritten: Vec<String>,
    /// Damaged pins that nobody needs, which were removed.
    pub unpinned: Vec<String>,
    /// Packs that were found missing or damaged just now: nothing in them is used for new snapshots any more.
    pub quarantined: Vec<PackId>,
    /// What was stored once more, for each such pack.
    pub healed: Vec<Healed>,
    /// Data that is nowhere to be found, and whom that hits.
    pub lost: Vec<Problem>,
    /// Damaged small objects that a repair can do nothing about.
    pub unresolved: Vec<Problem>,
}

/// What was healed of a pack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Healed {
    /// The pack.
    pub pack: PackId,
    /// Where it was still to be found.
    pub from: Origin,
    /// Chunks.
    pub chunks: u64,
    /// Their bytes, uncompressed.
    pub bytes: u64,
    /// Manifest blocks.
    pub blocks: u64,
}

/// Where lost data was found.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// Elsewhere in the repository.
    Repository,
    /// In a volume that was given.
    Source(Name),
}

/// Healed manifests can show more damage below them: so often is looked again.
const ROUNDS: usize = 4;

/// Repairs a repository. Any number of writers, collectors and other repairs may work on it at the same time, and it
/// may end at any moment: each step stands for itself.
pub async fn repair(
    repo: &Repository,
    options: &RepairOptions,
    ctx: &Context,
) -> Result<RepairReport> {
    let mut report = RepairReport::default();
    let survey = Survey::read(repo, ctx).await?;
    small::repair(repo, &survey, options, &mut report, ctx).await?;
    let records: Vec<&SnapshotRecord> = survey.committed().collect();
    for _ in 0..ROUNDS {
        let mut damage = Damage::find(repo, &records, ctx).await?;
        report.lost.clear();
        if damage.is_empty() {
            break;
        }
        quarantine(repo, &damage, options, &mut report, ctx).await?;
        damage.search(repo, &records, ctx).await?;
        let healed = heal::heal(repo, &mut damage, options, ctx).await?;
        report.lost = damage.report(repo, &records, ctx).await?;
        let look_again = !options.dry_run && healed.iter().any(|healed| healed.blocks > 0);
        report.healed.extend(healed);
        if !look_again {
            break;
        }
    }
    Ok(report)
}

/// Sets damaged packs aside: what is found in their place is kept, and writers leave them alone from now on.
async fn quarantine(
    repo: &Repository,
    damage: &Damage,
    options: &RepairOptions,
    report: &mut RepairReport,
    ctx: &Context,
) -> Result<()> {
    let known = repo.quarantined().await?;
    for pack in damage.packs() {
        ctx.check()?;
        if known.contains(&pack) || report.quarantined.contains(&pack) {
            continue;
        }
        if !options.dry_run {
            let key = Key::pack(pack);
            let found = match repo.store().get(&key).await {
                Ok(found) => found,
                // Then it says that there was nothing.
                Err(error) if error.is_not_found() => bytes::Bytes::new(),
                Err(error) => return Err(error.into()),
            };
            // Another repair may have found it in another state.
            repo.store().create(&Key::quarantine(&key), found).await?;
        }
        report.quarantined.push(pack);
    }
    Ok(())
}

impl Repository {
    /// Packs of which nothing may be used for new snapshots.
    pub(crate) async fn quarantined(&self) -> Result<HashSet<PackId>> {
        let mut packs = HashSet::new();
        let prefix = format!("{}{}", key::QUARANTINE, key::PACKS);
        list_each(self.store(), &prefix, |entry| {
            packs.extend(key::parse_numbered(&entry.key, &prefix));
        })
        .await?;
        Ok(packs)
    }
}
