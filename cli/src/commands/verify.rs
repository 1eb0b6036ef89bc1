//! `petra verify`.

use petra_engine::sample::{Sample, Share};
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
    /// Read and check data too, not only what describes it
    #[arg(long)]
    read_data: bool,
    /// Of the data, read only this share (such as 5%), chosen by chance: repeated, everything is read in the end
    #[arg(long, value_name = "SHARE", requires = "read_data")]
    sample: Option<Share>,
    /// Choose the same sample as a verification that printed this seed
    #[arg(long, value_name = "N", requires = "sample")]
    seed: Option<u32>,
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
        let activity = session.activity("verify");
        let random = || activity.context.host.random() as u32;
        let seed = self.seed.unwrap_or_else(random);
        let sample = self.sample.map(|share| Sample { share, seed });
        let options = VerifyOptions { read_data: self.read_data, sample };
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
    let read = match report.sample {
        _ if !read_data => String::new(),
        None => format!(", {} of data read", bytes(report.checked_bytes)),
        Some(Sample { share, seed }) => format!(
            ", {} of {} of data read ({share} by --seed {seed})",
            bytes(report.checked_bytes),
            bytes(report.data_bytes)
        ),
    };
    let found = match report.problems.len() {
        0 => "no problems".to_owned(),
        n => count(n, "problem"),
    };
    let (snapshots, packs) = (count(report.snapshots, "snapshot"), count(report.packs, "pack"));
    out += &format!("checked {snapshots} in {packs}{read}: {found}\n");
    out
}

/// A problem, and whom it hits.
pub(super) fn problem(problem: &Problem) -> String {
    let mut out = format!("{}: {}\n", problem.object, problem.detail);
    for Affected { snapshot, experiment, run, volume, ranges: affected } in &problem.affected {
        out += &format!("  {experiment}/{run}/{snapshot}/{volume}: {}\n", ranges(affected));
    }
    out
}
