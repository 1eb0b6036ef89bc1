//! `petra volume snapshot` and `petra volume upload`.

use std::ffi::OsString;
use std::time::Duration;

use petra_engine::record::SnapshotRecord;
use petra_engine::snapshot::Ahead;
use petra_engine::{Item, Name, PetraUrl, Repository, RepositoryUrl, SnapshotId};
use petra_volume::freeze::{self, GuardCommand};
use petra_volume::snapshot::{GroupRequest, Hook, Target, Upload, pending, read_ahead, take};
use petra_volume::{Error, idle};
use serde::Serialize;
use tokio::task::JoinHandle;

use super::gc::duration;
use super::pool::PoolOption;
use super::snapshot::{Description, Words, not_a_run, summary};
use crate::failure::Failure;
use crate::session::Session;
use crate::text::{duration_ms, size};
use crate::view;

/// The hidden subcommand that a freeze starts.
pub const FREEZE_GUARD: &str = "freeze-guard";
/// How long an upload may be locked by who only looks at it.
const LOOKED_AT: Duration = Duration::from_secs(2);

/// Options of `petra volume snapshot`.
#[derive(Debug, clap::Args)]
pub struct Snapshot {
    #[command(flatten)]
    pool: PoolOption,
    /// A volume of the pool, and its name in the snapshot if that is another one
    #[arg(required = true, value_name = "[AS=]VOLUME")]
    volumes: Vec<String>,
    /// The run that the snapshot belongs to: REPOSITORY#EXPERIMENT/RUN
    #[arg(required = true, value_name = "URL")]
    url: String,
    #[command(flatten)]
    words: Words,
    /// A line for the shell to run before the volumes are frozen; if it fails there is no snapshot
    #[arg(long, value_name = "COMMAND")]
    hook_before: Option<OsString>,
    /// A line for the shell to run after they are thawed
    #[arg(long, value_name = "COMMAND")]
    hook_after: Option<OsString>,
    /// After this time a hook is killed
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration)]
    hook_limit: Duration,
    /// The most to read in a second while uploading, such as 50M [default: as much as nobody else wants]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    rate: Option<u64>,
    /// Only take the copies, and leave the upload to `petra volume upload`
    #[arg(long)]
    later: bool,
}

/// Options of `petra volume upload`.
#[derive(Debug, clap::Args)]
pub struct GoOn {
    #[command(flatten)]
    pool: PoolOption,
    /// Delete the copies instead: there will be no snapshot of them
    #[arg(long)]
    give_up: bool,
    /// The uploads [default: all that nobody works on]
    #[arg(value_name = "ID")]
    ids: Vec<SnapshotId>,
}

#[derive(Serialize)]
struct Made<'a> {
    #[serde(flatten)]
    snapshot: view::Snapshot<'a>,
    pause_ms: u64,
}

#[derive(Serialize)]
struct Waiting {
    upload: SnapshotId,
    pause_ms: u64,
}

#[derive(Serialize)]
struct Uploaded<'a> {
    snapshots: Vec<view::Snapshot<'a>>,
    given_up: Vec<SnapshotId>,
}

impl Snapshot {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let url = session.url(&self.url)?;
        let Item::Run { experiment, run } = url.item.clone() else {
            return Err(not_a_run(&url));
        };
        let pool = self.pool.open_to_change(session)?;
        // What is wrong with the repository should show before anything is frozen.
        let repository = session.open(&url).await?;
        let hook = |line: Option<OsString>| line.map(|line| Hook::shell(line, self.hook_limit));
        let Description { name, labels, message, metadata } = self.words.check()?;
        let request = GroupRequest {
            target: Target {
                repository: url.repository.to_string(),
                experiment,
                run,
                name,
                labels,
                message,
                metadata,
            },
            volumes: self.volumes.iter().map(|text| named(text)).collect::<Result<_, _>>()?,
            before: hook(self.hook_before),
            after: hook(self.hook_after),
            guard: GuardCommand::this_program([FREEZE_GUARD]),
            limit: freeze::TIME_LIMIT,
            rate_bytes_per_s: self.rate,
        };
        let ahead = (!self.later).then(|| {
            let (pool, request) = (pool.clone(), request.clone());
            let (repository, context) = (repository.clone(), session.context());
            tokio::spawn(async move { read_ahead(&pool, &request, &repository, &context).await })
        });
        let mut taken = tokio::task::block_in_place(|| take(&pool, &request))?;
        if let Some(error) = taken.hook_failure.take() {
            session.out.warn(&format!("the copies are taken, but {error}"));
        }
        let pause_ms = u64::try_from(taken.pause.as_millis()).unwrap_or(u64::MAX);
        session.out.say(&format!("applications waited for {}", duration_ms(pause_ms)));
        if self.later {
            let document = Waiting { upload: taken.upload.id(), pause_ms };
            return session.out.report(&document, || format!("{}\n", document.upload));
        }
        let record = upload(&mut taken.upload, ahead, &repository, session).await?;
        let made = Made { snapshot: view::Snapshot::new(&url.repository, &record), pause_ms };
        session.out.report(&made, || format!("{}\n", made.snapshot.url))
    }
}

