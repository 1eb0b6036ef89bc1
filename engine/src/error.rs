//! What can go wrong, in words that name the object, what was expected and what was found.
//!
//! Callers that only need to decide what to do next ask [`Error::kind`]: try again, fix the request or the
//! surroundings, or stop because stored data is not what it must be.

use std::path::PathBuf;

use crate::id::SnapshotId;
use crate::store::StoreError;

/// The result of every fallible operation of the engine.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a caller can do about an [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The same call may succeed later: a store that is away, a session that lost a race.
    Retry,
    /// The request, its permissions or its surroundings must change first.
    Fix,
    /// Stored data is missing or damaged. Nothing was changed; a person should look.
    Stop,
    /// The caller cancelled the operation.
    Cancelled,
}

/// Everything the engine reports as a failure.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A URL does not follow the grammar.
    #[error("'{url}' is not a Petra URL: {reason}")]
    Url {
        /// The text as given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A name of an experiment, run, snapshot, volume or label is not allowed.
    #[error("{what} name {name:?} is not allowed: {reason}")]
    Name {
        /// `experiment`, `run`, `snapshot`, `volume` or `label`.
        what: &'static str,
        /// The name as given.
        name: String,
        /// The rule it breaks.
        reason: &'static str,
    },
    /// A request contradicts itself or the repository.
    #[error("{0}")]
    Request(String),
    /// There is no repository at this place.
    #[error("{location} holds no Petra repository")]
    NotARepository {
        /// Where it was looked for.
        location: String,
    },
    /// `init` found a repository, or other people's objects, at this place.
    #[error("{location} {found}")]
    NotEmpty {
        /// Where the repository should have been made.
        location: String,
        /// What is there already.
        found: &'static str,
    },
    /// A repository is encrypted, and no secret was given.
    #[error("{location} is encrypted, and no passphrase or key file was given")]
    Encrypted {
        /// The repository.
        location: String,
    },
    /// A secret was given for a repository that is not encrypted. Someone may have put a plain one in its place.
    #[error("{location} is not encrypted")]
    NotEncrypted {
        /// The repository.
        location: String,
    },
    /// A secret opens no key of the repository.
    #[error("the {kind} opens none of the {tried} keys of {location}")]
    WrongKey {
        /// The repository.
        location: String,
        /// `passphrase` or `key file`.
        kind: &'static str,
        /// How many keys there are.
        tried: usize,
    },
    /// An object was written by a newer Petra.
    #[error("{object} has format version {found}, this Petra reads up to {supported}")]
    Version {
        /// The object's key.
        object: String,
        /// Its version.
        found: u32,
        /// The newest version known here.
        supported: u32,
    },
    /// No such experiment, run, snapshot, volume or key.
    #[error("no {what} {name:?} in {within}")]
    Unknown {
        /// `experiment`, `run`, `snapshot`, `volume` or `key`.
        what: &'static str,
        /// The name that was asked for.
        name: String,
        /// Where it was looked for.
        within: String,
        /// Names that do exist there (the first few).
        known: Vec<String>,
    },
    /// A prefix or name fits several snapshots.
    #[error("{name:?} fits {} snapshots of {within}", .matches.len())]
    Ambiguous {
        /// The prefix or name that was asked for.
        name: String,
        /// Where it was looked for.
        within: String,
        /// The snapshots it fits.
        matches: Vec<SnapshotId>,
    },
    /// A store refused or failed a request.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An object that a snapshot needs is not there.
    #[error("{object} is missing, and {needed_by} needs it")]
    Missing {
        /// The object's key.
        object: String,
        /// Who refers to it.
        needed_by: String,
    },
    /// Bytes of an object are not what was written.
    #[error("{object} is damaged: {detail}")]
    Damaged {
        /// The object's key, with the byte range where one is known.
        object: String,
        /// What was expected and what was found.
        detail: String,
    },
    /// A collector gave up on this session while it was silent. Its data is uploaded again by a new session.
    #[error("snapshot session {session} was aborted by a garbage collection while it was silent")]
    Lost {
        /// The session that lost.
        session: SnapshotId,
    },
    /// A collector has given up a deleted snapshot's data, for ever.
    #[error(
        "snapshot {snapshot} can't come back: a garbage collection gave up its data{}",
        .at.map_or(String::new(), |at| format!(" at {at}"))
    )]
    Purged {
        /// The snapshot.
        snapshot: SnapshotId,
        /// When, by the collector's clock; None once nothing is left that says so.
        at: Option<jiff::Timestamp>,
    },
    /// The source changed while it was read.
    #[error("{path} changed while it was read: {detail}")]
    SourceChanged {
        /// The source.
        path: PathBuf,
        /// What changed.
        detail: String,
    },
    /// The target of a restore can't take the volume.
    #[error("cannot restore to {path}: {reason}")]
    Target {
        /// The target.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A file operation on the local machine failed.
    #[error("{action} {path}: {cause}")]
    Io {
        /// What was tried, as a verb: `read`, `write`, `sync`.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        cause: std::io::Error,
    },
    /// The caller cancelled the operation.
    #[error("cancelled")]
    Cancelled,
    /// A worker thread or task died. This is a defect of Petra.
    #[error("internal error: {0}")]
    Internal(&'static str),
}

impl Error {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Store(error) => error.kind(),
            Self::Lost { .. } => ErrorKind::Retry,
            Self::Missing { .. } | Self::Damaged { .. } | Self::Internal(_) => ErrorKind::Stop,
            Self::Cancelled => ErrorKind::Cancelled,
            Self::Url { .. }
            | Self::Name { .. }
            | Self::Request(_)
            | Self::NotARepository { .. }
            | Self::NotEmpty { .. }
            | Self::Encrypted { .. }
            | Self::NotEncrypted { .. }
            | Self::WrongKey { .. }
            | Self::Version { .. }
            | Self::Unknown { .. }
            | Self::Ambiguous { .. }
            | Self::Purged { .. }
            | Self::SourceChanged { .. }
            | Self::Target { .. }
            | Self::Io { .. } => ErrorKind::Fix,
        }
    }

    /// True for errors about one object's bytes, after which the rest of a snapshot can still be read.
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Missing { .. } | Self::Damaged { .. })
    }

    /// True for errors about what one object holds: damage, or a version that this Petra does not know, which in the
    /// midst of an older repository is most likely damage too.
    pub fn is_unreadable(&self) -> bool {
        self.is_damage() || matches!(self, Self::Version { .. })
    }

    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |cause| Self::Io { action, path, cause }
    }
}
