//! Snapshots on their way to a repository.
//!
//! Copies are taken while the caller waits; a process of its own uploads them. It outlives this one, and whoever finds an
//! upload that nobody works on begins it again. Who does work on it holds its lock, in this process or another.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::time::Duration;

use petra_engine::{Item, Name, PetraUrl, RepositoryUrl, SnapshotId};
use petra_volume::pool::pins;
use petra_volume::snapshot::{
    self, GroupRequest, Target, UploadState, is_being_done, pending, upload_state,
};
use petra_volume::{Error, Pool, freeze};
use tonic::{Code, Status};

use super::{LocalAgent, name_of};
use crate::agent::{CSI_NAME, NodeAgent, Repository, TakeSnapshotRequest, Upload, UploadMember};
use crate::failure::of_volume;
use crate::telemetry::{Severity, event};

/// How long the one who works on an upload may take to give it up, before the caller has to come again.
const DISCARD_WAIT: Duration = Duration::from_secs(20);
const DISCARD_STEP: Duration = Duration::from_millis(100);

impl LocalAgent {
    pub(super) async fn snapshot(&self, request: TakeSnapshotRequest) -> Result<Upload, Status> {
        let missing = || Status::invalid_argument(format!("the metadata {CSI_NAME} is missing"));
        let csi_name = request.metadata.get(CSI_NAME).ok_or_else(missing)?.clone();
        let (repository, target) = target_of(&request)?;
        let mut volumes = vec![];
        for member in &request.members {
            volumes.push((name_of("volume", &member.volume)?, name_of("volume", &member.name)?));
        }
        let _taking = self.0.taking.begin([csi_name.clone()])?;
        if let Some(found) = self.upload_called(&csi_name).await? {
            if !is_same(&found, &target, &volumes) {
                let text = format!("snapshot {csi_name} is on its way already, of something else");
                return Err(Status::already_exists(text));
            }
            // With secrets that may be new.
            self.keep_secrets(&repository.url, &repository.secrets).await?;
            self.begin_upload_of_nobody(found.id).await?;
            return self.describe(found).await;
        }
        if request.go_on {
            return Err(Status::not_found(format!("no upload of snapshot {csi_name}")));
        }
        // What is wrong with the repository should show before anything is frozen.
        self.open(&repository).await?;
        // Before there is a snapshot that would be in no list. Nothing else depends on it.
        if let Err(status) = self.note_repository(&repository.url).await {
            let (url, error) = (&repository.url, status.message());
            tracing::warn!(url, error, "a repository is not remembered");
        }
        let group = GroupRequest {
            target,
            volumes: volumes.clone(),
            before: None,
            after: None,
            guard: self.0.guard.clone(),
            limit: freeze::TIME_LIMIT,
            rate_bytes_per_s: None,
        };
        let pool = self.pool().clone();
        // The upload is let go of at once, for the process that does it.
        let taken =
            pins::blocking(move || Ok(snapshot::take(&pool, &group)?.upload.state().clone()));
        let taken = taken.await;
        if let Err(Error::Hydrating { .. }) = &taken {
            self.fill(volumes.into_iter().map(|(volume, _)| volume).collect()).await;
        }
        let state = taken.map_err(of_volume)?;
        self.begin_upload(state.id);
        self.describe(state).await
    }

    /// The upload that a CSI call of this name has begun.
    async fn upload_called(&self, csi_name: &str) -> Result<Option<UploadState>, Status> {
        let uploads = self.ready_uploads().await?;
        let is_called = |state: &UploadState| {
            state.target.metadata.get(CSI_NAME).is_some_and(|name| name == csi_name)
        };
        Ok(uploads.into_iter().find(is_called))
    }

    /// Uploads whose copies are all there, the oldest first.
    async fn ready_uploads(&self) -> Result<Vec<UploadState>, Status> {
        let pool = self.pool().clone();
        let read = pins::blocking(move || {
            let mut found = vec![];
            for id in pending(&pool)? {
                match upload_state(&pool, id) {
                    Ok(state) => found.extend(state.filter(|state| state.ready)),
                    // It must not keep others from being uploaded.
                    Err(error) => tracing::warn!(%id, %error, "an upload can't be read"),
                }
            }
            Ok(found)
        });
        read.await.map_err(of_volume)
    }

    pub(super) async fn list_uploads(&self) -> Result<Vec<Upload>, Status> {
        let mut uploads = vec![];
        for state in self.ready_uploads().await? {
            uploads.push(self.describe(state).await?);
        }
        Ok(uploads)
    }

    async fn describe(&self, state: UploadState) -> Result<Upload, Status> {
        let pool = self.pool().clone();
        pins::blocking(move || Ok(describe(&pool, state))).await.map_err(of_volume)
    }

    /// Goes on with what nobody works on.
    pub(super) async fn begin_uploads(&self) {
        let uploads = match self.ready_uploads().await {
            Ok(uploads) => uploads,
            Err(status) => {
                tracing::warn!(error = status.message(), "the uploads of the pool can't be listed");
                return;
            }
        };
        for upload in uploads {
            if let Err(status) = self.begin_upload_of_nobody(upload.id).await {
                tracing::warn!(id = %upload.id, error = status.message(), "an upload can't begin");
            }
        }
    }

