//! How a repository is opened: with which credentials for its store, and with which secret for its data.

mod directory;

use std::collections::BTreeMap;
use std::sync::Arc;

pub use directory::SecretsDirectory;

use crate::crypto::Secret;
use crate::error::{Error, Result};
use crate::repository::Repository;
use crate::store::{self, S3Credentials, Store};
use crate::url::RepositoryUrl;

/// A setting, and the names that it goes by; the first one is ours.
type Setting = &'static [&'static str];

const ACCESS_KEY_ID: Setting = &["access-key-id", "AWS_ACCESS_KEY_ID"];
const SECRET_ACCESS_KEY: Setting = &["secret-access-key", "AWS_SECRET_ACCESS_KEY"];
const SESSION_TOKEN: Setting = &["session-token", "AWS_SESSION_TOKEN"];
const PASSPHRASE: Setting = &["passphrase", "PETRA_PASSPHRASE"];
const KEY: Setting = &["key"];
const ALL: [Setting; 5] = [ACCESS_KEY_ID, SECRET_ACCESS_KEY, SESSION_TOKEN, PASSPHRASE, KEY];

/// What it takes to open a repository. Its `Debug` output shows none of the secrets.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// Credentials for an S3 store; without them, those of the AWS default chain.
    pub s3: Option<S3Credentials>,
    /// A passphrase or key file.
    pub secret: Option<Secret>,
}

impl Access {
    /// Reads the settings `access-key-id`, `secret-access-key`, `session-token`, `passphrase` and `key` (what a key file
    /// holds), or the same by the names that environment variables have. Others mean nothing here, and an empty one is
    /// none.
    pub fn from_secrets<'a>(
        secrets: impl IntoIterator<Item = (&'a String, &'a String)>,
    ) -> Result<Self> {
        let secrets = known(secrets);
        let get = |setting: Setting| {
            setting.first().and_then(|name| secrets.get(name)).map(|value| (*value).to_owned())
        };
        let s3 = match (get(ACCESS_KEY_ID), get(SECRET_ACCESS_KEY)) {
            (Some(access_key_id), Some(secret_access_key)) => {
                let session_token = get(SESSION_TOKEN);
                Some(S3Credentials { access_key_id, secret_access_key, session_token })
            }
            (None, None) if get(SESSION_TOKEN).is_none() => None,
            (None, _) => return Err(missing(ACCESS_KEY_ID)),
            (Some(_), None) => return Err(missing(SECRET_ACCESS_KEY)),
        };
        let secret = match (get(PASSPHRASE), get(KEY)) {
            (None, None) => None,
            (Some(passphrase), None) => Some(Secret::passphrase(passphrase.into_bytes())?),
            (None, Some(key)) => Some(Secret::key_file(key.into_bytes())?),
            (Some(_), Some(_)) => {
                let text =
                    "the secrets have both passphrase and key: a repository is opened with one";
                return Err(Error::Request(text.to_owned()));
            }
        };
        Ok(Self { s3, secret })
    }

    /// Opens a repository that these secrets are for. With a secret for its data, one that is not encrypted is refused:
    /// someone may have put another in its place.
    pub async fn open(&self, url: &RepositoryUrl) -> Result<Repository> {
        let store = self.store(url).await?;
        match &self.secret {
            Some(secret) => Repository::unlock(store, secret).await,
            None => Repository::open(store).await,
        }
    }

    /// Opens one of several repositories, of which this secret need not be for all.
    pub async fn open_any(&self, url: &RepositoryUrl) -> Result<Repository> {
        match self.open(url).await {
            Err(Error::NotEncrypted { .. }) => {
                Self { s3: self.s3.clone(), secret: None }.open(url).await
            }
            opened => opened,
        }
    }

    /// The store of a repository.
    pub async fn store(&self, url: &RepositoryUrl) -> Result<Arc<dyn Store>> {
        store::open_with(url, self.s3.as_ref()).await
    }
}

/// The settings among some secrets, by our names for them. Line ends after a value are no part of it.
fn known<'a>(
    secrets: impl IntoIterator<Item = (&'a String, &'a String)>,
) -> BTreeMap<&'static str, &'a str> {
    // In order, so that the same secrets always mean the same.
    let given: BTreeMap<&str, &str> =
        secrets.into_iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let mut known = BTreeMap::new();
    for setting in ALL {
        let values = setting.iter().filter_map(|name| given.get(name));
        let value =
            values.map(|value| value.trim_end_matches(['\r', '\n'])).find(|v| !v.is_empty());
        if let (Some(name), Some(value)) = (setting.first(), value) {
            known.insert(*name, value);
        }
    }
    known
}

fn missing(setting: Setting) -> Error {
    let name = setting.first().copied().unwrap_or_default();
    Error::Request(format!("the secrets for S3 lack {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secrets(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn secrets_are_read_by_either_name() {
        let access = Access::from_secrets(&secrets(&[])).unwrap();
        assert!(access.s3.is_none() && access.secret.is_none());
        for (id, key, token) in [
            ("access-key-id", "secret-access-key", "session-token"),
            ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
        ] {
            let given = secrets(&[
                (id, "AKID\n"),
                (key, "hidden1"),
                (token, "hidden2"),
                ("passphrase", "hidden3"),
                ("another", "thing"),
            ]);
            let access = Access::from_secrets(&given).unwrap();
            let s3 = access.s3.clone().unwrap();
            assert_eq!(
                (s3.access_key_id.as_str(), s3.secret_access_key.as_str()),
                ("AKID", "hidden1")
            );
            assert_eq!(s3.session_token.as_deref(), Some("hidden2"));
            assert_eq!(access.secret.as_ref().unwrap().kind(), "passphrase");
            assert!(!format!("{access:?}").contains("hidden"), "{access:?}");
        }
        let key = "0123456789abcdef".repeat(4);
        let access = Access::from_secrets(&secrets(&[("key", &key), ("passphrase", "")])).unwrap();
        assert_eq!(access.secret.unwrap().kind(), "key file");
    }

    #[test]
    fn what_is_half_there_is_named() {
        for (given, said) in [
            (secrets(&[("access-key-id", "a")]), "secret-access-key"),
            (secrets(&[("AWS_SECRET_ACCESS_KEY", "a"), ("access-key-id", "")]), "access-key-id"),
            (secrets(&[("session-token", "a")]), "access-key-id"),
            (secrets(&[("passphrase", "a"), ("key", "b")]), "both"),
            (secrets(&[("key", "short")]), "32"),
        ] {
            let error = Access::from_secrets(&given).unwrap_err();
            assert_eq!(error.kind(), crate::ErrorKind::Fix);
            assert!(error.to_string().contains(said), "{error}");
        }
    }
}
