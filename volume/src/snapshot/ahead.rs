//! Reading what a snapshot will be compared with, while its copies are being taken.

use petra_engine::snapshot::{Ahead, Parent};
use petra_engine::{Context, Name, Repository, SnapshotId};

use super::take::GroupRequest;
use super::upload::threads;
use crate::error::Result;
use crate::pool::pins::blocking;
use crate::pool::{BaseState, Pool};

/// Reads what the snapshot of some volumes will be compared with in `repo`, for [`Upload::set_ahead`]: beside
/// [`take`](super::take()), which mostly waits for the kernel. Takes no lock: where a volume gets another base meanwhile, it
/// was in vain.
///
/// [`Upload::set_ahead`]: super::Upload::set_ahead
pub async fn read_ahead(
    pool: &Pool,
    request: &GroupRequest,
    repo: &Repository,
    ctx: &Context,
) -> Result<Ahead> {
    let (pool, volumes, repository) = (pool.clone(), request.volumes.clone(), repo.config().id);
    let bases = move || {
        let base = |(volume, name): (Name, Name)| {
            let state = pool.volume(&volume)?.state()?;
            Ok((name, state.base.filter(|base| base.repository == repository)))
        };
        volumes.into_iter().map(base).collect::<Result<Vec<_>>>()
    };
    let (parent, compared) = compared_with(blocking(bases).await?);
    let parent = parent.map_or(Parent::Auto, Parent::Snapshot);
    let run = (&request.target.experiment, &request.target.run);
    let mut ctx = ctx.clone();
    ctx.limits.threads = threads(ctx.limits.threads);
    Ok(Ahead::read(repo, run, parent, compared, &ctx).await?)
}

/// The parent of a snapshot of volumes with these names and bases, and the names of its volumes that they are compared with.
fn compared_with(volumes: Vec<(Name, Option<BaseState>)>) -> (Option<SnapshotId>, Vec<Name>) {
    let mut bases = volumes.iter().filter_map(|(_, base)| base.as_ref());
    let parent = bases.next().map(|base| base.snapshot);
    let compared = volumes.into_iter().map(|(name, base)| {
        let base = base.filter(|base| Some(base.snapshot) == parent);
        base.map_or(name, |base| base.volume)
    });
    (parent, compared.collect())
}
