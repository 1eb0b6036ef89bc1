//! URLs that people type.
#![no_main]

use libfuzzer_sys::fuzz_target;
use petra_engine::PetraUrl;

fuzz_target!(|text: &str| {
    if let Ok(url) = text.parse::<PetraUrl>() {
        assert_eq!(url.to_string().parse::<PetraUrl>().expect("what is printed can be read"), url);
        let _ = url.resolved_repository();
    }
});
