//! Encryption: what the bucket may not know (docs/security.md), and in which bytes (docs/format.md).
//!
//! ```text
//! passphrase -- argon2id --+
//!                          +-> wrapping key --- opens ---> slot (`keys/ID`) ---> data key
//! key file ----- BLAKE3 ---+                                                       |
//!                                     +------------+------------+-----------+------+-----+
//!                                     v            v            v           v            v
//!                                 chunk ids     names        objects      packs     gear table
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | `aead` | one message under one key |
//! | `keys` | a repository's keys, and everything that is done with them; none for a plain repository |
//! | `secret` | what a person or program holds: a passphrase or a key file |
//! | `slot` | the data key, wrapped for one such secret |
//! | `keyring` | the slots of a repository: unlock, list, add, remove |
//!
//! Nothing else in the engine asks whether a repository is encrypted: it calls [`Keys`], which does nothing where
//! there is nothing to do. Key material is wiped when it is dropped, and never part of `Debug` output or errors.

mod aead;
mod keyring;
mod keys;
mod secret;
mod slot;

pub use aead::OVERHEAD_BYTES;
pub use keyring::{KeyInfo, list_keys};
pub use keys::{Keys, Piece};
pub use secret::{Cost, KEY_FILE_BYTES, NewKey, Secret};
pub use slot::{Kdf, Slot, Source};

pub(crate) use keyring::{put_slot, unlock};
pub(crate) use keys::DataKey;

#[cfg(test)]
mod tests;
