//! Connecting: endpoint, region, credentials, time-outs and retries.

use std::time::Duration;

use aws_config::environment::region::EnvironmentVariableRegionProvider;
use aws_config::meta::region::RegionProviderChain;
use aws_config::profile::ProfileFileRegionProvider;
use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::{
    Credentials, RequestChecksumCalculation, ResponseChecksumValidation,
    StalledStreamProtectionConfig,
};

use crate::error::{Error, Result};
use crate::store::S3Credentials;
use crate::url::S3Location;

/// How long a TCP connection and its TLS handshake may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a body may stand still on its way.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// The region that servers other than AWS mostly expect when none is configured.
pub(super) const USUAL_REGION: &str = "us-east-1";

/// How to reach a bucket, beyond what its URL says.
#[derive(Clone, Debug)]
pub struct S3Options {
    /// Instead of the AWS default chain.
    pub credentials: Option<S3Credentials>,
    /// How often a request is sent before the server counts as unavailable, with growing pauses.
    pub attempts: u32,
    /// How long the server may take to begin its answer, beside the time that the upload takes.
    pub response_timeout: Duration,
}

impl Default for S3Options {
    fn default() -> Self {
        Self { credentials: None, attempts: 6, response_timeout: Duration::from_secs(60) }
    }
}

/// The time-outs of one attempt.
pub(super) fn timeouts(response: Duration) -> TimeoutConfig {
    TimeoutConfig::builder().connect_timeout(CONNECT_TIMEOUT).read_timeout(response).build()
}

pub(super) async fn client(location: &S3Location, options: &S3Options) -> Result<Client> {
    if location.endpoint.as_deref().is_some_and(has_user) {
        // It would be shown wherever the repository's URL is.
        return Err(Error::Request("an S3 endpoint takes no user name and password".to_owned()));
    }
    let stalls = StalledStreamProtectionConfig::enabled().grace_period(STALL_TIMEOUT).build();
    let mut loader = aws_config::defaults(BehaviorVersion::latest())
        .retry_config(RetryConfig::standard().with_max_attempts(options.attempts.max(1)))
        .timeout_config(timeouts(options.response_timeout))
        .stalled_stream_protection(stalls)
        .region(region(location));
    if let Some(endpoint) = &location.endpoint {
        loader = loader.endpoint_url(endpoint);
    }
    if let Some(profile) = &location.profile {
        loader = loader.profile_name(profile);
    }
    if let Some(given) = &options.credentials {
        let S3Credentials { access_key_id, secret_access_key, session_token } = given.clone();
        let token = session_token;
        loader = loader.credentials_provider(Credentials::new(
            access_key_id,
            secret_access_key,
            token,
            None,
            "given",
        ));
    }
    let shared = loader.load().await;
    if shared.region().is_none() {
        let reason = "no region is configured; add '?region=..' to the URL, or '?endpoint=..' for other servers";
        return Err(Error::Request(format!("s3://{}: {reason}", location.bucket)));
    }
    // The endpoint may come from the profile, too.
    let path_style = location.path_style.unwrap_or(shared.endpoint_url().is_some());
    let config = aws_sdk_s3::config::Builder::from(&shared)
        .force_path_style(path_style)
        // Several S3-compatible servers refuse the checksums that the SDK adds by default. Objects carry their own.
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
        .build();
    Ok(Client::from_conf(config))
}

fn region(location: &S3Location) -> RegionProviderChain {
    if let Some(region) = &location.region {
        return RegionProviderChain::first_try(Region::new(region.clone()));
    }
    let mut profile = ProfileFileRegionProvider::builder();
    if let Some(name) = &location.profile {
        profile = profile.profile_name(name);
    }
    let configured = RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new())
        .or_else(profile.build());
    if location.endpoint.is_some() {
        // Not from the instance's metadata: elsewhere than on AWS, asking for it takes seconds.
        configured.or_else(Region::new(USUAL_REGION))
    } else {
        configured.or_default_provider()
    }
}

/// True for `http://USER:PASSWORD@HOST`.
fn has_user(endpoint: &str) -> bool {
    let authority = endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest);
    authority.split('/').next().is_some_and(|authority| authority.contains('@'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::S3Store;

    const SECRET: &str = "AveryLongSecretThatNobodyMaySee";

    fn options() -> S3Options {
        let credentials = S3Credentials {
            access_key_id: "AKID".to_owned(),
            secret_access_key: SECRET.to_owned(),
            session_token: Some(SECRET.to_owned()),
        };
        S3Options { credentials: Some(credentials), ..S3Options::default() }
    }

    fn location(endpoint: &str) -> S3Location {
        S3Location {
            bucket: "b".to_owned(),
            endpoint: Some(endpoint.to_owned()),
            ..S3Location::default()
        }
    }

    #[tokio::test]
    async fn debug_output_holds_no_secrets() {
        let options = options();
        let store =
            S3Store::connect_with(&location("http://127.0.0.1:1"), options.clone()).await.unwrap();
        for text in
            [format!("{options:?}"), format!("{store:?}"), format!("{:#?}", options.credentials)]
        {
            assert!(!text.contains(SECRET), "{text}");
        }
    }

    #[tokio::test]
    async fn an_endpoint_holds_no_password() {
        let error =
            S3Store::connect_with(&location("http://me:secret@localhost:9000"), options()).await;
        let error = error.unwrap_err().to_string();
        assert!(error.contains("no user name") && !error.contains("secret"), "{error}");
        S3Store::connect_with(&location("http://localhost:9000/a@b"), options()).await.unwrap();
    }
}
