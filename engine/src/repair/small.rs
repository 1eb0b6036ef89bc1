//! Putting small objects right: the catalogue from the records, and marks and pins whose meaning is still known.

use super::{RepairOptions, RepairReport};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::key::Key;
use crate::listings::{self, Finding};
use crate::record::MarkKind;
use crate::repository::Repository;
use crate::survey::Survey;
use crate::verify::{Problem, describe};

/// Repairs what it can; the rest is reported as unresolved.
pub(super) async fn repair(
    repo: &Repository,
    survey: &Survey,
    options: &RepairOptions,
    report: &mut RepairReport,
    ctx: &Context,
) -> Result<()> {
    for finding in listings::findings(survey) {
        match &finding {
            Finding::Lost { record, .. } => report.listed.push(record.id),
            Finding::Stray(key) => report.unlisted.push(key.to_string()),
        }
        if !options.dry_run {
            listings::mend(repo, &finding, ctx).await?;
        }
    }
    for (id, (k, state)) in &survey.marks {
        let Err(error) = state else { continue };
        if k % 2 == 0 {
            // A Purge or an Undelete: to guess wrong would lose a snapshot, or promise one whose data is gone.
            report.unresolved.push(problem(error));
            continue;
        }
        // Marks of odd numbers are Deletes and nothing else, so what it said is known but for the time.
        let key = Key::mark(*id, *k);
        report.rewritten.push(key.to_string());
        if !options.dry_run {
            ctx.check()?;
            set_aside(repo, &key).await?;
            // In between the snapshot is there again: nothing is lost.
            repo.store().delete(&key).await?;
            repo.store().put(&key, repo.mark(&key, MarkKind::Delete, ctx)?).await?;
        }
    }
    for (owner, key, pin) in &survey.pins {
        let Err(error) = pin else { continue };
        // Whatever it said, it is void.
        let is_void = matches!(survey.decisions.get(owner), Some(Ok(_)))
            || survey.ended.contains(owner)
            || survey.graves.contains(*owner);
        if !is_void {
            report.unresolved.push(problem(error));
            continue;
        }
        report.unpinned.push(key.to_string());
        if !options.dry_run {
            ctx.check()?;
            set_aside(repo, key).await?;
            repo.store().delete(key).await?;
        }
    }
    let unreadable = survey.decisions.values().filter_map(|decision| decision.as_ref().err());
    report.unresolved.extend(unreadable.map(problem));
    Ok(())
}

fn problem(error: &Error) -> Problem {
    let (object, detail) = describe(error);
    Problem { object, detail, affected: vec![] }
}

/// Keeps a copy of a damaged object for whoever wants to know what happened to it: of the first that was found in its
/// place.
async fn set_aside(repo: &Repository, key: &Key) -> Result<()> {
    match repo.store().get(key).await {
        Ok(body) => Ok(repo.store().create(&Key::quarantine(key), body).await.map(|_| ())?),
        Err(error) if error.is_not_found() => Ok(()),
        Err(error) => Err(error.into()),
    }
}
