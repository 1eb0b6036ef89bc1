//! The URL grammar: `REPOSITORY#EXPERIMENT/RUN/SNAPSHOT[/VOLUME]`.
//!
//! `REPOSITORY` is `file:///DIRECTORY` or `s3://BUCKET[/PREFIX][?endpoint=..&region=..&path-style=..]`, and may
//! hold `{experiment}`, which gives every experiment a repository of its own. A snapshot is also reachable as
//! `REPOSITORY#@ID[/VOLUME]`, without its experiment and run.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};

use crate::error::{Error, Result};
use crate::id::SnapshotId;
use crate::name::Name;

const TEMPLATE: &str = "{experiment}";
/// What is encoded in the path of a repository, where `{` and `}` mark the template.
const IN_PATH: &AsciiSet =
    &CONTROLS.add(b' ').add(b'#').add(b'?').add(b'%').add(b'"').add(b'<').add(b'>');
const IN_QUERY: &AsciiSet = &IN_PATH.add(b'&').add(b'+').add(b'=');

/// Where a repository is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RepositoryUrl {
    /// A directory of this machine.
    Directory(PathBuf),
    /// A bucket, or a prefix in one.
    S3(S3Location),
}

/// A bucket and how to reach it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct S3Location {
    /// The bucket's name.
    pub bucket: String,
    /// Keys begin with `PREFIX/`; empty for the whole bucket.
    pub prefix: String,
    /// An S3-compatible server; AWS without it.
    pub endpoint: Option<String>,
    /// The region; the default chain decides without it.
    pub region: Option<String>,
    /// `http://endpoint/bucket/key` rather than `http://bucket.endpoint/key`. Default: when an endpoint is given.
    pub path_style: Option<bool>,
    /// A profile of the AWS configuration files.
    pub profile: Option<String>,
}

/// A URL of a repository or of something in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PetraUrl {
    /// The part before `#`. Still holds `{experiment}` when it was given with it.
    pub repository: RepositoryUrl,
    /// The part after `#`.
    pub item: Item,
}

/// What a URL names in its repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// The repository itself.
    Repository,
    /// An experiment.
    Experiment(Name),
    /// A run.
    Run {
        /// The experiment it belongs to.
        experiment: Name,
        /// The run.
        run: Name,
    },
    /// A snapshot, or one volume of it.
    Snapshot {
        /// Which snapshot.
        snapshot: SnapshotRef,
        /// Which of its volumes; all of them without it.
        volume: Option<Name>,
    },
}

/// How a URL names a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotRef {
    /// By id alone (`#@ID`).
    Id(SnapshotId),
    /// Within a run.
    InRun {
        /// The experiment.
        experiment: Name,
        /// The run.
        run: Name,
        /// Which of its snapshots.
        selector: Selector,
    },
}

/// Which snapshot of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    /// `@latest`: the one with the greatest id.
    Latest,
    /// An id, a name (the newest snapshot that bears it), or a unique prefix of an id.
    Text(Name),
}

impl RepositoryUrl {
    /// True when every experiment has a repository of its own.
    pub fn is_template(&self) -> bool {
        match self {
            Self::Directory(path) => path.to_string_lossy().contains(TEMPLATE),
            Self::S3(s3) => s3.bucket.contains(TEMPLATE) || s3.prefix.contains(TEMPLATE),
        }
    }

    /// Puts an experiment's name in the place of `{experiment}`.
    pub fn for_experiment(&self, experiment: &Name) -> Result<Self> {
        Ok(match self {
            Self::Directory(path) => {
                let path = path.to_string_lossy().replace(TEMPLATE, &experiment.key_component());
                Self::Directory(path.into())
            }
            Self::S3(s3) => {
                let name = experiment.as_str();
                let fits =
                    name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
                if s3.bucket.contains(TEMPLATE) && !fits {
                    return Err(Error::Name {
                        what: "experiment",
                        name: name.to_owned(),
                        reason: "a bucket name is made of it, which allows only a-z, 0-9 and '-'",
                    });
                }
                Self::S3(S3Location {
                    bucket: s3.bucket.replace(TEMPLATE, name),
                    prefix: s3.prefix.replace(TEMPLATE, &experiment.key_component()),
                    ..s3.clone()
                })
            }
        })
    }
}

