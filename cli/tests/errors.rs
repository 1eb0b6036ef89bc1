//! Bad input and bad places: each error names the object, the cause and the next step, and has its exit code.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "a test may panic and talk"
)]

mod common;

use std::fs;

use common::{Sandbox, objects};

#[test]
fn what_people_get_wrong() {
    let mut petra = Sandbox::with_story();
    petra.volume("big.img", 1 << 20, 1 << 16, 1);
    fs::create_dir(petra.path("directory")).unwrap();
    fs::create_dir(petra.path("full")).unwrap();
    fs::write(petra.path("full/letter.txt"), "Dear reader").unwrap();
    for line in [
        // URLs
        "ls repo",
        "ls http://host/repo",
        "ls s3://bucket?colour=red",
        "ls ./repo#a/b/c/d/e",
        "info ./repo#iris/run-1/@newest",
        "info ./repo#@123",
        "info ./repo#iris/%2e%2e",
        "ls",
        "ls #iris",
        // repositories
        "ls ./nowhere",
        "ls ./full",
        "init ./repo",
        "init ./full",
        "init ./repo#iris",
        "init ./new --chunking tiny",
        // names
        "info ./repo#irsi/run-1",
        "info ./repo#iris/run-2",
        "info ./repo#iris/run-1/intial",
        "info ./repo#iris/run-1/0",
        "info ./repo#iris/run-1/initial/workspac",
        "verify ./repo#nothing",
        "du ./repo#iris/nothing",
        // snapshot
        "snapshot work.img",
        "snapshot work.img ./repo",
        "snapshot work.img ./repo#iris/run-1/named",
        "snapshot nothing.img ./repo#iris/run-1",
        "snapshot directory ./repo#iris/run-1",
        "snapshot /dev/null ./repo#iris/run-1",
        "snapshot a=work.img a=work.img ./repo#iris/run-1",
        "snapshot work.img ./repo#iris/run-1 --label step",
        "snapshot work.img ./repo#iris/run-1 --label a=1 --label a=2",
        "snapshot work.img ./repo#iris/run-1 --name a/b",
        "snapshot work.img ./repo#iris/run-1 --parent nothing",
        // restore
        "restore ./repo#iris/run-1 out.img",
        "restore ./repo#iris out.img",
        "restore ./repo#iris/run-1/final out.img",
        "restore ./repo#iris/run-1/final -",
        "restore ./repo#iris/run-1/final/workspace big.img",
        "restore ./repo#iris/run-1/final/workspace /dev/null",
        "restore ./repo#iris/run-1/final/workspace no/such/place.img",
        "restore ./repo#iris/run-1/final/workspace big.img/x",
        // the rest
        "diff ./repo#iris/run-1/final ./other#iris/run-1/final",
        "diff ./repo#iris/run-1/final ./repo#iris/run-1",
        "du ./repo#iris/run-1/final",
        "rm ./repo",
        "rm ./repo#iris",
        "rm ./repo#iris/run-1/final/models",
        "rm ./repo#iris/run-1/final ./repo#iris/run-1/nothing",
        "gc ./repo#iris",
        "gc ./repo --grace soon",
        "demo --dir full",
        "frobnicate",
    ] {
        let done = petra.run(line);
        assert_eq!(done.code, 2, "petra {line}: {}{}", done.stdout, done.stderr);
        assert!(done.stdout.is_empty(), "petra {line} prints: {}", done.stdout);
    }
    insta::assert_snapshot!("errors", petra.transcript());
    // The snapshot that was named together with an unknown one is still there.
    petra.ok("info ./repo#iris/run-1/final");
}

#[test]
fn errors_as_documents() {
    let mut petra = Sandbox::with_story();
    let mut said = |line: &str| -> serde_json::Value {
        let done = petra.run(line);
        assert!(done.stdout.is_empty(), "{}", done.stdout);
        serde_json::from_str(&done.stderr).unwrap()
    };
    let error = said("--json info ./repo#iris/run-1/intial");
    assert_eq!(error["error"]["kind"], "fix");
    assert_eq!(error["exit_code"], 2);
    assert!(error["error"]["message"].as_str().unwrap().contains("intial"));
    assert!(error["error"]["hint"].as_str().unwrap().contains("did you mean"));
    let error = said("restore --json --nonsense");
    assert_eq!((&error["error"]["kind"], &error["exit_code"]), (&"fix".into(), &2.into()));
}

