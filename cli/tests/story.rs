//! The whole story on a directory: what each command prints for people.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "a test may panic and talk"
)]

mod common;

use std::fs;
use std::process::Stdio;

use common::Sandbox;

#[test]
fn from_init_to_gc() {
    let mut petra = Sandbox::new();
    petra.volume("work.img", 8 << 20, 3 << 20, 1);
    petra.volume("models.img", 4 << 20, 1 << 20, 2);
    petra.run("init ./repo");
    petra.run(
        "snapshot work.img models=models.img ./repo#iris/run-1 --name initial \
         --label step=train --label phase=initial --message before --metadata image=jupyter:1.2",
    );
    petra.overwrite("work.img", 1 << 20, 1000, 3);
    petra.run("snapshot work.img models=models.img ./repo#iris/run-1 --name final");
    petra.run("snapshot work.img ./repo#notebooks/anna");
    insta::assert_snapshot!("snapshots", petra.transcript());

    for line in [
        "ls ./repo",
        "ls ./repo#iris",
        "ls ./repo#iris/run-1",
        "ls ./repo#iris/run-1/final",
        "ls --recursive ./repo",
        "info ./repo",
        "info ./repo#iris",
        "info ./repo#iris/run-1",
        "info ./repo#iris/run-1/initial",
        "info ./repo#iris/run-1/final/models",
        "diff ./repo#iris/run-1/initial ./repo#iris/run-1/final",
        "diff ./repo#iris/run-1/initial ./repo#notebooks/anna/@latest",
        "du ./repo",
        "du ./repo#iris/run-1",
        "verify ./repo",
        "verify --read-data ./repo#iris/run-1/final",
    ] {
        petra.ok(line);
    }
    insta::assert_snapshot!("listings", petra.transcript());

    petra.ok("rm ./repo#notebooks/anna/@latest ./repo#iris/run-1/final");
    petra.ok("gc ./repo");
    petra.ok("gc ./repo --grace 0 --dry-run");
    petra.ok("gc ./repo --grace 0");
    petra.ok("rm --recursive ./repo#iris");
    petra.ok("gc ./repo --grace 0 --silent 0");
    petra.ok("ls ./repo");
    insta::assert_snapshot!("deletions", petra.transcript());
    assert!(!petra.path("repo/packs").exists());
}

#[test]
fn restore_to_every_kind_of_target() {
    let mut petra = Sandbox::with_story();
    let before = "./repo#iris/run-1/initial";

    petra.ok(&format!("restore {before}/workspace new.img"));
    petra.assert_same("new.img", "work-before.img");
    petra.ok(&format!("restore {before} all/"));
    petra.assert_same("all/workspace.img", "work-before.img");
    petra.assert_same("all/models.img", "models.img");
    fs::create_dir(petra.path("one")).unwrap();
    petra.ok(&format!("restore {before}/models one"));
    petra.assert_same("one/models.img", "models.img");

    petra.overwrite("new.img", 2 << 20, 100, 9);
    petra.ok(&format!("restore {before}/workspace new.img --in-place"));
    petra.assert_same("new.img", "work-before.img");
    fs::write(petra.path("short.img"), "old").unwrap();
    petra.ok(&format!("restore {before}/workspace short.img --in-place"));
    petra.assert_same("short.img", "work-before.img");
    petra.ok(&format!("restore {before}/workspace fresh.img --in-place"));
    petra.assert_same("fresh.img", "work-before.img");
    insta::assert_snapshot!("restores", petra.transcript());

    let out = fs::File::create(petra.path("stream.img")).unwrap();
    let arguments = ["restore", &format!("{before}/workspace"), "-"];
    let status =
        petra.command().args(arguments).stdout(out).stderr(Stdio::null()).status().unwrap();
    assert!(status.success());
    petra.assert_same("stream.img", "work-before.img");
}

