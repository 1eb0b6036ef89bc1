//! Repositories by name, opened once, and what is in them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use futures::{StreamExt, stream};
use petra_engine::access::Access;
use petra_engine::record::{Pin, SnapshotRecord, VolumeRecord};
use petra_engine::{ErrorKind, Item, PetraUrl, Repository, RepositoryUrl, SnapshotId, SnapshotRef};
use petra_volume::snapshot;
use tonic::{Code, Status};

use crate::failure;
use crate::handle::SnapshotHandle;

/// Repositories that are kept open.
const OPEN: usize = 64;

/// The secrets of a CSI call.
pub type Secrets = HashMap<String, String>;

/// The repositories of a cluster.
#[derive(Clone, Debug, Default)]
pub struct Repositories(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// In the order given: the first is the default.
    named: Vec<(String, RepositoryUrl)>,
    /// By URL and a hash of the secrets.
    open: Mutex<HashMap<(String, blake3::Hash), Arc<Opened>>>,
}

/// A repository, and what was read of it that never changes.
#[derive(Debug)]
pub struct Opened {
    /// The repository.
    pub repository: Repository,
    records: Mutex<BTreeMap<SnapshotId, Arc<SnapshotRecord>>>,
    /// By the ids of pins; None for those of others.
    readers: Mutex<BTreeMap<SnapshotId, Option<Readers>>>,
}

/// A volume that many nodes read: what its pin remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Readers {
    /// The pin.
    pub pin: SnapshotId,
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// Which of its volumes, from 1.
    pub number: u32,
    /// The volume's size.
    pub size_bytes: u64,
}

/// Metadata of a pin: which volume of the snapshot is read, and its size.
const READ_VOLUME: &str = "csi.volume";
const READ_BYTES: &str = "csi.bytes";
/// Pins that are read at one time.
const READS: usize = 16;

impl Readers {
    /// What the pin is to remember.
    pub fn to_metadata(self) -> BTreeMap<String, String> {
        [(READ_VOLUME, self.number.to_string()), (READ_BYTES, self.size_bytes.to_string())]
            .map(|(key, value)| (key.to_owned(), value))
            .into()
    }

    fn of_pin(id: SnapshotId, pin: &Pin) -> Option<Self> {
        let number = pin.metadata.get(READ_VOLUME)?.parse().ok()?;
        let size_bytes = pin.metadata.get(READ_BYTES)?.parse().ok()?;
        Some(Self { pin: id, snapshot: *pin.snapshots.first()?, number, size_bytes })
    }
}

/// What the id of a snapshot names, whether that is there or not.
#[derive(Clone, Debug)]
pub struct Named {
    /// The repository's URL.
    pub url: RepositoryUrl,
    /// The snapshot.
    pub snapshot: SnapshotRef,
    /// The name of the volume, where the id has one.
    pub volume: Option<petra_engine::Name>,
}

/// A volume of a snapshot that an id led to.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its repository.
    pub opened: Arc<Opened>,
    /// The repository's URL.
    pub url: RepositoryUrl,
    /// The snapshot.
    pub record: Arc<SnapshotRecord>,
    /// The name of the volume, where the id has one.
    pub volume: Option<petra_engine::Name>,
}

impl Repositories {
    /// Repositories with their names.
    pub fn new(named: Vec<(String, RepositoryUrl)>) -> Self {
        Self(Arc::new(Inner { named, open: Mutex::default() }))
    }

    /// The name of the default repository.
    pub fn default_name(&self) -> Result<&str, Status> {
        self.0.named.first().map(|(name, _)| name.as_str()).ok_or_else(|| {
            Status::invalid_argument(
                "no repository: give the class the parameter repository, or the driver --repository NAME=URL",
            )
        })
    }

