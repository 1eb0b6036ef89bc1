//! Names that people give to experiments, runs, snapshots and volumes, and their encoded forms.

use std::fmt;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Bytes that stay as they are in URLs and object keys (RFC 3986 "unreserved", less `~`).
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_');

/// The longest name, in bytes of UTF-8.
pub const MAX_NAME_BYTES: usize = 255;

/// Longest encoded name that is used as a key component as it is. File names end at 255 bytes and S3 keys at
/// 1,024, and a key holds two names.
const MAX_PLAIN_COMPONENT: usize = 160;

/// A name as people type it: any script, spaces and dots, up to 255 bytes, without `/` and control characters.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// Checks a name. `what` says in errors what is named: `experiment`, `run`, `snapshot`, `volume`, `label`.
    pub fn new(what: &'static str, name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        let reason = if name.is_empty() {
            "it is empty"
        } else if name.len() > MAX_NAME_BYTES {
            "it is longer than 255 bytes"
        } else if name == "." || name == ".." {
            "'.' and '..' mean other things in paths"
        } else if name.contains('/') {
            "'/' separates names"
        } else if name.chars().any(char::is_control) {
            "it has a control character"
        } else {
            return Ok(Self(name));
        };
        Err(Error::Name { what, name, reason })
    }

    /// The name as typed.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The percent-encoded form for URLs.
    pub fn encoded(&self) -> String {
        utf8_percent_encode(&self.0, ENCODED).to_string()
    }

    /// The form for object keys: the percent-encoded name, or for long ones `~`, its beginning and a hash.
    /// `~` is always encoded in names, so the two forms can't meet.
    pub(crate) fn key_component(&self) -> String {
        let mut encoded = self.encoded();
        if encoded.len() > MAX_PLAIN_COMPONENT {
            let hash = blake3::hash(self.0.as_bytes()).to_hex();
            encoded.truncate(64);
            encoded = format!("~{encoded}~{}", &hash.as_str().get(..32).unwrap_or_default());
        }
        encoded
    }

    /// The inverse of [`encoded`](Self::encoded).
    pub(crate) fn decode(what: &'static str, encoded: &str) -> Result<Self> {
        match percent_decode_str(encoded).decode_utf8() {
            Ok(name) => Self::new(what, name),
            Err(_) => {
                Err(Error::Name { what, name: encoded.to_owned(), reason: "it is not UTF-8" })
            }
        }
    }

    /// The inverse of [`key_component`](Self::key_component), where the component holds the whole name.
    pub(crate) fn from_key_component(what: &'static str, component: &str) -> Option<Self> {
        if component.starts_with('~') { None } else { Self::decode(what, component).ok() }
    }
}

impl TryFrom<String> for Name {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        Self::new("recorded", name)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn refuses_what_paths_and_terminals_would_misread() {
        for bad in ["", ".", "..", "a/b", "a\nb", "a\0", "\u{85}", &"x".repeat(256)] {
            assert!(Name::new("run", bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn long_names_get_short_distinct_components() {
        let a = Name::new("run", "ж".repeat(127)).unwrap();
        let b = Name::new("run", "ж".repeat(126)).unwrap();
        assert!(a.key_component().len() < 128);
        assert_ne!(a.key_component(), b.key_component());
    }

    proptest! {
        #[test]
        fn encoding_round_trips(text in "\\PC{1,60}") {
            prop_assume!(!text.contains('/') && text != "." && text != "..");
            prop_assume!(text.len() <= MAX_NAME_BYTES && !text.chars().any(char::is_control));
            let name = Name::new("run", text).unwrap();
            let encoded = name.encoded();
            prop_assert!(encoded.is_ascii() && !encoded.contains(['/', '#', '?', '~', '@']));
            prop_assert_eq!(Name::decode("run", &encoded).unwrap(), name);
        }
    }
}
