//! The agent of a pool: the process that brings lazy clones their data, and does what else takes long.
//!
//! ```text
//! image server --(socket)--> agent: reads from the repository, hydrates            [crate::lazy::agent]
//!   died -> a successor gets its descriptor         hydrated -> the pin ends
//! every minute: pins that hold data for nothing end                                [crate::pool::pins]
//!               copies that wait are uploaded, by a process of idle priority       [crate::snapshot]
//! ```
//!
//! Everything that it must know is in files of the pool and in the image servers, so it can be killed or replaced at any
//! moment. There is one for each pool; a lock sees to that.

use std::collections::HashSet;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use petra_engine::clone::ClonePin;
use petra_engine::reader::VolumeReader;
use petra_engine::start::StartList;
use petra_engine::{Context, Repository, SnapshotId};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use crate::error::{Error, Result};
use crate::lazy::agent::{AgentEvent, AgentEvents, AgentOptions, Room, serve};
use crate::lazy::connection::{Connection, End};
use crate::lazy::server::Inheritance;
use crate::pool::lock::Lock;
use crate::pool::pins::{self, NotedPin, blocking};
use crate::pool::{LazyState, Pool};
use crate::programs::Programs;
use crate::snapshot;
use crate::volume::served::SOCKET;
use crate::volume::{DEFAULT_PATIENCE, Volume};

/// How often is looked for what has to be done.
const TICK: Duration = Duration::from_secs(60);
/// An agent without work ends after this.
const IDLE: Duration = Duration::from_secs(30);
/// Between attempts to do what failed.
const RETRY: Duration = Duration::from_secs(1);
/// Between attempts to open a repository that is away for longer: some take a second of work for a passphrase.
const LAST_RETRY: Duration = Duration::from_secs(8);
/// What is read in this time after a volume was first attached is what its mount needs.
const MOUNT_TIME: Duration = Duration::from_secs(3);

/// The target of lines that people should know of. Each has a `reason`, a word that never changes, and an `object`: a volume
/// by its pool's id and its name, or a repository by its URL.
const EVENT: &str = "event";

/// Opens repositories by the URLs that volumes remember.
#[async_trait]
pub trait Repositories: Send + Sync + fmt::Debug {
    /// Opens one.
    async fn open(&self, url: &str) -> petra_engine::Result<Repository>;
}

/// The agent of one pool.
#[derive(Clone, Debug)]
pub struct Agent(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    pool: Pool,
    programs: Programs,
    repositories: Arc<dyn Repositories>,
    ctx: Context,
}

impl Agent {
    /// An agent. It uses `ctx` for everything that it does.
    pub fn new(
        pool: Pool,
        programs: Programs,
        repositories: Arc<dyn Repositories>,
        ctx: Context,
    ) -> Self {
        Self(Arc::new(Inner { pool, programs, repositories, ctx }))
    }

