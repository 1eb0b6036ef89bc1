//! What can go wrong with volumes, in words that name the object, what was expected and what was found.

use std::io;
use std::path::PathBuf;

use petra_engine::ErrorKind;

/// The result of every fallible operation of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything this crate reports as a failure.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A request contradicts itself or the pool.
    #[error("{0}")]
    Request(String),
    /// No such volume, copy or device.
    #[error("no {what} {name:?} in {within}")]
    Unknown {
        /// `volume`, `copy` or `pool`.
        what: &'static str,
        /// The name that was asked for.
        name: String,
        /// Where it was looked for.
        within: String,
        /// Names that do exist there (the first few).
        known: Vec<String>,
    },
    /// The name is taken.
    #[error("{what} {name:?} exists already in {within}")]
    Exists {
        /// `volume` or `pool`.
        what: &'static str,
        /// The name.
        name: String,
        /// Where.
        within: String,
    },
    /// Someone uses it, so that it can't be changed now.
    #[error("{what} is in use: {by}")]
    InUse {
        /// The volume, device or directory.
        what: String,
        /// Who or what uses it.
        by: String,
    },
    /// Another process works on it at this moment.
    #[error("{what} is being changed by {holder}")]
    Busy {
        /// The pool or volume.
        what: String,
        /// The process, as far as it is known.
        holder: String,
    },
    /// Some of its data is in a repository only, and on its way here.
    #[error("{what} is a lazy clone whose data is not all here yet")]
    Hydrating {
        /// The volume.
        what: String,
    },
    /// The pool has no room for what was asked.
    #[error("{pool} has no room: {detail}")]
    NoRoom {
        /// The pool.
        pool: PathBuf,
        /// What is needed, what is there, what is held in reserve.
        detail: String,
    },
    /// This file system, kernel or machine can't do it.
    #[error("{path}: {detail}")]
    Unsupported {
        /// The file or device that it was tried on.
        path: PathBuf,
        /// What is missing.
        detail: String,
    },
    /// A program that this needs is not installed.
    #[error(
        "the program {tool} is not installed, and {needed_for} needs it (Debian package: {package})"
    )]
    MissingTool {
        /// Its name.
        tool: &'static str,
        /// The Debian package that has it.
        package: &'static str,
        /// What for.
        needed_for: String,
    },
    /// A program failed.
    #[error("{tool} failed ({status}): {stderr}")]
    Tool {
        /// The program and its arguments.
        tool: String,
        /// Its exit status.
        status: String,
        /// What it said, shortened.
        stderr: String,
    },
    /// A file of the pool is not what was written, or was never the pool's.
    #[error("{path} is damaged: {detail}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        detail: String,
    },
    /// A file of the pool was written by a newer Petra.
    #[error("{path} has format version {found}, this Petra reads up to {supported}")]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest version known here.
        supported: u32,
    },
    /// A file system was thawed before all copies were taken, so they are not one point in time. They are gone again.
    #[error("{path} was thawed before all copies were taken: {detail}")]
    Thawed {
        /// Where it is mounted.
        path: PathBuf,
        /// Who thawed it, as far as that is known.
        detail: String,
    },
    /// The kernel failed an operation on a file or device.
    #[error("{action} {path}: {cause}")]
    Io {
        /// What was tried, as a verb: `read`, `freeze`, `attach`.
        action: &'static str,
        /// On which file or device.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] petra_engine::Error),
    /// The caller cancelled the operation.
    #[error("cancelled")]
    Cancelled,
    /// A thread or task died. This is a defect of Petra.
    #[error("internal error: {0}")]
    Internal(&'static str),
}

impl Error {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Engine(error) => error.kind(),
            Self::Busy { .. } | Self::Hydrating { .. } | Self::Thawed { .. } => ErrorKind::Retry,
            Self::Damaged { .. } | Self::Internal(_) => ErrorKind::Stop,
            Self::Cancelled => ErrorKind::Cancelled,
            Self::Request(_)
            | Self::Unknown { .. }
            | Self::Exists { .. }
            | Self::InUse { .. }
            | Self::NoRoom { .. }
            | Self::Unsupported { .. }
            | Self::MissingTool { .. }
            | Self::Tool { .. }
            | Self::Version { .. }
            | Self::Io { .. } => ErrorKind::Fix,
        }
    }

    /// True when a file could not be written for want of room.
    pub fn is_full(&self) -> bool {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        matches!(self, Self::Io { cause, .. } if matches!(cause.kind(), StorageFull | QuotaExceeded))
    }

    /// Turns the system's answer to `action` on `path` into an error.
    pub fn io<E: Into<io::Error>>(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(E) -> Self {
        let path = path.into();
        move |cause| Self::Io { action, path, cause: cause.into() }
    }
}
