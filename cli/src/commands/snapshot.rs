//! `petra snapshot`.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use petra_engine::record::SnapshotRecord;
use petra_engine::snapshot::{Parent, SnapshotRequest, snapshot};
use petra_engine::source::{FileSource, Source};
use petra_engine::{Item, Name, PetraUrl, Repository, Selector, SnapshotId, SnapshotRef};
use petra_volume::device::System;

use crate::failure::{At, Failure};
use crate::session::Session;
use crate::text::{bytes, count, duration_ms, quoted, ratio};
use crate::{lookup, view};

/// Options of `petra snapshot`.
#[derive(Debug, clap::Args)]
pub struct Snapshot {
    /// A disk image or block device, and the name of its volume [default names: workspace, data-1, ...]
    #[arg(required = true, value_name = "[NAME=]SOURCE")]
    sources: Vec<OsString>,
    /// The run that the snapshot belongs to: REPOSITORY#EXPERIMENT/RUN
    #[arg(required = true, value_name = "URL")]
    url: String,
    #[command(flatten)]
    words: Words,
    /// The snapshot of this run to build on (id, name or @latest), or none [default: the newest]
    #[arg(long, value_name = "SNAPSHOT")]
    parent: Option<String>,
}

/// What is said of a snapshot.
#[derive(Debug, clap::Args)]
pub(super) struct Words {
    /// A name for the snapshot; the newest one of a name is found by it
    #[arg(long)]
    name: Option<String>,
    /// A label such as step=train or phase=final; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = pair)]
    labels: Vec<(String, String)>,
    /// A sentence for people
    #[arg(long, short)]
    message: Option<String>,
    /// Anything that programs want to keep with it; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    metadata: Vec<(String, String)>,
}

/// The same, checked.
pub(super) struct Description {
    pub name: Option<Name>,
    pub labels: BTreeMap<String, String>,
    pub message: Option<String>,
    pub metadata: BTreeMap<String, String>,
}

impl Words {
    pub(super) fn check(self) -> Result<Description, Failure> {
        Ok(Description {
            name: self.name.map(|name| Name::new("snapshot", name)).transpose()?,
            labels: unique("label", self.labels)?,
            message: self.message,
            metadata: unique("metadata key", self.metadata)?,
        })
    }
}

impl Snapshot {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let url = session.url(&self.url)?;
        let Item::Run { experiment, run } = url.item.clone() else {
            return Err(not_a_run(&url));
        };
        let mut volumes: Vec<(Name, Arc<dyn Source>)> = vec![];
        for (name, path) in named(&self.sources)? {
            let source = open(&path)?;
            warn_if_in_use(session, &path);
            volumes.push((name, Arc::new(source)));
        }
        let repository = session.open(&url).await?;
        let Description { name, labels, message, metadata } = self.words.check()?;
        let request = SnapshotRequest {
            name,
            labels,
            message,
            metadata,
            parent: parent(&repository, &url, self.parent.as_deref()).await?,
            experiment,
            run,
            volumes,
        };
        let activity = session.activity("snapshot");
        let record = snapshot(&repository, request, &activity.context).await.at(&url)?;
        drop(activity);
        session.out.say(&summary(&record));
        let made = view::Snapshot::new(&url.repository, &record);
        session.out.report(&made, || format!("{}\n", made.url))
    }
}

/// A source that is written while it is read is not a point in time.
fn warn_if_in_use(session: &Session, path: &Path) {
    let uses = System::default().uses(path).unwrap_or_default();
    let writers: Vec<String> =
        uses.iter().filter(|used| used.may_write()).map(ToString::to_string).collect();
    if !writers.is_empty() {
        session.out.warn(&format!(
            "{} is {}: the snapshot may be torn; freeze or unmount it first",
            path.display(),
            writers.join(" and ")
        ));
    }
}

/// What a snapshot cost, in a line.
pub(super) fn summary(record: &SnapshotRecord) -> String {
    let stats = &record.stats;
    format!(
        "{} with {} of data: {} new, stored as {} ({}) in {}, {}",
        count(record.volumes.len(), "volume"),
        bytes(stats.data_bytes),
        bytes(stats.new_bytes),
        bytes(stats.stored_bytes),
        ratio(stats.new_bytes, stats.stored_bytes),
        count(stats.puts, "object"),
        duration_ms(stats.elapsed_ms),
    )
}

pub(super) fn not_a_run(url: &PetraUrl) -> Failure {
    let failure = Failure::fix(format!("{url} does not name a run"));
    match &url.item {
        Item::Snapshot {
            snapshot: SnapshotRef::InRun { experiment, run, selector: Selector::Text(name) },
            ..
        } => {
            let item = Item::Run { experiment: experiment.clone(), run: run.clone() };
            let run = PetraUrl { repository: url.repository.clone(), item };
            failure.hint(format!(
                "a snapshot's name is an option: {} --name {}",
                quoted(&run.to_string()),
                quoted(name.as_str())
            ))
        }
        _ => failure.hint(format!("a run is named {}#EXPERIMENT/RUN", url.repository)),
    }
}