impl PetraUrl {
    /// The experiment that the URL names, if it does.
    pub fn experiment(&self) -> Option<&Name> {
        match &self.item {
            Item::Experiment(experiment)
            | Item::Run { experiment, .. }
            | Item::Snapshot { snapshot: SnapshotRef::InRun { experiment, .. }, .. } => {
                Some(experiment)
            }
            _ => None,
        }
    }

    /// The repository to open: with the experiment's name in place of `{experiment}`.
    pub fn resolved_repository(&self) -> Result<RepositoryUrl> {
        if !self.repository.is_template() {
            return Ok(self.repository.clone());
        }
        match self.experiment() {
            Some(experiment) => self.repository.for_experiment(experiment),
            None => Err(bad(
                &self.to_string(),
                "the repository depends on {experiment}, so an experiment must follow the '#'",
            )),
        }
    }
}

fn bad(url: &str, reason: impl Into<String>) -> Error {
    Error::Url { url: url.to_owned(), reason: reason.into() }
}

fn decode(url: &str, text: &str) -> Result<String> {
    match percent_decode_str(text).decode_utf8() {
        Ok(text) if text.contains('\0') => Err(bad(url, "it holds a zero byte")),
        Ok(text) => Ok(text.into_owned()),
        Err(_) => Err(bad(url, "its percent-encoding is not UTF-8")),
    }
}

impl FromStr for RepositoryUrl {
    type Err = Error;

    fn from_str(url: &str) -> Result<Self> {
        let Some((scheme, rest)) = url.split_once("://") else {
            return Err(bad(url, "it begins with neither 's3://' nor 'file://'"));
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        match scheme {
            "file" => {
                if !query.is_empty() {
                    return Err(bad(url, "a directory takes no '?' options"));
                }
                let path = decode(url, path)?;
                if !path.starts_with('/') {
                    return Err(bad(url, "a directory is written 'file:///ABSOLUTE/PATH'"));
                }
                Ok(Self::Directory(path.into()))
            }
            "s3" => {
                let (bucket, prefix) = path.split_once('/').unwrap_or((path, ""));
                let prefix = decode(url, prefix)?;
                let mut location = S3Location {
                    bucket: decode(url, bucket)?,
                    prefix: prefix.trim_end_matches('/').to_owned(),
                    ..S3Location::default()
                };
                check_bucket(url, &location.bucket)?;
                if prefix.split('/').any(|part| part == "." || part == "..") {
                    return Err(bad(url, "its prefix has a '.' or '..' component"));
                }
                location.set_options(url, query)?;
                Ok(Self::S3(location))
            }
            _ => Err(bad(url, "it begins with neither 's3://' nor 'file://'")),
        }
    }
}

/// The characters of S3's rules for buckets, with those that its first rules allowed and many servers still do. Others
/// would lead requests to another place than the one that the URL shows.
fn check_bucket(url: &str, bucket: &str) -> Result<()> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
    let name = bucket.replace(TEMPLATE, "experiment");
    if name.is_empty() {
        return Err(bad(url, "it names no bucket"));
    }
    if !name.bytes().all(allowed) || name.bytes().all(|b| b == b'.') {
        return Err(bad(url, "a bucket's name is made of a-z, A-Z, 0-9, '-', '.' and '_'"));
    }
    Ok(())
}

/// True for a scheme and a host, whatever follows.
fn is_endpoint(text: &str) -> bool {
    let host = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    host.is_some_and(|host| !host.is_empty() && !host.starts_with('/'))
}

impl S3Location {
    fn set_options(&mut self, url: &str, query: &str) -> Result<()> {
        let mut seen = BTreeMap::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decode(url, value)?;
            if seen.insert(key, ()).is_some() {
                return Err(bad(url, format!("option '{key}' is given twice")));
            }
            match key {
                "endpoint" if is_endpoint(&value) => {
                    self.endpoint = Some(value.trim_end_matches('/').to_owned());
                }
                "endpoint" => {
                    return Err(bad(url, "an endpoint is http:// or https:// and a host"));
                }
                "region" => self.region = Some(value),
                "profile" => self.profile = Some(value),
                "path-style" => match value.as_str() {
                    "true" => self.path_style = Some(true),
                    "false" => self.path_style = Some(false),
                    _ => return Err(bad(url, "path-style is 'true' or 'false'")),
                },
                _ => {
                    return Err(bad(
                        url,
                        format!(
                            "unknown option '{key}' (known: endpoint, region, path-style, profile)"
                        ),
                    ));
                }
            }
        }
        Ok(())
    }
}

