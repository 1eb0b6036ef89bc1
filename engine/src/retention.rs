//! How long snapshots are kept: rules, what they choose, and deleting the rest.
//!
//! Rules count in each run of its own, from its newest snapshot back; hours, days, ISO weeks, months and years are
//! those of UTC. What any rule keeps stays, what none keeps is deleted, and comes back with
//! [`undelete`](Repository::undelete) until its grace time is over.

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;

use futures::{StreamExt, stream};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::id::SnapshotId;
use crate::name::Name;
use crate::record::SnapshotRecord;
use crate::repository::{Repository, timestamp};
use crate::url::Item;

const DAY_S: u64 = 24 * 60 * 60;

/// What is kept of each run. Without any rule: everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
// A rule that is not known would keep something: it must not be passed over.
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// The newest snapshots: this many.
    #[serde(skip_serializing_if = "is_zero")]
    pub keep_last: u32,
    /// The newest of each hour, for this many hours that have snapshots.
    #[serde(skip_serializing_if = "is_zero")]
    pub keep_hourly: u32,
    /// The same for days.
    #[serde(skip_serializing_if = "is_zero")]
    pub keep_daily: u32,
    /// The same for ISO weeks, which begin on Mondays.
    #[serde(skip_serializing_if = "is_zero")]
    pub keep_weekly: u32,
    /// The same for months.
    #[serde(skip_serializing_if = "is_zero")]
    pub keep_monthly: u32,
    /// The same for years.
    #[serde(skip_serializing_if = "is_zero")]
    pub keep_yearly: u32,
    /// All that is not older than this many seconds.
    #[serde(skip_serializing_if = "is_zero")]
    pub keep_within_s: u64,
    /// All that bear one of these labels, for ever.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub keep_labels: Vec<LabelRule>,
}

fn is_zero<T: Default + PartialEq>(number: &T) -> bool {
    *number == T::default()
}

/// A label whose bearers are kept: `KEY=VALUE`, or `KEY` for any value.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LabelRule {
    key: String,
    value: Option<String>,
}

/// A rule that keeps a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// There is no rule at all.
    NoRule,
    /// [`Policy::keep_last`].
    Last,
    /// [`Policy::keep_hourly`].
    Hourly,
    /// [`Policy::keep_daily`].
    Daily,
    /// [`Policy::keep_weekly`].
    Weekly,
    /// [`Policy::keep_monthly`].
    Monthly,
    /// [`Policy::keep_yearly`].
    Yearly,
    /// [`Policy::keep_within_s`].
    Within,
    /// [`Policy::keep_labels`].
    Label(LabelRule),
}

/// A snapshot and what keeps it.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The snapshot.
    pub record: SnapshotRecord,
    /// Every rule that keeps it; none: it goes.
    pub reasons: Vec<Reason>,
}

impl Choice {
    /// True when some rule keeps the snapshot.
    pub fn is_kept(&self) -> bool {
        !self.reasons.is_empty()
    }
}

impl Policy {
    /// What holds where no policy was stored: 3 snapshots of each run, one for each of 14 days and 8 weeks, all of
    /// the last 30 days; for ever what is labelled `phase=final` or `keep=forever`.
    pub fn standard() -> Self {
        let label = |key: &str, value: &str| LabelRule {
            key: key.to_owned(),
            value: Some(value.to_owned()),
        };
        Self {
            keep_last: 3,
            keep_daily: 14,
            keep_weekly: 8,
            keep_within_s: 30 * DAY_S,
            keep_labels: vec![label("phase", "final"), label("keep", "forever")],
            ..Self::default()
        }
    }

    /// True without any rule. Such a policy keeps everything.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl LabelRule {
    /// True for a snapshot that bears the label.
    pub fn fits(&self, record: &SnapshotRecord) -> bool {
        match (record.labels.get(&self.key), &self.value) {
            (Some(found), Some(value)) => found == value,
            (Some(_), None) => true,
            (None, _) => false,
        }
    }
}

impl FromStr for LabelRule {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (key, value) = match text.split_once('=') {
            Some((key, value)) => (key, Some(value.to_owned())),
            None => (text, None),
        };
        if key.is_empty() {
            return Err("a label is KEY=VALUE, or KEY for any value");
        }
        Ok(Self { key: key.to_owned(), value })
    }
}

impl fmt::Display for LabelRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.key)?;
        self.value.as_ref().map_or(Ok(()), |value| write!(f, "={value}"))
    }
}

impl Serialize for LabelRule {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for LabelRule {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoRule => "no rule",
            Self::Last => "last",
            Self::Hourly => "hourly",
            Self::Daily => "daily",
            Self::Weekly => "weekly",
            Self::Monthly => "monthly",
            Self::Yearly => "yearly",
            Self::Within => "within",
            Self::Label(label) => return label.fmt(f),
        })
    }
}

