//! `petra restore`.

use std::io::IsTerminal;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use petra_engine::record::{SnapshotRecord, VolumeRecord};
use petra_engine::restore::{ByteRange, Damage, RestoreOptions, RestoreReport, restore, stream};
use petra_engine::target::FileTarget;
use petra_engine::{Error, Item, PetraUrl, Repository};
use petra_volume::device::{System, Use};
use serde::Serialize;

use crate::failure::{At, Exit, Failure};
use crate::progress::Activity;
use crate::session::Session;
use crate::text::{bytes, count, duration_ms, quoted};
use crate::{lookup, view};

/// How many ranges a message lists; documents have them all.
const RANGES: usize = 8;

/// Options of `petra restore`.
#[derive(Debug, clap::Args)]
pub struct Restore {
    /// A snapshot, or a volume of one
    #[arg(value_name = "URL")]
    url: String,
    /// A file to make, a directory for all volumes (NAME.img), a block device, or - for standard output
    #[arg(value_name = "TARGET")]
    target: PathBuf,
    /// Write to a file that exists, and there and on block devices only what differs
    #[arg(long)]
    in_place: bool,
    /// Restore around missing or damaged data, and end with exit code 5
    #[arg(long)]
    keep_going: bool,
}

#[derive(Serialize)]
struct Document<'a> {
    url: String,
    volumes: Vec<Restored<'a>>,
}

#[derive(Serialize)]
struct Restored<'a> {
    volume: view::Volume<'a>,
    target: PathBuf,
    report: RestoreReport,
}

/// Where volumes go.
#[derive(Debug, PartialEq, Eq)]
enum Destination {
    Stdout,
    Directory(PathBuf),
    New(PathBuf),
    Existing(PathBuf),
}

impl Restore {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let url = session.url(&self.url)?;
        let Item::Snapshot { volume, .. } = &url.item else {
            return Err(lookup::not_a_snapshot(&url));
        };
        let destination = Destination::of(&self.target)?;
        if destination == Destination::Stdout {
            let refused = if session.out.is_json() {
                "standard output can't carry both the volume and a JSON document"
            } else if std::io::stdout().is_terminal() {
                "standard output is a terminal"
            } else {
                ""
            };
            if !refused.is_empty() {
                return Err(
                    Failure::fix(refused).hint("restore to a file, or to a pipe without --json")
                );
            }
        }
        let repository = session.open(&url).await?;
        let record = session.unless_cancelled(lookup::snapshot(&repository, &url)).await?;
        let volumes = match volume {
            Some(name) => vec![lookup::volume(&record, name, &url)?],
            None => volumes(&record, &destination, &url)?,
        };
        let targets = self.targets(&destination, volumes)?;
        let options = RestoreOptions { in_place: self.in_place, keep_going: self.keep_going };

