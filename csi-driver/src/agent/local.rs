//! The node agent in process: volumes and snapshots of this machine's pool.
//!
//! ```text
//! LocalAgent --> volumes    making, growing and deleting volumes       [petra_volume::pool, clones]
//!            \-> uploads    taking snapshots, and who uploads them     [petra_volume::snapshot]
//!                           petra volume upload, a process for each, which outlives this one
//! ```
//!
//! Nothing is kept here: what is there is asked from the pool each time. A call that is dropped goes on to its end, so
//! that no pin or lock is let go of in the midst of it. Secrets of calls are kept for the helper processes in a
//! directory in memory, and nowhere else.

mod uploads;
mod volumes;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::future::Future;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use petra_engine::access::SecretsDirectory;
use petra_engine::{
    Access, Context, ErrorKind, Name, Repository as OpenRepository, RepositoryUrl, SnapshotId,
};
use petra_volume::freeze::GuardCommand;
use petra_volume::pool::{MAX_VOLUME_BYTES, MIN_VOLUME_BYTES, pins};
use petra_volume::volume::Serving;
use petra_volume::{Error, Pool, Programs};
use tokio::sync::Semaphore;
use tonic::Status;

use super::{
    AnnotateVolumeRequest, CreateVolumeRequest, ExpandVolumeRequest, NodeAgent, NodeInfo,
    Repository, TakeSnapshotRequest, Upload, Volume,
};
use crate::failure::{of_engine, of_volume};
use crate::locks::Locks;
use crate::proto::agent::DeleteVolumeRequest;
use crate::repositories::Secrets;
use volumes::ROUND_BYTES;

/// How often is looked for what was left undone.
const TICK: Duration = Duration::from_secs(60);
/// Uploads at one time. Each is a process of its own, with some hundred MiB of memory.
const UPLOADS_AT_ONCE: usize = 2;

/// The agent of one pool. Cheap to clone.
#[derive(Clone, Debug)]
pub struct LocalAgent(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    node: String,
    most_volumes: u64,
    pool: Pool,
    serving: Serving,
    guard: GuardCommand,
    secrets: SecretsDirectory,
    ctx: Context,
    /// Snapshots that are being taken, by their name in the CSI call.
    taking: Locks,
    /// Uploads that this process has begun, or will.
    uploading: Mutex<HashSet<SnapshotId>>,
    upload_slots: Semaphore,
}

impl LocalAgent {
    /// The agent of a pool on the node of this name. `petra` is the program that helper processes run.
    /// No more than `most_volumes` are published at a time; 0 for any number. A read of a lazy clone waits for `patience`
    /// while its repository is away.
    pub fn new(
        pool: Pool,
        node: impl Into<String>,
        petra: &Path,
        most_volumes: u64,
        patience: Duration,
    ) -> Result<Self, Status> {
        let secrets =
            SecretsDirectory::new(pool.run_directory().map_err(of_volume)?.join("secrets"));
        let options = vec!["--secrets".into(), secrets.path().as_os_str().to_owned()];
        Ok(Self(Arc::new(Inner {
            node: node.into(),
            most_volumes,
            serving: Serving { programs: Programs::new(petra, options), patience },
            guard: GuardCommand::new(petra, ["freeze-guard"]),
            pool,
            secrets,
            ctx: Context::default(),
            taking: Locks::default(),
            uploading: Mutex::default(),
            upload_slots: Semaphore::new(UPLOADS_AT_ONCE),
        })))
    }

    /// Cleans up what crashes have left, and goes on with what was begun, now and from time to time, as long as there is
    /// this agent.
    pub async fn start(&self) -> Result<(), Status> {
        let pool = self.0.pool.clone();
        let recovery = pins::blocking(move || pool.recover()).await.map_err(of_volume)?;
        for problem in recovery.problems {
            tracing::warn!(%problem, "a part of the pool could not be cleaned up");
        }
        let agent = Arc::downgrade(&self.0);
        tokio::spawn(async move {
            while let Some(inner) = agent.upgrade() {
                Self(inner).look_after().await;
                tokio::time::sleep(TICK).await;
            }
        });
        Ok(())
    }

    /// Does what was left undone.
    async fn look_after(&self) {
        self.begin_uploads().await;
        self.settle_pins().await;
        self.serve_lazy_volumes().await;
    }

