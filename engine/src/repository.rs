//! A repository: one store with one configuration, in which snapshots are found by name and by id.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use futures::future::join_all;
use futures::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;
use serde::Serialize;

use crate::chunker::Chunking;
use crate::context::Context;
use crate::crypto::{self, Keys, NewKey, Secret};
use crate::error::{Error, Result};
use crate::format::envelope;
use crate::graves::GraveCache;
use crate::id::{Digest, SnapshotId};
use crate::key::{self, Key};
use crate::name::Name;
use crate::probe::CheckedStore;
use crate::publish::{Published, publish};
use crate::record::{
    CatalogueEntry, Cipher, Config, Decision, Encryption, SnapshotRecord, Writers, kind,
};
use crate::relocation::RelocationCache;
use crate::store::{Entry, Store, StoreErrorCause, list_all, list_each};
use crate::url::{Item, Selector, SnapshotRef};

/// Requests in flight while many small objects are read.
pub(crate) const READS: usize = 32;

/// An open repository. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Repository {
    store: Arc<CheckedStore>,
    config: Arc<Config>,
    relocations: Arc<RelocationCache>,
    graves: Arc<GraveCache>,
    keys: Keys,
    unlocked: Option<Unlocked>,
}

/// How an encrypted repository was opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unlocked {
    /// The slot that the secret opened.
    pub slot: SnapshotId,
    /// The hash of the configuration.
    pub config: Digest,
}

/// Snapshots of a scope, with those told apart whose records can't be read.
#[derive(Debug, Default)]
pub struct Listing {
    /// Oldest first.
    pub records: Vec<SnapshotRecord>,
    /// Sessions that are in the catalogue and decided, and why nothing more is known of them. Oldest first.
    pub unreadable: Vec<(SnapshotId, Error)>,
}

/// A session in the catalogue.
#[derive(Clone, Debug)]
pub(crate) struct Listed {
    pub(crate) experiment: String,
    pub(crate) run: String,
    pub(crate) session: SnapshotId,
    pub(crate) key: Key,
}

impl Repository {
    /// Makes a repository in an empty place, if the store lets one of several creates win.
    pub async fn init(store: Arc<dyn Store>, chunking: Chunking, ctx: &Context) -> Result<Self> {
        Self::init_for(Writers::Many, store, chunking, ctx).await
    }

    /// Makes a repository in an empty place. For [`Writers::Single`] any store will do.
    pub async fn init_for(
        writers: Writers,
        store: Arc<dyn Store>,
        chunking: Chunking,
        ctx: &Context,
    ) -> Result<Self> {
        let config = new_config(writers, chunking, None, ctx)?;
        check_empty(&*store).await?;
        let store = Arc::new(CheckedStore::for_init(store, writers));
        publish_config(&*store, config_body(&config)?).await?;
        Ok(Self::new(store, config, Keys::none(), None))
    }

    /// Makes an encrypted repository in an empty place, which `key` opens from then on.
    pub async fn init_encrypted(
        writers: Writers,
        store: Arc<dyn Store>,
        chunking: Chunking,
        key: &NewKey,
        ctx: &Context,
    ) -> Result<Self> {
        let encryption = Some(Encryption { cipher: Cipher::Aes256Gcm });
        let config = new_config(writers, chunking, encryption, ctx)?;
        check_empty(&*store).await?;
        let store = Arc::new(CheckedStore::for_init(store, writers));
        let (data, body) = (crypto::DataKey::generate(&*ctx.host), config_body(&config)?);
        let digest = config_digest(&body);
        // Before the configuration: without that there is no repository, and the slot means nothing.
        let slot = crypto::put_slot(&*store, digest, &data, key, ctx).await?.id;
        if let Err(error) = publish_config(&*store, body).await {
            if matches!(error, Error::NotEmpty { .. }) {
                // Best effort: a slot for another configuration opens nothing.
                let _ = store.delete(&Key::slot(slot)).await;
            }
            return Err(error);
        }
        let unlocked = Some(Unlocked { slot, config: digest });
        Ok(Self::new(store, config, Keys::of(data), unlocked))
    }