    /// Works until it is cancelled or, if `until_idle`, there was nothing to do for a while. `ready` is called when image
    /// servers can connect. [`Error::Busy`] where the pool has an agent.
    pub async fn run(&self, until_idle: bool, ready: impl FnOnce()) -> Result<()> {
        let inner = &self.0;
        let run = inner.pool.run_directory()?;
        let what = format!("the agent of {}", inner.pool);
        let _lock = Lock::acquire(&run.join("agent.lock"), &what, Duration::ZERO)?;
        let listener = listen(run.join(SOCKET))?;
        ready();
        tracing::info!(pool = %inner.pool.root().display(), "the agent listens");
        let mut tasks = JoinSet::new();
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut busy = Instant::now();
        let mut settling: Option<AbortHandle> = None;
        let mut upload: Option<AbortHandle> = None;
        loop {
            tokio::select! {
                () = inner.ctx.cancel.cancelled() => break,
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => { tasks.spawn(self.clone().connection(stream)); }
                    // Too many open files, for example: the server tries again.
                    Err(error) => {
                        tracing::warn!(%error, "an image server could not connect");
                        sleep(RETRY).await;
                    }
                },
                _ = ticks.tick() => {
                    // Not here: a repository that does not answer must keep no image server waiting.
                    if is_over(&settling) {
                        settling = Some(tasks.spawn(self.clone().settle_pins()));
                    }
                    if is_over(&upload) && self.has_uploads().await {
                        upload = Some(tasks.spawn(self.clone().upload()));
                    }
                }
                () = sleep(IDLE / 2), if until_idle => {}
            }
            while tasks.try_join_next().is_some() {}
            if !tasks.is_empty() {
                busy = Instant::now();
            } else if until_idle && busy.elapsed() > IDLE {
                break;
            }
        }
        // Without the socket, whoever needs an agent starts another one.
        let _ = std::fs::remove_file(run.join(SOCKET));
        tasks.shutdown().await;
        Ok(())
    }

    /// Serves one image server, and its successors.
    async fn connection(self, stream: UnixStream) {
        match Connection::accept(stream).await {
            Ok(connection) => {
                let id = connection.volume();
                match self.serve(connection).await {
                    Ok(()) | Err(Error::Cancelled) => {}
                    Err(error) => {
                        tracing::warn!(volume = %id, %error, "an image server is left alone");
                        // It will come again at once.
                        sleep(RETRY).await;
                    }
                }
            }
            // One that only asked whether somebody listens.
            Err(error) => tracing::debug!(%error, "a connection without a server"),
        }
    }

    async fn serve(&self, connection: Connection) -> Result<()> {
        let id = connection.volume();
        let (volume, lazy, is_used) = self.lazy_volume(id).await?;
        lazy.volume.validate().map_err(|error| Error::Damaged {
            path: volume.directory().join("volume.json"),
            detail: error.to_string(),
        })?;
        let (sender, happened) = mpsc::unbounded_channel();
        let events: Arc<dyn AgentEvents> =
            Arc::new(Events { object: object_of(&volume), happened: sender });
        let opened = if lazy.hydrated {
            None
        } else {
            // However long that takes, a server that dies meanwhile has a successor.
            tokio::select! {
                opened = self.open(id, &lazy, &*events) => Some(opened?),
                dead = connection.dead() => dead.map(|()| None)?,
            }
        };
        match opened {
            Some((repo, reader)) => {
                let options = AgentOptions {
                    reader: Arc::new(reader),
                    start_list: lazy
                        .start
                        .as_ref()
                        .map(|list| list.ranges().to_vec())
                        .unwrap_or_default(),
                    hydrate: true,
                    record_for: (is_used && lazy.start.is_none()).then_some(MOUNT_TIME),
                    room: Arc::new(self.0.pool.clone()),
                    // What was said last is still heard, since the sender goes with the first one.
                    events,
                };
                let follow = self.follow(volume.clone(), lazy, repo, happened);
                let served = async {
                    let end = serve(connection, options, &self.0.ctx.cancel).await?;
                    self.ended(end, &volume).await;
                    Ok(())
                };
                // What follows may take long, and a successor must not wait for it.
                futures::join!(served, follow).0
            }
            None => {
                self.ended(connection.hold().await?, &volume).await;
                Ok(())
            }
        }
    }

    /// Does what the end of a connection asks for.
    async fn ended(&self, end: End, volume: &Volume) {
        match end {
            End::Unmounted | End::Disconnected => {}
            End::Died(inherited) => self.replace_server(volume, inherited).await,
        }
    }

    /// Starts successors of a dead server until one serves.
    ///
    /// Without the volume's lock: whoever has it may wait for the device, and so for the successor. What the lock would keep
    /// out does no harm. A file system that is gone ends the successor, and two servers the lock of the presence map keeps
    /// apart.
    async fn replace_server(&self, volume: &Volume, inherited: Inheritance) {
        let object = object_of(volume);
        let event = |event: AgentEvent<'_>| tell(&object, event);
        event(AgentEvent::ServerDied);
        let begun = Instant::now();
        // Who waits for longer than that wants an error.
        let patience = volume.state().map_or(DEFAULT_PATIENCE, |state| state.wanted.patience());
        loop {
            let attempt = inherited.try_clone().map(|inherited| {
                let (volume, programs) = (volume.clone(), self.0.programs.clone());
                blocking(move || start_successor(&volume, &programs, inherited))
            });
            let error = match attempt {
                Ok(attempt) => match attempt.await {
                    Ok(true) => return event(AgentEvent::ServerReplaced),
                    Ok(false) => return,
                    Err(error) => error,
                },
                Err(error) => error,
            };
            if begun.elapsed() >= patience {
                return event(AgentEvent::ServerLost { error: &error });
            }
            tracing::warn!(volume = %volume.name(), %error, "a successor could not be started");
            sleep(RETRY).await;
        }
    }

    /// Finds a volume by its id, and says whether it has a device or is about to.
    async fn lazy_volume(&self, id: SnapshotId) -> Result<(Volume, LazyState, bool)> {
        let pool = self.0.pool.clone();
        blocking(move || {
            for volume in pool.volumes()? {
                match volume.state() {
                    Ok(state) if state.id == id => {
                        let lazy = state.lazy.ok_or_else(|| {
                            Error::Request(format!("{volume} is no lazy clone any more"))
                        })?;
                        return Ok((volume, lazy, state.wanted.attached));
                    }
                    // Deleted meanwhile, or damaged: not the one, as far as anyone can tell.
                    _ => {}
                }
            }
            let (name, within) = (id.to_string(), pool.to_string());
            Err(Error::Unknown { what: "volume", name, within, known: vec![] })
        })
        .await
    }

    /// Opens what a clone comes from, however long that can't be read: a person can mend whatever it is while the volume
    /// waits.
    async fn open(
        &self,
        id: SnapshotId,
        lazy: &LazyState,
        events: &dyn AgentEvents,
    ) -> Result<(Repository, VolumeReader)> {
        let mut pause = RETRY;
        loop {
            let opened: petra_engine::Result<_> = async {
                let repo = self.0.repositories.open(&lazy.repository).await?;
                let reader = VolumeReader::open(&repo, &lazy.volume, &self.0.ctx)?;
                Ok((repo, reader))
            }
            .await;
            match opened {
                Ok(opened) => {
                    if pause > RETRY {
                        events.event(id, AgentEvent::StoreBack);
                    }
                    return Ok(opened);
                }
                Err(error) => {
                    if pause == RETRY {
                        events.event(id, AgentEvent::StoreAway { error: &error });
                    }
                }
            }
            tokio::select! {
                () = self.0.ctx.cancel.cancelled() => return Err(Error::Cancelled),
                () = sleep(pause) => {}
            }
            pause = (pause * 2).min(LAST_RETRY);
        }
    }

    /// Does what follows from what happens to a volume.
    async fn follow(
        &self,
        volume: Volume,
        lazy: LazyState,
        repo: Repository,
        mut events: mpsc::UnboundedReceiver<Happened>,
    ) {
        while let Some(happened) = events.recv().await {
            let done = match happened {
                Happened::Recorded(ranges) => self.recorded(&volume, &lazy, &repo, ranges).await,
                Happened::Hydrated => self.hydrated(&volume, &repo).await,
            };
            if let Err(error) = done {
                tracing::warn!(volume = %volume.name(), %error, "what follows from an event failed");
            }
        }
    }

    async fn recorded(
        &self,
        volume: &Volume,
        lazy: &LazyState,
        repo: &Repository,
        ranges: Vec<std::ops::Range<u64>>,
    ) -> Result<()> {
        let list = StartList::new(ranges);
        repo.put_start_list(lazy.snapshot, lazy.number, &list).await?;
        let volume = volume.clone();
        blocking(move || {
            volume.lock()?.change(|state| {
                if let Some(lazy) = &mut state.lazy {
                    lazy.start = Some(list);
                }
            })
        })
        .await
    }

    /// Ends the pin. A device goes on with its image server until it is attached the next time; where there is none, the
    /// server ends.
    async fn hydrated(&self, volume: &Volume, repo: &Repository) -> Result<()> {
        let noted = loop {
            let volume = volume.clone();
            match blocking(move || note_hydrated(&volume)).await {
                // Nobody would tell it again before the volume is attached the next time.
                Err(Error::Busy { .. }) => sleep(RETRY).await,
                noted => break noted?,
            }
        };
        if let Some(noted) = noted {
            ClonePin::taken(repo, noted.pin(), noted.snapshot()).end(&self.0.ctx).await?;
            noted.forget()?;
        }
        Ok(())
    }

    /// True when copies wait to be uploaded.
    async fn has_uploads(&self) -> bool {
        let pool = self.0.pool.clone();
        match blocking(move || snapshot::pending(&pool)).await {
            Ok(pending) => !pending.is_empty(),
            Err(error) => {
                tracing::warn!(%error, "the uploads of the pool can't be listed");
                false
            }
        }
    }

    /// Uploads what waits, unless someone is at it. In a process of its own, since idle priority is for good.
    async fn upload(self) {
        let command = self.0.programs.upload(&self.0.pool);
        match tokio::process::Command::from(command).status().await {
            Ok(status) if status.success() => {}
            Ok(status) => tracing::warn!(%status, "an upload failed; it is tried again"),
            Err(error) => tracing::warn!(%error, "an upload could not be started"),
        }
    }

    /// Ends pins that hold data for nothing.
    async fn settle_pins(self) {
        let pool = self.0.pool.clone();
        let urls = match blocking(move || pool.noted_pins()).await {
            Ok(noted) => {
                noted.iter().map(|noted| noted.repository().to_owned()).collect::<HashSet<_>>()
            }
            Err(error) => {
                tracing::warn!(%error, "the notes of pins can't be read");
                return;
            }
        };
        for url in urls {
            let settled = async {
                let repo = self.0.repositories.open(&url).await?;
                pins::settle(&self.0.pool, &url, &repo, &self.0.ctx).await
            };
            if let Err(error) = settled.await {
                tracing::warn!(url, %error, "pins that hold data for nothing could not be ended");
            }
        }
    }
}

