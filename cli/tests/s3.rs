//! Buckets: the story through S3 servers, and what is said when one does not answer as it should.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic")]

mod common;

use common::Sandbox;
use petra_tests::s3::{Access, InProcessS3, VersityGw, free_address};

/// A sandbox whose commands reach this server.
fn sandbox(access: &Access) -> Sandbox {
    let mut sandbox = Sandbox::new();
    sandbox.environment = access.environment().map(|(name, value)| (name.to_owned(), value)).into();
    sandbox
}

fn url(access: &Access, bucket: &str, rest: &str) -> String {
    format!("s3://{bucket}{rest}?endpoint={}&region=us-east-1", access.endpoint)
}

fn story(access: &Access) {
    let mut petra = sandbox(access);
    let repository = url(access, &access.bucket, "/team%20a");
    petra.volume("work.img", 8 << 20, 3 << 20, 1);
    std::fs::copy(petra.path("work.img"), petra.path("before.img")).unwrap();
    petra.ok(&format!("init {repository}"));
    let first = petra.ok(&format!("snapshot work.img {repository}#iris/run-1 --name initial"));
    petra.overwrite("work.img", 1 << 20, 1000, 3);
    petra.ok(&format!("snapshot work.img {repository}#iris/run-1 --name final"));

    petra.ok(&format!("restore {first} restored.img"));
    petra.assert_same("restored.img", "before.img");
    let final_url = format!("{repository}#iris/run-1/final");
    petra.ok(&format!("restore {final_url} restored.img --in-place"));
    petra.assert_same("restored.img", "work.img");

    assert_eq!(petra.ok(&format!("ls {repository}")), "iris");
    let diff = petra.json(&format!("diff {first} {final_url}"));
    assert!(diff["volumes"][0]["changed_bytes"].as_u64().unwrap() < 1 << 20, "{diff:#}");
    petra.ok(&format!("verify --read-data {repository}"));
    petra.ok(&format!("rm {final_url}"));
    let report = petra.json(&format!("gc {repository} --grace 0"));
    assert!(report["freed_bytes"].as_u64().unwrap() > 0, "{report:#}");
    petra.ok(&format!("verify --read-data {repository}"));
    petra.fails(
        &format!("init {repository}"),
        2,
        &["already holds a repository", "petra ls 's3://"],
    );
}

#[test]
fn through_a_server_in_this_process() {
    story(InProcessS3::start().access());
}

#[test]
fn through_a_real_server() {
    if let Some(server) = VersityGw::start() {
        story(server.access());
    }
}

#[test]
fn a_bucket_that_is_not_there() {
    // The server in this process does not tell a missing bucket from a missing object.
    let Some(server) = VersityGw::start() else { return };
    let mut petra = sandbox(server.access());
    let missing = url(server.access(), "no-such-bucket", "");
    let said = ["no-such-bucket", "petra init --create-bucket 's3://"];
    petra.fails(&format!("ls {missing}"), 2, &said);
    petra.fails(&format!("init {missing}"), 2, &said);
    petra.ok(&format!("init --create-bucket {missing}"));
    assert_eq!(petra.ok(&format!("ls {missing}")), "");
}

#[test]
fn a_bucket_without_a_repository() {
    let server = InProcessS3::start();
    let mut petra = sandbox(server.access());
    let empty = url(server.access(), &server.access().bucket, "/nothing");
    petra.fails(&format!("ls {empty}"), 2, &["holds no Petra repository", "petra init 's3://"]);
    // A bucket that is there is not made again.
    petra.ok(&format!("init --create-bucket {empty}"));
}

#[test]
fn credentials_that_are_missing_or_wrong() {
    let server = InProcessS3::start();
    let mut petra = sandbox(server.access());
    let repository = url(server.access(), &server.access().bucket, "/team-a");
    let hint = "hint: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY";
    petra.environment.retain(|(name, _)| name == "AWS_EC2_METADATA_DISABLED");
    petra.fails(&format!("ls {repository}"), 2, &[hint]);
    petra.fails(&format!("ls {repository}&profile=nobody"), 2, &[]);
    petra.environment.push(("AWS_ACCESS_KEY_ID".to_owned(), "stranger".to_owned()));
    petra.environment.push(("AWS_SECRET_ACCESS_KEY".to_owned(), "guess".to_owned()));
    petra.fails(&format!("ls {repository}"), 2, &[hint]);
}

#[test]
fn a_server_that_is_away() {
    let access = Access::to(free_address());
    let mut petra = sandbox(&access);
    let repository = url(&access, "bucket", "");
    petra.fails(&format!("ls {repository}"), 4, &["hint: check the endpoint and the network"]);
}