    /// The pool.
    pub fn pool(&self) -> &Pool {
        &self.0.pool
    }

    /// How lazy clones are served, for whoever attaches them.
    pub fn serving(&self) -> &Serving {
        &self.0.serving
    }

    /// Keeps secrets of a repository for helper processes, once they have opened it: wrong ones must not take the place
    /// of right ones. Only where the repository is away nobody can tell. Without any, those of an earlier call stay.
    pub async fn keep_secrets(
        &self,
        url: &str,
        secrets: &HashMap<String, String>,
    ) -> Result<(), Status> {
        let url = url_of(url)?;
        let access = Access::from_secrets(secrets).map_err(of_engine)?;
        if !is_given(&access) {
            return Ok(());
        }
        let (directory, at, wanted) = (self.0.secrets.clone(), url.clone(), secrets.clone());
        let known = pins::blocking(move || Ok(directory.holds(&at, &wanted)?));
        if known.await.map_err(of_volume)? {
            return Ok(());
        }
        match access.open(&url).await {
            Err(error) if error.kind() != ErrorKind::Retry => Err(of_engine(error)),
            _ => self.put_secrets(url, secrets.clone()).await,
        }
    }

    async fn put_secrets(
        &self,
        url: RepositoryUrl,
        secrets: HashMap<String, String>,
    ) -> Result<(), Status> {
        let directory = self.0.secrets.clone();
        let put = pins::blocking(move || Ok(directory.put(&url, &secrets)?));
        put.await.map_err(of_volume)
    }

    /// Opens a repository with the secrets of this call, which are kept, or else with those of an earlier one.
    async fn open(
        &self,
        repository: &Repository,
    ) -> Result<(RepositoryUrl, OpenRepository), Status> {
        let url = url_of(&repository.url)?;
        let given = Access::from_secrets(&repository.secrets).map_err(of_engine)?;
        if is_given(&given) {
            let opened = given.open(&url).await.map_err(of_engine)?;
            self.put_secrets(url.clone(), repository.secrets.clone()).await?;
            return Ok((url, opened));
        }
        let (directory, at) = (self.0.secrets.clone(), url.clone());
        let kept = pins::blocking(move || Ok(directory.access(&at)?.unwrap_or_default()));
        let kept = kept.await.map_err(of_volume)?;
        let opened = kept.open(&url).await.map_err(of_engine)?;
        Ok((url, opened))
    }

    /// Ends pins that hold data for nothing.
    async fn settle_pins(&self) {
        let pool = self.0.pool.clone();
        let noted = pins::blocking(move || {
            let noted = pool.noted_pins()?;
            Ok(noted.iter().map(|pin| pin.repository().to_owned()).collect::<HashSet<_>>())
        });
        match noted.await {
            Ok(urls) => {
                for url in urls {
                    self.settle_pins_of(url).await;
                }
            }
            Err(error) => tracing::warn!(%error, "the notes of pins can't be read"),
        }
    }

    async fn settle_pins_of(&self, url: String) {
        let settled = async {
            let repository = Repository { url: url.clone(), secrets: HashMap::new() };
            let (_, repository) = self.open(&repository).await?;
            pins::settle(&self.0.pool, &url, &repository, &self.0.ctx).await.map_err(of_volume)
        };
        if let Err(status) = settled.await {
            let error = status.message();
            tracing::warn!(url, error, "pins that hold data for nothing could not be ended");
        }
    }

    /// Makes sure that lazy volumes that are used, or that somebody waits for, have somebody to bring them their data.
    async fn serve_lazy_volumes(&self) {
        let inner = self.0.clone();
        let served = pins::blocking(move || {
            for volume in inner.pool.volumes()? {
                // Whoever wants a volume that can't be read is told.
                let Ok(state) = volume.state() else { continue };
                let Some(lazy) = state.lazy.filter(|lazy| !lazy.hydrated) else { continue };
                if volume.attachment()?.is_some() {
                    inner.serving.programs.ensure_agent(&inner.pool)?;
                } else if lazy.fill {
                    let locked = volume.lock_for(Duration::ZERO);
                    match locked.and_then(|mut locked| locked.fill(&inner.serving)) {
                        // Somebody uses or deletes it: the next time.
                        Ok(()) | Err(Error::Busy { .. } | Error::Unknown { .. }) => {}
                        Err(error) => tracing::warn!(%volume, %error, "it is not filled"),
                    }
                }
            }
            Ok(())
        });
        if let Err(error) = served.await {
            tracing::warn!(%error, "lazy volumes have no agent");
        }
    }
}

