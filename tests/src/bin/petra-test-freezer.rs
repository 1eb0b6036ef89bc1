//! What tests of freezing start as processes of their own, to kill them.
//!
//! ```text
//! petra-test-freezer guard                  a freeze guard
//! petra-test-freezer freeze DIR...          freezes, says so, and thaws at the end of its input
//! ```

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "in tests a panic is the right way to fail"
)]

use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use petra_volume::freeze::{FrozenGroup, GuardCommand, guard_main};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments[0] == "guard" {
        return guard_main();
    }
    let mounts: Vec<PathBuf> = arguments[1..].iter().map(PathBuf::from).collect();
    let guard = GuardCommand::new(std::env::current_exe().unwrap(), ["guard"]);
    let group = FrozenGroup::freeze(&mounts, &guard, Duration::from_secs(60), || Ok(())).unwrap();
    println!("frozen");
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    group.thaw().unwrap();
    println!("thawed");
    ExitCode::SUCCESS
}
