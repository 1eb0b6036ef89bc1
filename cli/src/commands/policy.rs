//! `petra policy`, and the rules that `petra prune` takes too.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Subcommand;
use clap::builder::RangedU64ValueParser;
use petra_engine::policies::Policies;
use petra_engine::retention::{LabelRule, Policy as Rules};
use petra_engine::{Item, Name, PetraUrl};
use serde::Serialize;

use super::gc::duration;
use crate::failure::{At, Failure};
use crate::session::Session;
use crate::text::{Side, Table, quoted};

/// Options of `petra policy`.
#[derive(Debug, clap::Args)]
pub struct Policy {
    #[command(subcommand)]
    action: Action,
}

/// What to do with policies.
#[derive(Debug, Subcommand)]
enum Action {
    /// Show what prune keeps
    Show {
        /// A repository or experiment
        #[arg(value_name = "URL")]
        url: String,
    },
    /// Set what prune keeps
    Set {
        /// A repository, for all its experiments, or an experiment
        #[arg(value_name = "URL")]
        url: String,
        #[command(flatten)]
        keep: Keep,
    },
    /// Take back what was set
    Reset {
        /// A repository or experiment
        #[arg(value_name = "URL")]
        url: String,
    },
}

/// Rules on the command line.
#[derive(Debug, clap::Args)]
pub struct Keep {
    /// Keep the newest N snapshots of each run
    #[arg(long, value_name = "N", value_parser = number())]
    keep_last: Option<u32>,
    /// Keep the newest snapshot of each hour, for N hours that have some
    #[arg(long, value_name = "N", value_parser = number())]
    keep_hourly: Option<u32>,
    /// The same for days (of UTC)
    #[arg(long, value_name = "N", value_parser = number())]
    keep_daily: Option<u32>,
    /// The same for weeks, from Monday on
    #[arg(long, value_name = "N", value_parser = number())]
    keep_weekly: Option<u32>,
    /// The same for months
    #[arg(long, value_name = "N", value_parser = number())]
    keep_monthly: Option<u32>,
    /// The same for years
    #[arg(long, value_name = "N", value_parser = number())]
    keep_yearly: Option<u32>,
    /// Keep all that is not older, such as 30d
    #[arg(long, value_name = "TIME", value_parser = duration)]
    keep_within: Option<Duration>,
    /// Keep all that bears this label, for ever; may be repeated
    #[arg(long = "keep-label", value_name = "KEY[=VALUE]")]
    keep_labels: Vec<LabelRule>,
    /// Keep everything
    #[arg(long, conflicts_with_all = [
        "keep_last", "keep_hourly", "keep_daily", "keep_weekly", "keep_monthly", "keep_yearly",
        "keep_within", "keep_labels",
    ])]
    keep_all: bool,
}

fn number() -> RangedU64ValueParser<u32> {
    RangedU64ValueParser::new().range(1..=u64::from(u32::MAX))
}

impl Keep {
    /// The rules; None where none was given.
    pub fn policy(self) -> Option<Rules> {
        let policy = Rules {
            keep_last: self.keep_last.unwrap_or_default(),
            keep_hourly: self.keep_hourly.unwrap_or_default(),
            keep_daily: self.keep_daily.unwrap_or_default(),
            keep_weekly: self.keep_weekly.unwrap_or_default(),
            keep_monthly: self.keep_monthly.unwrap_or_default(),
            keep_yearly: self.keep_yearly.unwrap_or_default(),
            keep_within_s: self.keep_within.unwrap_or_default().as_secs(),
            keep_labels: self.keep_labels,
        };
        (self.keep_all || !policy.is_empty()).then_some(policy)
    }
}

#[derive(Serialize)]
struct Document<'a> {
    url: String,
    /// What holds for the URL.
    policy: &'a Rules,
    default: Option<&'a Rules>,
    experiments: &'a BTreeMap<Name, Rules>,
    changed: Option<jiff::Timestamp>,
}