        let activity = session.activity("restore");
        let mut restored = vec![];
        for (volume, target) in targets {
            let report = write(&repository, volume, &target, &options, &activity).await.at(&url)?;
            restored.push(Restored {
                volume: view::Volume::new(&url.repository, &record, volume),
                target: target.path().to_owned(),
                report,
            });
        }
        drop(activity);
        for Restored { target, report, .. } in &restored {
            session.out.say(&summary(target, report));
        }
        let document = Document { url: url.to_string(), volumes: restored };
        if session.out.is_json() {
            session.out.report(&document, String::new)?;
        }
        partial(&document)
    }

    /// Where each volume goes, all checked before the first is written.
    fn targets<'a>(
        &self,
        destination: &Destination,
        volumes: Vec<&'a VolumeRecord>,
    ) -> Result<Vec<(&'a VolumeRecord, Destination)>, Failure> {
        let mut targets = vec![];
        if let Destination::Directory(directory) = destination {
            std::fs::create_dir_all(directory).map_err(|cause| Error::Io {
                action: "create",
                path: directory.clone(),
                cause,
            })?;
        }
        for volume in volumes {
            let target = match destination {
                Destination::Directory(directory) => {
                    Destination::of(&directory.join(format!("{}.img", volume.name)))?
                }
                Destination::Stdout => Destination::Stdout,
                Destination::New(path) => Destination::New(path.clone()),
                Destination::Existing(path) => Destination::Existing(path.clone()),
            };
            if let Destination::Existing(path) = &target {
                self.check_existing(path)?;
            }
            targets.push((volume, target));
        }
        Ok(targets)
    }

    fn check_existing(&self, path: &Path) -> Result<(), Failure> {
        let refuse =
            |reason: &str| Error::Target { path: path.to_owned(), reason: reason.to_owned() };
        let file_type = std::fs::metadata(path)
            .map_err(|cause| Error::Io { action: "look at", path: path.to_owned(), cause })?
            .file_type();
        if file_type.is_file() && !self.in_place {
            return Err(refuse("it exists already").into());
        }
        if !file_type.is_file() && !file_type.is_block_device() {
            return Err(refuse("it is neither a file, a directory nor a block device").into());
        }
        match System::default().uses(path) {
            Ok(uses) if uses.is_empty() => Ok(()),
            Ok(uses) => {
                let all: Vec<String> = uses.iter().map(ToString::to_string).collect();
                let failure = Failure::from(refuse(&format!("it is {}", all.join(" and "))));
                Err(failure.hint(release(path, &uses)))
            }
            Err(error) => {
                // The kernel still refuses a block device that is in use.
                tracing::warn!(path = %path.display(), %error, "cannot tell whether it is in use");
                Ok(())
            }
        }
    }
}

impl Destination {
    fn of(target: &Path) -> Result<Self, Failure> {
        if target.as_os_str() == "-" {
            return Ok(Self::Stdout);
        }
        // The kernel's answer for `file/` would be an error; a '/' at the end asks for a directory.
        let wants_directory = target.as_os_str().as_encoded_bytes().ends_with(b"/");
        match std::fs::metadata(target) {
            Ok(metadata) if metadata.is_dir() => Ok(Self::Directory(target.to_owned())),
            Ok(_) => Ok(Self::Existing(target.to_owned())),
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::Io { action: "look at", path: target.to_owned(), cause: error }.into())
            }
            Err(_) if wants_directory => Ok(Self::Directory(target.to_owned())),
            Err(_) => Ok(Self::New(target.to_owned())),
        }
    }

    fn path(&self) -> &Path {
        match self {
            Self::Stdout => Path::new("-"),
            Self::Directory(path) | Self::New(path) | Self::Existing(path) => path,
        }
    }
}

/// The volumes that a URL without a volume means for this destination.
fn volumes<'a>(
    record: &'a SnapshotRecord,
    destination: &Destination,
    url: &PetraUrl,
) -> Result<Vec<&'a VolumeRecord>, Failure> {
    if matches!(destination, Destination::Directory(_)) || record.volumes.len() == 1 {
        return Ok(record.volumes.iter().collect());
    }
    let names: Vec<&str> = record.volumes.iter().map(|volume| volume.name.as_str()).collect();
    let all = match destination {
        Destination::Stdout => "restore all of them to a directory".to_owned(),
        _ => {
            let target = quoted(&destination.path().to_string_lossy());
            format!("restore all of them to a directory: {target}/")
        }
    };
    let first = record.volumes.first().map_or("VOLUME".to_owned(), |volume| volume.name.encoded());
    Err(Failure::fix(format!(
        "snapshot {} has {}: {}",
        record.id,
        count(names.len(), "volume"),
        names.join(", ")
    ))
    .hint(format!("name one in the URL, such as {}, or {all}", quoted(&format!("{url}/{first}")))))
}

