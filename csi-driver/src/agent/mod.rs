//! What a controller asks of a node: one trait, with an implementation in process and one over gRPC.
//!
//! The messages are those of the wire (`proto/agent.proto`), so that both are the same thing.
//!
//! | module | what |
//! |---|---|
//! | [`nodes`] | all nodes that a controller knows, by pool and by name |
//! | [`remote`] | an agent on another node |
//! | [`server`] | an agent for a controller elsewhere |
//! | [`tls`] | who may talk to whom |

pub mod nodes;
pub mod remote;
pub mod server;
pub mod tls;

pub mod local;

use std::fmt;

use async_trait::async_trait;
use tonic::Status;

use crate::repositories::Secrets;

pub use crate::proto::agent::{
    AnnotateVolumeRequest, CreateVolumeRequest, ExpandVolumeRequest, NodeInfo, Repository,
    SnapshotMember, SnapshotSource, TakeSnapshotRequest, Upload, UploadMember, Volume,
    create_volume_request::Source,
};

/// Metadata of volumes and snapshots: the name in the CSI call that made it.
pub const CSI_NAME: &str = "csi.name";
/// Metadata of volumes: the size that was asked for, in bytes.
pub const ASKED_SIZE: &str = "csi.size";
/// Metadata of volumes: the file system that was asked for.
pub const ASKED_FILESYSTEM: &str = "csi.filesystem";
/// Metadata of volumes: the snapshot or volume that it was made from; empty for an empty one.
pub const ASKED_SOURCE: &str = "csi.source";

/// The longest request on the wire. Maps in CSI calls have 4 KiB at most.
const MAX_REQUEST_BYTES: usize = 1 << 20;
/// The longest answer: some ten thousand volumes.
const MAX_ANSWER_BYTES: usize = 16 << 20;

/// A node, as a controller sees it. Every call can be repeated, and may be dropped at any point.
#[async_trait]
pub trait NodeAgent: Send + Sync + fmt::Debug {
    /// Who it is, and how much room it has.
    async fn info(&self) -> Result<NodeInfo, Status>;

    /// Makes a volume, or finds the one that was made by the same request. `ALREADY_EXISTS` where a volume of this name
    /// differs from what is asked for, `RESOURCE_EXHAUSTED` without room.
    async fn create_volume(&self, request: CreateVolumeRequest) -> Result<Volume, Status>;

    /// Deletes a volume. Succeeds where there is none. `FAILED_PRECONDITION` while it is staged. A lazy clone lets go of
    /// its snapshot with these secrets: those that came when it was used are gone when the machine was restarted.
    async fn delete_volume(&self, name: &str, secrets: &Secrets) -> Result<(), Status>;

    /// Finds a volume: `NOT_FOUND`.
    async fn volume(&self, name: &str) -> Result<Volume, Status>;

    /// All volumes that this driver made, by name.
    async fn volumes(&self) -> Result<Vec<Volume>, Status>;

    /// Makes a volume at least this large.
    async fn expand_volume(&self, request: ExpandVolumeRequest) -> Result<Volume, Status>;

    /// Changes what is remembered with a volume.
    async fn annotate_volume(&self, request: AnnotateVolumeRequest) -> Result<Volume, Status>;

    /// Takes copies at one point in time and begins to upload them. Where an upload with the same [`CSI_NAME`] is under
    /// way it is that one, and begun again if nobody works on it; `ALREADY_EXISTS` where it is of other volumes.
    async fn take_snapshot(&self, request: TakeSnapshotRequest) -> Result<Upload, Status>;

    /// Uploads that have not ended, the oldest first.
    async fn uploads(&self) -> Result<Vec<Upload>, Status>;

    /// Gives an upload up. Succeeds where there is none.
    async fn discard_upload(&self, id: &str) -> Result<(), Status>;

    /// The URLs of the repositories that snapshots of this node went to, and of those that it was told to remember.
    async fn repositories(&self) -> Result<Vec<String>, Status>;

    /// Remembers a repository by its URL.
    async fn note_repository(&self, url: &str) -> Result<(), Status>;
}
