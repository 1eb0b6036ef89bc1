//! What a store says when its surroundings are wrong: the cause decides what a caller does next.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

use bytes::Bytes;
use petra_engine::error::ErrorKind;
use petra_engine::store::{Creation, LocalStore, S3Options, S3Store, Store, StoreErrorCause};
use petra_tests::mount::Tmpfs;
use petra_tests::outcomes::causes;
use petra_tests::s3::{Access, InProcessS3, VersityGw, free_address};
use petra_tests::scripted::{ScriptedS3, answer, error};

use super::conformance::{body, key, keys};

async fn all_fail_with(store: &dyn Store, cause: StoreErrorCause) {
    for (operation, outcome) in causes(store).await {
        assert_eq!(outcome, Err(cause), "{operation} in {}", store.location());
    }
}

async fn connect(access: &Access, bucket: &str, change: impl FnOnce(&mut S3Options)) -> S3Store {
    let mut location = access.location("");
    location.bucket = bucket.to_owned();
    let mut options = S3Options { attempts: 2, ..access.options() };
    change(&mut options);
    S3Store::connect_with(&location, options).await.unwrap()
}

#[tokio::test]
async fn no_such_bucket() {
    let in_process = InProcessS3::start();
    let store = connect(in_process.access(), "elsewhere", |_| {}).await;
    assert_eq!(store.list("", None).await.unwrap_err().cause, StoreErrorCause::NoContainer);
    store.create_bucket().await.unwrap();
    assert_eq!(store.list("", None).await.unwrap().entries, []);
    let Some(server) = VersityGw::start() else { return };
    let store = connect(server.access(), "elsewhere", |_| {}).await;
    all_fail_with(&store, StoreErrorCause::NoContainer).await;
    store.create_bucket().await.unwrap();
    store.create_bucket().await.unwrap();
    store.put(&key("config"), body(10)).await.unwrap();
}

#[tokio::test]
async fn wrong_credentials() {
    let in_process = InProcessS3::start();
    let versitygw = VersityGw::start();
    for access in
        [Some(in_process.access()), versitygw.as_ref().map(VersityGw::access)].into_iter().flatten()
    {
        for wrong_id in [true, false] {
            let store = connect(access, &access.bucket, |options| {
                let credentials = options.credentials.as_mut().unwrap();
                if wrong_id {
                    credentials.access_key_id = "someone".to_owned();
                } else {
                    credentials.secret_access_key = "wrong".to_owned();
                }
            })
            .await;
            all_fail_with(&store, StoreErrorCause::Credentials).await;
        }
    }
}

#[test]
fn no_credentials() {
    let server = InProcessS3::start();
    let mut child = Command::new(env!("CARGO_BIN_EXE_petra-test-child"));
    child.args(["credentials", &server.access().url("").to_string()]);
    child.env_clear().env("AWS_EC2_METADATA_DISABLED", "true").env("HOME", "/nonexistent");
    let output = child.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8(output.stdout).unwrap();
    let (on_aws, here): (Vec<&str>, Vec<&str>) =
        said.lines().partition(|line| line.starts_with("on AWS"));
    assert_eq!(here.len(), 6, "{said}");
    assert!(here.iter().all(|line| line.ends_with(": Credentials")), "{said}");
    assert!(on_aws.len() == 1 && on_aws[0].contains("no region"), "{said}");
}

#[tokio::test]
async fn a_server_that_is_away() {
    let store = connect(&Access::to(free_address()), "bucket", |_| {}).await;
    all_fail_with(&store, StoreErrorCause::Unavailable).await;
    assert_eq!(store.get(&key("a")).await.unwrap_err().kind(), ErrorKind::Retry);
}

#[tokio::test]
async fn a_server_that_does_not_answer() {
    // The system accepts connections for it.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let access = Access::to(silent.local_addr().unwrap());
    let store =
        connect(&access, "bucket", |options| options.response_timeout = Duration::from_millis(200))
            .await;
    let start = Instant::now();
    all_fail_with(&store, StoreErrorCause::Unavailable).await;
    assert!(start.elapsed() < Duration::from_secs(60));
}

#[tokio::test]
async fn what_servers_answer_decides_the_cause() {
    for (status, code, cause) in [
        ("403 Forbidden", "AccessDenied", StoreErrorCause::Denied),
        ("400 Bad Request", "ExpiredToken", StoreErrorCause::Credentials),
        ("404 Not Found", "NoSuchBucket", StoreErrorCause::NoContainer),
        ("501 Not Implemented", "NotImplemented", StoreErrorCause::Unsupported),
        ("503 Slow Down", "SlowDown", StoreErrorCause::Unavailable),
        ("500 Oh", "InternalError", StoreErrorCause::Unavailable),
        ("507 Full", "XMinioStorageFull", StoreErrorCause::Full),
    ] {
        let server = ScriptedS3::start(vec![error(status, code)]);
        let store = connect(server.access(), "bucket", |_| {}).await;
        all_fail_with(&store, cause).await;
        let said = store.get(&key("a")).await.unwrap_err().to_string();
        assert!(said.contains(code) && said.contains("Says the script."), "{said}");
    }
}

