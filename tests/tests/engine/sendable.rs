//! Every operation can be given to `tokio::spawn`: checked by the compiler.

use std::sync::Arc;

use petra_engine::chunker::Chunking;
use petra_engine::collect::{CollectOptions, collect};
use petra_engine::copy::{CopyOptions, copy};
use petra_engine::crypto::list_keys;
use petra_engine::diff::diff;
use petra_engine::record::{VolumeRecord, Writers};
use petra_engine::repair::{RepairOptions, repair};
use petra_engine::restore::{RestoreOptions, restore, stream};
use petra_engine::retention::{PruneOptions, prune};
use petra_engine::snapshot::{SnapshotRequest, snapshot};
use petra_engine::store::Store;
use petra_engine::target::FileTarget;
use petra_engine::url::{Item, SnapshotRef};
use petra_engine::usage::usage;
use petra_engine::verify::{VerifyOptions, verify};
use petra_engine::{Context, NewKey, Repository, SnapshotId};

fn spawn(work: impl Future + Send + 'static) {
    drop(work);
}

#[expect(dead_code, reason = "it is enough that it compiles")]
fn all_operations(
    store: Arc<dyn Store>,
    repo: Repository,
    ctx: Context,
    (request, volume, target): (SnapshotRequest, VolumeRecord, FileTarget),
    (id, find, item): (SnapshotId, SnapshotRef, Item),
    key: NewKey,
) {
    spawn(async move {
        Repository::init_encrypted(Writers::Many, store.clone(), Chunking::default(), &key, &ctx)
            .await?;
        Repository::unlock(store.clone(), &key.secret).await?;
        list_keys(&*store).await?;
        let repo = if item == Item::Repository { Repository::open(store).await? } else { repo };
        snapshot(&repo, request, &ctx).await?;
        restore(&repo, &volume, target, &RestoreOptions::default(), &ctx).await?;
        let sink = Box::new(std::io::sink());
        stream(&repo, &volume, sink, &RestoreOptions::default(), &ctx).await?;
        verify(&repo, &item, &VerifyOptions::default(), &ctx).await?;
        repair(&repo, &RepairOptions::default(), &ctx).await?;
        copy(&repo, &item, &repo, &CopyOptions::default(), &ctx).await?;
        usage(&repo, &item, &ctx).await?;
        diff(&repo, &volume, &volume, &ctx).await?;
        repo.add_key(&key, &ctx).await?;
        repo.remove_key(id).await?;
        repo.delete(id, &ctx).await?;
        repo.undelete(id, &ctx).await?;
        repo.deleted(&item).await?;
        repo.find_deleted(&find).await?;
        repo.set_policy(None, None, &ctx).await?;
        prune(&repo, &item, &PruneOptions::default(), &ctx).await?;
        repo.find(&find).await?;
        repo.snapshots(&item).await?;
        repo.experiments().await?;
        let options = CollectOptions { dry_run: true, ..CollectOptions::default() };
        collect(&repo, &options, &ctx).await
    });
}
