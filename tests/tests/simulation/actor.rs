//! What the processes do: each plays one role, with the engine's own functions.

use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use petra_engine::clone::ClonePin;
use petra_engine::collect::{CollectOptions, collect};
use petra_engine::context::{Context, Limits};
use petra_engine::key::MARKS;
use petra_engine::record::{SnapshotRecord, VolumeRecord};
use petra_engine::repair::{RepairOptions, RepairReport, repair};
use petra_engine::restore::{RestoreOptions, restore};
use petra_engine::snapshot::{Parent, SnapshotRequest, snapshot};
use petra_engine::source::Source;
use petra_engine::store::{StoreError, StoreErrorCause};
use petra_engine::target::FileTarget;
use petra_engine::url::{Item, SnapshotRef};
use petra_engine::verify::{VerifyOptions, verify};
use petra_engine::{Error, Repository};
use petra_tests::lab::{name, request_of};
use petra_tests::simulated::{Process, Troubles, spread};
use petra_tests::volume::{Volume, noise};

use crate::oracle::{ATTEMPT, AttemptResult, Oracle, Volumes};
use crate::volumes;

/// What a process does again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Takes snapshots of volumes that change.
    Writer,
    /// Deletes snapshots, and brings some back.
    Deleter,
    /// Collects garbage.
    Collector,
    /// Lists and restores snapshots, verifies, and repairs.
    Reader,
    /// Pins snapshots and reads them slowly.
    Cloner,
}

/// A process at work.
pub struct Actor {
    pub process: Arc<Process>,
    pub repo: Repository,
    pub ctx: Context,
    pub oracle: Oracle,
    pub rng: fastrand::Rng,
    /// The longest time between two steps.
    pub pace: Duration,
    /// What a collector mostly goes by.
    pub policy: Policy,
    /// What a writer takes snapshots of.
    pub volumes: Vec<(&'static str, Volume)>,
}

/// How patient collectors are.
#[derive(Clone, Copy, Debug, Default)]
pub struct Policy {
    grace: Duration,
    silent: Duration,
}

impl Policy {
    /// One of many.
    pub fn random(rng: &mut fastrand::Rng) -> Self {
        let mut one_of =
            |times: [u64; 5]| Duration::from_secs(rng.choice(times).unwrap_or_default());
        Self { grace: one_of([0, 0, 0, 60, 86_400]), silent: one_of([0, 10, 600, 86_400, 864_000]) }
    }
}

/// A context of one task, whose clock and random numbers are the process's.
pub fn context(process: &Arc<Process>, limits: Limits) -> Context {
    Context { host: process.clone(), limits, ..Context::default() }
}

/// What may be wrong with a call: nothing but what was done to its requests, and what the case allows.
fn excused(error: &Error, before: Troubles, after: Troubles) -> bool {
    let unavailable =
        matches!(error, Error::Store(StoreError { cause: StoreErrorCause::Unavailable, .. }));
    unavailable && after.errors > before.errors
}

impl Actor {
    /// Plays a role for some steps.
    pub async fn play(&mut self, role: Role, steps: u32) {
        for _ in 0..steps {
            tokio::time::sleep(spread(&mut self.rng, self.pace)).await;
            match role {
                Role::Writer => self.write().await,
                Role::Deleter if self.rng.u32(..3) == 0 => self.undelete().await,
                Role::Deleter => self.delete().await,
                Role::Collector => self.collect().await,
                Role::Reader => self.read().await,
                Role::Cloner => self.clone_one().await,
            }
        }
    }

    fn violation(&self, text: String) {
        self.process.note(format_args!("VIOLATION: {text}"));
        self.oracle.violation(format!("{}: {text}", self.process.name()));
    }

    /// Notes an error that nothing excuses.
    fn judge(&self, what: &str, error: &Error, before: Troubles, allowed: bool) {
        self.process.note(format_args!("{what}: {error}"));
        if !allowed && !excused(error, before, self.process.troubles()) {
            self.violation(format!("{what}: {error}"));
        }
    }

