//! `petra repair`.

use std::ffi::OsString;
use std::sync::Arc;

use petra_engine::Name;
use petra_engine::repair::{Healed, Origin, RepairOptions, RepairReport, repair};
use petra_engine::source::{FileSource, Source};
use serde::Serialize;

use super::snapshot;
use super::verify::problem;
use crate::failure::{At, Exit, Failure};
use crate::lookup;
use crate::session::Session;
use crate::text::{bytes, count};

/// Options of `petra repair`.
#[derive(Debug, clap::Args)]
pub struct Repair {
    /// A repository; with #EXPERIMENT when it has '{experiment}' in it
    #[arg(value_name = "URL")]
    url: String,
    /// A volume that may still have what is lost, by its name in snapshots; may be repeated
    #[arg(long = "source", value_name = "NAME=SOURCE")]
    sources: Vec<OsString>,
    /// Only tell what would be done
    #[arg(long, short = 'n')]
    dry_run: bool,
}

#[derive(Serialize)]
struct Document<'a> {
    url: String,
    dry_run: bool,
    #[serde(flatten)]
    report: &'a RepairReport,
}

impl Repair {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let url = session.url(&self.url)?;
        lookup::whole_repository(&url, "repair", "repaired")?;
        let repository = session.open(&url).await?;
        let mut sources: Vec<(Name, Arc<dyn Source>)> = vec![];
        for (name, path) in snapshot::named(&self.sources)? {
            sources.push((name, Arc::new(FileSource::open(&path)?)));
        }
        let options = RepairOptions { dry_run: self.dry_run, sources };
        let activity = session.activity("repair");
        let report = repair(&repository, &options, &activity.context).await.at(&url)?;
        drop(activity);
        let document = Document { url: url.to_string(), dry_run: self.dry_run, report: &report };
        session.out.report(&document, || text(&report, self.dry_run))?;
        let left = report.unresolved.len() + report.lost.len();
        if left > 0 {
            let what = format!("{} left in {url}", count(left, "problem"));
            return Err(Failure::new(Exit::Stop, what).hint(
                "a volume that still has the data heals it: petra repair --source NAME=SOURCE; so does \
                 the next repair after a new snapshot of it",
            ));
        }
        Ok(())
    }
}

fn text(report: &RepairReport, dry_run: bool) -> String {
    let mut out = String::new();
    let mut tell = |what: &str, objects: Vec<String>| {
        let what = if dry_run { format!("would be {what}") } else { what.to_owned() };
        out.extend(objects.iter().map(|object| format!("{object}: {what}\n")));
    };
    tell("listed again", report.listed.iter().map(ToString::to_string).collect());
    tell("removed, since it leads to nothing", report.unlisted.clone());
    tell("written again", report.rewritten.clone());
    tell("removed, since it is void", report.unpinned.clone());
    let packs = report.quarantined.iter().map(|pack| format!("packs/{pack}"));
    tell("set aside: nothing new will use it", packs.collect());
    for Healed { pack, from, chunks, bytes: len, blocks } in &report.healed {
        let from = match from {
            Origin::Repository => "the repository".to_owned(),
            Origin::Source(name) => format!("source {name}"),
        };
        let what = match (chunks, blocks) {
            (0, blocks) => count(*blocks, "manifest block"),
            (chunks, 0) => format!("{} in {}", bytes(*len), count(*chunks, "chunk")),
            (chunks, blocks) => format!(
                "{} in {} and {}",
                bytes(*len),
                count(*chunks, "chunk"),
                count(*blocks, "manifest block")
            ),
        };
        let healed = if dry_run { "would be healed" } else { "healed" };
        out += &format!("packs/{pack}: {what} {healed} from {from}\n");
    }
    out.extend(report.lost.iter().chain(&report.unresolved).map(problem));
    if out.is_empty() {
        out.push_str("nothing to repair\n");
    }
    out
}
