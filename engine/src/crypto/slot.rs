//! Slots: the data key, wrapped for one secret (`keys/ID`).

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::aead;
use super::keys::DataKey;
use super::secret::{Cost, NewKey, Secret};
use crate::context::Host;
use crate::error::{Error, Result};
use crate::format::FormatError;
use crate::id::Digest;
use crate::key::Key;
use crate::name::Name;

/// The data key, wrapped for one secret. Anyone can read it; who has the secret can use it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slot {
    /// When it was made, by its maker's clock.
    pub created: Timestamp,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<Name>,
    /// The hash of the `config` that it was made for, so that a changed one is found.
    pub config: Digest,
    /// What opens it.
    pub source: Source,
    /// The data key, sealed, in hexadecimal digits.
    wrapped: String,
}

/// What opens a slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Source {
    /// A passphrase.
    Passphrase {
        /// How the wrapping key is derived from it.
        kdf: Kdf,
        /// Makes the same passphrase give another key elsewhere.
        salt: String,
    },
    /// A key file.
    KeyFile,
}

/// How a wrapping key is derived from a passphrase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "algorithm", rename_all = "kebab-case")]
pub enum Kdf {
    /// Argon2id, version 1.3.
    Argon2id(Cost),
}

impl Source {
    /// `passphrase` or `key file`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Passphrase { .. } => "passphrase",
            Self::KeyFile => "key file",
        }
    }
}

/// The data key and what sealing adds to it, in hexadecimal digits.
const WRAPPED_DIGITS: usize = 2 * (32 + aead::OVERHEAD_BYTES);

impl Slot {
    /// Wraps the data key. The slot will be stored under `key`.
    pub fn wrap(
        key: &Key,
        config: Digest,
        data: &DataKey,
        new: &NewKey,
        created: Timestamp,
        host: &dyn Host,
    ) -> Result<Self> {
        let source = new.secret.source(new.cost, host);
        let label = new.label.clone();
        let mut slot = Self { created, label, config, source, wrapped: String::new() };
        let wrapping = match new.secret.wrapping_key(&slot.source) {
            Ok(Some(wrapping)) => wrapping,
            Ok(None) => return Err(Error::Internal("a source for another kind of secret")),
            Err(error) => return Err(Error::Request(error.to_string())),
        };
        let mut sealed = Vec::with_capacity(WRAPPED_DIGITS / 2);
        sealed.extend_from_slice(data.0.as_slice());
        aead::seal(&wrapping, host.random().to_le_bytes(), &slot.aad(key)?, &mut sealed);
        slot.wrapped = sealed.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(slot)
    }

    /// The data key, if this secret opens the slot. Takes as long as the slot says, within bounds.
    pub fn unwrap(&self, key: &Key, secret: &Secret) -> Result<Option<DataKey>> {
        let wrapping = match secret.wrapping_key(&self.source) {
            Ok(Some(wrapping)) => wrapping,
            Ok(None) => return Ok(None),
            Err(error) => return Err(error.of(key)),
        };
        let sealed = self.sealed().map_err(|error| error.of(key))?;
        let mut data = zeroize::Zeroizing::new(Vec::new());
        if aead::open(&wrapping, &self.aad(key)?, &sealed, &mut data).is_err() {
            return Ok(None);
        }
        let data = <[u8; 32]>::try_from(data.as_slice());
        Ok(data.ok().map(|data| DataKey(zeroize::Zeroizing::new(data))))
    }

    /// Everything but the data key: none of it can be changed without the secret.
    fn aad(&self, key: &Key) -> Result<Vec<u8>> {
        let bare = Self { wrapped: String::new(), ..self.clone() };
        let json = serde_json::to_vec(&bare);
        let json = json.map_err(|_| Error::Internal("a slot can't be written as JSON"))?;
        Ok([format!("petra key 1\n{key}\n").as_bytes(), &json].concat())
    }

    fn sealed(&self) -> Result<Vec<u8>, FormatError> {
        let bad = || FormatError::invalid("its wrapped key is not 128 hexadecimal digits");
        if self.wrapped.len() != WRAPPED_DIGITS || !self.wrapped.is_ascii() {
            return Err(bad());
        }
        let digits = self.wrapped.as_bytes().chunks_exact(2);
        digits
            .map(|pair| {
                let pair = std::str::from_utf8(pair).ok()?;
                u8::from_str_radix(pair, 16).ok().filter(|_| !pair.starts_with('+'))
            })
            .collect::<Option<Vec<u8>>>()
            .ok_or_else(bad)
    }
}