impl Policy {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let (Action::Show { url } | Action::Set { url, .. } | Action::Reset { url }) = &self.action;
        let url = session.url(url)?;
        let experiment = match &url.item {
            Item::Repository => None,
            Item::Experiment(experiment) => Some(experiment),
            Item::Run { .. } | Item::Snapshot { .. } => {
                return Err(Failure::fix(format!("{url} has no policy of its own"))
                    .hint("policies are those of a repository or an experiment"));
            }
        };
        let change = match self.action {
            Action::Show { .. } => None,
            Action::Reset { .. } => Some(None),
            Action::Set { keep, .. } => {
                let Some(policy) = keep.policy() else {
                    return Err(Failure::fix("no rule says what to keep").hint(
                        "give at least one, such as --keep-last 3, or --keep-all; petra policy reset \
                         takes back what was set",
                    ));
                };
                Some(Some(policy))
            }
        };
        let repository = session.open(&url).await?;
        let policies = match change {
            None => session.unless_cancelled(repository.policies()).await.at(&url)?,
            Some(policy) => {
                let activity = session.activity("policy");
                repository.set_policy(experiment, policy, &activity.context).await.at(&url)?
            }
        };
        report(session, &url, experiment, &policies)
    }
}

fn report(
    session: &Session,
    url: &PetraUrl,
    experiment: Option<&Name>,
    policies: &Policies,
) -> Result<(), Failure> {
    let policy = experiment.map_or(policies.for_others(), |name| policies.of(name));
    let document = Document {
        url: url.to_string(),
        policy,
        default: policies.default.as_ref(),
        experiments: &policies.experiments,
        changed: policies.changed,
    };
    session.out.report(&document, || {
        let mut table = Table::new(&[("EXPERIMENT", Side::Left), ("KEEPS", Side::Left)]);
        match experiment {
            Some(experiment) => table.row([experiment.to_string(), options(policy)]),
            None => {
                for (name, policy) in &policies.experiments {
                    table.row([name.to_string(), options(policy)]);
                }
                let others = if policies.experiments.is_empty() { "(all)" } else { "(others)" };
                table.row([others.to_owned(), options(policy)]);
            }
        }
        table.render()
    })
}

/// A policy as the options that set it.
fn options(policy: &Rules) -> String {
    let counts = [
        ("last", policy.keep_last),
        ("hourly", policy.keep_hourly),
        ("daily", policy.keep_daily),
        ("weekly", policy.keep_weekly),
        ("monthly", policy.keep_monthly),
        ("yearly", policy.keep_yearly),
    ];
    let counts = counts.into_iter().filter(|(_, count)| *count > 0);
    let mut options: Vec<String> =
        counts.map(|(rule, count)| format!("--keep-{rule} {count}")).collect();
    if policy.keep_within_s > 0 {
        options.push(format!("--keep-within {}", span(policy.keep_within_s)));
    }
    let labels = policy.keep_labels.iter();
    options.extend(labels.map(|label| format!("--keep-label {}", quoted(&label.to_string()))));
    if options.is_empty() { "--keep-all".to_owned() } else { options.join(" ") }
}

/// Seconds in the largest unit that takes them without a rest.
fn span(seconds: u64) -> String {
    let units = [(24 * 60 * 60, "d"), (60 * 60, "h"), (60, "m")];
    match units.into_iter().find(|(unit, _)| seconds.is_multiple_of(*unit)) {
        Some((unit, name)) => format!("{}{name}", seconds / unit),
        None => format!("{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        keep: Keep,
    }

    #[test]
    fn options_say_what_they_set() {
        for line in [
            "--keep-last 3 --keep-daily 14 --keep-weekly 8 --keep-within 30d --keep-label phase=final",
            "--keep-hourly 1 --keep-monthly 2 --keep-yearly 3 --keep-within 90m --keep-label a",
            "--keep-within 61s",
            "--keep-all",
        ] {
            let words = std::iter::once("petra").chain(line.split(' '));
            let policy = Line::try_parse_from(words).unwrap().keep.policy().unwrap();
            assert_eq!(options(&policy), line);
        }
        assert_eq!(Line::try_parse_from(["petra"]).unwrap().keep.policy(), None);
        for wrong in ["--keep-last=0", "--keep-within=soon", "--keep-label==x"] {
            assert!(Line::try_parse_from(["petra", wrong]).is_err(), "{wrong}");
        }
        assert!(Line::try_parse_from(["petra", "--keep-all", "--keep-last=1"]).is_err());
    }
}