#[tokio::test]
async fn creates_are_repeated_until_the_server_decides() {
    let conflict = error("409 Conflict", "ConditionalRequestConflict");
    let exists = error("412 Precondition Failed", "PreconditionFailed");
    for (last, expected) in
        [(answer("200 OK", &["ETag: \"1\""], ""), Creation::Created), (exists, Creation::Exists)]
    {
        let server = ScriptedS3::start(vec![
            conflict.clone(),
            error("503 Busy", "SlowDown"),
            conflict.clone(),
            last,
        ]);
        let store = connect(server.access(), "bucket", |options| options.attempts = 4).await;
        assert_eq!(store.create(&key("snaps/1"), body(10)).await.unwrap(), expected);
        assert_eq!(server.requests().len(), 4);
        for request in server.requests() {
            let request = request.to_ascii_lowercase();
            assert!(
                request.contains("if-none-match: *\r\n")
                    && request.contains("content-length: 10\r\n"),
                "{request}"
            );
            assert!(!request.contains("checksum") && !request.contains("chunked"), "{request}");
        }
    }
    // A conflict that stays is no answer, least of all "lost".
    let server = ScriptedS3::start(vec![conflict]);
    let store = connect(server.access(), "bucket", |_| {}).await;
    let error = store.create(&key("snaps/1"), body(10)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Retry);
}

#[tokio::test]
async fn answers_that_break_off_are_asked_for_again() {
    let broken =
        "HTTP/1.1 200 OK\r\nContent-Length: 10\r\nConnection: close\r\n\r\n01234".to_owned();
    let whole = answer("200 OK", &[], "0123456789");
    let server = ScriptedS3::start(vec![broken.clone(), whole]);
    let store = connect(server.access(), "bucket", |_| {}).await;
    assert_eq!(store.get(&key("a")).await.unwrap(), "0123456789");
    let server = ScriptedS3::start(vec![broken]);
    let store = connect(server.access(), "bucket", |_| {}).await;
    assert_eq!(store.get(&key("a")).await.unwrap_err().cause, StoreErrorCause::Unavailable);
}

#[tokio::test]
async fn a_range_must_be_the_one_that_was_asked_for() {
    let part = |range: &str, body: &str| {
        answer("206 Partial Content", &[&format!("Content-Range: bytes {range}")], body)
    };
    for (answer, good) in [
        (part("5-9/100", "56789"), true),
        (part("5-7/8", "567"), true),
        (part("0-4/100", "01234"), false),
        (part("5-10/100", "567890"), false),
        (answer("200 OK", &[], "0123456789"), false),
    ] {
        let server = ScriptedS3::start(vec![answer.clone()]);
        let store = connect(server.access(), "bucket", |_| {}).await;
        let got = store.get_range(&key("a"), 5..10).await;
        assert_eq!(got.is_ok(), good, "{answer}: {got:?}");
        let request = server.requests().concat().to_ascii_lowercase();
        assert!(request.contains("range: bytes=5-9\r\n"), "{request}");
    }
}

#[tokio::test]
async fn a_directory_that_can_not_be_written() {
    let check = async |store: LocalStore| {
        let denied = Err(StoreErrorCause::Denied);
        let outcomes = causes(&store).await;
        for (operation, outcome) in outcomes {
            let expected = match operation {
                "put" | "create" => denied,
                "get" | "get_range" => Err(StoreErrorCause::NotFound),
                // There is nothing to delete.
                _ => Ok(()),
            };
            assert_eq!(outcome, expected, "{operation}");
        }
        let error = store.delete(&key("pins/1")).await.unwrap_err();
        assert_eq!((error.cause, error.kind()), (StoreErrorCause::Denied, ErrorKind::Fix));
    };
    if !rustix::process::geteuid().is_root() {
        let dir = tempfile::tempdir().unwrap();
        let store = LocalStore::new(dir.path());
        store.put(&key("pins/1"), body(1)).await.unwrap();
        for path in [dir.path().join("pins"), dir.path().to_owned()] {
            std::fs::set_permissions(path, PermissionsExt::from_mode(0o555)).unwrap();
        }
        check(store).await;
        for path in [dir.path().to_owned(), dir.path().join("pins")] {
            std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
        }
    } else if let Some(tmpfs) = Tmpfs::mount("size=1m") {
        // Root may write whatever the permissions say, but not on a read-only filesystem.
        let store = LocalStore::new(tmpfs.path());
        store.put(&key("pins/1"), body(1)).await.unwrap();
        tmpfs.remount("ro");
        check(store).await;
    }
}

#[tokio::test]
async fn a_full_disk_leaves_nothing_behind() {
    let Some(tmpfs) = Tmpfs::mount("size=8m") else { return };
    let store: super::Shared = std::sync::Arc::new(LocalStore::new(tmpfs.path()));
    store.put(&key("config"), body(10)).await.unwrap();
    let free = || rustix::fs::statvfs(tmpfs.path()).unwrap().f_bavail;
    let before = free();
    for len in [9 << 20, (16 << 20) + 1] {
        let error = store.put(&key("packs/big/1"), body(len)).await.unwrap_err();
        assert_eq!((error.cause, error.kind()), (StoreErrorCause::Full, ErrorKind::Fix), "{error}");
        assert!(error.to_string().contains("No space left"), "{error}");
    }
    assert_eq!(free(), before);
    // Small objects, until there is no room.
    let small = Bytes::from(vec![7; 300_000]);
    let mut stored = 0;
    let error = loop {
        match store.create(&key(&format!("packs/small/{stored:02}")), small.clone()).await {
            Ok(_) => stored += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error.cause, StoreErrorCause::Full);
    assert!((20..28).contains(&stored), "{stored}");
    assert_eq!(keys(&store, "packs/", None).await.len(), stored);
    for n in 0..stored {
        assert!(store.get(&key(&format!("packs/small/{n:02}"))).await.unwrap() == small);
        store.delete(&key(&format!("packs/small/{n:02}"))).await.unwrap();
    }
    // Deleting gives the room back.
    store.put(&key("packs/big/1"), body(6 << 20)).await.unwrap();
}
