//! The services Controller, GroupController and SnapshotMetadata. They keep nothing: a volume is what its node says, a
//! snapshot what its repository says, or a node that is uploading it.
//!
//! ```text
//! CreateVolume    -> choose a node -> agent: empty, from a snapshot, from a volume
//! CreateSnapshot  -> agent: cut, upload begins -> not ready          asked again: is it uploading? is it in the repository?
//! DeleteSnapshot  -> agent: give the upload up -> repository: delete
//! GetMetadata*    -> repository: compare manifests
//! ```

mod attributes;
mod metadata;
mod paging;
mod read_only;
mod service;
mod snapshots;
mod volumes;

use std::collections::HashSet;
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt, stream};
use petra_engine::{Context, RepositoryUrl, SnapshotId};
use tonic::{Code, Status};

use crate::agent::nodes::{Node, Nodes};
use crate::locks::{Locks, Operation};
use crate::repositories::{Opened, Repositories, Secrets};
use crate::telemetry::Metrics;

pub use service::Services;

/// Repositories that are opened at one time.
const OPENED_AT_ONCE: usize = 8;

/// The services.
#[derive(Clone, Debug)]
pub struct Controller {
    nodes: Arc<Nodes>,
    repositories: Repositories,
    locks: Locks,
    metrics: Arc<Metrics>,
    ctx: Context,
}

impl Controller {
    /// A controller of these nodes.
    pub fn new(
        nodes: Arc<Nodes>,
        repositories: Repositories,
        metrics: Arc<Metrics>,
        ctx: Context,
    ) -> Self {
        Self { nodes, repositories, locks: Locks::default(), metrics, ctx }
    }

    /// The node that has a pool.
    async fn node(&self, pool: SnapshotId) -> Result<Node, Status> {
        let agent = self.nodes.by_pool(pool).await?;
        let info = agent.info().await?;
        Ok(Node { agent, info })
    }

    /// Begins a call that changes a volume, by its id: `ABORTED` while another one does. A call that has a name only, and
    /// may have no id yet, begins with [`named`](Self::named).
    fn changing(&self, volume_id: &str) -> Result<Operation, Status> {
        self.locks.begin([format!("volume {volume_id}")])
    }

    /// The same for a snapshot, or a group of them.
    fn changing_snapshot(&self, id: SnapshotId) -> Result<Operation, Status> {
        self.locks.begin([format!("snapshot {id}")])
    }

    /// Begins a call that makes or finds the volume or snapshot of this name.
    fn named(&self, what: &str, name: &str) -> Result<Operation, Status> {
        self.locks.begin([format!("{what} named {name}")])
    }

    /// The repositories that are known, as ids call them, each once: those that have a name, and those that snapshots of
    /// these nodes went to. What these secrets don't open is left out. `UNAVAILABLE` while one is away, whose part would
    /// be missing.
    async fn known_repositories(
        &self,
        nodes: &[Node],
        secrets: &Secrets,
    ) -> Result<Vec<(String, Arc<Opened>)>, Status> {
        let mut urls = vec![];
        for name in self.repositories.names() {
            urls.push(self.repositories.url(name)?);
        }
        for Node { agent, .. } in nodes {
            let noted = match agent.repositories().await {
                // A node of an earlier version.
                Err(status) if status.code() == Code::Unimplemented => vec![],
                noted => noted?,
            };
            urls.extend(noted.iter().filter_map(|url| url.parse::<RepositoryUrl>().ok()));
        }
        let mut seen = HashSet::new();
        urls.retain(|url| !url.is_template() && seen.insert(url.to_string()));
        // By value: with references in it the future would not be Send for every lifetime.
        let opening = urls
            .iter()
            .cloned()
            .map(|url| async move { self.repositories.open_to_list(&url, secrets).await });
        let opened: Vec<_> = stream::iter(opening).buffered(OPENED_AT_ONCE).try_collect().await?;
        let mut known = vec![];
        let mut ids = HashSet::new();
        for (url, opened) in urls.iter().map(ToString::to_string).zip(opened) {
            // One repository may have several names and URLs.
            let Some(opened) = opened else { continue };
            if ids.insert(opened.repository.config().id) {
                known.push((self.repositories.short(&url).to_owned(), opened));
            }
        }
        Ok(known)
    }

    /// All nodes: `UNAVAILABLE` while one is away, whose part would be missing.
    async fn everyone(&self) -> Result<Vec<Node>, Status> {
        let everyone = self.nodes.all().await;
        match everyone.away.first() {
            Some(away) => Err(Status::unavailable(format!(
                "node {} is away: {}",
                away.node,
                away.status.message()
            ))),
            None => Ok(everyone.there),
        }
    }
}

/// Refuses strings that are missing or too long.
fn check(what: &str, text: &str) -> Result<(), Status> {
    let invalid = |text: String| Err(Status::invalid_argument(text));
    if text.is_empty() {
        return invalid(format!("the {what} is missing"));
    }
    if text.len() > crate::MAX_STRING_BYTES {
        return invalid(format!("the {what} is longer than {} bytes", crate::MAX_STRING_BYTES));
    }
    Ok(())
}
