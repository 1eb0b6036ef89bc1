//! Volumes that many nodes read: nothing but a pin, until nodes make their clones.

use std::sync::Arc;

use petra_engine::SnapshotId;
use petra_engine::clone::ClonePin;
use tonic::Status;

use super::volumes::{Entry, Origin, Sizes, signed};
use super::{Controller, check};
use crate::agent::nodes::Node;
use crate::capability::Usage;
use crate::failure;
use crate::handle::VolumeHandle;
use crate::proto::csi;
use crate::proto::csi::volume_capability::access_mode::Mode;
use crate::repositories::{Readers, Secrets};

/// The bytes of a pin's id that the volume's name makes; the others are made by its source.
const NAME_BYTES: usize = 10;
/// The characters of a pin's id that are the same for all sources: five bits each, but for the first.
const NAME_CHARACTERS: usize = 16;
/// Nodes that remember a repository without a name: one may be gone tomorrow.
const REMEMBERING: usize = 3;

impl Controller {
    /// Makes such a volume, or finds the one that an earlier call of this name made.
    pub(super) async fn create_read_only(
        &self,
        request: &csi::CreateVolumeRequest,
        usages: &[Usage],
        sizes: Sizes,
        origin: Origin,
        source: &str,
    ) -> Result<csi::Volume, Status> {
        let Origin::Snapshot(mut found) = origin else {
            return Err(Status::invalid_argument(
                "only a snapshot can be read on many nodes: the volume needs one as its source",
            ));
        };
        if usages.iter().any(|usage| usage.mode != Mode::MultiNodeReaderOnly) {
            return Err(Status::invalid_argument(
                "a volume that many nodes read can't be written on one",
            ));
        }
        let opened = found.opened.clone();
        let repository = &opened.repository;
        let id = pin_of(&request.name, source);
        if repository.has_ended(id).await.map_err(failure::of_engine)? {
            return Err(Status::already_exists(format!(
                "volume {} was deleted: a new one needs another name",
                request.name
            )));
        }
        let text = id.to_string();
        let of_name = repository.pinned_by(text.get(..NAME_CHARACTERS).unwrap_or(&text)).await;
        if of_name.map_err(failure::of_engine)?.iter().any(|other| *other != id) {
            return Err(Status::already_exists(format!(
                "volume {} exists with another source",
                request.name
            )));
        }
        let pinned = ClonePin::find(repository, id).await.map_err(failure::of_engine)?;
        if let Some(pinned) = pinned.filter(|pinned| *pinned != found.record.id) {
            // The URL led an earlier call to another snapshot, as that of the latest one does.
            let record = repository.committed(pinned).await.map_err(failure::of_engine)?;
            let gone = || Status::not_found(format!("no snapshot {pinned}"));
            found.record = Arc::new(record.ok_or_else(gone)?);
        }
        let (volume, number) = found.volume()?;
        if !sizes.fits(volume.len_bytes) && sizes.required_bytes > volume.len_bytes {
            return Err(Status::out_of_range(format!(
                "the snapshot has {} bytes, and nobody could write to more",
                volume.len_bytes
            )));
        }
        let url = found.url.to_string();
        let short = self.repositories.short(&url);
        let readers =
            Readers { pin: id, snapshot: found.record.id, number, size_bytes: volume.len_bytes };
        let volume_id = id_of(&readers, short);
        // Before there is a pin that nobody could end.
        check("volume id (give the repository a name)", &volume_id)?;
        let _changing = self.changing(&volume_id)?;
        if pinned.is_none() && short == url {
            self.remember(&url).await;
        }
        let (snapshot, metadata) = (found.record.id, readers.to_metadata());
        let taken = ClonePin::take_named(repository, id, snapshot, metadata, &self.ctx).await;
        taken.map_err(failure::of_engine)?;
        Ok(csi::Volume {
            capacity_bytes: signed(volume.len_bytes),
            volume_id,
            volume_context: [].into(),
            content_source: request.volume_content_source.clone(),
            accessible_topology: vec![],
        })
    }

    /// Has some nodes remember a repository that has no name, for lists. Nothing else depends on it.
    async fn remember(&self, url: &str) {
        for Node { info, agent } in self.nodes.all().await.there.iter().take(REMEMBERING) {
            if let Err(status) = agent.note_repository(url).await {
                let error = status.message();
                tracing::warn!(url, node = info.node, error, "it does not remember a repository");
            }
        }
    }

    /// All such volumes of the repositories that are known.
    pub(super) async fn all_readers(&self, nodes: &[Node]) -> Result<Vec<Entry>, Status> {
        let mut all = vec![];
        // A list comes without secrets.
        for (name, opened) in self.known_repositories(nodes, &Secrets::new()).await? {
            all.extend(opened.readers().await?.iter().map(|readers| Entry {
                volume: csi::Volume {
                    capacity_bytes: signed(readers.size_bytes),
                    volume_id: id_of(readers, &name),
                    ..csi::Volume::default()
                },
                trouble: String::new(),
            }));
        }
        Ok(all)
    }
}

/// The id of such a volume. The repository is as ids call it.
fn id_of(readers: &Readers, repository: &str) -> String {
    let Readers { pin, snapshot, number, .. } = *readers;
    VolumeHandle::ReadOnly { pin, number, repository: repository.to_owned(), snapshot }.to_string()
}

/// The same id for the same name and source, so that a repeated call takes no second pin whatever the source has become;
/// and one that begins in the same way for the same name.
fn pin_of(name: &str, source: &str) -> SnapshotId {
    let mut bytes = [0; 16];
    let (of_name, of_source) = bytes.split_at_mut(NAME_BYTES);
    for (part, text) in [(of_name, name), (of_source, source)] {
        blake3::Hasher::new().update(text.as_bytes()).finalize_xof().fill(part);
    }
    SnapshotId::from_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_of_one_name_begin_in_the_same_way() {
        let text = |name, source| pin_of(name, source).to_string();
        let (one, two, other) = (text("a", "x"), text("a", "y"), text("b", "x"));
        assert_eq!(one, text("a", "x"));
        assert_eq!(one[..NAME_CHARACTERS], two[..NAME_CHARACTERS]);
        assert_ne!(one[NAME_CHARACTERS + 1..], two[NAME_CHARACTERS + 1..]);
        assert_ne!(one[..NAME_CHARACTERS], other[..NAME_CHARACTERS]);
        assert_eq!(one[NAME_CHARACTERS + 1..], other[NAME_CHARACTERS + 1..]);
    }
}
