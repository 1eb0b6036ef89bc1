//! Why a command ends without success, in the form that people and programs get to see.

use std::error::Error as _;
use std::process::ExitCode;

use petra_engine::{Error, ErrorKind, PetraUrl};
use serde::Serialize;

use crate::{hints, volume_hints};

/// The exit codes of `petra`. They are part of its interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Exit {
    /// Done.
    Ok,
    /// A defect of Petra, or of the machine.
    Internal,
    /// The request or its surroundings must change first.
    Fix,
    /// Stored data is missing or damaged.
    Stop,
    /// The same command may work later.
    Retry,
    /// Some of the data was restored.
    Partial,
    /// Cancelled by a signal.
    Cancelled,
}

impl Exit {
    /// The number that the shell sees.
    pub fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Internal => 1,
            Self::Fix => 2,
            Self::Stop => 3,
            Self::Retry => 4,
            Self::Partial => 5,
            Self::Cancelled => 130,
        }
    }

    fn of(error: &Error) -> Self {
        match error.kind() {
            // The engine says "stop" here too, but no stored data is in doubt.
            _ if matches!(error, Error::Internal(_)) => Self::Internal,
            ErrorKind::Retry => Self::Retry,
            ErrorKind::Fix => Self::Fix,
            ErrorKind::Stop => Self::Stop,
            ErrorKind::Cancelled => Self::Cancelled,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        exit.code().into()
    }
}

/// A command that failed: what, why, and what to do next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// How the process ends.
    #[serde(rename = "kind")]
    pub exit: Exit,
    /// One sentence.
    pub message: String,
    /// What led to it, from near to far; or its parts.
    pub causes: Vec<String>,
    /// The next step.
    pub hint: Option<String>,
}

impl Failure {
    /// A failure of the command line's own.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), causes: vec![], hint: None }
    }

    /// A request that must change first.
    pub fn fix(message: impl Into<String>) -> Self {
        Self::new(Exit::Fix, message)
    }

    /// Adds the next step.
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// Adds what led to it.
    pub fn causes(self, causes: Vec<String>) -> Self {
        Self { causes, ..self }
    }

    /// An error of the engine. The URL that the command was about makes hints concrete.
    pub fn engine(error: &Error, at: Option<&PetraUrl>) -> Self {
        let message = error.to_string();
        let mut causes: Vec<String> = vec![];
        let mut source = error.source();
        while let Some(cause) = source {
            let text = cause.to_string();
            // Several errors quote their cause in their own sentence.
            if !causes.last().unwrap_or(&message).contains(&text) {
                causes.push(text);
            }
            source = cause.source();
        }
        Self { exit: Exit::of(error), message, causes, hint: hints::hint(error, at) }
    }
}

impl From<petra_volume::Error> for Failure {
    fn from(error: petra_volume::Error) -> Self {
        let exit = match error {
            petra_volume::Error::Engine(error) => return error.into(),
            petra_volume::Error::Internal(_) => Exit::Internal,
            _ => match error.kind() {
                ErrorKind::Retry => Exit::Retry,
                ErrorKind::Fix => Exit::Fix,
                ErrorKind::Stop => Exit::Stop,
                ErrorKind::Cancelled => Exit::Cancelled,
            },
        };
        Self { hint: volume_hints::hint(&error), ..Self::new(exit, error.to_string()) }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::engine(&error, None)
    }
}

/// Says what URL an operation of the engine was about.
pub trait At<T> {
    /// Turns the engine's error into a failure with hints about this URL.
    fn at(self, url: &PetraUrl) -> Result<T, Failure>;
}

impl<T> At<T> for Result<T, Error> {
    fn at(self, url: &PetraUrl) -> Result<T, Failure> {
        self.map_err(|error| Failure::engine(&error, Some(url)))
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let cause = || io::Error::other("the disk fell off");
        let failure =
            Failure::from(Error::Io { action: "read", path: "/x".into(), cause: cause() });
        assert_eq!(failure.message, "read /x: the disk fell off");
        assert!(failure.causes.is_empty());
    }

    #[test]
    fn a_defect_is_not_told_as_damage() {
        assert_eq!(Failure::from(Error::Internal("a worker died")).exit, Exit::Internal);
        assert_eq!(Failure::from(Error::Cancelled).exit.code(), 130);
    }
}
