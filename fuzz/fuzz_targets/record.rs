//! JSON objects in their envelopes, sealed with a right checksum so that the parser sees them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use petra_engine::crypto::Slot;
use petra_engine::format::envelope;
use petra_engine::key::Key;
use petra_engine::record::{CatalogueEntry, Config, Decision, Grave, Mark, Pin, kind};
use petra_engine::retention::Policy;
use petra_engine::start::StartList;

fuzz_target!(|input: (u8, &[u8])| {
    let (choice, json) = input;
    let key = Key::config();
    let _ = envelope::unseal::<Config>(kind::CONFIG, &key, json);
    let kinds = [
        kind::CONFIG,
        kind::DECISION,
        kind::PIN,
        kind::MARK,
        kind::CATALOGUE,
        kind::KEY,
        kind::GRAVE,
        kind::END,
        kind::MOVE,
        kind::START,
        kind::POLICIES,
    ];
    let kind = kinds[usize::from(choice) % kinds.len()];
    let sealed = envelope::seal_json(kind, &key, json);
    let _ = envelope::unseal::<Config>(kind, &key, &sealed);
    if let Ok(Decision::Commit { snapshot, .. }) = envelope::unseal(kind, &key, &sealed) {
        let _ = snapshot.validate();
    }
    let _ = envelope::unseal::<Pin>(kind, &key, &sealed);
    let _ = envelope::unseal::<Grave>(kind, &key, &sealed);
    let _ = envelope::unseal::<Mark>(kind, &key, &sealed);
    let _ = envelope::unseal::<CatalogueEntry>(kind, &key, &sealed);
    let _ = envelope::unseal::<Slot>(kind, &key, &sealed);
    let _ = envelope::unseal::<StartList>(kind, &key, &sealed);
    let _ = envelope::unseal::<Policy>(kind, &key, &sealed);
});
