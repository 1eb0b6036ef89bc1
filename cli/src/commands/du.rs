//! `petra du`.

use petra_engine::Item;
use petra_engine::usage::{Usage, UsageRow, usage};
use serde::Serialize;

use crate::failure::{At, Failure};
use crate::lookup;
use crate::session::Session;
use crate::text::{Side, Table, bytes};

/// Options of `petra du`.
#[derive(Debug, clap::Args)]
pub struct Du {
    /// A repository, experiment or run
    #[arg(value_name = "URL")]
    url: String,
}

#[derive(Serialize)]
struct Document<'a> {
    url: String,
    #[serde(flatten)]
    usage: &'a Usage,
}

impl Du {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let url = session.url(&self.url)?;
        if matches!(url.item, Item::Snapshot { .. }) {
            return Err(Failure::fix(format!("{url} names a snapshot"))
                .hint("ask for its run: the table has a row for each snapshot"));
        }
        let repository = session.open(&url).await?;
        let activity = session.activity("du");
        let usage = usage(&repository, &url.item, &activity.context).await.at(&url)?;
        if usage.rows.is_empty() {
            lookup::exists(&repository, &url).await?;
        }
        drop(activity);
        let document = Document { url: url.to_string(), usage: &usage };
        session.out.report(&document, || table(&usage))?;
        let dead = usage.packs_bytes.saturating_sub(usage.live_bytes);
        session.out.say(&format!(
            "the repository stores {}; snapshots need {}, {} can be collected (petra gc)",
            bytes(usage.packs_bytes),
            bytes(usage.live_bytes),
            bytes(dead)
        ));
        Ok(())
    }
}

fn table(usage: &Usage) -> String {
    let mut table = Table::new(&[
        ("EXPERIMENT/RUN/SNAPSHOT", Side::Left),
        ("DATA", Side::Right),
        ("ALONE", Side::Right),
    ]);
    for row in &usage.rows {
        table.row([label(row), bytes(row.volume_bytes), bytes(row.exclusive_bytes)]);
    }
    table.render()
}

fn label(row: &UsageRow) -> String {
    match (&row.run, &row.snapshot, &row.name) {
        (_, Some(id), Some(name)) => format!("    {id} {name}"),
        (_, Some(id), None) => format!("    {id}"),
        (Some(run), None, _) => format!("  {run}"),
        (None, None, _) => row.experiment.to_string(),
    }
}
