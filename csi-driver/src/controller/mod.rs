//! The services Controller, GroupController and SnapshotMetadata.
