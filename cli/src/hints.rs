//! What to do next about each error of the engine.

use std::io;

use petra_engine::store::{StoreError, StoreErrorCause};
use petra_engine::{Error, Item, PetraUrl, RepositoryUrl, SnapshotRef};

use crate::text::quoted;

const URL_EXAMPLE: &str = "a URL is REPOSITORY#EXPERIMENT/RUN/SNAPSHOT[/VOLUME], for example \
     file:///srv/petra#iris/run-1/@latest or \
     's3://bucket/prefix?endpoint=http://127.0.0.1:9000#iris/run-1/train.final/workspace'";

/// The next step after an error, where there is one. `at` is the URL that the command was about.
pub fn hint(error: &Error, at: Option<&PetraUrl>) -> Option<String> {
    Some(match error {
        Error::Url { url, .. } if !url.contains("://") && !url.contains('#') => {
            format!("for a directory write {}; {URL_EXAMPLE}", quoted(&format!("./{url}")))
        }
        Error::Url { .. } => URL_EXAMPLE.to_owned(),
        Error::Name { reason, .. } if reason.contains("bucket") => {
            "choose another name for the experiment, or put {experiment} in the prefix: \
             s3://BUCKET/{experiment}"
                .to_owned()
        }
        Error::Name { .. } => {
            "a name is up to 255 bytes of UTF-8 without '/' and control characters; in URLs it is \
             percent-encoded"
                .to_owned()
        }
        Error::NotARepository { location } => {
            format!("make one with: petra init {}", quoted(&init_url(location, at)))
        }
        Error::NotEmpty { location, found } if found.starts_with("already") => {
            format!("use it as it is: petra ls {}", quoted(location))
        }
        Error::NotEmpty { .. } => "choose an empty directory or another prefix".to_owned(),
        Error::Encrypted { .. } => {
            "say --passphrase-file FILE or --key-file FILE, or set PETRA_PASSPHRASE, \
             PETRA_PASSPHRASE_FILE or PETRA_KEY_FILE"
                .to_owned()
        }
        Error::NotEncrypted { .. } => {
            "a passphrase or key file was given: if this repository should be encrypted, someone \
             may have put another in its place; else leave out the option, and unset \
             PETRA_PASSPHRASE, PETRA_PASSPHRASE_FILE and PETRA_KEY_FILE"
                .to_owned()
        }
        Error::WrongKey { .. } => format!(
            "petra key list {} shows what kind of keys there are",
            at.map_or("URL".to_owned(), |url| quoted(&url.repository.to_string()))
        ),
        Error::Version { .. } => {
            "a newer Petra wrote this repository: use that version or a later one".to_owned()
        }
        Error::Unknown { what, name, known, .. } => unknown(what, name, known, at),
        Error::Ambiguous { matches, .. } => {
            let ids: Vec<String> = matches.iter().take(5).map(ToString::to_string).collect();
            let more = if matches.len() > ids.len() { ", ..." } else { "" };
            format!("give more of the id: {}{more}", ids.join(", "))
        }
        Error::Store(error) => return store(error, at),
        Error::Missing { .. } | Error::Damaged { .. } => {
            let repository = at.map_or("URL".to_owned(), |url| quoted(&url.repository.to_string()));
            format!(
                "petra verify {repository} lists every volume and range that is affected; petra \
                 restore --keep-going restores the rest"
            )
        }
        Error::Lost { .. } => {
            "run the snapshot again; if it was still working, collect with a longer gc --silent"
                .to_owned()
        }
        Error::Purged { .. } => format!(
            "petra ls --deleted {} lists what can still come back; a longer gc --grace keeps more",
            at.map_or("URL".to_owned(), |url| quoted(&url.repository.to_string()))
        ),
        Error::SourceChanged { .. } => {
            "stop its writer, or freeze or unmount it, and take the snapshot again".to_owned()
        }
        Error::Target { reason, .. } if reason.contains("exist") => {
            "choose a path that does not exist, or write only what differs with --in-place"
                .to_owned()
        }
        Error::Target { reason, .. } if reason.contains("another restore") => {
            "wait until it ends, or choose another path".to_owned()
        }
        Error::Target { reason, .. } if reason.contains("in use") => {
            "unmount or detach it first; lsblk and losetup show what uses it".to_owned()
        }
        Error::Target { .. } => {
            "give a path that does not exist, a block device at least as large as the volume, a \
             directory, or - for standard output"
                .to_owned()
        }
        Error::Io { cause, .. } => return local(cause),
        Error::Internal(_) => {
            "this is a defect of Petra: please report it with the output of the same command and \
             -vv"
            .to_owned()
        }
        // The first says what is wrong in full; the second was asked for.
        Error::Request(_) | Error::Cancelled => return None,
        _ => return None,
    })
}

/// A template becomes a repository with the experiment that the URL names.
fn init_url(location: &str, at: Option<&PetraUrl>) -> String {
    match at {
        Some(url) if url.repository.is_template() => match url.experiment() {
            Some(experiment) => format!("{}#{}", url.repository, experiment.encoded()),
            None => location.to_owned(),
        },
        Some(url) => url.repository.to_string(),
        None => location.to_owned(),
    }
}

