//! Encrypted repositories on the command line: every way to give a secret, and what happens without one.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "a test may panic and talk"
)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;

use common::{Sandbox, objects, shape};
use petra_engine::RepositoryUrl;
use petra_engine::access::SecretsDirectory;

/// A repository `repo` that the passphrase in `pass` opens, with one snapshot.
fn encrypted() -> Sandbox {
    let mut petra = Sandbox::new();
    petra.volume("work.img", 4 << 20, 1 << 20, 1);
    fs::write(petra.path("pass"), "correct horse\n").unwrap();
    fs::write(petra.path("wrong"), "battery staple\n").unwrap();
    petra.ok("init --encrypt --passphrase-file pass ./repo --key-label first");
    petra.ok("--passphrase-file pass snapshot work.img ./repo#iris/run-1 --name initial -m secret");
    petra
}

#[test]
fn every_command_takes_the_secret() {
    let mut petra = encrypted();
    for line in [
        "ls ./repo",
        "ls --recursive ./repo",
        "info ./repo",
        "info ./repo#iris/run-1/initial",
        "diff ./repo#iris/run-1/initial ./repo#iris/run-1/@latest",
        "du ./repo",
        "verify --read-data ./repo",
        "restore ./repo#iris/run-1/initial/workspace new.img",
        "rm ./repo#iris/run-1/initial",
        "gc ./repo --grace 0",
    ] {
        petra.fails(line, 2, &["is encrypted, and no passphrase", "--passphrase-file FILE"]);
        petra.ok(&format!("{line} --passphrase-file pass"));
    }
    petra.assert_same("work.img", "new.img");
    petra.environment.push(("PETRA_PASSPHRASE".to_owned(), "correct horse".to_owned()));
    petra.ok("ls ./repo");
    let info = petra.json("info ./repo");
    assert_eq!(info["repository"]["config"]["encryption"]["cipher"], "aes-256-gcm");
    // What is said goes before what is set.
    petra.fails(
        "ls ./repo --passphrase-file wrong",
        2,
        &["the passphrase opens none of the 1 keys"],
    );
    petra.environment[0] = ("PETRA_PASSPHRASE_FILE".to_owned(), "pass".to_owned());
    petra.ok("ls ./repo");
    petra.environment.push(("PETRA_KEY_FILE".to_owned(), "pass".to_owned()));
    petra.fails("ls ./repo", 2, &["more than one of PETRA_PASSPHRASE"]);
    petra.ok("ls ./repo --passphrase-file pass");
}

#[test]
fn what_people_get_wrong() {
    let mut petra = encrypted();
    petra.ok("init ./plain");
    fs::write(petra.path("empty"), "\n").unwrap();
    for (line, said) in [
        ("ls ./plain --passphrase-file pass", "is not encrypted"),
        ("ls ./repo --passphrase-file nothing", "read nothing"),
        ("ls ./repo --passphrase-file empty", "the passphrase is empty"),
        ("ls ./repo --key-file pass", "a key file has 32 to 65536 bytes, not 13"),
        ("ls ./repo --key-file pass --passphrase-file pass", "cannot be used with"),
        ("init ./new --passphrase-file pass", "but not --encrypt"),
        ("init ./new --encrypt", "there is no terminal to ask"),
        ("init ./new --key-label x", "--encrypt"),
        ("key list ./plain", "is not encrypted"),
        ("key list ./nowhere", "does not exist"),
        ("key add ./repo --passphrase-file pass", "there is no terminal to ask"),
        ("key add ./plain --new-passphrase-file wrong", "is not encrypted"),
        ("key remove ./repo iris --passphrase-file pass", "'iris' is not the id of a key"),
        ("key remove ./repo 01M80PESERDX83KDBVSMYGHJ8N --passphrase-file pass", "no key"),
        ("key rotate ./repo --passphrase-file wrong --new-passphrase-file pass", "opens none"),
    ] {
        petra.fails(line, 2, &[said]);
    }
    assert!(!petra.path("new").exists());
    let failure = petra.run("--json ls ./repo --passphrase-file wrong");
    assert!(failure.stderr.starts_with("{\"error\":{\"kind\":\"fix\""), "{}", failure.stderr);
    assert!(!failure.stderr.contains("battery"), "{}", failure.stderr);
}

