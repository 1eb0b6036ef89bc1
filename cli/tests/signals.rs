//! Ctrl-C: the first one ends cleanly, and what was there before is untouched.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "a test may panic and talk"
)]

mod common;

use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::Sandbox;
use rustix::process::{Pid, Signal, kill_process};

fn interrupt(child: &Child) {
    kill_process(Pid::from_child(child), Signal::INT).unwrap();
}

#[test]
fn the_first_one_cancels() {
    let mut petra = Sandbox::with_story();
    petra.volume("large.img", 192 << 20, 192 << 20, 7);
    let mut command = petra.command();
    command.args(["snapshot", "large.img", "./repo#iris/run-1"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Its first object is there: it is at work.
    let pins = petra.path("repo/pins");
    let begun = Instant::now();
    while !pins.exists() && begun.elapsed() < Duration::from_secs(10) {
        sleep(Duration::from_millis(2));
    }
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout.is_empty());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("cancelling") && said.contains("error: cancelled"), "{said}");

    let listed = petra.json("ls ./repo#iris/run-1");
    assert_eq!(listed["snapshots"].as_array().unwrap().len(), 2);
    petra.ok("verify --read-data ./repo");
    petra.ok("snapshot work.img ./repo#iris/run-1");
}

#[test]
fn the_second_one_ends_at_once() {
    let petra = Sandbox::with_story();
    // Nobody reads the stream, so it can't end by itself.
    let mut command = petra.command();
    command.args(["restore", "./repo#iris/run-1/final/workspace", "-"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut ended = None;
    let begun = Instant::now();
    while ended.is_none() && begun.elapsed() < Duration::from_secs(20) {
        sleep(Duration::from_millis(200));
        interrupt(&child);
        ended = child.try_wait().unwrap();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let ended = ended.expect("it does not end");
    // The very first may come before it is watched for, and ends the process as signals do.
    assert!(ended.code().is_none_or(|code| code == 130), "{ended:?}");
}