impl FromStr for PetraUrl {
    type Err = Error;

    fn from_str(url: &str) -> Result<Self> {
        let (repository, fragment) = url.split_once('#').unwrap_or((url, ""));
        Ok(Self { repository: repository.parse()?, item: parse_item(url, fragment)? })
    }
}

fn parse_item(url: &str, fragment: &str) -> Result<Item> {
    let fragment = fragment.strip_suffix('/').unwrap_or(fragment);
    let parts: Vec<&str> = if fragment.is_empty() { vec![] } else { fragment.split('/').collect() };
    if let Some(id) = parts.first().and_then(|part| part.strip_prefix('@')) {
        let id =
            id.parse().map_err(|_| bad(url, format!("'{id}' after '#@' is not a snapshot id")))?;
        let volume = match parts.as_slice() {
            [_] => None,
            [_, volume] => Some(Name::decode("volume", volume)?),
            _ => return Err(bad(url, "'#@ID' is followed by at most a volume")),
        };
        return Ok(Item::Snapshot { snapshot: SnapshotRef::Id(id), volume });
    }
    let name = |what, part: &str| Name::decode(what, part);
    Ok(match parts.as_slice() {
        [] => Item::Repository,
        [experiment] => Item::Experiment(name("experiment", experiment)?),
        [experiment, run] => {
            Item::Run { experiment: name("experiment", experiment)?, run: name("run", run)? }
        }
        [experiment, run, snapshot, volume @ ..] => {
            let selector = match snapshot.strip_prefix('@') {
                Some("latest") => Selector::Latest,
                Some(other) => {
                    return Err(bad(
                        url,
                        format!("'@{other}' is not known; did you mean '@latest'?"),
                    ));
                }
                None => Selector::Text(name("snapshot", snapshot)?),
            };
            let volume = match volume {
                [] => None,
                [volume] => Some(name("volume", volume)?),
                _ => {
                    return Err(bad(url, "after '#' come at most EXPERIMENT/RUN/SNAPSHOT/VOLUME"));
                }
            };
            let (experiment, run) = (name("experiment", experiment)?, name("run", run)?);
            Item::Snapshot { snapshot: SnapshotRef::InRun { experiment, run, selector }, volume }
        }
    })
}

impl fmt::Display for RepositoryUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => {
                write!(f, "file://{}", utf8_percent_encode(&path.to_string_lossy(), IN_PATH))
            }
            Self::S3(s3) => {
                write!(f, "s3://{}", utf8_percent_encode(&s3.bucket, IN_PATH))?;
                if !s3.prefix.is_empty() {
                    write!(f, "/{}", utf8_percent_encode(&s3.prefix, IN_PATH))?;
                }
                let path_style = s3.path_style.map(|on| on.to_string());
                let options = [
                    ("endpoint", &s3.endpoint),
                    ("region", &s3.region),
                    ("path-style", &path_style),
                    ("profile", &s3.profile),
                ];
                let given = options.iter().filter_map(|(key, value)| Some((key, value.as_ref()?)));
                for (n, (key, value)) in given.enumerate() {
                    let separator = if n == 0 { '?' } else { '&' };
                    write!(f, "{separator}{key}={}", utf8_percent_encode(value, IN_QUERY))?;
                }
                Ok(())
            }
        }
    }
}

