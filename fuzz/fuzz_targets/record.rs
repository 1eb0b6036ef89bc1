//! JSON objects in their envelopes, sealed with a right checksum so that the parser sees them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use petra_engine::format::envelope;
use petra_engine::record::{CatalogueEntry, Config, Decision, Mark, Pin, kind};

fuzz_target!(|input: (u8, &[u8])| {
    let (choice, json) = input;
    let _ = envelope::unseal::<Config>(kind::CONFIG, json);
    let kinds = [kind::CONFIG, kind::DECISION, kind::PIN, kind::MARK, kind::CATALOGUE];
    let kind = kinds[usize::from(choice) % kinds.len()];
    let sealed = envelope::seal_json(kind, json);
    let _ = envelope::unseal::<Config>(kind, &sealed);
    if let Ok(Decision::Commit { snapshot, .. }) = envelope::unseal(kind, &sealed) {
        let _ = snapshot.validate();
    }
    let _ = envelope::unseal::<Pin>(kind, &sealed);
    let _ = envelope::unseal::<Mark>(kind, &sealed);
    let _ = envelope::unseal::<CatalogueEntry>(kind, &sealed);
});
