//! `petra clone`, `petra mount` and `petra unmount`: volumes from snapshots, at once.

use std::collections::BTreeMap;
use std::path::PathBuf;

use petra_engine::context::{Host, SystemHost};
use petra_engine::{Name, PetraUrl};
use petra_volume::clones::{self, CloneRequest, How};
use petra_volume::pool::pins;
use petra_volume::{LockedVolume, Pool, Volume};
use serde::Serialize;

use super::pool::PoolOption;
use crate::failure::Failure;
use crate::lookup;
use crate::node::{self, Patience};
use crate::session::Session;
use crate::text::{bytes, quoted};

/// Options of `petra clone`.
#[derive(Debug, clap::Args)]
pub struct Clone {
    #[command(flatten)]
    pool: PoolOption,
    /// A volume of a snapshot, or a snapshot of one volume
    #[arg(value_name = "URL")]
    url: String,
    /// The name of the new volume
    #[arg(value_name = "NAME")]
    name: String,
}

/// Options of `petra mount`.
#[derive(Debug, clap::Args)]
pub struct Mount {
    #[command(flatten)]
    pool: PoolOption,
    /// A volume of a snapshot, or a snapshot of one volume
    #[arg(value_name = "URL")]
    url: String,
    /// Where; made if it is missing
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Let nobody write to it
    #[arg(long)]
    read_only: bool,
    #[command(flatten)]
    patience: Patience,
}

/// Options of `petra unmount`.
#[derive(Debug, clap::Args)]
pub struct Unmount {
    #[command(flatten)]
    pool: PoolOption,
    /// Where petra mount has mounted a snapshot
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

#[derive(Serialize)]
struct Document<'a> {
    url: String,
    volume: &'a Name,
    how: &'static str,
    size_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    directory: Option<PathBuf>,
}

/// A clone that was made.
struct Made {
    volume: Volume,
    how: How,
    url: PetraUrl,
    size_bytes: u64,
}

impl Clone {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let name = Name::new("volume", self.name)?;
        let pool = self.pool.open_to_change(session)?;
        let made = make(session, &pool, &self.url, name, false).await?;
        report(&made, None, session)?;
        let name = quoted(made.volume.name().as_str());
        session.out.say(&format!("next: petra volume mount {name} DIR"));
        Ok(())
    }
}

impl Mount {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let pool = self.pool.open_to_change(session)?;
        let name = Name::new("volume", format!("mount-{}", SystemHost.new_id()))?;
        let made = make(session, &pool, &self.url, name, true).await?;
        let serving = node::serving(session, self.patience)?;
        let mounted = made.volume.lock().and_then(|mut locked| {
            locked.attach_served(&serving, self.read_only)?;
            locked.mount(&self.directory, self.read_only)
        });
        if let Err(error) = mounted {
            remove_or_detach(session, &made.volume).await?;
            return Err(error.into());
        }
        report(&made, Some(self.directory.clone()), session)?;
        let directory = quoted(&self.directory.to_string_lossy());
        session.out.say(&format!("next: petra unmount {directory}"));
        Ok(())
    }
}

impl Unmount {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let pool = self.pool.open()?;
        let directory = self.directory.canonicalize().unwrap_or(self.directory);
        for volume in pool.volumes()? {
            if volume.mounts()?.contains(&directory) {
                remove_or_detach(session, &volume).await?;
                session.out.say(&format!("unmounted {}", directory.display()));
                return Ok(());
            }
        }
        Err(Failure::fix(format!("no volume of {pool} is mounted at {}", directory.display()))
            .hint("petra volume ls shows the volumes of a pool"))
    }
}

/// Makes a clone of what a URL names.
async fn make(
    session: &Session,
    pool: &Pool,
    url: &str,
    name: Name,
    ephemeral: bool,
) -> Result<Made, Failure> {
    let url = session.url(url)?;
    let repository = session.open(&url).await?;
    let snapshot = session.unless_cancelled(lookup::snapshot(&repository, &url)).await?;
    let volume = lookup::one_volume(&snapshot, &url)?.clone();
    node::can_be_served(session, &repository)?;
    let activity = session.activity("clone");
    let request = CloneRequest {
        name,
        repository: url.resolved_repository()?.to_string(),
        origin: url.to_string(),
        snapshot,
        volume,
        ephemeral,
        held: false,
        size_bytes: None,
        metadata: BTreeMap::new(),
    };
    let (volume, how) = clones::clone(pool, &repository, &request, &activity.context).await?;
    Ok(Made { volume, how, url, size_bytes: request.volume.len_bytes })
}

fn report(made: &Made, directory: Option<PathBuf>, session: &Session) -> Result<(), Failure> {
    let document = Document {
        url: made.url.to_string(),
        volume: made.volume.name(),
        how: made.how.into(),
        size_bytes: made.size_bytes,
        directory,
    };
    session.out.report(&document, || match &document.directory {
        Some(directory) => format!("{}\n", directory.display()),
        None => format!("{}\n", document.volume),
    })?;
    session.out.say(&format!(
        "{} {}",
        bytes(made.size_bytes),
        match made.how {
            How::Reference => "by reference to a copy on this machine: complete",
            How::Lazy => "lazily: its data comes as it is read, and in the background",
        }
    ));
    Ok(())
}

/// Ends a mount; a volume that was made for it goes as well.
async fn remove_or_detach(session: &Session, volume: &Volume) -> Result<(), Failure> {
    let mut locked = volume.lock()?;
    locked.unmount()?;
    locked.detach()?;
    if locked.state().ephemeral { remove(session, locked, false).await } else { Ok(()) }
}

/// Deletes a volume, and ends its pin if it has one and its repository can be reached.
pub async fn remove(
    session: &Session,
    volume: LockedVolume,
    copies_matter: bool,
) -> Result<(), Failure> {
    let pool = volume.volume().pool().clone();
    let lazy = volume.state().lazy.clone();
    clones::delete(volume, copies_matter)?;
    let Some(lazy) = lazy.filter(|lazy| !lazy.hydrated) else { return Ok(()) };
    let url = session.url(&lazy.repository)?;
    let settled = async {
        let repository = session.open(&url).await?;
        let activity = session.activity("delete");
        pins::settle(&pool, &lazy.repository, &repository, &activity.context).await?;
        Ok::<_, Failure>(())
    };
    if let Err(failure) = settled.await {
        session.out.warn(&format!(
            "its pin in {url} could not be ended, which the next agent of the pool will do: {}",
            failure.message
        ));
    }
    Ok(())
}