impl GoOn {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let pool = self.pool.open_to_change(session)?;
        let ids = if self.ids.is_empty() { pending(&pool)? } else { self.ids.clone() };
        // Others may just be looking at what is asked for by its id.
        let wait = if self.ids.is_empty() { Duration::ZERO } else { LOOKED_AT };
        let (mut done, mut given_up, mut failed) = (vec![], vec![], None);
        for id in ids {
            let mut opened = match Upload::open_within(&pool, id, wait) {
                // Another process is at it, or has just ended it.
                Err(Error::Busy { .. } | Error::Unknown { .. }) if self.ids.is_empty() => continue,
                // One that can't be read must not keep others waiting either.
                Err(error) if self.ids.is_empty() => {
                    let failure = Failure::from(error);
                    session.out.warn(&format!("upload {id}: {}", failure.message));
                    failed = failed.or(Some(failure));
                    continue;
                }
                opened => opened?,
            };
            if self.give_up {
                opened.give_up()?;
                given_up.push(id);
                continue;
            }
            match go_on(&mut opened, session).await {
                Ok(uploaded) => done.push(uploaded),
                // One repository that is away must not keep others waiting.
                Err(failure) if self.ids.is_empty() && !session.cancel.is_cancelled() => {
                    session.out.warn(&format!("upload {id}: {}", failure.message));
                    failed = failed.or(Some(failure));
                }
                Err(failure) => return Err(failure),
            }
        }
        let snapshots =
            done.iter().map(|(repository, record)| view::Snapshot::new(repository, record));
        let document = Uploaded { snapshots: snapshots.collect(), given_up };
        session.out.report(&document, || {
            document.snapshots.iter().map(|snapshot| format!("{}\n", snapshot.url)).collect()
        })?;
        failed.map_or(Ok(()), Err)
    }
}

/// Ends an upload that was begun.
async fn go_on(
    waiting: &mut Upload,
    session: &Session,
) -> Result<(RepositoryUrl, SnapshotRecord), Failure> {
    let url = url_of(waiting.target())?;
    let repository = session.open(&url).await?;
    let record = upload(waiting, None, &repository, session).await?;
    Ok((url.repository, record))
}

/// Uploads at the lowest priority: from now on this process does nothing else.
async fn upload(
    upload: &mut Upload,
    ahead: Option<JoinHandle<Result<Ahead, Error>>>,
    repository: &Repository,
    session: &Session,
) -> Result<SnapshotRecord, Failure> {
    if let Err(error) = idle::whole_process() {
        session.out.warn(&format!("the upload may slow others: {error}"));
    }
    let activity = session.activity("upload");
    if let Some(ahead) = ahead {
        // What is wrong with the repository shows when it is read again.
        let ahead = async { Ok::<_, Error>(ahead.await.ok().and_then(Result::ok)) };
        if let Ok(Some(ahead)) = session.unless_cancelled(ahead).await {
            upload.set_ahead(ahead);
        }
    }
    let uploaded = upload.run(repository, &activity.context).await;
    drop(activity);
    let record = uploaded.map_err(|error| {
        let failure = Failure::from(error);
        match failure.hint {
            Some(_) => failure,
            None => failure
                .hint(format!("the copies are kept: petra volume upload {} goes on", upload.id())),
        }
    })?;
    session.out.say(&summary(&record));
    Ok(record)
}

/// The run that an upload goes to.
fn url_of(target: &Target) -> Result<PetraUrl, Failure> {
    let repository = target.repository.parse::<PetraUrl>()?.repository;
    let (experiment, run) = (target.experiment.clone(), target.run.clone());
    Ok(PetraUrl { repository, item: Item::Run { experiment, run } })
}

/// `AS=VOLUME`, or a volume's name.
fn named(text: &str) -> Result<(Name, Name), Failure> {
    let (name, volume) = text.split_once('=').unwrap_or((text, text));
    Ok((Name::new("volume", volume)?, Name::new("volume", name)?))
}