/// Binds the socket. One that a dead agent left is replaced: the lock says that it is dead.
fn listen(path: PathBuf) -> Result<UnixListener> {
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::io("delete", path)(error));
        }
        _ => {}
    }
    UnixListener::bind(&path).map_err(Error::io("listen on", path))
}

/// How events call a volume: by its id in a cluster.
fn object_of(volume: &Volume) -> String {
    format!("{}/{}", volume.pool().state().id, volume.name())
}

impl Room for Pool {
    fn is_short(&self) -> bool {
        Self::is_short(self)
    }
}

/// What an event is followed by.
#[derive(Debug)]
enum Happened {
    Recorded(Vec<std::ops::Range<u64>>),
    Hydrated,
}

/// Writes events down, and passes on what has consequences.
#[derive(Debug)]
struct Events {
    object: String,
    happened: mpsc::UnboundedSender<Happened>,
}

impl AgentEvents for Events {
    fn event(&self, _: SnapshotId, event: AgentEvent<'_>) {
        let happened = match &event {
            AgentEvent::Recorded { ranges } => Some(Happened::Recorded(ranges.to_vec())),
            AgentEvent::Hydrated => Some(Happened::Hydrated),
            _ => None,
        };
        tell(&self.object, event);
        if let Some(happened) = happened {
            // Nobody follows any more: the agent ends.
            let _ = self.happened.send(happened);
        }
    }
}