/// Volumes and their sources. What has no name becomes the workspace, then a data volume.
pub(super) fn named(sources: &[OsString]) -> Result<Vec<(Name, PathBuf)>, Failure> {
    let mut volumes: Vec<(Name, PathBuf)> = vec![];
    let mut unnamed = 0;
    for source in sources {
        let (name, path) = split(source);
        let name = name.unwrap_or_else(|| {
            unnamed += 1;
            match unnamed {
                1 => "workspace".to_owned(),
                n => format!("data-{}", n - 1),
            }
        });
        let name = Name::new("volume", name)?;
        if volumes.iter().any(|(other, _)| *other == name) {
            return Err(Failure::fix(format!("two volumes are named {name:?}"))
                .hint("give each source a name of its own: NAME=SOURCE"));
        }
        volumes.push((name, path.to_owned()));
    }
    Ok(volumes)
}

/// `NAME=SOURCE`. A path with a '/' before its first '=' is a source without a name.
fn split(source: &OsStr) -> (Option<String>, &Path) {
    let bytes = source.as_bytes();
    let at = bytes.iter().position(|b| *b == b'=');
    if let Some((name, [_, path @ ..])) = at.and_then(|at| bytes.split_at_checked(at))
        && !name.contains(&b'/')
    {
        let name = String::from_utf8_lossy(name).into_owned();
        return (Some(name), Path::new(OsStr::from_bytes(path)));
    }
    (None, Path::new(source))
}

fn open(path: &Path) -> Result<FileSource, Failure> {
    if path.is_dir() {
        return Err(Failure::fix(format!("{} is a directory", path.display())).hint(
            "Petra takes volumes as a whole: give the block device or disk image that the directory \
             lies on",
        ));
    }
    Ok(FileSource::open(path)?)
}

/// The snapshot to build on.
async fn parent(
    repository: &Repository,
    url: &PetraUrl,
    given: Option<&str>,
) -> Result<Parent, Failure> {
    let text = match given {
        None => return Ok(Parent::Auto),
        Some("none") => return Ok(Parent::None),
        Some(text) => text,
    };
    if let Ok(id) = text.parse::<SnapshotId>() {
        return Ok(Parent::Snapshot(id));
    }
    // A name, or the beginning of an id, in the same run.
    let Item::Run { experiment, run } = url.item.clone() else { return Err(not_a_run(url)) };
    let selector = match text {
        "@latest" => Selector::Latest,
        _ => Selector::Text(Name::new("snapshot", text)?),
    };
    let snapshot = SnapshotRef::InRun { experiment, run, selector };
    let item = Item::Snapshot { snapshot, volume: None };
    let url = PetraUrl { repository: url.repository.clone(), item };
    Ok(Parent::Snapshot(lookup::snapshot(repository, &url).await?.id))
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write it as KEY=VALUE".to_owned()),
    }
}

fn unique(what: &str, pairs: Vec<(String, String)>) -> Result<BTreeMap<String, String>, Failure> {
    let mut map = BTreeMap::new();
    for (key, value) in pairs {
        if map.contains_key(&key) {
            return Err(Failure::fix(format!("{what} {key:?} is given twice")));
        }
        map.insert(key, value);
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(sources: &[&str]) -> Result<Vec<(String, PathBuf)>, String> {
        let sources: Vec<OsString> = sources.iter().map(OsString::from).collect();
        let named = named(&sources).map_err(|failure| failure.message)?;
        Ok(named.into_iter().map(|(name, path)| (name.to_string(), path)).collect())
    }

    #[test]
    fn the_first_unnamed_source_is_the_workspace() {
        let volume = |name: &str, path: &str| (name.to_owned(), PathBuf::from(path));
        assert_eq!(
            names(&["a.img", "models=b.img", "c.img", "./x=y"]).unwrap(),
            [
                volume("workspace", "a.img"),
                volume("models", "b.img"),
                volume("data-1", "c.img"),
                volume("data-2", "./x=y"),
            ]
        );
    }

    #[test]
    fn a_name_is_given_once() {
        assert_eq!(
            names(&["a", "workspace=b"]).unwrap_err(),
            "two volumes are named \"workspace\""
        );
        assert!(names(&["=a"]).unwrap_err().contains("it is empty"));
        let twice = vec![("a".to_owned(), "1".to_owned()), ("a".to_owned(), "2".to_owned())];
        assert_eq!(unique("label", twice).unwrap_err().message, "label \"a\" is given twice");
    }

    #[test]
    fn pairs() {
        assert_eq!(pair("a=b=c").unwrap(), ("a".to_owned(), "b=c".to_owned()));
        assert!(pair("a").is_err() && pair("=a").is_err());
    }
}
