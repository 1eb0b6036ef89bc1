//! The shapes of the documents that `--json` prints. They are an interface: a change here is one for its users.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "a test may panic and talk"
)]

mod common;

use std::fmt::Write;

use common::{Sandbox, shape};

#[test]
fn shapes() {
    let mut petra = Sandbox::with_story();
    petra.overwrite("models.img", 0, 100, 5);
    let mut shapes = String::new();
    for line in [
        "init ./new",
        "init ./database --chunking fixed-16k",
        "snapshot work.img models=models.img ./repo#iris/run-1 --name later --label a=b -m text --metadata c=d",
        "ls ./repo",
        "ls ./repo#iris",
        "ls ./repo#iris/run-1",
        "ls ./repo#iris/run-1/later",
        "ls --recursive ./repo",
        "info ./repo",
        "info ./repo#iris",
        "info ./repo#iris/run-1",
        "info ./repo#iris/run-1/later",
        "info ./repo#iris/run-1/later/models",
        "diff ./repo#iris/run-1/final ./repo#iris/run-1/later",
        "du ./repo",
        "restore ./repo#iris/run-1/later all/",
        "verify ./repo",
        "verify ./repo --read-data --sample 50% --seed 7",
        "repair ./repo",
        "copy ./repo#iris/run-1 ./new",
        "rm ./repo#iris/run-1/initial",
        "gc ./repo --dry-run",
        "demo --dir demo",
    ] {
        let document = petra.json(line);
        let _ = writeln!(shapes, "$ petra --json {line}\n{:#}\n", shape(&document));
    }
    insta::assert_snapshot!("shapes", shapes);
}

#[test]
fn values() {
    let mut petra = Sandbox::with_story();
    let info = petra.json("info ./repo#iris/run-1/initial");
    let snapshot = &info["snapshot"];
    assert_eq!(snapshot["name"], "initial");
    assert_eq!(snapshot["labels"], serde_json::json!({ "phase": "initial", "step": "train" }));
    assert_eq!(snapshot["message"], "before");
    assert_eq!(snapshot["metadata"]["image"], "jupyter:1.2");
    assert_eq!(snapshot["volumes"][0]["name"], "workspace");
    assert_eq!(snapshot["volumes"][0]["len_bytes"], 8 << 20);
    assert_eq!(snapshot["volumes"][0]["data_bytes"], 3 << 20);
    assert_eq!(snapshot["stats"]["new_bytes"], 4 << 20);

    let diff = petra.json("diff ./repo#iris/run-1/initial ./repo#iris/run-1/final");
    let range = &diff["volumes"][0]["ranges"][0];
    let (start, end) = (range["start"].as_u64().unwrap(), range["end"].as_u64().unwrap());
    assert!(start <= 1 << 20 && end >= (1 << 20) + 1000 && end - start < 1 << 20, "{range}");
    assert_eq!(diff["volumes"][1]["changed_bytes"], 0);

    let url = snapshot["volumes"][1]["url"].as_str().unwrap();
    let restored = petra.json(&format!("restore {url} m.img"));
    petra.assert_same("m.img", "models.img");
    assert_eq!(restored["volumes"][0]["target"], "m.img");
    assert_eq!(restored["volumes"][0]["report"]["len_bytes"], 4 << 20);
    assert_eq!(restored["volumes"][0]["report"]["written_bytes"], 1 << 20);
}