/// Writes down what people should know of.
fn tell(object: &str, event: AgentEvent<'_>) {
    let (reason, note) = match &event {
        AgentEvent::StoreAway { .. } => ("RepositoryAway", "what is missing waits"),
        AgentEvent::StoreBack => ("RepositoryBack", "the repository is back"),
        AgentEvent::RoomShort => {
            ("PoolShort", "the pool is down to its reserve; only what is read is fetched")
        }
        AgentEvent::FlushFailed => {
            ("CloneNotDurable", "what was fetched can't be made durable; it is tried again")
        }
        AgentEvent::Damaged { .. } => ("CloneDamaged", "a part of a clone can't be read"),
        AgentEvent::Incomplete { .. } => {
            ("CloneIncomplete", "all data of a clone is here but what can't be read")
        }
        AgentEvent::Hydrated => ("CloneFilled", "all data of a clone is here"),
        AgentEvent::ServerDied => {
            ("ImageServerDied", "an image server died; who uses it waits for a successor")
        }
        AgentEvent::ServerReplaced => {
            ("ImageServerReplaced", "another image server goes on where the dead one was")
        }
        AgentEvent::ServerLost { .. } => (
            "ImageServerLost",
            "no image server could be started: reads and writes fail until it is attached anew",
        ),
        AgentEvent::Recorded { .. } => return,
    };
    match event {
        AgentEvent::Damaged { range, error } => {
            tracing::error!(target: EVENT, reason, object, ?range, %error, "{note}");
        }
        AgentEvent::Incomplete { damaged_bytes } => {
            tracing::error!(target: EVENT, reason, object, damaged_bytes, "{note}");
        }
        AgentEvent::ServerLost { error } => {
            tracing::error!(target: EVENT, reason, object, %error, "{note}");
        }
        AgentEvent::StoreAway { error } => {
            tracing::warn!(target: EVENT, reason, object, %error, "{note}");
        }
        AgentEvent::RoomShort | AgentEvent::FlushFailed | AgentEvent::ServerDied => {
            tracing::warn!(target: EVENT, reason, object, "{note}");
        }
        _ => tracing::info!(target: EVENT, reason, object, "{note}"),
    }
}

