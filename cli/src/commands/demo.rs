//! `petra demo`: the whole story on a small volume, for a first look.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use petra_engine::chunker::Chunking;
use petra_engine::record::SnapshotRecord;
use petra_engine::restore::{RestoreOptions, restore};
use petra_engine::snapshot::{Parent, SnapshotRequest, snapshot};
use petra_engine::source::FileSource;
use petra_engine::store;
use petra_engine::target::FileTarget;
use petra_engine::{Error, Name, PetraUrl, Repository, RepositoryUrl};
use serde::Serialize;

use crate::failure::{At, Exit, Failure};
use crate::session::Session;
use crate::text::{Side, Table, bytes, duration_ms, quoted, ratio};
use crate::{lookup, view};

const MIB: u64 = 1 << 20;
const VOLUME_LEN: u64 = 128 * MIB;
/// Where the part that does not compress is, and where it moves.
const RANDOM_AT: u64 = 40 * MIB;
const MOVED_TO: u64 = 80 * MIB + 12_345;
const BLOCK: usize = 64 << 10;

/// Options of `petra demo`.
#[derive(Debug, clap::Args)]
pub struct Demo {
    /// Where to make it; must be empty or not exist [default: a new directory among temporary files]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Remove the directory at the end, rather than leave it to go on with
    #[arg(long)]
    remove: bool,
}

#[derive(Serialize)]
struct Document<'a> {
    directory: &'a Path,
    repository: String,
    snapshots: Vec<view::Snapshot<'a>>,
    restored: &'a Path,
    identical: bool,
}

impl Demo {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let directory = directory(self.dir.as_deref())?;
        let result = play(session, &directory, !self.remove).await;
        if self.remove {
            std::fs::remove_dir_all(&directory).map_err(Story::io("remove", &directory))?;
        }
        result
    }
}

/// The files of the demonstration.
struct Story {
    volume: PathBuf,
    before: PathBuf,
    restored: PathBuf,
    repository: RepositoryUrl,
}

async fn play(session: &Session, directory: &Path, stays: bool) -> Result<(), Failure> {
    let story = Story {
        volume: directory.join("volume.img"),
        before: directory.join("volume-before.img"),
        restored: directory.join("restored.img"),
        repository: RepositoryUrl::Directory(directory.join("repository")),
    };
    let out = session.out;
    let at = &story.repository;

    out.say(&format!(
        "making a volume of {}, mostly empty: {}",
        bytes(VOLUME_LEN),
        story.volume.display()
    ));
    story.make_volumes()?;

    let activity = session.activity("demo");
    let repository =
        Repository::init(store::open(at).await?, Chunking::default(), &activity.context).await?;
    let take = async |name: &str, message: &str| -> Result<SnapshotRecord, Failure> {
        let source = FileSource::open(&story.volume)?;
        let request = SnapshotRequest {
            experiment: Name::new("experiment", "demo")?,
            run: Name::new("run", "run-1")?,
            name: Some(Name::new("snapshot", name)?),
            labels: [("phase".to_owned(), name.to_owned())].into(),
            message: Some(message.to_owned()),
            metadata: [].into(),
            parent: Parent::Auto,
            volumes: vec![(Name::new("volume", "workspace")?, Arc::new(source))],
        };
        Ok(snapshot(&repository, request, &activity.context).await?)
    };
    let first = take("initial", "before the change").await?;
    out.say(&format!("took a first snapshot: {}", view::snapshot_url(at, &first, None)));

    story.change_volume()?;
    let second = take("final", "after the change").await?;
    out.say(&format!(
        "changed the volume, took a second one: {}",
        view::snapshot_url(at, &second, None)
    ));

    // By its URL, as on another machine.
    let url: PetraUrl = view::snapshot_url(at, &first, None).parse()?;
    let elsewhere = Repository::open(store::open(at).await?).await?;
    let found = lookup::snapshot(&elsewhere, &url).await?;
    let volume = found.volumes.first().ok_or(Error::Internal("the demo's volume is lost"))?;
    let target = FileTarget::create(&story.restored, volume.len_bytes)?;
    let report =
        restore(&repository, volume, target, &RestoreOptions::default(), &activity.context)
            .await
            .at(&url)?;
    drop(activity);
    if !same(&story.before, &story.restored)? {
        return Err(Failure::new(
            Exit::Stop,
            format!("{} is not what {} was", story.restored.display(), story.before.display()),
        )
        .hint("this is a defect of Petra: please report it"));
    }
    out.say(&format!(
        "restored the first from its URL in {}: every byte is as it was\n",
        duration_ms(report.elapsed_ms)
    ));

    let document = Document {
        directory,
        repository: at.to_string(),
        snapshots: [&first, &second].map(|record| view::Snapshot::new(at, record)).into(),
        restored: &story.restored,
        identical: true,
    };
    out.report(&document, || {
        let table = table(&[&first, &second]);
        if stays { format!("{table}\n{}", next(&story, &first)) } else { table }
    })
}

