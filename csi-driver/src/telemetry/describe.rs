//! Requests as text, without secrets.
//!
//! It works on the description of the wire interfaces rather than on their types, so that no message can be forgotten:
//! every map `secrets`, however deep, keeps its keys and loses its values.

use std::collections::HashMap;
use std::sync::LazyLock;

use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor, Value};

/// The name of all fields that hold secrets.
const SECRETS: &str = "secrets";
/// What is shown instead of one.
const HIDDEN: &str = "(hidden)";
/// The label of calls of methods that there are not.
pub const UNKNOWN: &str = "unknown";

/// The messages and services of both interfaces.
static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    let description = include_bytes!(concat!(env!("OUT_DIR"), "/interfaces.bin"));
    DescriptorPool::decode(description.as_slice()).unwrap_or_default()
});

/// All methods by their HTTP paths.
static METHODS: LazyLock<HashMap<String, Method>> = LazyLock::new(|| {
    let mut methods = HashMap::new();
    for service in POOL.services() {
        for method in service.methods() {
            let name = format!("{}/{}", service.name(), method.name());
            let path = format!("/{}/{}", service.full_name(), method.name());
            methods.insert(path, Method { name, request: method.input() });
        }
    }
    methods
});

/// A method of one of the services.
#[derive(Debug)]
pub struct Method {
    /// Its name for people and in metrics: `Controller/CreateVolume`.
    pub name: String,
    request: MessageDescriptor,
}

/// Finds a method by its HTTP path.
pub fn method(path: &str) -> Option<&'static Method> {
    METHODS.get(path)
}

impl Method {
    /// A request as it came over the wire, as text.
    pub fn describe(&self, wire: &[u8]) -> String {
        // One byte says whether it is compressed, four how long it is.
        let Some(bytes) = wire.get(5..) else { return "(incomplete)".to_owned() };
        if wire.first() != Some(&0) {
            return "(compressed)".to_owned();
        }
        match DynamicMessage::decode(self.request.clone(), bytes) {
            Ok(mut message) => {
                hide(&mut message);
                message.to_string()
            }
            Err(_) => "(not understood)".to_owned(),
        }
    }
}

/// Hides the secrets of a message and of those within.
fn hide(message: &mut DynamicMessage) {
    // What this version does not know could be anything.
    let unknown: Vec<u32> = message.unknown_fields().map(|field| field.number()).collect();
    for number in unknown {
        message.clear_field_by_number(number);
    }
    for (field, value) in message.fields_mut() {
        if field.name() == SECRETS {
            hide_all(value);
        } else {
            hide_within(value);
        }
    }
}

fn hide_within(value: &mut Value) {
    match value {
        Value::Message(message) => hide(message),
        Value::List(values) => values.iter_mut().for_each(hide_within),
        Value::Map(values) => values.values_mut().for_each(hide_within),
        _ => {}
    }
}

fn hide_all(value: &mut Value) {
    match value {
        Value::Map(values) => {
            values.values_mut().for_each(|value| *value = Value::String(HIDDEN.to_owned()));
        }
        // Nothing of the kind is in the interfaces; if it comes, it is hidden.
        other => *other = Value::String(HIDDEN.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use prost_reflect::{Cardinality, Kind, MapKey};

    use super::*;

    const SECRET: &str = "hunter2";

    /// A message with something in every field, and a secret in every map of secrets.
    fn filled(descriptor: &MessageDescriptor, depth: usize) -> DynamicMessage {
        let mut message = DynamicMessage::new(descriptor.clone());
        for field in descriptor.fields() {
            let value = if field.is_map() {
                let text = if field.name() == SECRETS { SECRET } else { "plain" };
                let entry = (MapKey::String("key".to_owned()), Value::String(text.to_owned()));
                Value::Map([entry].into())
            } else {
                let one = match field.kind() {
                    Kind::Message(inner) if depth < 6 => Value::Message(filled(&inner, depth + 1)),
                    Kind::Message(_) => continue,
                    Kind::String => Value::String("plain".to_owned()),
                    kind => kind.default_value(),
                };
                if field.cardinality() == Cardinality::Repeated {
                    Value::List(vec![one])
                } else {
                    one
                }
            };
            message.set_field(&field, value);
        }
        message
    }

    #[test]
    fn no_secret_of_any_message_is_shown() {
        let mut with_secrets = 0;
        for method in METHODS.values() {
            let bytes = filled(&method.request, 0).encode_to_vec();
            let mut wire = vec![0; 5];
            wire.extend(&bytes);
            let text = method.describe(&wire);
            assert!(!text.contains(SECRET), "{}: {text}", method.name);
            if String::from_utf8_lossy(&bytes).contains(SECRET) {
                with_secrets += 1;
                assert!(text.contains(HIDDEN) && text.contains("key"), "{}: {text}", method.name);
            }
        }
        // Of the CSI interface, and the two of the agents' that carry a repository.
        assert!(with_secrets >= 18, "{with_secrets}");
    }

    #[test]
    fn methods_have_names() {
        assert!(METHODS.len() >= 41, "{}", METHODS.len());
        let method = method("/csi.v1.Controller/CreateVolume").unwrap();
        assert_eq!(method.name, "Controller/CreateVolume");
        assert!(super::method("/csi.v1.Controller/Nothing").is_none());
    }

    #[test]
    fn what_is_no_request_is_no_trouble() {
        let method = method("/csi.v1.Controller/CreateVolume").unwrap();
        for wire in [&b""[..], b"\0\0", b"\x01\0\0\0\0abc", b"\0\0\0\0\x02\xff\xff"] {
            assert!(method.describe(wire).starts_with('('));
        }
    }

    #[test]
    fn what_is_unknown_is_not_shown() {
        let method = method("/csi.v1.Controller/CreateVolume").unwrap();
        // Field 1000, a string.
        let mut wire = vec![0, 0, 0, 0, 0, 0xc2, 0x3e, 7];
        wire.extend(SECRET.as_bytes());
        assert_eq!(method.describe(&wire), "");
    }
}