    /// Opens a repository that is not encrypted.
    pub async fn open(store: Arc<dyn Store>) -> Result<Self> {
        let (config, _) = read_config(&*store).await?;
        if config.encryption.is_some() {
            return Err(Error::Encrypted { location: store.location() });
        }
        let store = Arc::new(CheckedStore::new(store, config.writers));
        Ok(Self::new(store, config, Keys::none(), None))
    }

    /// Opens an encrypted repository. One that is not encrypted is refused: whoever holds a secret expects one that
    /// is, and someone may have put another in its place.
    pub async fn unlock(store: Arc<dyn Store>, secret: &Secret) -> Result<Self> {
        let (config, digest) = read_config(&*store).await?;
        if config.encryption.is_none() {
            return Err(Error::NotEncrypted { location: store.location() });
        }
        let (data, slot) = crypto::unlock(&*store, digest, secret).await?;
        let unlocked = Some(Unlocked { slot, config: digest });
        let store = Arc::new(CheckedStore::new(store, config.writers));
        Ok(Self::new(store, config, Keys::of(data), unlocked))
    }

    fn new(
        store: Arc<CheckedStore>,
        config: Config,
        keys: Keys,
        unlocked: Option<Unlocked>,
    ) -> Self {
        Self {
            store,
            config: Arc::new(config),
            relocations: Arc::default(),
            graves: Arc::default(),
            keys,
            unlocked,
        }
    }

    pub(crate) fn unlocked(&self) -> Option<Unlocked> {
        self.unlocked
    }

    pub(crate) fn grave_cache(&self) -> &GraveCache {
        &self.graves
    }

    pub(crate) fn relocation_cache(&self) -> &RelocationCache {
        &self.relocations
    }

    /// Fails where the store can't be written to safely: it does not keep create-if-absent. Costs a few requests
    /// the first time, unless the store is known. Every operation that writes asks by itself; who asks earlier, while
    /// it does something else, waits less.
    pub async fn ready_to_write(&self, ctx: &Context) -> Result<()> {
        Ok(self.store.ready(ctx).await?)
    }

    /// Its keys; none where it is not encrypted.
    pub fn keys(&self) -> &Keys {
        &self.keys
    }

    /// The repository's URL.
    pub fn location(&self) -> String {
        self.store.location()
    }

    /// The repository's parameters.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where its objects are.
    pub fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// Wraps the JSON object that will be stored under `key`.
    pub(crate) fn seal<T: Serialize>(
        &self,
        kind: &str,
        key: &Key,
        value: &T,
    ) -> Result<bytes::Bytes> {
        Ok(self.keys.seal_object(kind, key, envelope::json(value).map_err(not_json)?))
    }

    /// Checks and unwraps the JSON object that is stored under `key`.
    pub(crate) fn unseal<T: serde::de::DeserializeOwned>(
        &self,
        kind: &str,
        key: &Key,
        body: &[u8],
    ) -> Result<T> {
        self.keys
            .open_object(kind, key, body)
            .and_then(|json| envelope::parse(kind, &json))
            .map_err(|error| error.of(key))
    }

    pub(crate) fn shared_store(&self) -> Arc<dyn Store> {
        self.store.clone()
    }

    /// Experiments that have snapshots, sorted.
    pub async fn experiments(&self) -> Result<Vec<Name>> {
        let listed = self.listed(key::RUNS).await?;
        self.names("experiment", listed, |entry| &entry.experiment, |names| names.experiment).await
    }

    /// Runs of an experiment that have snapshots, sorted.
    pub async fn runs(&self, experiment: &Name) -> Result<Vec<Name>> {
        let listed = self.listed(&key::experiment_prefix(&self.keys, experiment)).await?;
        if listed.is_empty() {
            return Err(self.unknown_experiment(experiment).await);
        }
        self.names("run", listed, |entry| &entry.run, |names| names.run).await
    }

