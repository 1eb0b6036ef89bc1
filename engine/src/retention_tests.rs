use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::id::SnapshotId;
use crate::record::SnapshotStats;

const HOUR_MS: i64 = 60 * 60 * 1000;
/// The first second of 2026, a Thursday.
const NEW_YEAR_MS: i64 = 1_767_225_600_000;

fn at(ms: i64) -> Timestamp {
    Timestamp::from_millisecond(ms).unwrap()
}

fn record(run: &str, created: Timestamp, n: u128, labels: &[(&str, &str)]) -> SnapshotRecord {
    let ms = u64::try_from(created.as_millisecond()).unwrap();
    SnapshotRecord {
        id: SnapshotId::from_parts(ms, n),
        experiment: Name::new("experiment", "e").unwrap(),
        run: Name::new("run", run).unwrap(),
        name: None,
        created,
        labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        message: None,
        metadata: BTreeMap::new(),
        parent: None,
        origin: None,
        volumes: vec![],
        stats: SnapshotStats::default(),
    }
}

/// One snapshot every `hours`, `count` in all, the last one at the beginning of the year.
fn series(hours: i64, count: i64) -> Vec<SnapshotRecord> {
    let age = |n| at(NEW_YEAR_MS - (count - 1 - n) * hours * HOUR_MS);
    (0..count).map(|n| record("r", age(n), 0, &[])).collect()
}

/// Which of them stay, by their place from the newest.
fn kept(policy: &Policy, records: Vec<SnapshotRecord>) -> Vec<usize> {
    let choices = choose(records, |_| policy, at(NEW_YEAR_MS));
    let newest_first = choices.iter().rev().enumerate();
    newest_first.filter(|(_, choice)| choice.is_kept()).map(|(n, _)| n).collect()
}

fn label(text: &str) -> LabelRule {
    text.parse().unwrap()
}

#[test]
fn each_rule_by_itself() {
    let every_6_hours = || series(6, 40);
    let policy = |change: fn(&mut Policy)| {
        let mut policy = Policy::default();
        change(&mut policy);
        policy
    };
    type Change = fn(&mut Policy);
    let cases: [(Change, Vec<usize>); 8] = [
        (|p| p.keep_last = 2, vec![0, 1]),
        (|p| p.keep_hourly = 3, vec![0, 1, 2]),
        // The newest is alone in its day: it was made at midnight.
        (|p| p.keep_daily = 3, vec![0, 1, 5]),
        // Weeks begin on Mondays, so the last Sunday is the 28th of December.
        (|p| p.keep_weekly = 2, vec![0, 13]),
        (|p| p.keep_monthly = 9, vec![0, 1]),
        (|p| p.keep_yearly = 1, vec![0]),
        (|p| p.keep_within_s = 12 * 60 * 60, vec![0, 1, 2]),
        (|p| (p.keep_last, p.keep_daily) = (2, 2), vec![0, 1]),
    ];
    for (n, (change, expected)) in cases.into_iter().enumerate() {
        assert_eq!(kept(&policy(change), every_6_hours()), expected, "case {n}");
    }
}

#[test]
fn no_rule_keeps_everything() {
    let policy = Policy::default();
    let choices = choose(series(24, 400), |_| &policy, at(NEW_YEAR_MS));
    assert!(choices.iter().all(|choice| choice.reasons == [Reason::NoRule]));
}

#[test]
fn labels_keep_for_ever() {
    let old = at(0);
    let mut records = vec![
        record("r", old, 1, &[("phase", "final")]),
        record("r", old, 2, &[("phase", "initial")]),
        record("r", old, 3, &[("pinned", "")]),
        record("r", old, 4, &[]),
    ];
    records.push(record("r", at(NEW_YEAR_MS), 5, &[]));
    let policy = Policy {
        keep_last: 1,
        keep_labels: vec![label("phase=final"), label("pinned")],
        ..Policy::default()
    };
    let choices = choose(records, |_| &policy, at(NEW_YEAR_MS));
    let reasons: Vec<&[Reason]> = choices.iter().map(|choice| &*choice.reasons).collect();
    let by = |text| [Reason::Label(label(text))];
    assert_eq!(reasons, [&by("phase=final")[..], &[], &by("pinned"), &[], &[Reason::Last]]);
}