    /// Begins an upload unless someone is at it.
    async fn begin_upload_of_nobody(&self, id: SnapshotId) -> Result<(), Status> {
        let begun =
            || self.0.uploading.lock().unwrap_or_else(PoisonError::into_inner).contains(&id);
        if begun() {
            return Ok(());
        }
        let pool = self.pool().clone();
        let is_done = pins::blocking(move || is_being_done(&pool, id)).await.map_err(of_volume)?;
        if !is_done {
            self.begin_upload(id);
        }
        Ok(())
    }

    /// Begins an upload, or puts it in the queue.
    fn begin_upload(&self, id: SnapshotId) {
        let mut uploading = self.0.uploading.lock().unwrap_or_else(PoisonError::into_inner);
        if !uploading.insert(id) {
            return;
        }
        drop(uploading);
        let agent = self.clone();
        tokio::spawn(async move {
            if let Err(error) = agent.upload(id).await {
                failed(id, &error.to_string());
            }
            let mut uploading = agent.0.uploading.lock().unwrap_or_else(PoisonError::into_inner);
            uploading.remove(&id);
        });
    }

    /// Runs the process of an upload to its end.
    async fn upload(&self, id: SnapshotId) -> petra_volume::Result<()> {
        // It is closed only with the agent.
        let Ok(_slot) = self.0.upload_slots.acquire().await else { return Ok(()) };
        let inner = self.0.clone();
        let process = pins::blocking(move || {
            // It may have been discarded while it waited.
            match upload_state(&inner.pool, id)? {
                Some(_) => inner.serving.programs.start_upload(&inner.pool, id).map(Some),
                None => Ok(None),
            }
        });
        let Some(process) = process.await? else { return Ok(()) };
        let status = process.wait().await?;
        if status.success() {
            let note = "a snapshot is in its repository";
            event(Severity::Normal, "SnapshotUploaded", &id.to_string(), note);
        } else {
            failed(id, &format!("its process ended with {status}, and uploads.log has the reason"));
        }
        Ok(())
    }

    pub(super) async fn discard(&self, id: SnapshotId) -> Result<(), Status> {
        let mut waited = Duration::ZERO;
        loop {
            let pool = self.pool().clone();
            match pins::blocking(move || snapshot::discard(&pool, id)).await {
                // Whoever is at it gives it up soon.
                Err(Error::Busy { .. }) if waited < DISCARD_WAIT => {
                    tokio::time::sleep(DISCARD_STEP).await;
                    waited += DISCARD_STEP;
                }
                Err(error @ Error::Busy { .. }) => {
                    return Err(Status::new(Code::Aborted, error.to_string()));
                }
                discarded => return discarded.map_err(of_volume),
            }
        }
    }
}

/// Tells people of an upload that failed.
fn failed(id: SnapshotId, why: &str) {
    let note = format!("an upload failed, and is tried again: {why}");
    event(Severity::Warning, "UploadFailed", &id.to_string(), &note);
}

/// Where a snapshot goes. The repository is that of the experiment, where each has its own.
fn target_of(request: &TakeSnapshotRequest) -> Result<(Repository, Target), Status> {
    let missing = || Status::invalid_argument("the repository is missing");
    let given = request.repository.as_ref().ok_or_else(missing)?;
    let url: RepositoryUrl = given.url.parse().map_err(crate::failure::of_engine)?;
    let experiment = name_of("experiment", &request.experiment)?;
    let item = Item::Experiment(experiment.clone());
    let url = PetraUrl { repository: url, item }.resolved_repository();
    let url = url.map_err(crate::failure::of_engine)?.to_string();
    let name = match request.name.as_str() {
        "" => None,
        name => Some(name_of("snapshot", name)?),
    };
    let sorted = |pairs: &std::collections::HashMap<String, String>| -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| (key.clone(), value.clone())).collect()
    };
    let target = Target {
        repository: url.clone(),
        experiment,
        run: name_of("run", &request.run)?,
        name,
        labels: sorted(&request.labels),
        message: None,
        metadata: sorted(&request.metadata),
    };
    Ok((Repository { url, secrets: given.secrets.clone() }, target))
}

/// True for an upload of the same volumes to the same place.
fn is_same(found: &UploadState, target: &Target, volumes: &[(Name, Name)]) -> bool {
    let ours: BTreeMap<&Name, &Name> =
        volumes.iter().map(|(volume, name)| (volume, name)).collect();
    let theirs: BTreeMap<&Name, &Name> =
        found.volumes.iter().map(|part| (&part.volume, &part.name)).collect();
    found.target.repository == target.repository && ours == theirs
}

/// An upload as the controller sees it.
fn describe(pool: &Pool, state: UploadState) -> Upload {
    let Target { repository, experiment, run, name, metadata, .. } = state.target;
    let members = state.volumes.iter().map(|part| UploadMember {
        volume: part.volume.to_string(),
        name: part.name.to_string(),
        // A copy that is gone, since the upload has just ended, has no size any more.
        size_bytes: pool
            .volume(&part.volume)
            .ok()
            .and_then(|volume| std::fs::metadata(volume.copy_image(part.copy)).ok())
            .map_or(0, |metadata| metadata.len()),
    });
    Upload {
        id: state.id.to_string(),
        repository,
        experiment: experiment.to_string(),
        run: run.to_string(),
        name: name.map(|name| name.to_string()).unwrap_or_default(),
        metadata: metadata.into_iter().collect(),
        members: members.collect(),
        created_unix_ms: u64::try_from(state.created.as_millisecond()).unwrap_or_default(),
    }
}
