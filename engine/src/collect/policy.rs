//! What time decides: grace and silence. Safety does not depend on it.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{CollectOptions, CollectReport};
use crate::context::Context;
use crate::error::Result;
use crate::id::SnapshotId;
use crate::key::{self, Key};
use crate::publish::{Published, publish};
use crate::record::{Decision, MarkKind, PinOwner, kind};
use crate::relocation::parse_move;
use crate::repository::{Repository, stamp, timestamp};
use crate::store::{Entry, list_each};

use super::view::read_pin;

/// Ends the grace time of deleted snapshots.
pub(super) async fn purge(
    repo: &Repository,
    options: &CollectOptions,
    report: &mut CollectReport,
    ctx: &Context,
) -> Result<()> {
    let now = timestamp(ctx);
    for (id, state) in repo.marks().await? {
        ctx.check()?;
        if state.mark != MarkKind::Delete {
            continue;
        }
        if !is_over(now, state.at, options.grace) {
            report.in_grace += 1;
            continue;
        }
        // Undelete competes for the same key; whoever wins, the marks say what holds.
        let key = Key::mark(id, state.k + 1);
        let body = repo.mark(&key, MarkKind::Purge, ctx)?;
        if !options.dry_run && publish(repo.store(), &key, body).await? != Published::Ours {
            continue;
        }
        report.purged += 1;
    }
    Ok(())
}

/// True when `grace` has passed.
pub(super) fn is_over(now: jiff::Timestamp, at: jiff::Timestamp, grace: Duration) -> bool {
    let age_ms = now.as_millisecond().saturating_sub(at.as_millisecond());
    u128::try_from(age_ms).is_ok_and(|age| age >= grace.as_millis())
}

/// Aborts sessions that are undecided and have stored nothing for a while; says which.
pub(super) async fn abort_silent(
    repo: &Repository,
    options: &CollectOptions,
    report: &mut CollectReport,
    ctx: &Context,
) -> Result<Vec<SnapshotId>> {
    let graves = repo.graves().await?;
    let decided = repo.decided().await?;
    let mut last_seen: BTreeMap<SnapshotId, u64> = BTreeMap::new();
    let mut see = |session: Option<SnapshotId>, entry: &Entry| {
        let Some(session) = session else { return };
        if !decided.contains(&session) && !graves.contains(session) {
            let seen = last_seen.entry(session).or_insert_with(|| session.unix_ms());
            *seen = entry.modified_unix_ms.max(*seen);
        }
    };
    list_each(repo.store(), key::PACKS, |entry| {
        see(key::parse_numbered(&entry.key, key::PACKS).map(|pack| pack.session), entry);
    })
    .await?;
    list_each(repo.store(), key::RUNS, |entry| see(key::parse_catalogued(&entry.key), entry))
        .await?;
    list_each(repo.store(), key::MOVES, |entry| {
        see(parse_move(&entry.key).map(|(_, session)| session), entry);
    })
    .await?;
    let mut pins = Vec::new();
    list_each(repo.store(), key::PINS, |entry| pins.push(entry.clone())).await?;
    for entry in pins {
        let Some(id) = key::parse_numbered(&entry.key, key::PINS) else { continue };
        // A session that died right after its pin has nothing else. A clone must never be aborted.
        let pin = read_pin(repo, &Key::from_listing(entry.key.clone())).await?;
        if pin.is_some_and(|pin| pin.owner == PinOwner::Session) {
            see(Some(id.session), &entry);
        }
    }
    let now = ctx.host.unix_ms();
    let mut aborted = Vec::new();
    for (session, seen) in last_seen {
        ctx.check()?;
        if u128::from(now.saturating_sub(seen)) < options.silent.as_millis() {
            continue;
        }
        // The session's own commit may win.
        let key = Key::snap(session);
        let abort = repo.seal(kind::DECISION, &key, &Decision::Abort { stamp: stamp(ctx) })?;
        if !options.dry_run && publish(repo.store(), &key, abort).await? != Published::Ours {
            continue;
        }
        aborted.push(session);
        report.aborted_sessions += 1;
    }
    Ok(aborted)
}
