//! Errors as gRPC codes: those that the CSI specification gives a meaning.

use petra_engine::ErrorKind;
use tonic::{Code, Status};

/// The answer that tells of a volume's or pool's error.
pub fn of_volume(error: petra_volume::Error) -> Status {
    use petra_volume::Error;
    let code = match &error {
        Error::Engine(_) => {
            return match error {
                Error::Engine(error) => of_engine(error),
                other => Status::internal(other.to_string()),
            };
        }
        Error::Request(_) => Code::InvalidArgument,
        Error::Unknown { .. } => Code::NotFound,
        Error::Exists { .. } => Code::AlreadyExists,
        Error::InUse { .. } | Error::Unsupported { .. } | Error::Version { .. } => {
            Code::FailedPrecondition
        }
        // The caller comes again.
        Error::Busy { .. } => Code::Aborted,
        Error::Thawed { .. } | Error::Hydrating { .. } => Code::Unavailable,
        Error::NoRoom { .. } => Code::ResourceExhausted,
        full if full.is_full() => Code::ResourceExhausted,
        Error::Cancelled => Code::Cancelled,
        _ => Code::Internal,
    };
    Status::new(code, chain(&error))
}

/// The answer that tells of a repository's error.
pub fn of_engine(error: petra_engine::Error) -> Status {
    let code = match &error {
        petra_engine::Error::Unknown { .. } => Code::NotFound,
        error => match error.kind() {
            ErrorKind::Retry => Code::Unavailable,
            ErrorKind::Fix => Code::InvalidArgument,
            ErrorKind::Stop => Code::DataLoss,
            ErrorKind::Cancelled => Code::Cancelled,
        },
    };
    Status::new(code, chain(&error))
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // Some errors say in their own words what their cause says.
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_file_system_without_room_is_no_fault_of_ours() {
        let of = |cause: io::ErrorKind| {
            let failed = petra_volume::Error::io("write", "/pool/x")(io::Error::from(cause));
            of_volume(failed).code()
        };
        assert_eq!(of(io::ErrorKind::StorageFull), Code::ResourceExhausted);
        assert_eq!(of(io::ErrorKind::QuotaExceeded), Code::ResourceExhausted);
        assert_eq!(of(io::ErrorKind::NotFound), Code::Internal);
    }
}
