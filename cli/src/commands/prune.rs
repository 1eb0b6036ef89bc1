//! `petra prune`.

use std::collections::BTreeMap;

use jiff::Timestamp;
use petra_engine::marks::undelete_until;
use petra_engine::retention::{Choice, PruneOptions, Reason, prune};
use petra_engine::{Item, Name, PetraUrl, SnapshotId};
use serde::Serialize;

use super::policy::Keep;
use crate::failure::{At, Failure};
use crate::session::Session;
use crate::text::{Side, Table, count, quoted, time};
use crate::view;

/// Options of `petra prune`.
#[derive(Debug, clap::Args)]
pub struct Prune {
    /// A repository, experiment or run [default: the repository of --repository]
    #[arg(value_name = "URL")]
    url: Option<String>,
    #[command(flatten)]
    keep: Keep,
    /// Only tell what would be done
    #[arg(long, short = 'n')]
    dry_run: bool,
}

#[derive(Serialize)]
struct Document<'a> {
    url: String,
    dry_run: bool,
    /// With a collector's usual grace time; null when nothing was deleted.
    undelete_until: Option<Timestamp>,
    snapshots: Vec<Row<'a>>,
}

#[derive(Serialize)]
struct Row<'a> {
    url: String,
    id: SnapshotId,
    experiment: &'a Name,
    run: &'a Name,
    name: Option<&'a Name>,
    created: Timestamp,
    labels: &'a BTreeMap<String, String>,
    deleted: bool,
    kept_by: &'a [Reason],
}

impl<'a> Row<'a> {
    fn new(url: &PetraUrl, choice: &'a Choice) -> Self {
        let record = &choice.record;
        Self {
            url: view::snapshot_url(&url.repository, record, None),
            id: record.id,
            experiment: &record.experiment,
            run: &record.run,
            name: record.name.as_ref(),
            created: record.created,
            labels: &record.labels,
            deleted: !choice.is_kept(),
            kept_by: &choice.reasons,
        }
    }
}

impl Prune {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let Some(text) = self.url.as_deref().or(session.default_repository()) else {
            return Err(Failure::fix("there is no repository to prune").hint(
                "give a URL or path such as /srv/petra, or set --repository or PETRA_REPOSITORY",
            ));
        };
        let url = session.url(text)?;
        if matches!(url.item, Item::Snapshot { .. }) {
            return Err(Failure::fix(format!("{url} names a snapshot, and rules are for runs"))
                .hint(format!("petra rm {} deletes it", quoted(&url.to_string()))));
        }
        let repository = session.open(&url).await?;
        let options = PruneOptions { policy: self.keep.policy(), dry_run: self.dry_run };
        let activity = session.activity("prune");
        let choices = prune(&repository, &url.item, &options, &activity.context).await.at(&url)?;
        let until = undelete_until(&activity.context);
        drop(activity);

        let deleted = choices.iter().filter(|choice| !choice.is_kept()).count();
        let document = Document {
            url: url.to_string(),
            dry_run: self.dry_run,
            undelete_until: (deleted > 0 && !self.dry_run).then_some(until),
            snapshots: choices.iter().map(|choice| Row::new(&url, choice)).collect(),
        };
        session.out.report(&document, || table(&choices, &url.item))?;
        let verb = if self.dry_run { "would delete" } else { "deleted" };
        let mut said = format!("{verb} {} of {}", deleted, count(choices.len(), "snapshot"));
        if document.undelete_until.is_some() {
            said += &format!(
                "; petra undelete brings them back until {}, petra gc frees their data then",
                time(until)
            );
        }
        session.out.say(&said);
        Ok(())
    }
}

fn table(choices: &[Choice], scope: &Item) -> String {
    use Side::Left;
    let with_run = !matches!(scope, Item::Run { .. });
    let mut columns =
        vec![("ID", Left), ("NAME", Left), ("CREATED", Left), ("", Left), ("KEPT BY", Left)];
    if with_run {
        columns.splice(0..0, [("EXPERIMENT", Left), ("RUN", Left)]);
    }
    let mut table = Table::new(&columns);
    for Choice { record, reasons } in choices {
        let by: Vec<String> = reasons.iter().map(ToString::to_string).collect();
        let mut cells = vec![
            record.id.to_string(),
            record.name.as_ref().map_or(String::new(), ToString::to_string),
            time(record.created),
            if reasons.is_empty() { "delete" } else { "keep" }.to_owned(),
            by.join(", "),
        ];
        if with_run {
            cells.splice(0..0, [record.experiment.to_string(), record.run.to_string()]);
        }
        table.row(cells);
    }
    table.render()
}