impl Story {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_owned();
        move |cause| Error::Io { action, path, cause }
    }

    /// A volume, and a copy of it to compare with later.
    fn make_volumes(&self) -> Result<(), Failure> {
        // Made twice rather than copied: a copy would fill the holes.
        for path in [&self.volume, &self.before] {
            Self::make_volume(path).map_err(Self::io("write", path))?;
        }
        Ok(())
    }

    /// 24 MiB that compress, 8 MiB that don't, holes around them.
    fn make_volume(path: &Path) -> io::Result<()> {
        let file = File::create_new(path)?;
        file.set_len(VOLUME_LEN)?;
        let mut noise = Noise(1);
        fill(&file, MIB, 24 * MIB, |block| noise.words(block))?;
        fill(&file, RANDOM_AT, 8 * MIB, |block| noise.bytes(block))
    }

    /// 1 MiB is written anew, and 8 MiB move to an odd place, where only cutting by content finds them again.
    fn change_volume(&self) -> Result<(), Failure> {
        let write = || -> io::Result<()> {
            let file = File::options().read(true).write(true).open(&self.volume)?;
            let mut noise = Noise(2);
            fill(&file, 4 * MIB, MIB, |block| noise.words(block))?;
            let mut block = vec![0; BLOCK];
            for offset in (0..8 * MIB).step_by(BLOCK) {
                file.read_exact_at(&mut block, RANDOM_AT + offset)?;
                file.write_all_at(&block, MOVED_TO + offset)?;
            }
            Ok(())
        };
        Ok(write().map_err(Self::io("write", &self.volume))?)
    }
}

fn fill(file: &File, start: u64, len: u64, mut next: impl FnMut(&mut [u8])) -> io::Result<()> {
    let mut block = vec![0; BLOCK];
    for offset in (0..len).step_by(BLOCK) {
        next(&mut block);
        file.write_all_at(&block, start + offset)?;
    }
    Ok(())
}

/// The same numbers in every demonstration (splitmix64).
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn bytes(&mut self, block: &mut [u8]) {
        for piece in block.chunks_mut(8) {
            let bytes = self.next().to_le_bytes();
            piece.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        }
    }

    /// Words in random order, which compress as text does.
    fn words(&mut self, block: &mut [u8]) {
        const WORDS: [&str; 16] = [
            "epoch ",
            "loss ",
            "0.0173 ",
            "accuracy ",
            "batch ",
            "step\n",
            "tensor ",
            "weights ",
            "layer ",
            "gradient ",
            "validation ",
            "0.9981 ",
            "train ",
            "model ",
            "rate ",
            "seed ",
        ];
        let mut random = self.next();
        let mut text = std::iter::repeat_with(|| {
            random = random.rotate_left(7).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x55;
            WORDS.iter().cycle().nth((random >> 60) as usize).map_or("", |word| word)
        })
        .flat_map(str::bytes);
        for to in block {
            *to = text.next().unwrap_or(b' ');
        }
    }
}