    /// Snapshots that are committed and not deleted, oldest first. `scope` is the repository, an experiment or a run.
    /// Fails if the record of one of them can't be read.
    pub async fn snapshots(&self, scope: &Item) -> Result<Vec<SnapshotRecord>> {
        let Listing { records, unreadable } = self.listing(scope).await?;
        unreadable.into_iter().next().map_or(Ok(records), |(_, error)| Err(error))
    }

    /// Like [`snapshots`](Self::snapshots), but a damaged record costs no others.
    pub async fn listing(&self, scope: &Item) -> Result<Listing> {
        let (experiment, run) = match scope {
            Item::Repository => (None, None),
            Item::Experiment(experiment) => (Some(experiment), None),
            Item::Run { experiment, run } => (Some(experiment), Some(run)),
            Item::Snapshot { snapshot, .. } => {
                let records = vec![Box::pin(self.find(snapshot)).await?];
                return Ok(Listing { records, unreadable: vec![] });
            }
        };
        let listing = self.read_records(self.ids(scope).await?).await?;
        if listing.records.is_empty()
            && listing.unreadable.is_empty()
            && let Some(experiment) = experiment
        {
            return Err(match run {
                Some(run) => self.unknown_run(experiment, run).await,
                None => self.unknown_experiment(experiment).await,
            });
        }
        Ok(listing)
    }

    /// The ids of snapshots that are not deleted, and of sessions that may become some, in no order. The scope is the
    /// repository, an experiment or a run.
    pub async fn ids(&self, scope: &Item) -> Result<Vec<SnapshotId>> {
        let prefix = match scope {
            Item::Repository => key::RUNS.to_owned(),
            Item::Experiment(experiment) => key::experiment_prefix(&self.keys, experiment),
            Item::Run { experiment, run } => key::run_prefix(&self.keys, experiment, run),
            Item::Snapshot { snapshot, .. } => {
                return Ok(vec![Box::pin(self.find(snapshot)).await?.id]);
            }
        };
        Ok(self.listed(&prefix).await?.into_iter().map(|entry| entry.session).collect())
    }

    /// The records of those of some sessions that are snapshots.
    pub async fn records(&self, sessions: Vec<SnapshotId>) -> Result<Listing> {
        self.read_records(sessions).await
    }

    /// The record of one snapshot.
    pub async fn find(&self, snapshot: &SnapshotRef) -> Result<SnapshotRecord> {
        match snapshot {
            SnapshotRef::Id(id) => self.by_id(*id, None).await,
            SnapshotRef::InRun { experiment, run, selector } => {
                self.find_in_run(experiment, run, selector).await
            }
        }
    }

    async fn by_id(&self, id: SnapshotId, run: Option<(&Name, &Name)>) -> Result<SnapshotRecord> {
        let record = self.committed(id).await?.ok_or_else(|| self.unknown_snapshot(id))?;
        let elsewhere = run.is_some_and(|(e, r)| (e, r) != (&record.experiment, &record.run));
        let dead = self.is_deleted(id).await? || self.graves().await?.contains(id);
        if elsewhere || dead {
            return Err(self.unknown_snapshot(id));
        }
        Ok(record)
    }

    pub(crate) fn unknown_snapshot(&self, id: SnapshotId) -> Error {
        Error::Unknown {
            what: "snapshot",
            name: id.to_string(),
            within: self.location(),
            known: vec![],
        }
    }

