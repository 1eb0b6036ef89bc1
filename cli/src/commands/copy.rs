//! `petra copy`.

use petra_engine::copy::{Copied, CopyOptions, CopyReport, Uncopied, copy};
use petra_engine::{Item, PetraUrl, RepositoryUrl, SnapshotId};
use serde::Serialize;

use crate::failure::{At, Exit, Failure};
use crate::session::Session;
use crate::text::{bytes, count, duration_ms};
use crate::{lookup, view};

/// Options of `petra copy`.
#[derive(Debug, clap::Args)]
pub struct Copy {
    /// A repository, experiment, run or snapshot
    #[arg(value_name = "URL")]
    url: String,
    /// The repository that gets the copies
    #[arg(value_name = "REPOSITORY")]
    repository: String,
    /// Only tell what would be copied
    #[arg(long, short = 'n')]
    dry_run: bool,
}

#[derive(Serialize)]
struct Document {
    from: String,
    to: String,
    dry_run: bool,
    copied: Vec<Pair>,
    present: u64,
    failed: Vec<Uncopied>,
    data_bytes: u64,
    fetched_bytes: u64,
    new_bytes: u64,
    stored_bytes: u64,
    elapsed_ms: u64,
}

#[derive(Serialize)]
struct Pair {
    from: String,
    to: Option<String>,
    data_bytes: u64,
}

impl Copy {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let url = session.url(&self.url)?;
        let target = session.url(&self.repository)?;
        if target.item != Item::Repository {
            return Err(Failure::fix(format!("{target} is a part of a repository")).hint(
                "snapshots keep their experiment and run: name the repository alone, without '#'",
            ));
        }
        let source = session.open(&url).await?;
        let mut document = Document {
            from: url.to_string(),
            to: target.to_string(),
            dry_run: self.dry_run,
            copied: vec![],
            present: 0,
            failed: vec![],
            data_bytes: 0,
            fetched_bytes: 0,
            new_bytes: 0,
            stored_bytes: 0,
            elapsed_ms: 0,
        };
        let scopes = if target.repository.is_template() {
            session.unless_cancelled(by_experiment(&source, &url)).await?
        } else {
            vec![(url.item.clone(), None)]
        };
        let activity = session.activity("copy");
        for (scope, experiment) in scopes {
            let repository = match &experiment {
                Some(experiment) => target.repository.for_experiment(experiment).at(&target)?,
                None => target.repository.clone(),
            };
            let at = PetraUrl { repository, item: Item::Repository };
            let destination = session.open(&at).await?;
            let options = CopyOptions { dry_run: self.dry_run };
            let report = copy(&source, &scope, &destination, &options, &activity.context);
            document.add(report.await.at(&url)?, &url.repository, &target.repository);
        }
        drop(activity);
        session.out.say(&summary(&document));
        session.out.report(&document, || text(&document))?;
        if document.failed.is_empty() {
            return Ok(());
        }
        let failed = count(document.failed.len(), "snapshot");
        let reasons = document.failed.iter().map(|f| format!("{}: {}", f.snapshot, f.reason));
        Err(Failure::new(Exit::Stop, format!("{failed} of {url} can't be copied"))
            .causes(reasons.collect())
            .hint(format!(
                "all others were; petra verify --read-data {} tells more",
                url.repository
            )))
    }
}

/// A repository for each experiment: which of them a URL is about.
async fn by_experiment(
    source: &petra_engine::Repository,
    url: &PetraUrl,
) -> Result<Vec<(Item, Option<petra_engine::Name>)>, Failure> {
    if let Some(experiment) = url.experiment() {
        return Ok(vec![(url.item.clone(), Some(experiment.clone()))]);
    }
    if matches!(url.item, Item::Snapshot { .. }) {
        let record = lookup::snapshot(source, url).await?;
        return Ok(vec![(url.item.clone(), Some(record.experiment))]);
    }
    let experiments = source.experiments().await.at(url)?;
    Ok(experiments.into_iter().map(|e| (Item::Experiment(e.clone()), Some(e))).collect())
}

impl Document {
    fn add(&mut self, report: CopyReport, from: &RepositoryUrl, to: &RepositoryUrl) {
        let pair = |copied: &Copied| {
            let at = |repository: &RepositoryUrl, id: SnapshotId| {
                view::url_of(repository, &copied.experiment, &copied.run, id)
            };
            Pair {
                from: at(from, copied.from),
                to: copied.to.map(|id| at(to, id)),
                data_bytes: copied.data_bytes,
            }
        };
        self.copied.extend(report.copied.iter().map(pair));
        self.present += report.present;
        self.failed.extend(report.failed);
        self.data_bytes += report.data_bytes;
        self.fetched_bytes += report.fetched_bytes;
        self.new_bytes += report.new_bytes;
        self.stored_bytes += report.stored_bytes;
        self.elapsed_ms += report.elapsed_ms;
    }
}

/// The URLs of the copies, or of what would be copied.
fn text(document: &Document) -> String {
    let urls = document.copied.iter().map(|pair| pair.to.as_ref().unwrap_or(&pair.from));
    urls.map(|url| format!("{url}\n")).collect()
}

fn summary(document: &Document) -> String {
    let (copied, present) =
        (count(document.copied.len(), "snapshot"), count(document.present, "snapshot"));
    let data = bytes(document.data_bytes);
    if document.dry_run {
        return format!("{copied} with {data} of data would be copied, {present} there already");
    }
    format!(
        "{copied} with {data} of data copied, {present} there already: {} read, {} new, stored as {} in {}",
        bytes(document.fetched_bytes),
        bytes(document.new_bytes),
        bytes(document.stored_bytes),
        duration_ms(document.elapsed_ms),
    )
}