    /// The names of all that have one.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.named.iter().map(|(name, _)| name.as_str())
    }

    /// The URL of a repository that is given by its name or as a URL. `FAILED_PRECONDITION` without one of this name.
    pub fn url(&self, repository: &str) -> Result<RepositoryUrl, Status> {
        if let Some((_, url)) = self.0.named.iter().find(|(name, _)| name == repository) {
            return Ok(url.clone());
        }
        if !repository.contains("://") {
            let known: Vec<_> = self.names().collect();
            // What is in it is there all the same, so it must not count as gone.
            return Err(Status::failed_precondition(format!(
                "no repository is named {repository:?}; there are: {}",
                known.join(", ")
            )));
        }
        let url: PetraUrl = repository.parse().map_err(failure::of_engine)?;
        match url.item {
            Item::Repository => Ok(url.repository),
            _ => Err(Status::invalid_argument(format!("{repository} is no whole repository"))),
        }
    }

    /// How a repository is called in ids: by its name if it has one.
    pub fn short<'a>(&'a self, repository: &'a str) -> &'a str {
        let url = || repository.parse::<RepositoryUrl>().ok();
        let named = |url: RepositoryUrl| self.0.named.iter().find(|(_, named)| *named == url);
        url().and_then(named).map_or(repository, |(name, _)| name)
    }

    /// Opens a repository.
    pub async fn open(
        &self,
        url: &RepositoryUrl,
        secrets: &Secrets,
    ) -> Result<Arc<Opened>, Status> {
        let key = (url.to_string(), fingerprint(secrets));
        if let Some(open) = self.lock().get(&key) {
            return Ok(open.clone());
        }
        let access = Access::from_secrets(secrets).map_err(failure::of_engine)?;
        let repository = access.open(url).await.map_err(failure::of_engine)?;
        let (records, readers) = (Mutex::default(), Mutex::default());
        let opened = Arc::new(Opened { repository, records, readers });
        let mut open = self.lock();
        if open.len() >= OPEN {
            // Which one goes does not matter: it is opened again when it is needed.
            open.clear();
        }
        Ok(open.entry(key).or_insert(opened).clone())
    }

    /// Opens a repository for a list, for which there may be no secrets: then as an earlier call has opened it. None where
    /// that is not possible: it belongs to others, or is gone.
    pub async fn open_to_list(
        &self,
        url: &RepositoryUrl,
        secrets: &Secrets,
    ) -> Result<Option<Arc<Opened>>, Status> {
        let refused = match self.open(url, secrets).await {
            Err(status) if matches!(status.code(), Code::InvalidArgument | Code::NotFound) => {
                status
            }
            opened => return opened.map(Some),
        };
        let text = url.to_string();
        let found = self.lock().iter().find(|((url, _), _)| *url == text).map(|(_, o)| o.clone());
        if found.is_none() {
            let error = refused.message();
            tracing::warn!(repository = text, error, "what is in it is not listed");
        }
        Ok(found)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<(String, blake3::Hash), Arc<Opened>>> {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the id of a snapshot names: `NOT_FOUND` where that is no snapshot.
    pub fn named(&self, handle: &SnapshotHandle) -> Result<Named, Status> {
        let url = self.url(&handle.repository)?;
        let text = format!("{url}#{}", handle.item);
        let parsed: PetraUrl =
            text.parse().map_err(|_| Status::not_found(format!("no snapshot {handle}")))?;
        match parsed.item {
            Item::Snapshot { snapshot, volume } => {
                Ok(Named { url: parsed.repository, snapshot, volume })
            }
            _ => Err(Status::not_found(format!("{handle} names no snapshot"))),
        }
    }

    /// Follows the id of a snapshot. `NOT_FOUND` where it is not in its repository (yet).
    pub async fn find(&self, handle: &SnapshotHandle, secrets: &Secrets) -> Result<Found, Status> {
        let Named { url, snapshot, volume } = self.named(handle)?;
        let opened = self.open(&url, secrets).await?;
        let record = match &snapshot {
            SnapshotRef::Id(id) => {
                snapshot::resolve(&opened.repository, *id, snapshot::MAX_ATTEMPTS).await
            }
            in_run => opened.repository.find(in_run).await,
        };
        let record = record.map_err(failure::of_engine)?;
        Ok(Found { opened, url, record: Arc::new(record), volume })
    }
}

impl Opened {
    /// All snapshots, oldest first. What was read before is not read again.
    pub async fn records(&self) -> Result<Vec<Arc<SnapshotRecord>>, Status> {
        let ids = self.repository.ids(&Item::Repository).await.map_err(failure::of_engine)?;
        let missing = {
            let mut known = self.known();
            let there: HashSet<_> = ids.iter().copied().collect();
            known.retain(|id, _| there.contains(id));
            ids.into_iter().filter(|id| !known.contains_key(id)).collect()
        };
        let listing = self.repository.records(missing).await.map_err(failure::of_engine)?;
        for (id, error) in &listing.unreadable {
            tracing::warn!(snapshot = %id, %error, "its record can't be read");
        }
        let mut known = self.known();
        known.extend(listing.records.into_iter().map(|record| (record.id, Arc::new(record))));
        Ok(known.values().cloned().collect())
    }

    /// The volumes that many nodes read, by their pins. What was read before is not read again.
    pub async fn readers(&self) -> Result<Vec<Readers>, Status> {
        let pins = self.repository.pinned_by("").await.map_err(failure::of_engine)?;
        // An end without its pin is of no interest, but not the other way round: the ends come last.
        let ended = self.repository.ended().await.map_err(failure::of_engine)?;
        let there: BTreeSet<_> = pins.into_iter().filter(|id| !ended.contains(id)).collect();
        let missing: Vec<_> = {
            let mut known = self.known_readers();
            known.retain(|id, _| there.contains(id));
            there.iter().copied().filter(|id| !known.contains_key(id)).collect()
        };
        let read = missing.into_iter().map(|id| async move { (id, self.repository.pin(id).await) });
        let mut read = stream::iter(read).buffer_unordered(READS);
        while let Some((id, pin)) = read.next().await {
            match pin {
                Ok(Some(pin)) => {
                    self.known_readers().insert(id, Readers::of_pin(id, &pin));
                }
                // It has just ended.
                Ok(None) => {}
                Err(error) if error.kind() == ErrorKind::Stop => {
                    tracing::warn!(pin = %id, %error, "it can't be read");
                }
                Err(error) => return Err(failure::of_engine(error)),
            }
        }
        Ok(self.known_readers().values().flatten().copied().collect())
    }

    fn known_readers(&self) -> std::sync::MutexGuard<'_, BTreeMap<SnapshotId, Option<Readers>>> {
        self.readers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self) -> std::sync::MutexGuard<'_, BTreeMap<SnapshotId, Arc<SnapshotRecord>>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Found {
    /// The volume, and its number from 1. `NOT_FOUND` where the snapshot has none of this name, or several and none is
    /// named.
    pub fn volume(&self) -> Result<(&VolumeRecord, u32), Status> {
        let record = &self.record;
        let mut volumes = record.volumes.iter().zip(1..);
        match &self.volume {
            Some(name) => volumes.find(|(volume, _)| volume.name == *name).ok_or_else(|| {
                Status::not_found(format!("snapshot {} has no volume {name}", record.id))
            }),
            None => match (volumes.next(), volumes.next()) {
                (Some(only), None) => Ok(only),
                _ => Err(Status::not_found(format!(
                    "snapshot {} has several volumes, and the id names none",
                    record.id
                ))),
            },
        }
    }
}

/// Tells secrets apart without keeping them.
fn fingerprint(secrets: &Secrets) -> blake3::Hash {
    let sorted: BTreeMap<_, _> = secrets.iter().collect();
    let mut hasher = blake3::Hasher::new();
    for (key, value) in sorted {
        for text in [key, value] {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
    }
    hasher.finalize()
}