#[test]
fn the_printed_url_is_the_way_back() {
    let mut petra = Sandbox::new();
    petra.volume("a.img", 1 << 20, 1 << 16, 1);
    petra.ok("init ./repo");
    let url = petra.run_words(&["snapshot", "a.img", "./repo#Iris flowers/run 1"]).stdout;
    let url = url.trim_end();
    assert!(url.contains("#Iris%20flowers/run%201/0"), "{url}");
    // A single volume needs no name, and the working directory does not matter.
    petra.ok(&format!("restore {url} b.img"));
    petra.assert_same("a.img", "b.img");
    let id = url.rsplit('/').next().unwrap();
    petra.ok(&format!("restore ./repo#@{id}/workspace c.img"));
    petra.assert_same("a.img", "c.img");
    petra.ok(&format!("info ./repo#Iris%20flowers/run%201/{}", &id[..20]));
}

#[test]
fn parents_by_name_id_and_none() {
    let mut petra = Sandbox::with_story();
    let parent = |petra: &mut Sandbox, option: &str| {
        let made = petra.json(&format!("snapshot work.img ./repo#iris/run-1 {option}"));
        made["parent"].as_str().map(str::to_owned)
    };
    let first = petra.json("info ./repo#iris/run-1/initial")["snapshot"]["id"].clone();
    let first = first.as_str().unwrap();
    assert_eq!(parent(&mut petra, "--parent initial").as_deref(), Some(first));
    assert_eq!(parent(&mut petra, &format!("--parent {first}")).as_deref(), Some(first));
    assert_eq!(parent(&mut petra, "--parent none"), None);
    assert!(parent(&mut petra, "").is_some());
    let snapshot = "snapshot work.img ./repo#iris/run-1 --parent";
    petra.fails(&format!("{snapshot} intial"), 2, &["did you mean \"initial\"?"]);
}

#[test]
fn a_repository_for_each_experiment() {
    let mut petra = Sandbox::new();
    petra.volume("a.img", 1 << 20, 1 << 16, 1);
    petra.fails("init ./{experiment}", 2, &["an experiment must follow the '#'"]);
    petra.ok("init ./{experiment}#iris");
    petra.ok("snapshot a.img ./{experiment}#iris/run-1 --name a");
    petra.fails(
        "snapshot a.img ./{experiment}#mnist/run-1",
        2,
        &["petra init", "{experiment}#mnist'"],
    );
    petra.ok("restore ./{experiment}#iris/run-1/a b.img");
    petra.ok("gc ./{experiment}#iris");
    assert_eq!(petra.ok("ls ./iris"), "iris");
}

#[test]
fn a_default_repository() {
    let mut petra = Sandbox::with_story();
    assert_eq!(petra.ok("ls --repository ./repo"), "iris");
    assert_eq!(petra.ok("ls --repository ./repo #iris"), "run-1");
    let output = petra.command().arg("ls").env("PETRA_REPOSITORY", "./repo").output().unwrap();
    assert_eq!(output.stdout, b"iris\n");
}

#[test]
fn quiet_says_nothing_and_still_prints_the_url() {
    let mut petra = Sandbox::with_story();
    let done = petra.run("--quiet snapshot work.img ./repo#iris/run-1");
    assert!(done.stdout.starts_with("file://") && done.stderr.is_empty());
    let done = petra.run("restore --quiet ./repo#iris/run-1/final/models m.img");
    assert_eq!((done.stdout.as_str(), done.stderr.as_str()), ("", ""));
}