fn directory(given: Option<&Path>) -> Result<PathBuf, Failure> {
    let path = match given {
        Some(path) => std::path::absolute(path).map_err(Story::io("find", path))?,
        None => {
            let mut number = std::process::id();
            loop {
                let path = std::env::temp_dir().join(format!("petra-demo-{number}"));
                match std::fs::create_dir(&path) {
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                    Err(error) => return Err(Story::io("create", &path)(error).into()),
                    Ok(()) => return Ok(path),
                }
            }
        }
    };
    std::fs::create_dir_all(&path).map_err(Story::io("create", &path))?;
    let mut entries = std::fs::read_dir(&path).map_err(Story::io("list", &path))?;
    if entries.next().is_some() {
        return Err(Failure::fix(format!("{} is not empty", path.display()))
            .hint("give a directory that is empty or does not exist"));
    }
    Ok(path)
}

fn same(a: &Path, b: &Path) -> Result<bool, Error> {
    let open = |path: &Path| File::open(path).map_err(Story::io("open", path));
    let (mut left, mut right) = (open(a)?, open(b)?);
    let (mut in_left, mut in_right) = (vec![0; BLOCK * 16], vec![0; BLOCK * 16]);
    loop {
        let n = left.read(&mut in_left).map_err(Story::io("read", a))?;
        let (Some(expected), Some(found)) = (in_left.get(..n), in_right.get_mut(..n)) else {
            return Ok(false);
        };
        if n == 0 {
            return Ok(right.read(&mut in_right).map_err(Story::io("read", b))? == 0);
        }
        if right.read_exact(found).is_err() || found != expected {
            return Ok(false);
        }
    }
}

fn table(records: &[&SnapshotRecord]) -> String {
    use Side::{Left, Right};
    let mut table = Table::new(&[
        ("SNAPSHOT", Left),
        ("VOLUME", Right),
        ("DATA", Right),
        ("KNOWN", Right),
        ("NEW", Right),
        ("STORED", Right),
        ("DATA/STORED", Right),
        ("TIME", Right),
    ]);
    for record in records {
        let stats = &record.stats;
        table.row([
            record.name.as_ref().map_or("", |name| name.as_str()).to_owned(),
            bytes(record.volumes.iter().map(|volume| volume.len_bytes).sum()),
            bytes(stats.data_bytes),
            bytes(stats.data_bytes.saturating_sub(stats.new_bytes)),
            bytes(stats.new_bytes),
            bytes(stats.stored_bytes),
            ratio(stats.data_bytes, stats.stored_bytes),
            duration_ms(stats.elapsed_ms),
        ]);
    }
    table.render()
}

/// Commands to go on with, as the shell of this very call takes them.
fn next(story: &Story, first: &SnapshotRecord) -> String {
    let called = std::env::args_os().next().unwrap_or_else(|| OsString::from("petra"));
    let petra = quoted(&called.to_string_lossy());
    let at = &story.repository;
    let run = quoted(&format!("{at}#demo/run-1"));
    let latest = quoted(&format!("{at}#demo/run-1/@latest"));
    let initial = quoted(&view::snapshot_url(at, first, None));
    let repository = quoted(&at.to_string());
    let file = |path: &Path| quoted(&path.to_string_lossy());
    let (volume, before, restored) =
        (file(&story.volume), file(&story.before), file(&story.restored));
    let directory = file(story.volume.parent().unwrap_or(Path::new("/")));
    format!(
        "Go on with:\n  \
         cmp {before} {restored}\n  \
         {petra} ls {run}\n  \
         {petra} info {latest}\n  \
         {petra} diff {initial} {latest}\n  \
         {petra} restore --in-place {initial} {volume}\n  \
         {petra} snapshot {volume} {run} --name rolled-back\n  \
         {petra} du {repository}\n  \
         {petra} verify --read-data {repository}\n  \
         rm -r {directory}\n"
    )
}