impl fmt::Display for PetraUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.repository)?;
        match &self.item {
            Item::Repository => Ok(()),
            Item::Experiment(experiment) => write!(f, "#{}", experiment.encoded()),
            Item::Run { experiment, run } => {
                write!(f, "#{}/{}", experiment.encoded(), run.encoded())
            }
            Item::Snapshot { snapshot, volume } => {
                match snapshot {
                    SnapshotRef::Id(id) => write!(f, "#@{id}")?,
                    SnapshotRef::InRun { experiment, run, selector } => {
                        write!(f, "#{}/{}/", experiment.encoded(), run.encoded())?;
                        match selector {
                            Selector::Latest => write!(f, "@latest")?,
                            Selector::Text(text) => write!(f, "{}", text.encoded())?,
                        }
                    }
                }
                volume.as_ref().map_or(Ok(()), |volume| write!(f, "/{}", volume.encoded()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(url: &str) -> PetraUrl {
        url.parse().unwrap()
    }

    #[test]
    fn the_examples_of_the_grammar() {
        let url = parse(
            "s3://ml-snapshots/team-a?endpoint=http://127.0.0.1:9000#iris-3mis2/run-19u9b/train.final/workspace",
        );
        let RepositoryUrl::S3(s3) = &url.repository else { panic!("{url:?}") };
        assert_eq!((s3.bucket.as_str(), s3.prefix.as_str()), ("ml-snapshots", "team-a"));
        assert_eq!(s3.endpoint.as_deref(), Some("http://127.0.0.1:9000"));
        let Item::Snapshot { snapshot: SnapshotRef::InRun { experiment, run, selector }, volume } =
            url.item
        else {
            panic!()
        };
        assert_eq!((experiment.as_str(), run.as_str()), ("iris-3mis2", "run-19u9b"));
        assert_eq!(selector, Selector::Text(Name::new("snapshot", "train.final").unwrap()));
        assert_eq!(volume.unwrap().as_str(), "workspace");
    }

    #[test]
    fn one_repository_per_experiment() {
        let url = parse("s3://ml-{experiment}#iris/run-1");
        assert_eq!(url.resolved_repository().unwrap().to_string(), "s3://ml-iris");
        assert!(parse("s3://ml-{experiment}").resolved_repository().is_err());
        assert!(parse("s3://ml-{experiment}#Iris%20flowers/r").resolved_repository().is_err());
        let url = parse("file:///repos/{experiment}#Iris%20flowers/r");
        assert_eq!(
            url.resolved_repository().unwrap().to_string(),
            "file:///repos/Iris%2520flowers"
        );
    }

    #[test]
    fn says_what_is_wrong() {
        for (url, reason) in [
            ("/var/lib/repo", "begins with neither"),
            ("http://x", "begins with neither"),
            ("file://host/x", "ABSOLUTE"),
            ("file:///x?region=a", "takes no"),
            ("s3://", "no bucket"),
            ("s3://a%2fb", "a bucket's name"),
            ("s3://a b", "a bucket's name"),
            ("s3://..", "a bucket's name"),
            ("s3://b/../c", "'..'"),
            ("s3://b?endpoint=127.0.0.1:9000", "http://"),
            ("s3://b?endpoint=http://", "a host"),
            ("s3://b?endpoint=https:////", "a host"),
            ("s3://b?colour=red", "unknown option 'colour'"),
            ("s3://b?region=a&region=b", "twice"),
            ("s3://b#e/r/@newest", "@latest"),
            ("s3://b#@xyz", "not a snapshot id"),
            ("s3://b#e/r/s/v/w", "at most"),
            ("s3://b#e//s", "it is empty"),
            ("s3://b#e/%2e%2e/s", "mean other things"),
            ("file:///a%ff", "UTF-8"),
        ] {
            let error = url.parse::<PetraUrl>().unwrap_err().to_string();
            assert!(error.contains(reason), "{url}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_parses_or_is_refused(text in "(s3|file)://\\PC{0,40}#?\\PC{0,40}") {
            if let Ok(url) = text.parse::<PetraUrl>() {
                prop_assert_eq!(&url.to_string().parse::<PetraUrl>().unwrap(), &url);
            }
        }

        #[test]
        fn names_survive(experiment in "[^/\\p{C}]{1,20}", run in "[^/\\p{C}]{1,20}") {
            let (Ok(experiment), Ok(run)) = (Name::new("experiment", experiment), Name::new("run", run))
            else { return Ok(()) };
            let repository = RepositoryUrl::Directory("/a b/#?%".into());
            let url = PetraUrl { repository, item: Item::Run { experiment, run } };
            prop_assert_eq!(&url.to_string().parse::<PetraUrl>().unwrap(), &url);
        }
    }
}
