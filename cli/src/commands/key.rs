//! `petra key`.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use clap::Subcommand;
use jiff::Timestamp;
use petra_engine::crypto::{KeyInfo, Source, list_keys};
use petra_engine::{Context, Error, Name, NewKey, PetraUrl, Repository, Secret, SnapshotId, store};
use serde::Serialize;

use crate::failure::{At, Failure};
use crate::secrets;
use crate::session::Session;
use crate::text::{Side, Table, time};

/// Options of `petra key`.
#[derive(Debug, clap::Args)]
pub struct Key {
    #[command(subcommand)]
    action: Action,
}

/// What to do with keys.
#[derive(Debug, Subcommand)]
enum Action {
    /// List the keys. Needs none of them
    List(OfRepository),
    /// Let one more passphrase or key file open the repository
    Add(Add),
    /// Take a key away, but never the last one
    Remove(Remove),
    /// Put a new passphrase or key file in the place of the one that was given
    Rotate(Add),
    /// Write a new key file
    Generate(Generate),
}

/// A repository.
#[derive(Debug, clap::Args)]
struct OfRepository {
    /// The repository; with #EXPERIMENT when it has '{experiment}' in it
    #[arg(value_name = "URL")]
    url: String,
}

/// A new key.
#[derive(Debug, clap::Args)]
struct Add {
    #[command(flatten)]
    of: OfRepository,
    /// The new passphrase is in this file. Without it and --new-key-file it is asked for
    #[arg(long, value_name = "FILE", conflicts_with = "new_key_file")]
    new_passphrase_file: Option<PathBuf>,
    /// The new key file
    #[arg(long, value_name = "FILE")]
    new_key_file: Option<PathBuf>,
    /// A name for the new key, which anyone who can read the store can read
    #[arg(long, value_name = "NAME")]
    label: Option<String>,
}

#[derive(Debug, clap::Args)]
struct Remove {
    #[command(flatten)]
    of: OfRepository,
    /// The key's id, as petra key list shows it
    #[arg(value_name = "ID")]
    id: String,
}

#[derive(Debug, clap::Args)]
struct Generate {
    /// The file to make. Only its owner can read it
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// A key as programs see it.
#[derive(Serialize)]
struct View<'a> {
    id: SnapshotId,
    kind: &'static str,
    label: Option<&'a Name>,
    created: Timestamp,
}

impl<'a> From<&'a KeyInfo> for View<'a> {
    fn from(KeyInfo { id, slot }: &'a KeyInfo) -> Self {
        let kind = match slot.source {
            Source::Passphrase { .. } => "passphrase",
            Source::KeyFile => "key-file",
        };
        Self { id: *id, kind, label: slot.label.as_ref(), created: slot.created }
    }
}

#[derive(Serialize)]
struct Listed<'a> {
    url: String,
    keys: Vec<View<'a>>,
}

#[derive(Serialize)]
struct Changed<'a> {
    url: String,
    added: Option<View<'a>>,
    removed: Option<SnapshotId>,
}

#[derive(Serialize)]
struct Generated {
    file: String,
}

impl Key {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        match self.action {
            Action::List(of) => of.list(session).await,
            Action::Add(add) => add.run(session, false).await,
            Action::Rotate(add) => add.run(session, true).await,
            Action::Remove(remove) => remove.run(session).await,
            Action::Generate(generate) => generate.run(session),
        }
    }
}

impl OfRepository {
    async fn list(&self, session: &Session) -> Result<(), Failure> {
        let url = session.url(&self.url)?;
        let location = url.resolved_repository()?;
        let keys =
            session.unless_cancelled(async { list_keys(&*store::open(&location).await?).await });
        let keys = keys.await.at(&url)?;
        let document = Listed { url: url.to_string(), keys: keys.iter().map(View::from).collect() };
        session.out.report(&document, || table(&document.keys))
    }

    async fn open(&self, session: &Session) -> Result<(PetraUrl, Repository), Failure> {
        let url = session.url(&self.url)?;
        let repository = session.open(&url).await?;
        Ok((url, repository))
    }
}

fn table(keys: &[View<'_>]) -> String {
    use Side::Left;
    let mut table = Table::new(&[("ID", Left), ("KIND", Left), ("CREATED", Left), ("LABEL", Left)]);
    for key in keys {
        let label = key.label.map_or(String::new(), ToString::to_string);
        table.row([key.id.to_string(), key.kind.to_owned(), time(key.created), label]);
    }
    table.render()
}

impl Add {
    async fn run(&self, session: &Session, rotate: bool) -> Result<(), Failure> {
        let (url, repository) = self.of.open(session).await?;
        let Some(old) = repository.opened_with() else {
            let location = repository.location();
            return Err(Failure::engine(&Error::NotEncrypted { location }, Some(&url)));
        };
        let key = NewKey {
            label: self.label.as_ref().map(|label| Name::new("label", label)).transpose()?,
            ..NewKey::new(self.secret(session).await?)
        };
        let activity = session.activity("key");
        let added = repository.add_key(&key, &activity.context).await.at(&url)?;
        // Only now, so that there is one key at any time.
        let removed = rotate.then_some(old);
        if let Some(old) = removed {
            repository.remove_key(old).await.at(&url)?;
        }
        drop(activity);
        if rotate {
            session.out.say("who had the old key may have kept the data key that it opened");
        }
        let view = View::from(&added);
        let document = Changed { url: url.to_string(), added: Some(view), removed };
        session.out.report(&document, || format!("{}\n", added.id))
    }

    async fn secret(&self, session: &Session) -> Result<Secret, Failure> {
        let passphrase = self.new_passphrase_file.as_deref();
        match secrets::of_files(passphrase, self.new_key_file.as_deref())? {
            Some(secret) => Ok(secret),
            None => secrets::ask_new(session).await,
        }
    }
}

impl Remove {
    async fn run(&self, session: &Session) -> Result<(), Failure> {
        let id: SnapshotId = self
            .id
            .parse()
            .map_err(|_| Failure::fix(format!("'{}' is not the id of a key", self.id)))?;
        let (url, repository) = self.of.open(session).await?;
        repository.remove_key(id).await.at(&url)?;
        let document = Changed { url: url.to_string(), added: None, removed: Some(id) };
        session.out.report(&document, || format!("{id}\n"))
    }
}

impl Generate {
    fn run(&self, session: &Session) -> Result<(), Failure> {
        let line = Secret::generate(&*Context::default().host);
        let io = |cause| Error::Io { action: "write", path: self.file.clone(), cause };
        let mut options = std::fs::OpenOptions::new();
        // One that is there may be the only one that opens something.
        let mut file =
            options.write(true).create_new(true).mode(0o600).open(&self.file).map_err(io)?;
        file.write_all(line.as_bytes()).and_then(|()| file.sync_all()).map_err(io)?;
        let document = Generated { file: self.file.display().to_string() };
        session.out.report(&document, || format!("{}\n", document.file))
    }
}