impl Serialize for Reason {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Applies policies to snapshots, each run by itself. `policy_of` gives the policy of an experiment. The result is
/// sorted by experiment, run and age, the oldest first.
pub fn choose<'p>(
    mut records: Vec<SnapshotRecord>,
    policy_of: impl Fn(&Name) -> &'p Policy,
    now: Timestamp,
) -> Vec<Choice> {
    fn run(record: &SnapshotRecord) -> (&Name, &Name) {
        (&record.experiment, &record.run)
    }
    // By id, as listings and `@latest` do.
    records.sort_by(|a, b| (run(a), a.id).cmp(&(run(b), b.id)));
    let mut choices = Vec::with_capacity(records.len());
    for series in records.chunk_by(|a, b| run(a) == run(b)) {
        let Some(first) = series.first() else { continue };
        let mut rules = Rules::new(policy_of(&first.experiment), now);
        let newest_first = series.iter().rev();
        let chosen: Vec<Choice> = newest_first
            .map(|record| Choice { reasons: rules.reasons(record), record: record.clone() })
            .collect();
        choices.extend(chosen.into_iter().rev());
    }
    choices
}

/// A policy, and how much of it a run has used.
struct Rules<'p> {
    policy: &'p Policy,
    oldest: Timestamp,
    last_left: u32,
    calendar: [Calendar; 5],
}

/// The newest snapshot of each of some periods.
struct Calendar {
    reason: Reason,
    period: fn(Timestamp) -> i64,
    left: u32,
    seen: HashSet<i64>,
}

impl<'p> Rules<'p> {
    fn new(policy: &'p Policy, now: Timestamp) -> Self {
        let within = std::time::Duration::from_secs(policy.keep_within_s);
        let rule = |reason, left, period| Calendar { reason, period, left, seen: HashSet::new() };
        Self {
            policy,
            oldest: now.checked_sub(within).unwrap_or(Timestamp::MIN),
            last_left: policy.keep_last,
            calendar: [
                rule(Reason::Hourly, policy.keep_hourly, hour),
                rule(Reason::Daily, policy.keep_daily, day),
                rule(Reason::Weekly, policy.keep_weekly, week),
                rule(Reason::Monthly, policy.keep_monthly, month),
                rule(Reason::Yearly, policy.keep_yearly, year),
            ],
        }
    }

    /// What keeps the next older snapshot.
    fn reasons(&mut self, record: &SnapshotRecord) -> Vec<Reason> {
        if self.policy.is_empty() {
            return vec![Reason::NoRule];
        }
        let mut reasons = Vec::new();
        if let Some(left) = self.last_left.checked_sub(1) {
            self.last_left = left;
            reasons.push(Reason::Last);
        }
        for rule in &mut self.calendar {
            if rule.left > 0 && rule.seen.insert((rule.period)(record.created)) {
                rule.left -= 1;
                reasons.push(rule.reason.clone());
            }
        }
        if self.policy.keep_within_s > 0 && record.created >= self.oldest {
            reasons.push(Reason::Within);
        }
        let labels = self.policy.keep_labels.iter().filter(|label| label.fits(record));
        reasons.extend(labels.cloned().map(Reason::Label));
        reasons
    }
}

fn hour(at: Timestamp) -> i64 {
    at.as_second().div_euclid(60 * 60)
}

fn day(at: Timestamp) -> i64 {
    at.as_second().div_euclid(24 * 60 * 60)
}

fn week(at: Timestamp) -> i64 {
    // Day 0, the first of 1970, was a Thursday.
    (day(at) + 3).div_euclid(7)
}

fn month(at: Timestamp) -> i64 {
    let date = TimeZone::UTC.to_datetime(at).date();
    i64::from(date.year()) * 12 + i64::from(date.month())
}

fn year(at: Timestamp) -> i64 {
    TimeZone::UTC.to_datetime(at).date().year().into()
}

/// What to prune, and how.
#[derive(Clone, Debug, Default)]
pub struct PruneOptions {
    /// Holds for all snapshots, instead of what is stored in the repository.
    pub policy: Option<Policy>,
    /// Only say what would be done.
    pub dry_run: bool,
}

/// Deletes the snapshots of a repository, experiment or run that no rule keeps. Says what became of each.
pub async fn prune(
    repo: &Repository,
    scope: &Item,
    options: &PruneOptions,
    ctx: &Context,
) -> Result<Vec<Choice>> {
    if matches!(scope, Item::Snapshot { .. }) {
        return Err(Error::Request("policies are for runs and what holds them".to_owned()));
    }
    let (records, policies) = futures::try_join!(repo.snapshots(scope), repo.policies())?;
    let policy_of = |experiment: &Name| match &options.policy {
        Some(policy) => policy,
        None => policies.of(experiment),
    };
    let choices = choose(records, policy_of, timestamp(ctx));
    if !options.dry_run {
        let going: Vec<SnapshotId> = choices
            .iter()
            .filter(|choice| !choice.is_kept())
            .map(|choice| choice.record.id)
            .collect();
        let deletions = going.into_iter().map(|id| repo.delete(id, ctx));
        let mut deletions = stream::iter(deletions).buffer_unordered(ctx.limits.requests.max(1));
        ctx.check()?;
        while let Some(deleted) = deletions.next().await {
            deleted?;
            ctx.check()?;
        }
    }
    Ok(choices)
}

#[cfg(test)]
#[path = "retention_tests.rs"]
mod tests;
