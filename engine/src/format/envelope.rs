//! The envelope of small objects: one line that says what follows and its checksum, then JSON.
//!
//! ```text
//! petra KIND VERSION BLAKE3-OF-THE-REST
//! { ... }
//! ```
//!
//! A person can read it with any tool, and no byte of it is trusted before the checksum is.

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{FormatError, VERSION};

/// The largest JSON object: a record's labels and metadata are bounded far below.
pub const MAX_BYTES: usize = 16 << 20;

/// Wraps a value. `kind` is one word that is part of the format.
pub fn seal<T: Serialize>(kind: &str, value: &T) -> Result<Bytes, serde_json::Error> {
    let mut json = serde_json::to_vec_pretty(value)?;
    json.push(b'\n');
    Ok(seal_json(kind, &json))
}

/// Wraps bytes that should be JSON.
pub fn seal_json(kind: &str, json: &[u8]) -> Bytes {
    let mut object = format!("petra {kind} {VERSION} {}\n", blake3::hash(json)).into_bytes();
    object.extend_from_slice(json);
    object.into()
}

/// Checks and unwraps a value of this kind.
pub fn unseal<T: DeserializeOwned>(kind: &str, object: &[u8]) -> Result<T, FormatError> {
    let json = check(kind, object)?;
    serde_json::from_slice(json)
        .map_err(|error| FormatError::invalid(format!("not a {kind}: {error}")))
}

fn check<'a>(kind: &str, object: &'a [u8]) -> Result<&'a [u8], FormatError> {
    if object.len() > MAX_BYTES {
        return Err(FormatError::invalid(format!(
            "{} bytes are too many for a {kind}",
            object.len()
        )));
    }
    let header_ends = object.iter().take(256).position(|byte| *byte == b'\n');
    let (header, rest) = header_ends
        .and_then(|at| Some((object.get(..at)?, object.get(at + 1..)?)))
        .ok_or_else(|| FormatError::invalid("it does not begin with 'petra'"))?;
    let header = std::str::from_utf8(header).unwrap_or_default();
    let mut words = header.split(' ');
    let (Some("petra"), Some(found_kind), Some(version), Some(checksum), None) =
        (words.next(), words.next(), words.next(), words.next(), words.next())
    else {
        return Err(FormatError::invalid("it does not begin with 'petra'"));
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
    let actual = blake3::hash(rest).to_string();
    if actual != checksum {
        return Err(FormatError::Checksum { found: checksum.to_owned(), actual });
    }
    Ok(rest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn tells_versions_kinds_and_damage_apart() {
        let object = seal("pin", &[1, 2]).unwrap();
        assert_eq!(unseal::<Vec<u8>>("pin", &object).unwrap(), [1, 2]);
        let text = String::from_utf8(object.to_vec()).unwrap();
        let newer = text.replacen("pin 1", "pin 9", 1);
        assert_eq!(check("pin", newer.as_bytes()), Err(FormatError::Version { found: 9 }));
        assert!(check("mark", &object).unwrap_err().to_string().contains("a mark expected"));
        let flipped = text.replacen('2', "3", 1);
        assert!(check("pin", flipped.as_bytes()).is_err());
        assert!(check("pin", &object[..object.len() - 1]).is_err());
    }

    proptest! {
        #[test]
        fn foreign_bytes_are_refused(bytes: Vec<u8>) {
            prop_assert!(unseal::<serde_json::Value>("pin", &bytes).is_err());
        }
    }
}
