//! The envelope of small objects: one line that says what follows and its checksum, then JSON.
//!
//! ```text
//! petra KIND VERSION CHECKSUM
//! { ... }
//! ```
//!
//! A person can read it with any tool, and no byte of it is trusted before the checksum is. The checksum is BLAKE3 of
//! the object's key, a newline, and everything after the first line: an object does not pass for another. In an
//! encrypted repository the name of the cipher stands there instead, and the rest is sealed (see [`crate::crypto`]).

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{FormatError, VERSION};
use crate::key::Key;

/// The largest JSON object: a record's labels and metadata are bounded far below.
pub const MAX_BYTES: usize = 16 << 20;

/// Stands in the place of the checksum where the rest is sealed.
const CIPHER: &str = "aes-256-gcm";

/// Wraps a value that will be stored under `key`, for anyone to read. `kind` is one word that is part of the format.
pub fn seal<T: Serialize>(kind: &str, key: &Key, value: &T) -> Result<Bytes, serde_json::Error> {
    Ok(seal_json(kind, key, &json(value)?))
}

/// The JSON of a value, as it is stored.
pub fn json<T: Serialize>(value: &T) -> Result<Vec<u8>, serde_json::Error> {
    let mut json = serde_json::to_vec_pretty(value)?;
    json.push(b'\n');
    Ok(json)
}

/// Wraps bytes that should be JSON.
pub fn seal_json(kind: &str, key: &Key, json: &[u8]) -> Bytes {
    let mut object = format!("petra {kind} {VERSION} {}\n", checksum(key, json)).into_bytes();
    object.extend_from_slice(json);
    object.into()
}

/// Checks and unwraps a value of this kind that was stored under `key` for anyone to read.
pub fn unseal<T: DeserializeOwned>(kind: &str, key: &Key, object: &[u8]) -> Result<T, FormatError> {
    parse(kind, open_json(kind, key, object)?)
}

/// Reads a value of this kind.
pub fn parse<T: DeserializeOwned>(kind: &str, json: &[u8]) -> Result<T, FormatError> {
    serde_json::from_slice(json)
        .map_err(|error| FormatError::invalid(format!("not a {kind}: {error}")))
}

/// Checks and unwraps bytes that should be JSON.
pub fn open_json<'a>(kind: &str, key: &Key, object: &'a [u8]) -> Result<&'a [u8], FormatError> {
    let Envelope { seal, rest, .. } = Envelope::read(kind, object)?;
    if seal == CIPHER {
        return Err(FormatError::invalid("it is encrypted, and nothing here should be"));
    }
    let actual = checksum(key, rest).to_string();
    if actual != seal {
        return Err(FormatError::Checksum { found: seal.to_owned(), actual });
    }
    Ok(rest)
}

/// The first line of a sealed object.
pub fn sealed_header(kind: &str) -> String {
    format!("petra {kind} {VERSION} {CIPHER}\n")
}

/// The first line of an object, and what is sealed.
pub fn open_sealed<'a>(kind: &str, object: &'a [u8]) -> Result<(&'a [u8], &'a [u8]), FormatError> {
    let Envelope { line, seal, rest } = Envelope::read(kind, object)?;
    if seal != CIPHER {
        return Err(FormatError::invalid("it is not encrypted, and everything here should be"));
    }
    Ok((line, rest))
}

fn checksum(key: &Key, json: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(key.as_str().as_bytes()).update(b"\n").update(json);
    hasher.finalize()
}

/// An object taken apart: nothing of it is verified yet.
struct Envelope<'a> {
    /// The first line, with its end.
    line: &'a [u8],
    /// The last word of it.
    seal: &'a str,
    rest: &'a [u8],
}

impl<'a> Envelope<'a> {
    fn read(kind: &str, object: &'a [u8]) -> Result<Self, FormatError> {
        if object.len() > MAX_BYTES {
            return Err(FormatError::invalid(format!(
                "{} bytes are too many for a {kind}",
                object.len()
            )));
        }
        let foreign = || FormatError::invalid("it does not begin with 'petra'");
        let line_ends = object.iter().take(256).position(|byte| *byte == b'\n');
        let (line, rest) =
            line_ends.and_then(|at| object.split_at_checked(at + 1)).ok_or_else(foreign)?;
        let mut words =
            std::str::from_utf8(line).unwrap_or_default().trim_end_matches('\n').split(' ');
        let (Some("petra"), Some(found_kind), Some(version), Some(seal), None) =
            (words.next(), words.next(), words.next(), words.next(), words.next())
        else {
            return Err(foreign());
        };
        // The version comes before the checksum: a newer format may compute that in another way.
        match version.parse::<u32>() {
            Ok(found) if found > VERSION => return Err(FormatError::Version { found }),
            Ok(VERSION) => {}
            _ => return Err(FormatError::invalid(format!("format version '{version}'"))),
        }
        if found_kind != kind {
            return Err(FormatError::invalid(format!("a {kind} expected, a '{found_kind}' found")));
        }
        Ok(Self { line, seal, rest })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn tells_versions_kinds_and_damage_apart() {
        let key = Key::from_listing("pins/x".to_owned());
        let check = |kind, object| open_json(kind, &key, object);
        let object = seal("pin", &key, &[1, 2]).unwrap();
        assert_eq!(unseal::<Vec<u8>>("pin", &key, &object).unwrap(), [1, 2]);
        let text = String::from_utf8(object.to_vec()).unwrap();
        let newer = text.replacen("pin 1", "pin 9", 1);
        assert_eq!(check("pin", newer.as_bytes()), Err(FormatError::Version { found: 9 }));
        assert!(check("mark", &object).unwrap_err().to_string().contains("a mark expected"));
        let flipped = text.replacen('2', "3", 1);
        assert!(check("pin", flipped.as_bytes()).is_err());
        assert!(check("pin", &object[..object.len() - 1]).is_err());
        let elsewhere = Key::from_listing("pins/y".to_owned());
        assert!(open_json("pin", &elsewhere, &object).is_err());
    }

    proptest! {
        #[test]
        fn foreign_bytes_are_refused(bytes: Vec<u8>) {
            prop_assert!(unseal::<serde_json::Value>("pin", &Key::config(), &bytes).is_err());
        }
    }
}