    async fn find_in_run(
        &self,
        experiment: &Name,
        run: &Name,
        selector: &Selector,
    ) -> Result<SnapshotRecord> {
        let text = match selector {
            Selector::Text(text) => text,
            Selector::Latest => {
                let mut listed = self.listed(&key::run_prefix(&self.keys, experiment, run)).await?;
                listed.sort_by_key(|entry| std::cmp::Reverse(entry.session));
                for entry in listed {
                    if let Some(record) = self.committed(entry.session).await? {
                        return Ok(record);
                    }
                }
                return Err(self.unknown_run(experiment, run).await);
            }
        };
        if let Ok(id) = text.as_str().parse() {
            return self.by_id(id, Some((experiment, run))).await;
        }
        let scope = Item::Run { experiment: experiment.clone(), run: run.clone() };
        let Listing { records, unreadable } = self.listing(&scope).await?;
        if let Some(named) = records.iter().rev().find(|record| record.name.as_ref() == Some(text))
        {
            // What can't be read may be a newer snapshot of that name.
            let newer = unreadable.into_iter().find(|(id, _)| *id > named.id);
            return newer.map_or_else(|| Ok(named.clone()), |(_, error)| Err(error));
        }
        let within = format!("{experiment}/{run}");
        let fits = |record: &&SnapshotRecord| record.id.to_string().starts_with(text.as_str());
        let mut fitting: Vec<&SnapshotRecord> = records.iter().filter(fits).collect();
        match (fitting.pop(), fitting.is_empty()) {
            (Some(only), true) => Ok(only.clone()),
            (Some(last), false) => Err(Error::Ambiguous {
                name: text.to_string(),
                within,
                matches: fitting.iter().map(|record| record.id).chain([last.id]).collect(),
            }),
            (None, _) => {
                if let Some((_, error)) = unreadable.into_iter().next() {
                    return Err(error);
                }
                let name =
                    |r: &SnapshotRecord| r.name.as_ref().map_or(r.id.to_string(), Name::to_string);
                let known = records.iter().rev().map(name).collect();
                Err(Error::Unknown { what: "snapshot", name: text.to_string(), within, known })
            }
        }
    }

    async fn unknown_experiment(&self, experiment: &Name) -> Error {
        let known = self.experiments().await.unwrap_or_default();
        Error::Unknown {
            what: "experiment",
            name: experiment.to_string(),
            within: self.location(),
            known: known.iter().map(Name::to_string).collect(),
        }
    }

    async fn unknown_run(&self, experiment: &Name, run: &Name) -> Error {
        match Box::pin(self.runs(experiment)).await {
            Ok(runs) => Error::Unknown {
                what: "run",
                name: run.to_string(),
                within: format!("experiment {experiment}"),
                known: runs.iter().map(Name::to_string).collect(),
            },
            Err(error) => error,
        }
    }

