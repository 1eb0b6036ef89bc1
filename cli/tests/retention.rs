//! Deleting by rules, and bringing back what was deleted: what each command prints for people.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "a test may panic and talk"
)]

mod common;

use common::Sandbox;
use petra_tests::s3::{Creates, InProcessS3};

/// Three snapshots of one run, and one of another experiment.
fn sandbox() -> Sandbox {
    let mut petra = Sandbox::new();
    petra.volume("a.img", 1 << 20, 1 << 16, 1);
    petra.ok("init ./repo");
    for line in [
        "./repo#iris/run-1 --name first --label phase=initial",
        "./repo#iris/run-1 --name second --label phase=final",
        "./repo#iris/run-1 --name third",
        "./repo#notebooks/anna",
    ] {
        petra.ok(&format!("snapshot a.img {line}"));
    }
    petra.forget();
    petra
}

#[test]
fn there_and_back() {
    let mut petra = sandbox();
    petra.ok("rm ./repo#iris/run-1/first ./repo#iris/run-1/third");
    petra.ok("ls ./repo#iris/run-1");
    petra.ok("ls --deleted ./repo#iris/run-1");
    petra.ok("undelete ./repo#iris/run-1/first");
    // What is there already is left as it is.
    petra.ok("undelete ./repo#iris/run-1/first");
    petra.ok("undelete ./repo#iris/run-1/@latest");
    petra.ok("ls --deleted ./repo");
    petra.ok("rm --recursive ./repo#iris ./repo#notebooks");
    petra.ok("ls --deleted ./repo");
    petra.ok("undelete --recursive ./repo#iris/run-1");
    petra.ok("rm ./repo#iris/run-1/third");
    petra.ok("gc ./repo --grace 0 --dry-run");
    petra.ok("gc ./repo --grace 0");
    petra.fails("undelete ./repo#iris/run-1/third", 2, &["no deleted snapshot \"third\""]);
    petra.fails("undelete ./repo#iris/run-1", 2, &["petra undelete --recursive"]);
    petra.fails("undelete --recursive ./repo#iris/run-1", 2, &["petra ls --deleted"]);
    petra.fails("undelete ./repo#iris/run-1/first/workspace", 2, &["leave out the volume"]);
    insta::assert_snapshot!("undelete", petra.transcript());
    // By its id alone a purged snapshot is still known.
    petra.ok("rm ./repo#iris/run-1/second");
    let deleted = petra.json("ls --deleted ./repo#iris");
    let id = deleted["deleted"][0]["id"].as_str().unwrap();
    petra.ok("gc ./repo --grace 0");
    petra.fails(&format!("undelete ./repo#@{id}"), 2, &["can't come back", "ls --deleted"]);
    petra.ok("verify --read-data ./repo");
    petra.ok("restore ./repo#iris/run-1/first b.img");
    petra.assert_same("a.img", "b.img");
}

#[test]
fn rules_and_policies() {
    let mut petra = sandbox();
    let done = petra.run("prune ./repo --dry-run");
    assert!(done.stderr.contains("would delete 0 of 4 snapshots"), "{}", done.stderr);
    assert!(done.stdout.contains("last, within, phase=final"), "{}", done.stdout);
    petra.forget();
    petra.ok("prune ./repo#iris/run-1 --keep-last 1 --keep-label phase=final --dry-run");
    petra.ok("ls ./repo#iris/run-1");
    petra.ok("prune ./repo#iris --keep-last 1 --keep-label phase=final");
    petra.ok("ls --recursive ./repo");
    petra.ok("undelete ./repo#iris/run-1/first");
    petra.ok("policy show ./repo");
    petra.ok("policy set ./repo#iris --keep-last 2 --keep-within 36h --keep-label keep");
    petra.ok("policy set ./repo#notebooks --keep-all");
    petra.ok("policy set ./repo --keep-last 1");
    petra.ok("policy show ./repo#iris");
    petra.ok("prune ./repo");
    petra.ok("policy reset ./repo#iris");
    petra.ok("policy show ./repo");
    petra.ok("prune ./repo");
    petra.ok("prune ./repo");
    petra.fails("policy set ./repo", 2, &["--keep-all"]);
    petra.fails("policy show ./repo#iris/run-1", 2, &["has no policy of its own"]);
    petra.fails("prune ./repo#iris/run-1/third", 2, &["petra rm"]);
    petra.fails("prune ./repo#nothing", 2, &["no experiment"]);
    petra.fails("prune ./repo --keep-last 0", 2, &["--keep-last"]);
    petra.fails("prune", 2, &["PETRA_REPOSITORY"]);
    insta::assert_snapshot!("prune", petra.transcript());
}

#[test]
fn shapes() {
    let mut petra = sandbox();
    let mut shapes = String::new();
    for line in [
        "policy set ./repo#iris --keep-last 2 --keep-label keep",
        "policy show ./repo",
        "prune ./repo",
        "ls --deleted ./repo",
        "undelete --recursive ./repo#iris",
        "prune ./repo#notebooks --dry-run",
    ] {
        let document = petra.json(line);
        shapes += &format!("$ petra --json {line}\n{:#}\n\n", common::shape(&document));
    }
    insta::assert_snapshot!("retention_shapes", shapes);
}

#[test]
fn an_endpoint_without_conditional_writes() {
    let server = InProcessS3::start_with(Creates::Unconditional);
    let access = server.access();
    let mut petra = Sandbox::new();
    petra.volume("a.img", 1 << 20, 1 << 16, 1);
    let environment = access.environment();
    petra.environment.extend(environment.map(|(name, value)| (name.to_owned(), value)));
    let at = |prefix: &str| format!("s3://{}/{prefix}?endpoint={}", access.bucket, access.endpoint);
    let why = "does not keep create-if-absent: of 8 creates of one object 8 won";
    petra.fails(&format!("init {}", at("a")), 2, &[why, "petra init --single-writer"]);
    let done = petra.run(&format!("init --single-writer {}", at("a")));
    assert!(done.stderr.contains("only one process may change"), "{}", done.stderr);
    petra.ok(&format!("snapshot a.img {}#iris/run-1 --name a", at("a")));
    let info = petra.ok(&format!("info {}", at("a")));
    assert!(info.contains("one at a time"), "{info}");
    assert_eq!(
        petra.json(&format!("info {}", at("a")))["repository"]["config"]["writers"],
        "single"
    );
    petra.ok(&format!("rm {}#iris/run-1/a", at("a")));
    petra.ok(&format!("undelete {}#iris/run-1/a", at("a")));
    petra.ok(&format!("gc {} --grace 0", at("a")));
    petra.ok(&format!("verify --read-data {}", at("a")));

    // A repository of many writers, found through an endpoint that loses the condition.
    let good = server.endpoint(Creates::Exclusive);
    let through_good = at("b").replace(&access.endpoint, &good.access().endpoint);
    petra.ok(&format!("init {through_good}"));
    petra.ok(&format!("snapshot a.img {through_good}#iris/run-1 --name a"));
    let (why, hint) = ("of 3 creates of one object 3 won", "reading needs none of this");
    for line in ["snapshot a.img URL#iris/run-1", "rm URL#iris/run-1/a", "policy reset URL"] {
        petra.fails(&line.replace("URL", &at("b")), 2, &[why, hint]);
    }
    petra.ok(&format!("restore {}#iris/run-1/a b.img", at("b")));
    petra.assert_same("a.img", "b.img");
}
