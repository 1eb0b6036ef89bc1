//! Making a volume from another one of the pool, which may be in use.
//!
//! ```text
//! lock the source -> begin a copy -> sync, freeze -> finish the copy -> thaw -> a volume from the copy -> delete the copy
//! ```
//!
//! No state names the copy, so that recovery deletes it after a crash. Until it is deleted the source is locked, and
//! recovery passes it over.

use std::collections::BTreeMap;
use std::fs::File;
use std::time::Duration;

use petra_engine::Name;

use super::larger;
use crate::error::{Error, Result};
use crate::freeze::{GuardCommand, while_frozen};
use crate::pool::{Content, CreateRequest, Pool};
use crate::snapshot::SETTLE;
use crate::volume::{LockedVolume, Volume};

/// A volume to make from another one.
#[derive(Clone, Debug)]
pub struct CopyRequest {
    /// The name of the new volume.
    pub name: Name,
    /// The volume that it is made from.
    pub source: Name,
    /// The new volume's length in bytes, if it is not that of the source.
    pub size_bytes: Option<u64>,
    /// Whatever is to be remembered with the new volume.
    pub metadata: BTreeMap<String, String>,
    /// Starts a freeze guard.
    pub guard: GuardCommand,
    /// The longest freeze.
    pub limit: Duration,
}

/// Makes a volume that holds what another one holds now, by reference. Blocks.
///
/// Errors: [`Error::Hydrating`] while some of the source's data is in a repository only.
pub fn copy(pool: &Pool, request: &CopyRequest) -> Result<Volume> {
    let source = pool.volume(&request.source)?.lock()?;
    larger(&request.name, request.size_bytes, source.state().size_bytes)?;
    // What is known to fail should fail before anything is frozen.
    if pool.volume(&request.name).is_ok() {
        let (name, within) = (request.name.to_string(), pool.to_string());
        return Err(Error::Exists { what: "volume", name, within });
    }
    pool.backend().settle(pool.root(), SETTLE)?;
    let copy = source.begin_copy()?;
    let volume = source.volume();
    let mount = volume.mounts()?.into_iter().next();
    let device = volume.attachment()?.map(|attachment| attachment.device);
    let mounts: Vec<_> = mount.into_iter().collect();
    while_frozen(
        &mounts,
        &request.guard,
        request.limit,
        || copy.refresh(),
        || {
            if let (true, Some(device)) = (mounts.is_empty(), &device) {
                // Someone may write to the device itself. What he wrote before is to be in the copy.
                let synced = File::open(device).and_then(|file| file.sync_all());
                synced.map_err(Error::io("sync", device))?;
            }
            copy.finish()
        },
    )?;
    let copy = volume.copy(copy.publish()?);
    let made = create_request(&source, request, Content::CopyOf(copy.clone()))
        .and_then(|create| pool.create(create));
    if let Err(error) = pool.backend().delete(&copy) {
        tracing::warn!(%volume, %error, "a copy is left for the next recovery");
    }
    made
}

fn create_request(
    source: &LockedVolume,
    request: &CopyRequest,
    content: Content,
) -> Result<CreateRequest> {
    let state = source.state();
    let size_bytes = larger(&request.name, request.size_bytes, state.size_bytes)?;
    Ok(CreateRequest {
        name: request.name.clone(),
        size_bytes,
        sector_bytes: state.sector_bytes,
        filesystem: state.filesystem,
        content,
        base: None,
        origin: state.origin.clone(),
        lazy: None,
        ephemeral: false,
        grow_filesystem: state.grow_filesystem || size_bytes > state.size_bytes,
        metadata: request.metadata.clone(),
    })
}
