use std::path::PathBuf;

use super::*;
use petra_engine::SnapshotId;

fn url(text: &str) -> PetraUrl {
    text.parse().unwrap()
}

fn hint_at(error: &Error, text: &str) -> String {
    hint(error, Some(&url(text))).unwrap()
}

fn store_error(location: &str, cause: StoreErrorCause) -> Error {
    let key = "config".to_owned();
    let location = location.to_owned();
    StoreError { operation: "read", key, location, cause, detail: "no".to_owned() }.into()
}

fn unknown_error(what: &'static str, name: &str, known: &[&str]) -> Error {
    let known = known.iter().map(ToString::to_string).collect();
    Error::Unknown { what, name: name.to_owned(), within: "here".to_owned(), known }
}

#[test]
fn a_wrong_url_gets_the_grammar() {
    let error = "repo".parse::<PetraUrl>().unwrap_err();
    let text = hint(&error, None).unwrap();
    assert!(text.starts_with("for a directory write ./repo;"), "{text}");
    let error = "s3://b?colour=red".parse::<PetraUrl>().unwrap_err();
    assert!(hint(&error, None).unwrap().starts_with("a URL is REPOSITORY#EXPERIMENT/RUN"));
}

#[test]
fn a_bucket_made_of_a_name_gets_another_place_for_it() {
    let error = url("s3://ml-{experiment}#Iris/r").resolved_repository().unwrap_err();
    assert!(hint(&error, None).unwrap().contains("s3://BUCKET/{experiment}"));
    let error = "file:///r#a/%2e%2e".parse::<PetraUrl>().unwrap_err();
    assert!(hint(&error, None).unwrap().contains("255 bytes"));
}

#[test]
fn what_is_no_repository_can_become_one() {
    let error = Error::NotARepository { location: "file:///r".to_owned() };
    assert_eq!(hint_at(&error, "file:///r"), "make one with: petra init file:///r");
    assert_eq!(
        hint_at(&error, "file:///r/{experiment}#e/run"),
        "make one with: petra init 'file:///r/{experiment}#e'"
    );
    let not_empty = |found| Error::NotEmpty { location: "file:///r".to_owned(), found };
    let text = hint(&not_empty("already holds a repository"), None).unwrap();
    assert_eq!(text, "use it as it is: petra ls file:///r");
    assert!(hint(&not_empty("is not empty"), None).unwrap().contains("another prefix"));
    let error = Error::Version { object: "config".to_owned(), found: 9, supported: 1 };
    assert!(hint(&error, None).unwrap().contains("newer Petra"));
}

#[test]
fn unknown_names_get_near_ones_and_the_way_to_see_all() {
    let at = "file:///r#iris/run-1/initial/workspac";
    let cases = [
        (
            unknown_error("volume", "workspac", &["workspace", "data-1"]),
            "did you mean \"workspace\"? petra info file:///r#iris/run-1/initial lists what is there",
        ),
        (
            unknown_error("snapshot", "inital", &["initial", "final"]),
            "did you mean \"initial\"? petra ls file:///r#iris/run-1 lists what is there",
        ),
        (
            unknown_error("run", "nightly", &["run-1", "run-2"]),
            "there is \"run-1\", \"run-2\". petra ls file:///r#iris lists what is there",
        ),
        (
            unknown_error("experiment", "Iris", &["iris", "irish"]),
            "did you mean \"iris\" or \"irish\"? petra ls file:///r lists what is there",
        ),
        (unknown_error("experiment", "x", &[]), "petra ls file:///r lists what is there"),
    ];
    for (error, expected) in cases {
        assert_eq!(hint_at(&error, at), expected);
    }
    let id = SnapshotId::from_parts(1, 2);
    assert_eq!(
        hint_at(&unknown_error("snapshot", "x", &[]), &format!("file:///r#@{id}")),
        "petra ls --recursive file:///r lists what is there"
    );
}

#[test]
fn far_names_are_not_offered() {
    let known: Vec<String> = ["run-1", "run-2", "serving"].map(String::from).into();
    assert_eq!(nearest("run-3", &known), ["run-1", "run-2"]);
    assert!(nearest("notebook", &known).is_empty());
    assert_eq!(nearest("x", &["y".to_owned()]), ["y"]);
}

