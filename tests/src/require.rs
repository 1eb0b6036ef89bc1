//! Tests that need more than a plain machine say so here.
//!
//! Where something is missing the test prints `skipped: ..` and returns early, so that `cargo test` passes on a
//! laptop. With `PETRA_TEST_REQUIRE=all`, as in CI, it fails instead: nothing is left out unnoticed.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Finds a program in `PATH`, or where `go install` puts it.
pub fn tool(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path)
        .chain(go_bin())
        .map(|dir| dir.join(name))
        .find(|file| file.is_file());
    if found.is_none() {
        unmet(&format!("{name} is not installed"));
    }
    found
}

/// True for root, who may mount filesystems.
pub fn root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        unmet("this test needs root");
    }
    root
}

/// Says that something is missing: a note, or a failure where everything is required.
#[expect(clippy::print_stderr, reason = "the person who runs the tests should see it")]
pub fn unmet(what: &str) {
    let required = env::var("PETRA_TEST_REQUIRE").is_ok_and(|required| required == "all");
    assert!(!required, "{what}, and PETRA_TEST_REQUIRE=all");
    eprintln!("skipped: {what}");
}

fn go_bin() -> Option<PathBuf> {
    let answer = Command::new("go").args(["env", "GOPATH"]).output().ok()?;
    let path = String::from_utf8(answer.stdout).ok()?;
    Some(Path::new(path.trim()).join("bin"))
}