#[test]
fn each_run_counts_by_itself() {
    let mut records = series(1, 5);
    records.extend((0..5).map(|n| record("s", at(n), 0, &[])));
    let policy = Policy { keep_last: 2, ..Policy::default() };
    let choices = choose(records, |_| &policy, at(NEW_YEAR_MS));
    let kept = choices.iter().filter(|choice| choice.is_kept());
    let runs: Vec<&str> = kept.map(|choice| choice.record.run.as_str()).collect();
    assert_eq!(runs, ["r", "r", "s", "s"]);
}

#[test]
fn the_standard_is_finite_but_for_labels() {
    let standard = Policy::standard();
    let mut records = series(24, 1000);
    records.push(record("r", at(NEW_YEAR_MS - 900 * 24 * HOUR_MS), 9, &[("phase", "final")]));
    let kept = choose(records, |_| &standard, at(NEW_YEAR_MS + 2 * HOUR_MS));
    let kept: Vec<_> = kept.into_iter().filter(Choice::is_kept).collect();
    // 30 days, then the last day of each of the weeks beyond them, of 8 in all.
    assert_eq!(kept.len(), 30 + 3 + 1, "{kept:?}");
    assert_eq!(kept[0].reasons, [Reason::Label(label("phase=final"))]);
}

#[test]
fn policies_are_read_strictly() {
    let policy = Policy { keep_labels: vec![label("a=b=c"), label("k")], ..Policy::standard() };
    let json = serde_json::to_string(&policy).unwrap();
    assert!(json.contains(r#""keep_labels":["a=b=c","k"]"#) && !json.contains("hourly"), "{json}");
    assert_eq!(serde_json::from_str::<Policy>(&json).unwrap(), policy);
    assert_eq!(serde_json::from_str::<Policy>("{}").unwrap(), Policy::default());
    for wrong in [r#"{"keep_forever": 1}"#, r#"{"keep_last": -1}"#, r#"{"keep_labels": ["=x"]}"#] {
        assert!(serde_json::from_str::<Policy>(wrong).is_err(), "{wrong}");
    }
}

/// A period as the calendar has it.
fn calendar(reason: &Reason, at: Timestamp) -> (i16, i8, i8, i8) {
    let time = TimeZone::UTC.to_datetime(at);
    let (date, week) = (time.date(), time.date().iso_week_date());
    match reason {
        Reason::Hourly => (date.year(), date.month(), date.day(), time.hour()),
        Reason::Daily => (date.year(), date.month(), date.day(), 0),
        Reason::Weekly => (week.year(), week.week(), 0, 0),
        Reason::Monthly => (date.year(), date.month(), 0, 0),
        _ => (date.year(), 0, 0, 0),
    }
}

/// The rules said as directly as possible: for each of the newest `count` periods, its newest snapshot.
fn naive(policy: &Policy, run: &[SnapshotRecord], now: Timestamp) -> BTreeSet<SnapshotId> {
    let mut newest_first: Vec<&SnapshotRecord> = run.iter().collect();
    newest_first.sort_by_key(|record| std::cmp::Reverse(record.id));
    if *policy == Policy::default() {
        return newest_first.iter().map(|record| record.id).collect();
    }
    let mut kept: BTreeSet<SnapshotId> =
        newest_first.iter().take(policy.keep_last as usize).map(|record| record.id).collect();
    for (reason, count) in [
        (Reason::Hourly, policy.keep_hourly),
        (Reason::Daily, policy.keep_daily),
        (Reason::Weekly, policy.keep_weekly),
        (Reason::Monthly, policy.keep_monthly),
        (Reason::Yearly, policy.keep_yearly),
    ] {
        let mut periods: Vec<_> =
            newest_first.iter().map(|record| calendar(&reason, record.created)).collect();
        periods.sort();
        periods.dedup();
        for period in periods.into_iter().rev().take(count as usize) {
            let in_it = |record: &&&SnapshotRecord| calendar(&reason, record.created) == period;
            kept.insert(newest_first.iter().find(in_it).unwrap().id);
        }
    }
    for record in newest_first {
        let age_s = (now.as_millisecond() - record.created.as_millisecond()) as f64 / 1000.0;
        let within = policy.keep_within_s > 0 && age_s <= policy.keep_within_s as f64;
        let labelled = policy.keep_labels.iter().any(|rule| {
            record.labels.iter().any(|(key, value)| {
                rule.to_string() == *key || rule.to_string() == format!("{key}={value}")
            })
        });
        if within || labelled {
            kept.insert(record.id);
        }
    }
    kept
}

prop_compose! {
    fn policies()(
        counts in prop::array::uniform6(prop_oneof![Just(0_u32), 0..4_u32, 0..40_u32]),
        within_hours in prop_oneof![Just(0_u64), 1..2000_u64],
        labels in prop::collection::vec(prop_oneof!["a", "a=1", "b=2"], 0..3),
    ) -> Policy {
        let [keep_last, keep_hourly, keep_daily, keep_weekly, keep_monthly, keep_yearly] = counts;
        Policy {
            keep_last, keep_hourly, keep_daily, keep_weekly, keep_monthly, keep_yearly,
            keep_within_s: within_hours * 3600,
            keep_labels: labels.iter().map(|text| label(text)).collect(),
        }
    }
}

prop_compose! {
    /// Some hours, days or months apart, over the ends of several years.
    fn histories()(
        step_hours in prop_oneof![Just(1_i64), Just(7), Just(50), Just(600)],
        gaps in prop::collection::vec((0..20_i64, 0..2_usize, 0..4_usize), 0..60),
    ) -> Vec<SnapshotRecord> {
        let mut ms = NEW_YEAR_MS;
        let runs = ["r", "s"];
        let labels: [&[(&str, &str)]; 4] = [&[], &[("a", "1")], &[("a", "2")], &[("b", "2")]];
        gaps.into_iter().enumerate().map(|(n, (gap, run, label))| {
            ms -= gap * step_hours * HOUR_MS / 4;
            record(runs[run], at(ms), 1000 - n as u128, labels[label])
        }).collect()
    }
}

proptest! {
    #[test]
    fn as_the_rules_say(policy in policies(), records in histories(), late in 0..100_i64) {
        let now = at(NEW_YEAR_MS + late * HOUR_MS);
        let choices = choose(records.clone(), |_| &policy, now);
        prop_assert_eq!(choices.len(), records.len());
        let kept: BTreeSet<_> =
            choices.iter().filter(|choice| choice.is_kept()).map(|choice| choice.record.id).collect();
        let runs: BTreeSet<_> = records.iter().map(|record| record.run.clone()).collect();
        let mut expected = BTreeSet::new();
        for run in runs {
            let of_run: Vec<_> = records.iter().filter(|record| record.run == run).cloned().collect();
            expected.extend(naive(&policy, &of_run, now));
            let newest = of_run.iter().map(|record| record.id).max().unwrap();
            prop_assert!(policy.keep_last == 0 || kept.contains(&newest));
        }
        prop_assert_eq!(&kept, &expected);
    }

    /// Applied again at the same time, a policy finds nothing more to delete.
    #[test]
    fn twice_is_once(policy in policies(), records in histories()) {
        let now = at(NEW_YEAR_MS);
        let kept = |records: Vec<SnapshotRecord>| -> Vec<SnapshotRecord> {
            let choices = choose(records, |_| &policy, now);
            choices.into_iter().filter(Choice::is_kept).map(|choice| choice.record).collect()
        };
        let once = kept(records);
        prop_assert_eq!(kept(once.clone()), once);
    }

    /// What a policy keeps, one with more rules keeps too.
    #[test]
    fn more_rules_keep_more(policy in policies(), more in policies(), records in histories()) {
        let kept = |policy: &Policy| -> BTreeSet<SnapshotId> {
            let choices = choose(records.clone(), |_| policy, at(NEW_YEAR_MS));
            choices.iter().filter(|choice| choice.is_kept()).map(|choice| choice.record.id).collect()
        };
        prop_assume!(!policy.is_empty());
        let both = Policy {
            keep_last: policy.keep_last.max(more.keep_last),
            keep_hourly: policy.keep_hourly.max(more.keep_hourly),
            keep_daily: policy.keep_daily.max(more.keep_daily),
            keep_weekly: policy.keep_weekly.max(more.keep_weekly),
            keep_monthly: policy.keep_monthly.max(more.keep_monthly),
            keep_yearly: policy.keep_yearly.max(more.keep_yearly),
            keep_within_s: policy.keep_within_s.max(more.keep_within_s),
            keep_labels: [policy.keep_labels.clone(), more.keep_labels].concat(),
        };
        prop_assert!(kept(&both).is_superset(&kept(&policy)));
    }
}