#[test]
fn ambiguous_ids_are_listed() {
    let matches: Vec<SnapshotId> = (0..7).map(|n| SnapshotId::from_parts(1, n)).collect();
    let error = Error::Ambiguous { name: "0".to_owned(), within: "run".to_owned(), matches };
    let text = hint(&error, None).unwrap();
    assert!(text.ends_with(", ...") && text.matches("00000000").count() >= 5, "{text}");
}

#[test]
fn stores_that_refuse() {
    use StoreErrorCause as Cause;
    let s3 = "s3://bucket?endpoint=http://127.0.0.1:9000";
    for (location, cause, expected) in [
        (s3, Cause::NotFound, "petra verify"),
        (s3, Cause::NoContainer, "init --create-bucket 's3://bucket?"),
        ("file:///r", Cause::NoContainer, "petra init file:///r"),
        (s3, Cause::Denied, "s3:PutObject"),
        ("file:///r", Cause::Denied, "run as a user"),
        (s3, Cause::Credentials, "AWS_ACCESS_KEY_ID"),
        (s3, Cause::Full, "petra gc"),
        (s3, Cause::Unsupported, "conditional writes"),
        (s3, Cause::NotExclusive, "petra init --single-writer"),
        (s3, Cause::Unavailable, "run the same command again"),
    ] {
        let error = store_error(location, cause);
        for text in [hint(&error, None), hint(&error, Some(&url(location)))] {
            assert!(text.clone().unwrap().contains(expected), "{cause:?}: {text:?}");
        }
    }
    assert!(hint(&store_error(s3, Cause::Other), None).is_none());
}

#[test]
fn damage_and_lost_races() {
    let error = Error::Damaged { object: "packs/x".to_owned(), detail: "cut off".to_owned() };
    let text = hint_at(&error, "s3://b?region=eu#e/r/s");
    assert!(text.contains("petra verify 's3://b?region=eu'"), "{text}");
    assert!(text.contains("--keep-going"));
    let error = Error::Missing { object: "packs/x".to_owned(), needed_by: "it".to_owned() };
    assert!(hint(&error, None).unwrap().contains("petra verify"));
    let error = Error::Lost { session: SnapshotId::from_parts(1, 2) };
    assert!(hint(&error, None).unwrap().contains("again"));
    let error = Error::SourceChanged { path: "/dev/sdb".into(), detail: "shorter".to_owned() };
    assert!(hint(&error, None).unwrap().contains("unmount"));
}

#[test]
fn targets_and_files() {
    let target = |reason: &str| Error::Target { path: "/t".into(), reason: reason.to_owned() };
    assert!(hint(&target("it exists already"), None).unwrap().contains("--in-place"));
    assert!(hint(&target("another restore is writing it"), None).unwrap().contains("wait"));
    assert!(
        hint(&target("the device is mounted or otherwise in use"), None).unwrap().contains("lsblk")
    );
    assert!(hint(&target("it is too small"), None).unwrap().contains("at least as large"));
    for (kind, expected) in [
        (io::ErrorKind::NotFound, Some("directory must exist")),
        (io::ErrorKind::PermissionDenied, Some("usually need root")),
        (io::ErrorKind::StorageFull, Some("make room")),
        (io::ErrorKind::ResourceBusy, Some("unmount")),
        (io::ErrorKind::BrokenPipe, Some("ended early")),
        (io::ErrorKind::Other, None),
    ] {
        let error = Error::Io { action: "write", path: PathBuf::from("/t"), cause: kind.into() };
        let text = hint(&error, None);
        match expected {
            Some(expected) => assert!(text.unwrap().contains(expected), "{kind:?}"),
            None => assert_eq!(text, None),
        }
    }
}

#[test]
fn what_needs_no_hint_and_what_needs_a_report() {
    assert_eq!(hint(&Error::Cancelled, None), None);
    assert_eq!(hint(&Error::Request("no volumes".to_owned()), None), None);
    assert!(hint(&Error::Internal("died"), None).unwrap().contains("report"));
}