    /// Takes a snapshot of the volumes, after some changes.
    pub async fn write(&mut self) {
        self.change_volumes();
        let volumes: Volumes =
            self.volumes.iter().map(|(n, v)| (name(n), Arc::new(v.clone()))).collect();
        let number = self.oracle.attempt(volumes.clone());
        let known = self.oracle.committed();
        let parent = match self.rng.u32(..8) {
            0 => Parent::None,
            1 | 2 => self.rng.choice(known).map_or(Parent::Auto, Parent::Snapshot),
            _ => Parent::Auto,
        };
        let sources = volumes.iter().map(|(n, v)| (n.clone(), v.clone() as Arc<dyn Source>));
        let run = ["r1", "r2"].get(self.rng.usize(..2)).copied().unwrap_or_default();
        let request = SnapshotRequest {
            parent,
            labels: [(ATTEMPT.to_owned(), number.to_string())].into(),
            ..request_of(run, sources.collect())
        };
        let mut ctx = self.ctx.clone();
        let cancelled = self.rng.u32(..20) == 0;
        if cancelled {
            ctx.cancel = ctx.cancel.child_token();
            let (cancel, after) =
                (ctx.cancel.clone(), spread(&mut self.rng, Duration::from_secs(2)));
            tokio::spawn(async move {
                tokio::time::sleep(after).await;
                cancel.cancel();
            });
        }
        self.process.note(format_args!("attempt {number} in {run}, parent {parent:?}"));
        let before = self.process.troubles();
        match snapshot(&self.repo, request, &ctx).await {
            Ok(record) => {
                let now = self.oracle.now();
                self.oracle.saw("snapshot", 1);
                self.process.note(format_args!("attempt {number} is snapshot {}", record.id));
                self.oracle.attempted(number, AttemptResult::Committed(record.id, now));
            }
            Err(error) => {
                let allowed = match &error {
                    Error::Cancelled => cancelled,
                    Error::Lost { .. } => {
                        self.oracle.saw("attempt lost", 1);
                        true
                    }
                    // The parent.
                    Error::Unknown { .. } => match parent {
                        Parent::Snapshot(id) => self.oracle.may_be_deleted(id),
                        _ => false,
                    },
                    _ => false,
                };
                self.judge(&format!("attempt {number}"), &error, before, allowed);
                if self.process.troubles().doubts == before.doubts {
                    self.oracle.attempted(number, AttemptResult::Failed);
                }
            }
        }
    }

    fn change_volumes(&mut self) {
        if self.volumes.is_empty() || self.rng.u32(..12) == 0 {
            let count = self.rng.usize(1..=2);
            let names = ["workspace", "data"].into_iter().take(count);
            self.volumes = names.map(|n| (n, volumes::fresh(&mut self.rng))).collect();
        }
        for (_, volume) in &mut self.volumes {
            for _ in 0..self.rng.u32(..4) {
                volumes::change(&mut self.rng, volume);
            }
        }
    }

    async fn delete(&mut self) {
        let known = self.oracle.committed();
        // The newest is the one that writers are most likely to use.
        let newest = known.last().copied().filter(|_| self.rng.bool());
        let Some(id) = newest.or_else(|| self.rng.choice(known)) else { return };
        self.process.note(format_args!("delete {id}"));
        let call = self.oracle.call(id, true);
        let before = self.process.troubles();
        match self.repo.delete(id, &self.ctx).await {
            Ok(()) => {
                self.oracle.saw("snapshot deleted", 1);
                self.oracle.done(call);
            }
            Err(error) => {
                // Maybe while this one waited for an answer.
                let buried = matches!(error, Error::Unknown { .. })
                    && self.oracle.may_be_deleted_by_others(call);
                self.judge(&format!("delete {id}"), &error, before, buried);
            }
        }
    }

    async fn undelete(&mut self) {
        let mut known = self.oracle.committed();
        known.retain(|id| self.oracle.may_be_deleted(*id));
        let Some(id) = self.rng.choice(known) else { return };
        self.process.note(format_args!("undelete {id}"));
        let call = self.oracle.call(id, false);
        let before = self.process.troubles();
        match self.repo.undelete(id, &self.ctx).await {
            Ok(()) => {
                self.oracle.saw("snapshot brought back", 1);
                self.oracle.done(call);
            }
            Err(error) => {
                let too_late = matches!(error, Error::Purged { .. });
                self.judge(&format!("undelete {id}"), &error, before, too_late);
            }
        }
    }

    async fn collect(&mut self) {
        let policy = match self.rng.u32(..5) {
            0 => Policy::random(&mut self.rng),
            _ => self.policy,
        };
        let options = CollectOptions {
            grace: policy.grace,
            silent: policy.silent,
            max_waste_percent: self.rng.choice([None, Some(0), Some(0), Some(30)]).flatten(),
            bury_from: self.rng.choice([1, 1, 4, 1000]).unwrap_or(1),
            dry_run: self.rng.u32(..8) == 0,
        };
        self.process.note(format_args!("collect {options:?}"));
        let before = self.process.troubles();
        match collect(&self.repo, &options, &self.ctx).await {
            Ok(report) => {
                self.process.note(format_args!("collected: {report:?}"));
                if !options.dry_run {
                    self.oracle.saw("session aborted", report.aborted_sessions);
                    self.oracle.saw("snapshot purged", report.purged);
                    self.oracle.saw("pack deleted", report.deleted_packs);
                    self.oracle.saw("pack compacted", report.compacted_packs);
                    self.oracle.saw("id buried", report.buried);
                }
            }
            // Snapshots were purged faster than they could be walked.
            Err(error) => {
                let allowed = matches!(error, Error::Request(_));
                self.judge("collect", &error, before, allowed);
            }
        }
    }

