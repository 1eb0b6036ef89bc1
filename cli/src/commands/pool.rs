//! `petra pool`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Subcommand;
use jiff::Timestamp;
use petra_engine::SnapshotId;
use petra_engine::context::SystemHost;
use petra_volume::pool::{DEFAULT_OVERCOMMIT_PERCENT, InitRequest, Place, Recovered, Status};
use petra_volume::{BackendKind, Pool as OpenPool};
use serde::Serialize;

use super::agent::Agent;
use crate::failure::Failure;
use crate::session::Session;
use crate::text::{Fields, bytes, quoted, size, time};

/// Options of `petra pool`.
#[derive(Debug, clap::Args)]
pub struct Pool {
    #[command(subcommand)]
    action: Action,
}

/// What to do with a pool.
#[derive(Debug, Subcommand)]
enum Action {
    /// Make a pool in an empty directory on btrfs or XFS, on an empty device, or in a new file
    Init(Init),
    /// Show how much room a pool has, and what it has promised
    Status {
        #[command(flatten)]
        pool: PoolOption,
    },
    /// Bring lazy clones their data, until there is nothing to do; started when it is needed
    Agent(Agent),
    /// Clean up after a crash: what was half made or deleted, devices nobody wants, frozen file systems
    Recover {
        #[command(flatten)]
        pool: PoolOption,
    },
}

/// The pool that a command is about.
#[derive(Debug, clap::Args)]
pub struct PoolOption {
    /// The pool's directory
    #[arg(long, value_name = "DIR", env = "PETRA_POOL")]
    pool: PathBuf,
}

impl PoolOption {
    /// Opens the pool to look at it.
    pub fn open(&self) -> Result<OpenPool, Failure> {
        Ok(OpenPool::open(&self.pool, Arc::new(SystemHost))?)
    }

    /// Opens the pool to change something in it, after cleaning up what crashes have left.
    pub fn open_to_change(&self, session: &Session) -> Result<OpenPool, Failure> {
        let pool = self.open()?;
        for problem in pool.recover()?.problems {
            session.out.warn(&problem.to_string());
        }
        Ok(pool)
    }
}

#[derive(Debug, clap::Args)]
struct Init {
    /// An empty or new directory on btrfs or XFS; or, to be formatted, an empty block device, or with --size a new file
    #[arg(value_name = "DIR|DEVICE|FILE")]
    place: PathBuf,
    /// Make a file of this size, which takes room as it is filled, such as 20G
    #[arg(long, value_name = "SIZE", value_parser = size)]
    size: Option<u64>,
    /// Format with btrfs (the default) or xfs; for a directory, what it must be on
    #[arg(long, value_name = "btrfs|xfs")]
    filesystem: Option<BackendKind>,
    /// Where to mount a device, or a file [default for a file: its name without what follows the last dot]
    #[arg(long, value_name = "DIR")]
    at: Option<PathBuf>,
    /// How much volumes may be promised together, in percent of the room there is
    #[arg(long, value_name = "PERCENT", default_value_t = DEFAULT_OVERCOMMIT_PERCENT)]
    overcommit: u32,
    /// Room that is kept for writes to volumes that are there [default: 5%, at least 1 GiB, at most 10%]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    reserve: Option<u64>,
}

#[derive(Serialize)]
struct InitDocument<'a> {
    pool: &'a Path,
    id: SnapshotId,
    backend: BackendKind,
    mounted: Option<&'a Path>,
}

#[derive(Serialize)]
struct StatusDocument<'a> {
    pool: &'a Path,
    id: SnapshotId,
    backend: BackendKind,
    created: Timestamp,
    overcommit_percent: u32,
    available_bytes: u64,
    #[serde(flatten)]
    status: Status,
}

#[derive(Serialize)]
struct RecoverDocument<'a> {
    pool: &'a Path,
    done: Vec<Recovered>,
    problems: Vec<String>,
}

impl Pool {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        match self.action {
            Action::Agent(agent) => agent.run(session).await,
            Action::Init(init) => init.run(session),
            Action::Status { pool } => status(&pool.open()?, session),
            Action::Recover { pool } => recover(&pool.open()?, session),
        }
    }
}

