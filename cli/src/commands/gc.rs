//! `petra gc`.

use std::time::Duration;

use petra_engine::collect::{CollectOptions, CollectReport, collect};
use serde::Serialize;

use crate::failure::{At, Failure};
use crate::lookup;
use crate::session::Session;
use crate::text::{Fields, bytes, count};

/// Options of `petra gc`.
#[derive(Debug, clap::Args)]
pub struct Gc {
    /// A repository; with #EXPERIMENT when it has '{experiment}' in it
    #[arg(value_name = "URL")]
    url: String,
    /// How long deleted snapshots are kept, and can be brought back with undelete
    #[arg(long, value_name = "TIME", default_value = "7d", value_parser = duration)]
    grace: Duration,
    /// After how long without a sign of life a writer is given up; its snapshot then fails
    #[arg(long, value_name = "TIME", default_value = "1d", value_parser = duration)]
    silent: Duration,
    /// Garbage within packs may take this share of them, in percent; what is above is compacted away. 100 compacts nothing
    #[arg(long, value_name = "PERCENT", default_value_t = 5, value_parser = clap::value_parser!(u8).range(0..=100))]
    max_waste: u8,
    /// Only tell what would be done
    #[arg(long, short = 'n')]
    dry_run: bool,
}

#[derive(Serialize)]
struct Document<'a> {
    url: String,
    dry_run: bool,
    #[serde(flatten)]
    report: &'a CollectReport,
}

impl Gc {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let url = session.url(&self.url)?;
        lookup::whole_repository(&url, "gc", "collected")?;
        let repository = session.open(&url).await?;
        let options = CollectOptions {
            grace: self.grace,
            silent: self.silent,
            dry_run: self.dry_run,
            max_waste_percent: (self.max_waste < 100).then_some(self.max_waste),
            ..CollectOptions::default()
        };
        let activity = session.activity("gc");
        let report = collect(&repository, &options, &activity.context).await.at(&url)?;
        drop(activity);
        if report.damaged_packs > 0 {
            let packs = count(report.damaged_packs, "pack");
            session.out.warn(&format!(
                "{packs} could not be compacted, since what is needed of them is damaged; `petra verify {url}` says whose it is"
            ));
        }
        let document = Document { url: url.to_string(), dry_run: self.dry_run, report: &report };
        session.out.report(&document, || text(&report, self.dry_run))
    }
}

fn text(report: &CollectReport, dry_run: bool) -> String {
    let mut fields = Fields::default();
    let packs = |n, len| format!("{} in {}", bytes(len), count(n, "pack"));
    let freed = packs(report.deleted_packs, report.freed_bytes);
    let copied = bytes(report.copied_bytes);
    let compacted = format!("{}, {copied} written", report.compacted_packs);
    fields
        .add(if dry_run { "would free" } else { "freed" }, freed)
        .add("kept", packs(report.kept_packs, report.kept_bytes))
        .add("garbage within", bytes(report.wasted_bytes))
        .add("packs compacted", compacted)
        .add("snapshots purged", report.purged.to_string())
        .add("deleted, in grace", report.in_grace.to_string())
        .add("ids written down", report.buried.to_string())
        .add("writers given up", report.aborted_sessions.to_string());
    fields.render()
}

/// `7d`, `12h30m`, `90 minutes`. A day has 24 hours here.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    const SHAPE: &str = "write it as 7d, 12h or 30m";
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let span: jiff::Span = text.parse().map_err(|_| SHAPE)?;
    let signed = span.to_duration(jiff::SpanRelativeTo::days_are_24_hours()).map_err(|_| SHAPE)?;
    signed.try_into().map_err(|_| "it is negative".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grace_time_is_the_one_that_others_print() {
        use clap::Parser;

        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            gc: Gc,
        }

        let line = Line::try_parse_from(["petra", "URL"]).unwrap();
        assert_eq!(line.gc.grace, petra_engine::marks::DEFAULT_GRACE);
    }

    #[test]
    fn durations_as_people_write_them() {
        for (text, seconds) in [
            ("7d", 604_800),
            ("1d 2h", 93_600),
            ("90m", 5_400),
            ("0s", 0),
            ("0", 0),
            ("1w", 604_800),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for wrong in ["", "7", "d", "-1d", "1 month", "soon"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
