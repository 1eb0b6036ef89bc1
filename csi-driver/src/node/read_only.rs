//! What the node needs to know of repositories: clones for volumes that many nodes read, and secrets that come with a
//! call.

use std::collections::HashMap;
use std::fmt;

use async_trait::async_trait;
use petra_engine::{Name, SnapshotId};
use tonic::Status;

/// Makes what nodes read of snapshots.
#[async_trait]
pub trait ReadOnlyClones: Send + Sync + fmt::Debug {
    /// Makes an ephemeral volume of the pool from a volume of a snapshot. May be called again after it was interrupted;
    /// succeeds where the volume is there already.
    async fn clone_read_only(&self, request: ReadOnlyClone) -> Result<(), Status>;

    /// Keeps secrets for the processes that bring a lazy clone its data from the repository with this URL.
    async fn keep_secrets(
        &self,
        repository: &str,
        secrets: &HashMap<String, String>,
    ) -> Result<(), Status>;
}

/// A clone to make.
#[derive(Clone, PartialEq, Eq)]
pub struct ReadOnlyClone {
    /// The repository: its URL, or the name of one that the driver was started with.
    pub repository: String,
    /// The secrets of the call, for that repository.
    pub secrets: HashMap<String, String>,
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// Which of its volumes, from 1.
    pub number: u32,
    /// The name of the new volume.
    pub name: Name,
}

impl fmt::Debug for ReadOnlyClone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Secrets are in no log, not even their names.
        f.debug_struct("ReadOnlyClone")
            .field("repository", &self.repository)
            .field("snapshot", &self.snapshot)
            .field("number", &self.number)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// The name of a node's clone for a volume that many nodes read, which is held by this pin.
pub fn clone_name(pin: SnapshotId) -> Name {
    let name = Name::new("volume", format!("ro-{pin}"));
    #[expect(clippy::expect_used, reason = "letters, digits and a dash are a name")]
    name.expect("an id is a name")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_shown() {
        let request = ReadOnlyClone {
            repository: "main".to_owned(),
            secrets: [("passphrase".to_owned(), "hunter2".to_owned())].into(),
            snapshot: SnapshotId::from_parts(1, 2),
            number: 1,
            name: clone_name(SnapshotId::from_parts(1, 3)),
        };
        let shown = format!("{request:?}");
        assert!(!shown.contains("hunter2") && !shown.contains("passphrase"), "{shown}");
        assert!(shown.contains("ro-0"), "{shown}");
    }
}