/// Starts a successor if the volume needs one. Says whether it has one now.
fn start_successor(volume: &Volume, programs: &Programs, inherited: Inheritance) -> Result<bool> {
    let state = match volume.state() {
        // Deleted meanwhile.
        Err(Error::Unknown { .. }) => return Ok(false),
        state => state?,
    };
    if !state.needs_server() || !inherited.is_mounted() {
        return Ok(false);
    }
    match volume.start_server(&state, programs, Some(inherited)) {
        // Somebody was faster.
        Err(_) if volume.has_server()? => Ok(true),
        started => started.map(|()| true),
    }
}

/// Notes that all data of a volume is here, and that its pin is to be ended.
fn note_hydrated(volume: &Volume) -> Result<Option<NotedPin>> {
    let mut locked = volume.lock()?;
    let Some(lazy) = locked.state().lazy.clone().filter(|lazy| !lazy.hydrated) else {
        return Ok(None);
    };
    // Noted before the volume lets go of it, and ended after.
    let noted = pins::note_end(volume.pool(), &lazy)?;
    locked.change(|state| {
        if let Some(lazy) = &mut state.lazy {
            lazy.hydrated = true;
        }
    })?;
    if !locked.state().wanted.attached
        && let Err(error) = locked.become_plain()
    {
        // The next attach does it.
        tracing::warn!(%volume, %error, "it still has its image server");
    }
    Ok(Some(noted))
}

/// True where a task has ended, or never began.
fn is_over(task: &Option<AbortHandle>) -> bool {
    task.as_ref().is_none_or(AbortHandle::is_finished)
}