    /// What was decided about a session; None while it is undecided.
    pub async fn decision(&self, session: SnapshotId) -> Result<Option<Decision>> {
        let key = Key::snap(session);
        let body = match self.store.get(&key).await {
            Ok(body) => body,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let decision: Decision = self.unseal(kind::DECISION, &key, &body)?;
        if let Decision::Commit { snapshot, .. } = &decision {
            snapshot.validate().map_err(|error| error.of(&key))?;
            if snapshot.id != session {
                let detail = format!("it holds the record of snapshot {}", snapshot.id);
                return Err(Error::Damaged { object: key.to_string(), detail });
            }
        }
        Ok(Some(decision))
    }

    /// The record that a session has committed, also of a snapshot that was deleted since: for who holds it by a pin.
    pub async fn committed(&self, session: SnapshotId) -> Result<Option<SnapshotRecord>> {
        Ok(match self.decision(session).await? {
            Some(Decision::Commit { snapshot, .. }) => Some(*snapshot),
            Some(Decision::Abort { .. } | Decision::Compaction { .. }) | None => None,
        })
    }

    /// Committed records of these sessions.
    pub(crate) async fn read_records(&self, sessions: Vec<SnapshotId>) -> Result<Listing> {
        let read = sessions.into_iter().map(|id| async move { (id, self.committed(id).await) });
        let mut read = stream::iter(read).buffer_unordered(READS);
        let mut listing = Listing::default();
        while let Some((id, record)) = read.next().await {
            match record {
                Ok(record) => listing.records.extend(record),
                Err(error) if error.is_unreadable() => listing.unreadable.push((id, error)),
                Err(error) => return Err(error),
            }
        }
        listing.records.sort_by_key(|record| record.id);
        listing.unreadable.sort_by_key(|(id, _)| *id);
        Ok(listing)
    }

    /// Entries of the catalogue below a prefix.
    pub(crate) async fn catalogue(&self, prefix: &str) -> Result<Vec<Listed>> {
        let entries = list_all(&*self.store, prefix).await?;
        Ok(entries.into_iter().filter_map(parse_listed).collect())
    }

    /// The sessions that are decided, as far as that is not in a grave.
    pub(crate) async fn decided(&self) -> Result<BTreeSet<SnapshotId>> {
        let mut decided = BTreeSet::new();
        list_each(self.store(), key::SNAPS, |entry| {
            decided.extend(key::parse_id(&entry.key, key::SNAPS));
        })
        .await?;
        Ok(decided)
    }

    /// Sessions of the catalogue below a prefix that are decided and not deleted, by listings alone.
    async fn listed(&self, prefix: &str) -> Result<Vec<Listed>> {
        let mut listed = self.catalogue(prefix).await?;
        if listed.is_empty() {
            return Ok(listed);
        }
        let decided = self.decided().await?;
        let sessions: HashSet<SnapshotId> = listed.iter().map(|entry| entry.session).collect();
        let marks = self.last_marks().await?.into_iter().filter(|(id, _)| sessions.contains(id));
        let read = marks.map(|(id, k)| async move { (id, self.hides(id, k).await) });
        let mut read = stream::iter(read).buffer_unordered(READS);
        let mut gone = HashSet::new();
        while let Some((id, hides)) = read.next().await {
            if hides? {
                gone.insert(id);
            }
        }
        let graves = self.graves().await?;
        listed.retain(|Listed { session, .. }| {
            decided.contains(session) && !gone.contains(session) && !graves.contains(*session)
        });
        Ok(listed)
    }

    /// Committed snapshots that are likely to share data with a new one of this run: those of the run first, then
    /// of the experiment, then of the repository, the newest first. Records that can't be read are passed over.
    pub(crate) async fn relatives(
        &self,
        experiment: &Name,
        run: &Name,
        count: usize,
    ) -> Result<Vec<SnapshotRecord>> {
        let mut listed = self.listed(key::RUNS).await?;
        let run = self.keys.run_component(experiment, run);
        let experiment = self.keys.experiment_component(experiment);
        listed.sort_by_key(|entry| {
            let near = entry.experiment == experiment;
            let nearest = near && entry.run == run;
            std::cmp::Reverse((nearest, near, entry.session))
        });
        let mut relatives = Vec::with_capacity(count);
        // Few are aborted or damaged; a bound, lest many were.
        let mut left = listed.into_iter().take(4 * count).map(|entry| entry.session);
        while relatives.len() < count {
            let next: Vec<SnapshotId> = left.by_ref().take(count - relatives.len()).collect();
            if next.is_empty() {
                break;
            }
            for record in join_all(next.into_iter().map(|id| self.committed(id))).await {
                match record {
                    Ok(record) => relatives.extend(record),
                    Err(error) if error.is_damage() => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(relatives)
    }

    async fn names(
        &self,
        what: &'static str,
        listed: Vec<Listed>,
        component: impl Fn(&Listed) -> &str,
        full: fn(CatalogueEntry) -> Name,
    ) -> Result<Vec<Name>> {
        let mut seen = BTreeSet::new();
        let first_of_name = listed.iter().filter(|entry| seen.insert(component(entry)));
        let read =
            first_of_name.map(|entry| (entry, Name::from_key_component(what, component(entry))));
        // By value: with references in it the future would not be Send for every lifetime.
        let read: Vec<_> = read.map(|(entry, name)| (entry.key.clone(), name)).collect();
        let read = read.into_iter().map(|(key, name)| async move {
            // Long names are shortened in keys, and with encryption all are hashed; the entry has them in full.
            match name {
                Some(name) => Ok(name),
                None => self.unseal(kind::CATALOGUE, &key, &self.store.get(&key).await?).map(full),
            }
        });
        let names: BTreeSet<Name> =
            stream::iter(read).buffer_unordered(READS).try_collect().await?;
        Ok(names.into_iter().collect())
    }
}

fn new_config(
    writers: Writers,
    chunking: Chunking,
    encryption: Option<Encryption>,
    ctx: &Context,
) -> Result<Config> {
    let (id, created) = (ctx.host.new_id(), timestamp(ctx));
    Ok(Config { id, created, chunking: chunking.validate()?, writers, encryption })
}

fn config_body(config: &Config) -> Result<bytes::Bytes> {
    envelope::seal(kind::CONFIG, &Key::config(), config).map_err(not_json)
}

fn config_digest(body: &[u8]) -> Digest {
    Digest(*blake3::hash(body).as_bytes())
}

/// Reads the configuration; gives the hash of the object too.
pub(crate) async fn read_config(store: &dyn Store) -> Result<(Config, Digest)> {
    let key = Key::config();
    let body = match store.get(&key).await {
        Ok(body) => body,
        Err(error) if error.is_not_found() => {
            return Err(Error::NotARepository { location: store.location() });
        }
        Err(error) => return Err(error.into()),
    };
    let config: Config =
        envelope::unseal(kind::CONFIG, &key, &body).map_err(|error| error.of(&key))?;
    config
        .chunking
        .validate()
        .map_err(|error| Error::Damaged { object: key.to_string(), detail: error.to_string() })?;
    Ok((config, config_digest(&body)))
}

/// Checks that nothing is in the way of a new repository.
async fn check_empty(store: &dyn Store) -> Result<()> {
    // What a killed probe left is nothing, and a slot is what a killed `init` leaves.
    let foreign =
        |entry: &Entry| !entry.key.starts_with(key::PROBE) && !entry.key.starts_with(key::KEYS);
    let found = match store.list("", None).await {
        Ok(page) if page.entries.iter().any(|entry| entry.key == Key::config().as_str()) => {
            ALREADY_THERE
        }
        Ok(page) if page.entries.iter().any(foreign) => {
            "is not empty, and what it holds is not a repository"
        }
        Ok(_) => return Ok(()),
        // A directory that is not there yet is as good as an empty one; a bucket must exist, which `create` finds.
        Err(error) if error.cause == StoreErrorCause::NoContainer => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    Err(Error::NotEmpty { location: store.location(), found })
}

const ALREADY_THERE: &str = "already holds a repository";

async fn publish_config(store: &dyn Store, body: bytes::Bytes) -> Result<()> {
    match publish(store, &Key::config(), body).await? {
        Published::Ours => Ok(()),
        Published::Theirs(_) => {
            Err(Error::NotEmpty { location: store.location(), found: ALREADY_THERE })
        }
    }
}

fn parse_listed(entry: Entry) -> Option<Listed> {
    let mut parts = entry.key.strip_prefix(key::RUNS)?.split('/');
    let (experiment, run, session) = (parts.next()?, parts.next()?, parts.next()?);
    Some(Listed {
        experiment: experiment.to_owned(),
        run: run.to_owned(),
        session: session.parse().ok()?,
        key: Key::from_listing(entry.key.clone()),
    })
}

/// Now, by the host's clock.
pub(crate) fn timestamp(ctx: &Context) -> Timestamp {
    let ms = i64::try_from(ctx.host.unix_ms()).unwrap_or(i64::MAX);
    Timestamp::from_millisecond(ms).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// A stamp that no other write bears.
pub(crate) fn stamp(ctx: &Context) -> String {
    format!("{:032x}", ctx.host.random())
}

fn not_json(_: serde_json::Error) -> Error {
    Error::Internal("a record can't be written as JSON")
}