async fn write(
    repository: &Repository,
    volume: &VolumeRecord,
    target: &Destination,
    options: &RestoreOptions,
    activity: &Activity,
) -> petra_engine::Result<RestoreReport> {
    let file = match target {
        Destination::Stdout => {
            let out = Box::new(std::io::stdout());
            return stream(repository, volume, out, options, &activity.context).await;
        }
        Destination::Existing(path) => FileTarget::open_existing(path, volume.len_bytes)?,
        Destination::New(path) | Destination::Directory(path) => {
            FileTarget::create(path, volume.len_bytes)?
        }
    };
    restore(repository, volume, file, options, &activity.context).await
}

fn summary(target: &Path, report: &RestoreReport) -> String {
    format!(
        "{}: {}, {} written, {} fetched in {}, {}",
        target.display(),
        bytes(report.len_bytes),
        bytes(report.written_bytes),
        bytes(report.fetched_bytes),
        count(report.gets, "request"),
        duration_ms(report.elapsed_ms)
    )
}

/// Fails when something could not be restored.
fn partial(document: &Document<'_>) -> Result<(), Failure> {
    let damage = |restored: &Restored<'_>| -> Vec<String> {
        let target = restored.target.display().to_string();
        let line = |damage: &Damage| {
            format!("{target}: {}: {}; {}", damage.object, damage.detail, ranges(&damage.ranges))
        };
        restored.report.damaged.iter().map(line).collect()
    };
    let causes: Vec<String> = document.volumes.iter().flat_map(damage).collect();
    if causes.is_empty() {
        return Ok(());
    }
    let what = format!("{} could not be read, the rest is restored", count(causes.len(), "object"));
    Err(Failure::new(Exit::Partial, what)
        .causes(causes)
        .hint("the ranges named hold zeros, or what was there before with --in-place"))
}

/// Ranges of a volume in a line.
pub(super) fn ranges(ranges: &[ByteRange]) -> String {
    let first = ranges.iter().take(RANGES).map(|range| format!("{}-{}", range.start, range.end));
    let mut text = format!("bytes {}", first.collect::<Vec<_>>().join(", "));
    if let Some(more) = ranges.len().checked_sub(RANGES).filter(|more| *more > 0) {
        text += &format!(" and {}", count(more, "more range"));
    }
    text
}

/// How to end these uses.
fn release(path: &Path, uses: &[Use]) -> String {
    let steps = uses.iter().map(|used| match used {
        Use::Mounted { at, .. } => format!("umount {}", quoted(&at.to_string_lossy())),
        Use::Loop { name } => format!("losetup -d /dev/{name}"),
        Use::Held { by } => format!("take /dev/{by} apart"),
        Use::Swap => format!("swapoff {}", quoted(&path.to_string_lossy())),
    });
    format!("first: {}", steps.collect::<Vec<_>>().join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("there"), "").unwrap();
        let of = |path: &Path| Destination::of(path).unwrap();
        assert_eq!(of(Path::new("-")), Destination::Stdout);
        assert_eq!(of(directory.path()), Destination::Directory(directory.path().into()));
        assert_eq!(of(&path("new/")), Destination::Directory(path("new/")));
        assert_eq!(of(&path("new")), Destination::New(path("new")));
        assert_eq!(of(&path("there")), Destination::Existing(path("there")));
        assert!(Destination::of(&path("there/new")).is_err());
    }

    #[test]
    fn a_message_names_a_few_ranges() {
        let range = |n: u64| ByteRange { start: n * 10, end: n * 10 + 5 };
        assert_eq!(ranges(&[range(0), range(1)]), "bytes 0-5, 10-15");
        let many: Vec<ByteRange> = (0..10).map(range).collect();
        assert!(ranges(&many).ends_with("70-75 and 2 more ranges"));
    }

    #[test]
    fn what_to_do_about_a_target_in_use() {
        let uses = [
            Use::Mounted { at: "/mnt/a b".into(), read_only: false },
            Use::Loop { name: "loop3".to_owned() },
        ];
        assert_eq!(
            release(Path::new("/x"), &uses),
            "first: umount '/mnt/a b'; losetup -d /dev/loop3"
        );
    }
}
