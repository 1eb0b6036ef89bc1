//! One message under one key: AES-256-GCM whose key and nonce are derived from a salt.
//!
//! | bytes | |
//! |---|---|
//! | n | the message, encrypted |
//! | 16 | tag |
//! | 16 | salt |
//!
//! The derivation is BLAKE3, keyed, of the salt: 32 bytes of key and 12 of nonce. So no two messages share a key,
//! there is no bound on how many may be sealed, and 16 random bytes suffice as a salt: among 2^40 of them two are
//! equal with a probability of 2^-49, where random nonces of 12 bytes under one key would have met.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::error::Unspecified;
use zeroize::Zeroizing;

use crate::format::FormatError;

/// A symmetric key. Wiped when dropped.
pub type Key256 = Zeroizing<[u8; 32]>;

/// What makes a message's key different from any other's.
pub type Salt = [u8; 16];

const TAG_BYTES: usize = 16;
const SALT_BYTES: usize = 16;
/// Bytes that sealing adds to a message.
pub const OVERHEAD_BYTES: usize = TAG_BYTES + SALT_BYTES;

fn cipher(key: &Key256, salt: Salt) -> Result<(LessSafeKey, Nonce), Unspecified> {
    let mut derived = Zeroizing::new([0; 44]);
    blake3::Hasher::new_keyed(key).update(&salt).finalize_xof().fill(derived.as_mut_slice());
    let (key, nonce) = derived.split_at(32);
    let nonce = Nonce::try_assume_unique_for_key(nonce)?;
    Ok((LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key)?), nonce))
}

/// Encrypts a message in place and appends tag and salt. `aad` says what it is and must be said again to open it.
/// A salt must not come twice under one key, but with the same message and `aad`.
#[expect(
    clippy::expect_used,
    reason = "AES-GCM takes any message below 64 GiB, and none here comes near"
)]
pub fn seal(key: &Key256, salt: Salt, aad: &[u8], message: &mut Vec<u8>) {
    let sealed = cipher(key, salt).and_then(|(cipher, nonce)| {
        cipher.seal_in_place_separate_tag(nonce, Aad::from(aad), message)
    });
    message.extend_from_slice(sealed.expect("the message is short enough").as_ref());
    message.extend_from_slice(&salt);
}

/// Decrypts a message into `out`, if nothing of it was changed and `aad` is what it was sealed with.
pub fn open(key: &Key256, aad: &[u8], sealed: &[u8], out: &mut Vec<u8>) -> Result<(), FormatError> {
    let split = sealed
        .split_last_chunk::<SALT_BYTES>()
        .and_then(|(rest, salt)| Some((rest.split_last_chunk::<TAG_BYTES>()?, salt)));
    let Some(((message, tag), salt)) = split else {
        return Err(FormatError::invalid(format!("{} bytes are too few", sealed.len())));
    };
    out.clear();
    out.resize(message.len(), 0);
    let opened = cipher(key, *salt).and_then(|(cipher, nonce)| {
        cipher.open_separate_gather(nonce, Aad::from(aad), message, tag, out)
    });
    opened.map_err(|Unspecified| {
        out.clear();
        FormatError::Forged
    })
}
