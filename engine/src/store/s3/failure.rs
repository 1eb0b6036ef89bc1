//! What a failed request means, from the many ways in which S3 servers say it.

use std::error::Error;

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use crate::store::StoreErrorCause;

/// What a failed request means, and the server's words.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) cause: StoreErrorCause,
    pub(super) detail: String,
}

/// Explains a failure that is left after all retries.
pub(super) fn of<E>(error: &SdkError<E, HttpResponse>) -> Failure
where
    E: ProvideErrorMetadata + Error + 'static,
{
    let status = status(error);
    let words = || words(error);
    match error {
        SdkError::ServiceError(answer) => {
            let (code, message) = (answer.err().code(), answer.err().message());
            let cause = cause(status.unwrap_or_default(), code.unwrap_or_default());
            Failure { cause, detail: describe(status, code, message) }
        }
        _ if has_source::<CredentialsError>(error) => {
            Failure { cause: StoreErrorCause::Credentials, detail: words() }
        }
        SdkError::TimeoutError(_) | SdkError::ResponseError(_) => {
            Failure { cause: StoreErrorCause::Unavailable, detail: words() }
        }
        SdkError::DispatchFailure(failure) if failure.is_io() || failure.is_timeout() => {
            Failure { cause: StoreErrorCause::Unavailable, detail: words() }
        }
        _ => Failure { cause: StoreErrorCause::Other, detail: words() },
    }
}

/// The HTTP status of the answer, if there was one.
pub(super) fn status<E>(error: &SdkError<E, HttpResponse>) -> Option<u16> {
    error.raw_response().map(|answer| answer.status().as_u16())
}

/// The server's error code.
pub(super) fn code<E: ProvideErrorMetadata>(error: &SdkError<E, HttpResponse>) -> Option<&str> {
    error.as_service_error().and_then(ProvideErrorMetadata::code)
}

/// True when the server asks to repeat a conditional request.
pub(super) fn is_conflict<E>(error: &SdkError<E, HttpResponse>) -> bool {
    status(error) == Some(409)
}

/// An error and what caused it, in one line.
pub(super) fn words(error: &(dyn Error + 'static)) -> String {
    let mut words = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let more = source.to_string();
        if !words.ends_with(&more) {
            words = format!("{words}: {more}");
        }
        next = source.source();
    }
    words
}

fn has_source<T: Error + 'static>(error: &(dyn Error + 'static)) -> bool {
    error.is::<T>() || error.source().is_some_and(has_source::<T>)
}

fn describe(status: Option<u16>, code: Option<&str>, message: Option<&str>) -> String {
    let status =
        status.map_or_else(|| "no HTTP status".to_owned(), |status| format!("HTTP {status}"));
    let parts = [code, message].into_iter().flatten().filter(|part| !part.is_empty());
    match parts.collect::<Vec<_>>().join(": ") {
        said if said.is_empty() => format!("the server answered {status}"),
        said => format!("{said} ({status})"),
    }
}

fn cause(status: u16, code: &str) -> StoreErrorCause {
    match code {
        // Only this: "not found" decides things, so a proxy's answer or a wrong endpoint must not pass for it.
        "NoSuchKey" => return StoreErrorCause::NotFound,
        "NoSuchBucket" => return StoreErrorCause::NoContainer,
        "InvalidAccessKeyId"
        | "SignatureDoesNotMatch"
        | "ExpiredToken"
        | "ExpiredTokenException"
        | "InvalidToken"
        | "InvalidClientTokenId"
        | "TokenRefreshRequired"
        | "InvalidSecurity"
        | "UnrecognizedClientException"
        | "NotSignedUp"
        | "XAdminUserNotFound" => return StoreErrorCause::Credentials,
        "QuotaExceeded"
        | "XMinioStorageFull"
        | "XMinioAdminBucketQuotaExceeded"
        | "InsufficientCapacity" => {
            return StoreErrorCause::Full;
        }
        "NotImplemented" => return StoreErrorCause::Unsupported,
        "SlowDown" | "RequestTimeout" | "ServiceUnavailable" => {
            return StoreErrorCause::Unavailable;
        }
        _ => {}
    }
    match status {
        401 => StoreErrorCause::Credentials,
        403 => StoreErrorCause::Denied,
        405 | 501 => StoreErrorCause::Unsupported,
        507 => StoreErrorCause::Full,
        // A conflict that stays: other creates of this object are still going on.
        408 | 409 | 429 | 500..=599 => StoreErrorCause::Unavailable,
        _ => StoreErrorCause::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_say_more_than_statuses() {
        for (status, code, expected) in [
            (404, "NoSuchKey", StoreErrorCause::NotFound),
            (404, "", StoreErrorCause::Other),
            (404, "XAdminUserNotFound", StoreErrorCause::Credentials),
            (404, "NoSuchBucket", StoreErrorCause::NoContainer),
            (403, "AccessDenied", StoreErrorCause::Denied),
            (403, "", StoreErrorCause::Denied),
            (403, "InvalidAccessKeyId", StoreErrorCause::Credentials),
            (403, "SignatureDoesNotMatch", StoreErrorCause::Credentials),
            (400, "ExpiredToken", StoreErrorCause::Credentials),
            (409, "ConditionalRequestConflict", StoreErrorCause::Unavailable),
            (503, "SlowDown", StoreErrorCause::Unavailable),
            (500, "InternalError", StoreErrorCause::Unavailable),
            (501, "NotImplemented", StoreErrorCause::Unsupported),
            (507, "XMinioStorageFull", StoreErrorCause::Full),
            (301, "PermanentRedirect", StoreErrorCause::Other),
        ] {
            assert_eq!(cause(status, code), expected, "{status} {code}");
        }
    }

    #[test]
    fn details_are_the_servers_words() {
        assert_eq!(
            describe(Some(403), Some("AccessDenied"), Some("Not for you.")),
            "AccessDenied: Not for you. (HTTP 403)"
        );
        assert_eq!(describe(Some(502), None, None), "the server answered HTTP 502");
    }
}