impl Init {
    fn run(self, session: &Session) -> Result<(), Failure> {
        let request = InitRequest {
            place: self.place()?,
            filesystem: self.filesystem,
            overcommit_percent: self.overcommit,
            reserve_bytes: self.reserve,
        };
        let made = OpenPool::init(&request, Arc::new(SystemHost))?;
        let root = made.pool.root();
        let document = InitDocument {
            pool: root,
            id: made.pool.state().id,
            backend: made.pool.state().backend,
            mounted: made.mounted.as_ref().map(|(from, _)| from.as_path()),
        };
        session.out.report(&document, || format!("{}\n", root.display()))?;
        let word = |path: &Path| quoted(&path.to_string_lossy());
        if let Some((from, at)) = &made.mounted {
            session.out.say(&format!("after a reboot: mount {} {}", word(from), word(at)));
        }
        let root = word(root);
        session.out.say(&format!("next: petra volume create --pool {root} NAME --size 10G"));
        Ok(())
    }

    fn place(&self) -> Result<Place, Failure> {
        let path = &self.place;
        let is_device = std::fs::metadata(path).is_ok_and(|metadata| {
            std::os::unix::fs::FileTypeExt::is_block_device(&metadata.file_type())
        });
        match (is_device, self.size, &self.at) {
            (true, None, Some(at)) => Ok(Place::Device { device: path.clone(), at: at.clone() }),
            (true, None, None) => Err(Failure::fix(format!("{} is a device", path.display()))
                .hint("say where to mount it, such as --at /var/lib/petra")),
            (true, Some(_), _) => Err(Failure::fix(format!(
                "{} is a device and has its size already",
                path.display()
            ))
            .hint("leave out --size")),
            (false, Some(size_bytes), at) => {
                let at = match at {
                    Some(at) => at.clone(),
                    None if path.extension().is_some() => path.with_extension(""),
                    None => {
                        return Err(Failure::fix(format!(
                            "there is no place yet for what {} will hold",
                            path.display()
                        ))
                        .hint("say where to mount it with --at DIR"));
                    }
                };
                Ok(Place::File { file: path.clone(), size_bytes, at })
            }
            (false, None, Some(_)) => Err(Failure::fix(format!(
                "{} is not mounted: it is no device, and no file without --size",
                path.display()
            ))
            .hint("leave out --at to use a directory, or give --size to make a file")),
            (false, None, None) => Ok(Place::Directory(path.clone())),
        }
    }
}

fn status(pool: &OpenPool, session: &Session) -> Result<(), Failure> {
    let (state, status) = (pool.state(), pool.status()?);
    let document = StatusDocument {
        pool: pool.root(),
        id: state.id,
        backend: state.backend,
        created: state.created,
        overcommit_percent: state.overcommit_percent,
        available_bytes: status.available_bytes(),
        status,
    };
    session.out.report(&document, || {
        let status = &document.status;
        let mut fields = Fields::default();
        fields
            .add("pool", pool.root().to_string_lossy())
            .add("id", state.id.to_string())
            .add("backend", state.backend.to_string())
            .add("created", time(state.created))
            .add("size", bytes(status.total_bytes))
            .add("free", bytes(status.free_bytes))
            .add("reserve", bytes(status.reserve_bytes))
            .add("volumes", status.volumes.to_string())
            .add(
                "promised",
                format!("{} of {}", bytes(status.promised_bytes), bytes(status.limit_bytes)),
            );
        fields.render()
    })
}

fn recover(pool: &OpenPool, session: &Session) -> Result<(), Failure> {
    let recovery = pool.recover()?;
    let problems: Vec<String> = recovery.problems.iter().map(ToString::to_string).collect();
    let document = RecoverDocument { pool: pool.root(), done: recovery.done, problems };
    session.out.report(&document, || {
        document.done.iter().map(|done| format!("{}\n", describe(done))).collect()
    })?;
    if document.done.is_empty() {
        session.out.say("there was nothing to do");
    }
    let Some(first) = recovery.problems.into_iter().next() else { return Ok(()) };
    let failure = Failure::from(first);
    let what = format!("{} could not be cleaned up: {}", pool.root().display(), failure.message);
    Err(Failure { message: what, causes: document.problems, ..failure })
}

fn describe(done: &Recovered) -> String {
    match done {
        Recovered::Deleted { path } => format!("deleted {}", path.display()),
        Recovered::DeletedCopy { path, .. } => format!("deleted {}", path.display()),
        Recovered::ForgotCopy { volume, copy } => {
            format!("copy {copy} of volume {volume} is gone: its next snapshot may read everything")
        }
        Recovered::Detached { device, image } => {
            format!("detached {} from {}", device.display(), image.display())
        }
        Recovered::Thawed { volume, at } => {
            format!("thawed volume {volume}, mounted at {}", at.display())
        }
    }
}
