//! `petra verify`.

use petra_engine::verify::{Affected, Problem, VerifyOptions, VerifyReport, verify};
use serde::Serialize;

use super::restore::ranges;
use crate::failure::{At, Exit, Failure};
use crate::lookup;
use crate::session::Session;
use crate::text::{bytes, count};

/// Options of `petra verify`.
#[derive(Debug, clap::Args)]
pub struct Verify {
    /// A repository, experiment, run or snapshot
    #[arg(value_name = "URL")]
    url: String,
    /// Read and check all data too, not only what describes it
    #[arg(long)]
    read_data: bool,
}

#[derive(Serialize)]
struct Document<'a> {
    url: String,
    read_data: bool,
    #[serde(flatten)]
    report: &'a VerifyReport,
}

impl Verify {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let url = session.url(&self.url)?;
        let repository = session.open(&url).await?;
        let options = VerifyOptions { read_data: self.read_data };
        let activity = session.activity("verify");
        let report = verify(&repository, &url.item, &options, &activity.context).await.at(&url)?;
        if report.snapshots == 0 && report.problems.is_empty() {
            lookup::exists(&repository, &url).await?;
        }
        drop(activity);
        let document =
            Document { url: url.to_string(), read_data: self.read_data, report: &report };
        session.out.report(&document, || text(&report, self.read_data))?;
        let problems = report.problems.len();
        if problems > 0 {
            let what = format!("{} found in {url}", count(problems, "problem"));
            return Err(Failure::new(Exit::Stop, what).hint(
                "keep the repository as it is until it is clear what happened; petra restore \
                 --keep-going restores everything that is not listed",
            ));
        }
        Ok(())
    }
}

fn text(report: &VerifyReport, read_data: bool) -> String {
    let mut out: String = report.problems.iter().map(problem).collect();
    let read = if read_data {
        format!(", {} of data read", bytes(report.checked_bytes))
    } else {
        String::new()
    };
    let found = match report.problems.len() {
        0 => "no problems".to_owned(),
        n => count(n, "problem"),
    };
    let (snapshots, packs) = (count(report.snapshots, "snapshot"), count(report.packs, "pack"));
    out += &format!("checked {snapshots} in {packs}{read}: {found}\n");
    out
}

fn problem(problem: &Problem) -> String {
    let mut out = format!("{}: {}\n", problem.object, problem.detail);
    for Affected { snapshot, experiment, run, volume, ranges: affected } in &problem.affected {
        out += &format!("  {experiment}/{run}/{snapshot}/{volume}: {}\n", ranges(affected));
    }
    out
}