#[test]
fn a_repository_of_a_newer_version() {
    let mut petra = Sandbox::with_story();
    let config = petra.path("repo/config");
    let text = fs::read_to_string(&config).unwrap();
    let newer = text.replacen("petra repository 1 ", "petra repository 99 ", 1);
    assert_ne!(text, newer, "{text}");
    fs::write(&config, newer).unwrap();
    petra.fails("ls ./repo", 2, &["version 99", "hint: a newer Petra wrote this repository"]);
}

#[test]
fn damage_stops_a_restore_unless_it_keeps_going() {
    let mut petra = Sandbox::with_story();
    let pack = objects(&petra.path("repo/packs")).into_iter().next().unwrap();
    let mut bytes = fs::read(&pack).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&pack, bytes).unwrap();

    let restore = "restore ./repo#iris/run-1/initial";
    petra.fails(&format!("{restore} once/"), 3, &["is damaged", "hint: petra verify file://"]);
    petra.fails(
        &format!("{restore} all/ --keep-going"),
        5,
        &["could not be read", "caused by:", "bytes "],
    );
    assert!(petra.path("all/workspace.img").exists());
    let expected = fs::read(petra.path("work-before.img")).unwrap();
    let restored = fs::read(petra.path("all/workspace.img")).unwrap();
    assert_eq!(restored.len(), expected.len());
    let same = expected.iter().zip(&restored).filter(|(a, b)| a == b).count();
    assert!(same * 10 > expected.len() * 8, "{same} bytes of {}", expected.len());

    let done = petra.run("--json restore ./repo#iris/run-1/initial again/ --keep-going");
    let document: serde_json::Value = serde_json::from_str(&done.stdout).unwrap();
    let damaged: usize = document["volumes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|volume| volume["report"]["damaged"].as_array().unwrap().len())
        .sum();
    assert!(damaged > 0 && done.code == 5, "{document:#}");
    let error: serde_json::Value = serde_json::from_str(&done.stderr).unwrap();
    assert_eq!((&error["error"]["kind"], &error["exit_code"]), (&"partial".into(), &5.into()));

    petra.ok("verify ./repo");
    petra.fails("verify --read-data ./repo", 3, &["found in file://", "hint: keep the repository"]);
    let done = petra.run("--json verify --read-data ./repo");
    let document: serde_json::Value = serde_json::from_str(&done.stdout).unwrap();
    let problem = &document["problems"][0];
    let object = problem["object"].as_str().unwrap();
    assert!(object.contains(pack.file_name().unwrap().to_str().unwrap()), "{document:#}");
    assert!(!problem["affected"][0]["ranges"].as_array().unwrap().is_empty(), "{document:#}");
}

#[test]
fn a_missing_pack_is_named() {
    let mut petra = Sandbox::with_story();
    let pack = objects(&petra.path("repo/packs")).into_iter().next().unwrap();
    fs::remove_file(&pack).unwrap();
    let name = pack.file_name().unwrap().to_str().unwrap();
    petra.fails("restore ./repo#iris/run-1/initial/workspace out.img", 3, &["packs/", name]);
    assert!(!petra.path("out.img").exists());
    petra.fails("verify ./repo", 3, &["found in"]);
}

#[test]
fn no_permission() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;

    const NOBODY: u32 = 65534;
    let petra = Sandbox::with_story();
    let set_mode = |name: &str, mode| {
        fs::set_permissions(petra.path(name), fs::Permissions::from_mode(mode)).unwrap();
    };
    // Root has every permission, so it asks as someone else, who may not be able to reach the binary.
    let binary = petra.path("petra");
    fs::hard_link(env!("CARGO_BIN_EXE_petra"), &binary)
        .or_else(|_| fs::copy(env!("CARGO_BIN_EXE_petra"), &binary).map(drop))
        .unwrap();
    set_mode("", 0o755);
    let said = |arguments: &[&str]| {
        let mut command = std::process::Command::new(&binary);
        command.args(arguments).current_dir(petra.path(""));
        if rustix::process::geteuid().is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    set_mode("work.img", 0);
    let text = said(&["snapshot", "work.img", "./repo#iris/run-1"]);
    assert!(text.contains("hint: run as a user who has access"), "{text}");
    set_mode("repo/config", 0);
    let text = said(&["ls", "./repo"]);
    assert!(text.contains("hint: run as a user who may"), "{text}");
}