fn unknown(what: &str, name: &str, known: &[String], at: Option<&PetraUrl>) -> String {
    let near = nearest(name, known);
    let mut parts = vec![];
    if !near.is_empty() {
        let near: Vec<String> = near.iter().map(|name| format!("{name:?}")).collect();
        parts.push(format!("did you mean {}?", near.join(" or ")));
    } else if !known.is_empty() && known.len() <= 5 {
        let known: Vec<String> = known.iter().map(|name| format!("{name:?}")).collect();
        parts.push(format!("there is {}.", known.join(", ")));
    }
    if let Some(url) = at {
        let (command, item) = around(what, &url.item);
        let url = PetraUrl { repository: url.repository.clone(), item };
        parts.push(format!("petra {command} {} lists what is there", quoted(&url.to_string())));
    }
    parts.join(" ")
}

/// The command that shows the siblings of what was not found.
fn around(what: &str, item: &Item) -> (&'static str, Item) {
    let in_run = |item: &Item| match item {
        Item::Run { experiment, run }
        | Item::Snapshot { snapshot: SnapshotRef::InRun { experiment, run, .. }, .. } => {
            Some((experiment.clone(), run.clone()))
        }
        _ => None,
    };
    match (what, item, in_run(item)) {
        ("volume", Item::Snapshot { snapshot, .. }, _) => {
            ("info", Item::Snapshot { snapshot: snapshot.clone(), volume: None })
        }
        ("deleted snapshot", _, Some((experiment, run))) => {
            ("ls --deleted", Item::Run { experiment, run })
        }
        ("deleted snapshot", ..) => ("ls --deleted", Item::Repository),
        ("snapshot", _, Some((experiment, run))) => ("ls", Item::Run { experiment, run }),
        ("run", _, Some((experiment, _))) => ("ls", Item::Experiment(experiment)),
        ("snapshot", ..) => ("ls --recursive", Item::Repository),
        ("key", ..) => ("key list", Item::Repository),
        _ => ("ls", Item::Repository),
    }
}

/// The names nearest to what was typed: at most three, near first, none that only shares a few letters.
pub fn nearest(name: &str, known: &[String]) -> Vec<String> {
    let typed = name.to_lowercase();
    let limit = (typed.chars().count() / 3).clamp(1, 4);
    let mut near: Vec<(usize, &String)> = known
        .iter()
        .map(|known| (strsim::osa_distance(&typed, &known.to_lowercase()), known))
        .filter(|(distance, _)| *distance <= limit)
        .collect();
    near.sort();
    near.into_iter().take(3).map(|(_, name)| name.clone()).collect()
}

fn store(error: &StoreError, at: Option<&PetraUrl>) -> Option<String> {
    let is_s3 = at.map_or(error.location.starts_with("s3:"), |url| {
        matches!(url.repository, RepositoryUrl::S3(_))
    });
    let text = match (error.cause, is_s3) {
        (StoreErrorCause::NotFound, _) => {
            "an object that should be there is not: petra verify tells what needs it"
        }
        (StoreErrorCause::NoContainer, true) => {
            return Some(format!(
                "correct the bucket, endpoint or region in the URL, or make the bucket with: petra \
                 init --create-bucket {}",
                quoted(&init_url(&error.location, at))
            ));
        }
        (StoreErrorCause::NoContainer, false) => {
            return Some(format!(
                "the directory does not exist: correct it, or make a repository with: petra init {}",
                quoted(&init_url(&error.location, at))
            ));
        }
        (StoreErrorCause::Denied, true) => {
            "the credentials need s3:GetObject, s3:PutObject and s3:ListBucket on this bucket, and \
             s3:DeleteObject for snapshot and gc"
        }
        (StoreErrorCause::Denied, false) => {
            "run as a user who may read and write the repository's directory"
        }
        (StoreErrorCause::Credentials, _) => {
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (or ?profile=NAME in the \
             URL) for a profile of ~/.aws/credentials or ~/.aws/config"
        }
        (StoreErrorCause::Full, _) => {
            "make room: petra rm and petra gc give back what old snapshots hold alone; what is \
             committed is safe"
        }
        (StoreErrorCause::Unsupported, _) => {
            "the server must support conditional writes (PutObject with If-None-Match); update it or \
             use another"
        }
        (StoreErrorCause::NotExclusive, _) => {
            "use a server that keeps PutObject with If-None-Match: *; where you see to it that only one \
             process writes at any time, petra init --single-writer makes a repository without it; \
             reading needs none of this"
        }
        (StoreErrorCause::Unavailable, _) => {
            "check the endpoint and the network, then run the same command again: what is committed \
             is safe"
        }
        _ => return None,
    };
    Some(text.to_owned())
}

/// The next step after an error of the local machine.
pub fn local(cause: &io::Error) -> Option<String> {
    let text = match cause.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
            "check the path; the directory must exist"
        }
        io::ErrorKind::PermissionDenied => {
            "run as a user who has access to it; block devices usually need root"
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "make room there, then run the same command again"
        }
        io::ErrorKind::ResourceBusy => "something else uses it: unmount or detach it first",
        io::ErrorKind::BrokenPipe => "the program that reads the output ended early",
        _ => return None,
    };
    Some(text.to_owned())
}

#[cfg(test)]
#[path = "hints_tests.rs"]
mod tests;