#[test]
fn a_reader_may_leave_early() {
    let petra = Sandbox::with_story();
    let mut child = petra.command();
    let mut child =
        child.args(["ls", "./repo"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_demo_tells_the_truth() {
    let mut petra = Sandbox::new();
    let done = petra.run("demo --dir demo");
    assert_eq!(done.code, 0, "{}", done.stderr);
    petra.assert_same("demo/volume-before.img", "demo/restored.img");
    // Each command that it prints works.
    let commands = done.stdout.lines().filter_map(|line| line.trim().split_once("petra "));
    let commands: Vec<&str> = commands.map(|(_, arguments)| arguments).collect();
    assert!(commands.len() >= 6, "{}", done.stdout);
    for command in commands {
        petra.ok(command);
    }
    petra.fails("demo --dir demo", 2, &["is not empty"]);
    let made = petra.json("demo --dir other --remove");
    assert_eq!(made["identical"], true);
    assert!(!petra.path("other").exists());
}

#[test]
fn shells_and_manuals() {
    let mut petra = Sandbox::new();
    for shell in ["bash", "zsh", "fish"] {
        assert!(petra.ok(&format!("completions {shell}")).contains("petra"));
    }
    let page = petra.ok("man");
    assert!(page.contains(".TH petra 1") && page.contains("Exit codes:"), "{page}");
    petra.ok("man pages");
    assert!(petra.path("pages/petra.1").exists() && petra.path("pages/petra-restore.1").exists());
    insta::assert_snapshot!("help", petra.ok("--help"));
}

#[test]
fn copies_to_another_repository() {
    let mut petra = Sandbox::with_story();
    petra.ok("init ./other --chunking fixed-16k");
    petra.forget();
    petra.ok("copy ./repo#iris/run-1/initial ./other --dry-run");
    let copy = petra.ok("copy ./repo#iris/run-1/initial ./other");
    petra.ok("copy ./repo ./other");
    petra.ok("copy ./repo#iris ./other");
    petra.ok("ls ./other#iris/run-1");
    petra.fails("copy ./repo ./repo", 2, &["the same repository"]);
    petra.fails("copy ./repo ./other#iris", 2, &["is a part of a repository"]);
    insta::assert_snapshot!("copies", petra.transcript());
    assert!(copy.contains("/other#iris/run-1/0"), "{copy}");
    petra.ok(&format!("restore {copy}/workspace a.img"));
    petra.assert_same("a.img", "work-before.img");
    petra.ok("restore ./other#iris/run-1/final/workspace b.img");
    petra.assert_same("b.img", "work.img");
    // A repository for each experiment.
    petra.ok("init ./by-{experiment}#iris");
    petra.ok("copy ./repo ./by-{experiment}");
    petra.ok("restore ./by-{experiment}#iris/run-1/final/models c.img");
    petra.assert_same("c.img", "models.img");
}

#[test]
fn repairs_from_the_repository_and_from_a_volume() {
    let mut petra = Sandbox::with_story();
    petra.ok("repair ./repo");
    // The largest pack holds the data of the first snapshot.
    let pack = common::objects(&petra.path("repo/packs")).remove(0);
    let mut bytes = fs::read(&pack).unwrap();
    bytes[1_500_000] ^= 1;
    fs::write(&pack, bytes).unwrap();
    let entry = common::objects(&petra.path("repo/runs")).remove(0);
    fs::remove_file(entry).unwrap();
    petra.fails("repair ./repo --dry-run", 3, &["1 problem left"]);
    petra.fails("repair ./repo", 3, &["petra repair --source NAME=SOURCE"]);
    petra.fails("repair ./repo", 3, &["1 problem left"]);
    let healed = petra.ok("repair ./repo --source workspace=work-before.img");
    assert!(healed.contains("healed from source workspace"), "{healed}");
    assert_eq!(petra.ok("repair ./repo"), "nothing to repair");
    petra.ok("verify --read-data ./repo");
    petra.ok("restore ./repo#iris/run-1/initial/workspace a.img");
    petra.assert_same("a.img", "work-before.img");
    petra.fails("repair ./repo#iris", 2, &["is a part of a repository"]);
    petra.fails("verify ./repo --sample 5%", 2, &["--read-data"]);
    petra.fails("verify ./repo --read-data --sample 5", 2, &["write it as 5%"]);
    let sampled = petra.ok("verify ./repo --read-data --sample 50% --seed 3");
    assert!(sampled.contains("(50% by --seed 3)"), "{sampled}");
}

#[test]
fn a_damaged_record_is_told_after_the_others() {
    let mut petra = Sandbox::with_story();
    let record = common::objects(&petra.path("repo/snaps")).remove(0);
    let mut bytes = fs::read(&record).unwrap();
    bytes[300] ^= 1;
    fs::write(&record, bytes).unwrap();
    let done = petra.run("ls ./repo#iris/run-1");
    assert_eq!(done.code, 3, "{}", done.stderr);
    assert_eq!(done.stdout.lines().count(), 2, "a heading and one snapshot:\n{}", done.stdout);
    assert!(done.stderr.contains("is damaged"), "{}", done.stderr);
}
