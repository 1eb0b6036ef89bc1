//! What a person or program holds to open a repository.

use std::fmt;
use std::sync::Arc;

use argon2::{Algorithm, Argon2, Params, Version};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::aead::Key256;
use super::slot::{Kdf, Source};
use crate::context::Host;
use crate::error::{Error, Result};
use crate::format::FormatError;
use crate::name::Name;

/// How long a key file may be: long enough to be random, short enough to be no mistake.
pub const KEY_FILE_BYTES: std::ops::RangeInclusive<usize> = 32..=64 << 10;

/// A passphrase, or the content of a key file. Wiped when the last clone is dropped, never shown.
#[derive(Clone)]
pub struct Secret(Arc<Kind>);

enum Kind {
    Passphrase(Zeroizing<Vec<u8>>),
    KeyFile(Zeroizing<Vec<u8>>),
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &*self.0 {
            Kind::Passphrase(_) => "Secret(passphrase)",
            Kind::KeyFile(_) => "Secret(key file)",
        })
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        match (&*self.0, &*other.0) {
            (Kind::Passphrase(a), Kind::Passphrase(b)) | (Kind::KeyFile(a), Kind::KeyFile(b)) => {
                a == b
            }
            _ => false,
        }
    }
}

/// Line ends after a secret are no part of it: editors and secret stores add and remove them.
fn trimmed(mut bytes: Zeroizing<Vec<u8>>) -> Zeroizing<Vec<u8>> {
    while bytes.last().is_some_and(|byte| matches!(byte, b'\n' | b'\r')) {
        bytes.pop();
    }
    bytes
}

impl Secret {
    /// A passphrase as typed.
    pub fn passphrase(bytes: Vec<u8>) -> Result<Self> {
        let bytes = trimmed(Zeroizing::new(bytes));
        if bytes.is_empty() {
            return Err(Error::Request("the passphrase is empty".to_owned()));
        }
        Ok(Self(Arc::new(Kind::Passphrase(bytes))))
    }

    /// The content of a key file. It must be random: nothing slows a search for it down.
    pub fn key_file(bytes: Vec<u8>) -> Result<Self> {
        let bytes = trimmed(Zeroizing::new(bytes));
        if !KEY_FILE_BYTES.contains(&bytes.len()) {
            return Err(Error::Request(format!(
                "a key file has {} to {} bytes, not {}",
                KEY_FILE_BYTES.start(),
                KEY_FILE_BYTES.end(),
                bytes.len()
            )));
        }
        Ok(Self(Arc::new(Kind::KeyFile(bytes))))
    }

    /// The content of a new key file: a line of 64 hexadecimal digits.
    pub fn generate(host: &dyn Host) -> Zeroizing<String> {
        let mut line = Zeroizing::new(String::with_capacity(65));
        line.push_str(&blake3::Hash::from_bytes(*super::keys::random_256(host)).to_hex());
        line.push('\n');
        line
    }

    /// `passphrase` or `key file`.
    pub fn kind(&self) -> &'static str {
        match &*self.0 {
            Kind::Passphrase(_) => "passphrase",
            Kind::KeyFile(_) => "key file",
        }
    }

    /// A source for a new slot that this secret will open.
    pub(super) fn source(&self, cost: Cost, host: &dyn Host) -> Source {
        match &*self.0 {
            Kind::Passphrase(_) => Source::Passphrase {
                kdf: Kdf::Argon2id(cost),
                salt: format!("{:032x}", host.random()),
            },
            Kind::KeyFile(_) => Source::KeyFile,
        }
    }

    /// The key that wraps the data key in a slot of this source. None if the slot is for another kind of secret.
    pub(super) fn wrapping_key(&self, source: &Source) -> Result<Option<Key256>, FormatError> {
        match (&*self.0, source) {
            (
                Kind::Passphrase(passphrase),
                Source::Passphrase { kdf: Kdf::Argon2id(cost), salt },
            ) => cost.derive(passphrase, salt.as_bytes()).map(Some),
            (Kind::KeyFile(bytes), Source::KeyFile) => {
                Ok(Some(Zeroizing::new(blake3::derive_key("Petra 1: key file", bytes))))
            }
            _ => Ok(None),
        }
    }
}

/// What argon2id costs: the more, the harder a passphrase is to guess.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cost {
    /// Memory, in KiB.
    pub memory_kib: u32,
    /// How often it is gone through.
    pub passes: u32,
    /// Lanes, which Petra goes through one after the other.
    pub lanes: u32,
}

impl Default for Cost {
    /// The second recommendation of RFC 9106, with one lane: 64 MiB and some 0.2 s.
    fn default() -> Self {
        Self { memory_kib: 64 << 10, passes: 3, lanes: 1 }
    }
}

impl Cost {
    /// At most 1 GiB.
    const MAX_MEMORY_KIB: u32 = 1 << 20;
    const MAX_PASSES: u32 = 64;
    const MAX_LANES: u32 = 16;
    /// Memory times passes: some ten seconds.
    const MAX_WORK_KIB: u64 = 4 << 20;

    /// Checks that the parameters make sense and cost neither all memory nor all day: they come from the store.
    pub fn validate(self) -> Result<Self, FormatError> {
        let Self { memory_kib, passes, lanes } = self;
        let ok = (1..=Self::MAX_LANES).contains(&lanes)
            && (8 * lanes..=Self::MAX_MEMORY_KIB).contains(&memory_kib)
            && (1..=Self::MAX_PASSES).contains(&passes)
            && u64::from(memory_kib) * u64::from(passes) <= Self::MAX_WORK_KIB;
        if ok { Ok(self) } else { Err(FormatError::invalid(format!("{self:?} is out of range"))) }
    }

    fn derive(self, passphrase: &[u8], salt: &[u8]) -> Result<Key256, FormatError> {
        let Self { memory_kib, passes, lanes } = self.validate()?;
        let failed = |error: argon2::Error| FormatError::invalid(format!("argon2id: {error}"));
        let params = Params::new(memory_kib, passes, lanes, Some(32)).map_err(failed)?;
        let mut key = Zeroizing::new([0; 32]);
        Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
            .hash_password_into(passphrase, salt, key.as_mut_slice())
            .map_err(failed)?;
        Ok(key)
    }
}

/// A secret that shall open a repository from now on.
#[derive(Clone, Debug)]
pub struct NewKey {
    /// The secret.
    pub secret: Secret,
    /// A name for people: whose it is, or where. Anyone who can read the store can read it.
    pub label: Option<Name>,
    /// What a passphrase's derivation costs; without effect for key files.
    pub cost: Cost,
}

impl NewKey {
    /// A key without a label, of the usual cost.
    pub fn new(secret: Secret) -> Self {
        Self { secret, label: None, cost: Cost::default() }
    }
}