#[async_trait]
impl NodeAgent for LocalAgent {
    async fn info(&self) -> Result<NodeInfo, Status> {
        let inner = self.0.clone();
        let status = pins::blocking(move || inner.pool.status()).await.map_err(of_volume)?;
        let is_full = status.free_bytes <= status.reserve_bytes;
        let available_bytes = if is_full { 0 } else { status.available_bytes() };
        let largest_bytes = available_bytes / ROUND_BYTES * ROUND_BYTES;
        Ok(NodeInfo {
            node: self.0.node.clone(),
            pool: self.0.pool.state().id.to_string(),
            available_bytes,
            largest_volume_bytes: largest_bytes.min(MAX_VOLUME_BYTES),
            smallest_volume_bytes: MIN_VOLUME_BYTES,
            most_volumes: self.0.most_volumes,
        })
    }

    async fn create_volume(&self, request: CreateVolumeRequest) -> Result<Volume, Status> {
        let agent = self.clone();
        to_its_end(async move { agent.make_volume(request).await }).await
    }

    async fn delete_volume(&self, name: &str, secrets: &Secrets) -> Result<(), Status> {
        let (agent, name, secrets) = (self.clone(), name_of("volume", name)?, secrets.clone());
        to_its_end(async move { agent.remove_volume(name, secrets).await }).await
    }

    async fn volume(&self, name: &str) -> Result<Volume, Status> {
        self.find_volume(name_of("volume", name)?).await
    }

    async fn volumes(&self) -> Result<Vec<Volume>, Status> {
        self.list_volumes().await
    }

    async fn expand_volume(&self, request: ExpandVolumeRequest) -> Result<Volume, Status> {
        let agent = self.clone();
        to_its_end(async move { agent.grow_volume(request).await }).await
    }

    async fn annotate_volume(&self, request: AnnotateVolumeRequest) -> Result<Volume, Status> {
        let agent = self.clone();
        to_its_end(async move { agent.change_metadata(request).await }).await
    }

    async fn take_snapshot(&self, request: TakeSnapshotRequest) -> Result<Upload, Status> {
        let agent = self.clone();
        to_its_end(async move { agent.snapshot(request).await }).await
    }

    async fn uploads(&self) -> Result<Vec<Upload>, Status> {
        self.list_uploads().await
    }

    async fn discard_upload(&self, id: &str) -> Result<(), Status> {
        // What is no id is none of ours.
        let Ok(id) = id.parse() else { return Ok(()) };
        let agent = self.clone();
        to_its_end(async move { agent.discard(id).await }).await
    }

    async fn repositories(&self) -> Result<Vec<String>, Status> {
        let pool = self.0.pool.clone();
        pins::blocking(move || pool.repositories()).await.map_err(of_volume)
    }

    async fn note_repository(&self, url: &str) -> Result<(), Status> {
        let (pool, url) = (self.0.pool.clone(), url_of(url)?.to_string());
        pins::blocking(move || pool.note_repository(&url)).await.map_err(of_volume)
    }
}

/// Works to the end, also when nobody waits for it any more.
async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> Result<T, Status> {
    tokio::spawn(work).await.map_err(|_| Status::internal("a task of the node agent panicked"))?
}

fn is_given(access: &Access) -> bool {
    access.s3.is_some() || access.secret.is_some()
}

/// The URL of one repository.
fn url_of(text: &str) -> Result<RepositoryUrl, Status> {
    let url: RepositoryUrl = text.parse().map_err(of_engine)?;
    if url.is_template() {
        let text = format!("{url} is the URL of many repositories: its experiment is missing");
        return Err(Status::invalid_argument(text));
    }
    Ok(url)
}

fn name_of(what: &'static str, text: &str) -> Result<Name, Status> {
    Name::new(what, text).map_err(of_engine)
}

/// As [`Repository`]: it holds secrets.
impl fmt::Debug for DeleteVolumeRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeleteVolumeRequest").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Requests hold secrets, so that what is generated would show them.
impl fmt::Debug for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Repository").field("url", &self.url).finish_non_exhaustive()
    }
}
