//! From an upload to its snapshot: the id of an upload is given out before there is one.

use futures::{StreamExt, stream};
use petra_engine::key::{self, Key};
use petra_engine::record::SnapshotRecord;
use petra_engine::{Error, Repository, SnapshotId, SnapshotRef};

/// More attempts than any upload makes.
pub const MAX_ATTEMPTS: u32 = 1 << 20;
/// Decisions that are read at one time.
const READS: usize = 4;

/// The snapshot that an upload has made: that of its first attempt, or else that of a later one of the first `attempts`.
/// [`Error::Unknown`] where there is none, or it was deleted.
///
/// One request finds the snapshot of the first attempt, which few uploads miss. One listing has all the others, since
/// their ids begin with the same time.
pub async fn resolve(
    repo: &Repository,
    upload: SnapshotId,
    attempts: u32,
) -> petra_engine::Result<SnapshotRecord> {
    let unknown = match repo.find(&SnapshotRef::Id(upload)).await {
        Err(error @ Error::Unknown { .. }) => error,
        found => return found,
    };
    let found = decided(repo, upload, attempts).await?;
    let found = found.into_iter().map(|id| async move { repo.find(&SnapshotRef::Id(id)).await });
    let mut found = stream::iter(found).buffered(READS);
    while let Some(found) = found.next().await {
        match found {
            // An attempt that was aborted.
            Err(Error::Unknown { .. }) => {}
            found => return found,
        }
    }
    Err(unknown)
}

/// The later attempts that came to an end, in order.
async fn decided(
    repo: &Repository,
    upload: SnapshotId,
    attempts: u32,
) -> petra_engine::Result<Vec<SnapshotId>> {
    let first = Key::snap(upload).to_string();
    let same_time = first.get(..key::SNAPS.len() + TIME_CHARACTERS).unwrap_or(&first);
    let mut ids = vec![];
    let mut after: Option<String> = None;
    loop {
        let page = repo.store().list(same_time, after.as_deref()).await?;
        let listed = page.entries.iter().filter_map(|entry| key::parse_id(&entry.key, key::SNAPS));
        ids.extend(listed.filter_map(|id| {
            let attempt = id.distance_after(upload)?;
            (1..attempts).contains(&attempt).then_some((attempt, id))
        }));
        after = page.entries.into_iter().next_back().map(|entry| entry.key);
        if !page.more || after.is_none() {
            break;
        }
    }
    ids.sort_unstable();
    Ok(ids.into_iter().map(|(_, id)| id).collect())
}

/// So many characters of an id are its time; what is random follows.
const TIME_CHARACTERS: usize = 10;
