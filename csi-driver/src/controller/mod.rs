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

use std::sync::Arc;

use petra_engine::{Context, SnapshotId};
use tonic::Status;

use crate::agent::nodes::{Node, Nodes};
use crate::locks::{Locks, Operation};
use crate::repositories::Repositories;
use crate::telemetry::Metrics;

pub use service::Services;

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