#[test]
fn keys_come_and_go() {
    let mut petra = encrypted();
    petra.ok("key generate robot.key");
    let mode = petra.path("robot.key").metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    petra.fails("key generate robot.key", 2, &["write robot.key"]);
    let robot =
        petra.ok("key add ./repo --passphrase-file pass --new-key-file robot.key --label robot");
    petra.ok("ls ./repo --key-file robot.key");
    petra.ok("ls ./repo --passphrase-file pass");

    // Nobody needs a secret to see which keys there are.
    let listed = petra.json("key list ./repo");
    let keys = listed["keys"].as_array().unwrap();
    assert_eq!(keys.len(), 2);
    assert_eq!((&keys[0]["kind"], &keys[0]["label"]), (&"passphrase".into(), &"first".into()));
    assert_eq!((&keys[1]["kind"], &keys[1]["label"]), (&"key-file".into(), &"robot".into()));
    assert_eq!(keys[1]["id"], robot.as_str());
    let first = keys[0]["id"].as_str().unwrap().to_owned();

    let rotated =
        petra.json("key rotate ./repo --passphrase-file pass --new-passphrase-file wrong");
    assert_eq!(rotated["removed"], first.as_str());
    petra.fails("ls ./repo --passphrase-file pass", 2, &["opens none of the 2 keys"]);
    petra.ok("ls ./repo --passphrase-file wrong");
    petra.ok("restore ./repo#iris/run-1/initial new.img --key-file robot.key");
    petra.assert_same("work.img", "new.img");

    petra.ok(&format!("key remove ./repo {robot} --passphrase-file wrong"));
    petra.fails("ls ./repo --key-file robot.key", 2, &["the key file opens none of the 1 keys"]);
    let last = rotated["added"]["id"].as_str().unwrap();
    let line = format!("key remove ./repo {last} --passphrase-file wrong");
    petra.fails(&line, 2, &["is the only key"]);
    petra.ok("ls ./repo --passphrase-file wrong");

    let shapes: String = [
        "key list ./repo",
        "key add ./repo --passphrase-file wrong --new-key-file robot.key",
        "key generate other.key",
        "init ./other --encrypt --key-file other.key",
    ]
    .map(|line| format!("$ petra --json {line}\n{:#}\n\n", shape(&petra.json(line))))
    .concat();
    insta::assert_snapshot!("shapes", shapes);
}

#[test]
fn the_store_shows_nothing() {
    let petra = encrypted();
    let plain = fs::read(petra.path("work.img")).unwrap();
    let tells: [&[u8]; 6] =
        [b"iris", b"run-1", b"workspace", b"initial", b"correct horse", &plain[5_000..5_032]];
    let found = objects(&petra.path("repo"));
    assert!(found.len() >= 6);
    for path in found {
        let body = fs::read(&path).unwrap();
        let name = path.strip_prefix(petra.path("repo")).unwrap().to_string_lossy().into_owned();
        for tell in tells {
            assert!(!body.windows(tell.len()).any(|w| w == tell), "{name} shows {tell:?}");
            assert!(!name.as_bytes().windows(tell.len()).any(|w| w == tell), "{name}");
        }
    }
}

/// As the CSI driver keeps them for its helper processes.
#[test]
fn a_directory_holds_the_secrets_of_several_repositories() {
    let mut petra = encrypted();
    petra.ok("init ./plain");
    let directory = SecretsDirectory::new(petra.path("secrets"));
    let put = |petra: &Sandbox, repository: &str, passphrase: &str| {
        let path = petra.path(repository).canonicalize().unwrap();
        let secrets = BTreeMap::from([("passphrase".to_owned(), passphrase.to_owned())]);
        directory.put(&RepositoryUrl::Directory(path), &secrets).unwrap();
    };
    let url = format!("file://{}", petra.path("repo").canonicalize().unwrap().display());
    petra.fails(&format!("ls {url} --secrets secrets"), 2, &["is encrypted"]);
    put(&petra, "repo", "correct horse");
    petra.ok(&format!("ls {url} --secrets secrets"));
    petra.ok("ls ./plain --secrets secrets");
    // What is kept for a repository goes before what is meant for all.
    petra.ok(&format!("ls {url} --secrets secrets --passphrase-file wrong"));
    put(&petra, "repo", "battery staple");
    petra.fails(&format!("ls {url} --secrets secrets --passphrase-file pass"), 2, &["opens none"]);
    // Nobody can put a plain repository in an encrypted one's place.
    put(&petra, "plain", "correct horse");
    let plain = format!("file://{}", petra.path("plain").canonicalize().unwrap().display());
    petra.fails(&format!("ls {plain} --secrets secrets"), 2, &["is not encrypted"]);
}