    async fn read(&mut self) {
        let began = self.oracle.now();
        let before = self.process.troubles();
        let records = match self.repo.snapshots(&Item::Repository).await {
            Ok(records) => records,
            Err(error) => return self.judge("list", &error, before, false),
        };
        let ended = self.oracle.now();
        self.oracle.check_listing(began, ended, &records);
        match self.rng.u32(..8) {
            0 | 1 => return self.verify().await,
            2 => return self.repair().await,
            _ => {}
        }
        let Some(record) = self.rng.choice(records.as_slice()) else { return };
        // The lister may stand still before it reads.
        tokio::time::sleep(spread(&mut self.rng, self.pace)).await;
        let before = self.process.troubles();
        if let Err(error) = self.repo.find(&SnapshotRef::Id(record.id)).await {
            let allowed =
                matches!(error, Error::Unknown { .. }) && self.oracle.may_be_deleted(record.id);
            return self.judge(&format!("find {}", record.id), &error, before, allowed);
        }
        self.restore(record, false).await;
    }

    /// Nothing is damaged, whatever goes on meanwhile.
    async fn verify(&self) {
        self.process.note(format_args!("verify"));
        let before = self.process.troubles();
        let options = VerifyOptions { read_data: true, ..VerifyOptions::default() };
        match verify(&self.repo, &Item::Repository, &options, &self.ctx).await {
            Ok(report) if report.problems.is_empty() => self.oracle.saw("verified", 1),
            Ok(report) => self.violation(format!("verify: {:?}", report.problems)),
            Err(error) => self.judge("verify", &error, before, false),
        }
    }

    /// So there is nothing to heal; and what a repair does puts nothing else at risk.
    async fn repair(&self) {
        self.process.note(format_args!("repair"));
        let before = self.process.troubles();
        match repair(&self.repo, &RepairOptions::default(), &self.ctx).await {
            Ok(report) => {
                let RepairReport { quarantined, healed, lost, unresolved, .. } = &report;
                if quarantined.is_empty()
                    && healed.is_empty()
                    && lost.is_empty()
                    && unresolved.is_empty()
                {
                    self.oracle.saw("repaired", 1);
                } else {
                    self.violation(format!("repair: {report:?}"));
                }
            }
            Err(error) => self.judge("repair", &error, before, false),
        }
    }

    /// Restores all volumes of a snapshot and compares every byte. One that is pinned can be read whatever happens.
    pub async fn restore(&mut self, record: &SnapshotRecord, pinned: bool) {
        let id = record.id;
        self.process.note(format_args!("restore {id}"));
        for (volume, (name, expected)) in record.volumes.iter().zip(self.oracle.volumes(record)) {
            let before = self.process.troubles();
            match self.restore_volume(volume, &expected).await {
                Ok(None) if name == volume.name => {
                    self.oracle.saw("volume restored", 1);
                    let marks = self.process.world().keys(&format!("{MARKS}{id}/"));
                    if pinned && marks.len() >= 2 {
                        self.oracle.saw("volume restored after its purge", 1);
                    }
                }
                Ok(difference) => {
                    self.violation(format!("restored {id}/{}: {difference:?}", volume.name));
                }
                Err(error) => {
                    let gone = matches!(error, Error::Missing { .. } | Error::Damaged { .. });
                    let allowed = gone && !pinned && self.oracle.may_be_deleted(id);
                    return self.judge(&format!("restore {id}"), &error, before, allowed);
                }
            }
        }
    }

    /// The first difference.
    async fn restore_volume(
        &mut self,
        volume: &VolumeRecord,
        expected: &Volume,
    ) -> Result<Option<String>, Error> {
        // A file in memory, which has something in it already.
        let file = rustix::fs::memfd_create("petra", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        std::fs::write(&path, noise(self.rng.u64(..10), 10_000)).unwrap();
        let target = FileTarget::open_existing(&path, volume.len_bytes)?;
        let options = RestoreOptions { in_place: self.rng.bool(), keep_going: false };
        restore(&self.repo, volume, target, &options, &self.ctx).await?;
        Ok(expected.difference(&path))
    }

    async fn clone_one(&mut self) {
        let Some(id) = self.rng.choice(self.oracle.committed()) else { return };
        let before = self.process.troubles();
        let gone = |error: &Error| {
            matches!(error, Error::Unknown { .. }) && self.oracle.may_be_deleted(id)
        };
        let record = match self.repo.find(&SnapshotRef::Id(id)).await {
            Ok(record) => record,
            Err(error) => return self.judge("find", &error, before, gone(&error)),
        };
        let before = self.process.troubles();
        let pin = match ClonePin::take(&self.repo, id, &self.ctx).await {
            Ok(pin) => pin,
            Err(error) => return self.judge("pin", &error, before, gone(&error)),
        };
        self.process.note(format_args!("clone {} of {id}", pin.id()));
        for _ in 0..self.rng.u32(1..=4) {
            tokio::time::sleep(spread(&mut self.rng, self.pace)).await;
            self.restore(&record, true).await;
        }
        // Some clones live on when all is over.
        if self.rng.u32(..4) > 0 {
            self.end(&pin).await;
        }
    }

    async fn end(&self, pin: &ClonePin) {
        let before = self.process.troubles();
        self.process.note(format_args!("end {}", pin.id()));
        if let Err(error) = pin.end(&self.ctx).await {
            self.judge("end", &error, before, false);
        }
    }
}
