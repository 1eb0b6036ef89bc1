//! `petra init`.

use petra_engine::chunker::Chunking;
use petra_engine::record::{Config, Writers};
use petra_engine::store::{self, S3Store, StoreErrorCause};
use petra_engine::{Error, Item, Name, NewKey, Repository, RepositoryUrl};
use serde::Serialize;

use crate::failure::{At, Failure};
use crate::secrets;
use crate::session::Session;
use crate::text::quoted;

/// Options of `petra init`.
#[derive(Debug, clap::Args)]
pub struct Init {
    /// A bucket, a prefix in one, or a directory; with #EXPERIMENT when it has '{experiment}' in it
    #[arg(value_name = "URL")]
    url: String,
    /// How volumes are cut into chunks: by content (cdc, cdc-16k) or in fixed sizes (fixed-16k, for databases)
    #[arg(long, value_name = "PROFILE", default_value = "cdc")]
    chunking: Chunking,
    /// Encrypt everything. Without --passphrase-file, --key-file or their variables it asks for a passphrase
    #[arg(long)]
    encrypt: bool,
    /// A name for the key, which anyone who can read the store can read
    #[arg(long, value_name = "NAME", requires = "encrypt")]
    key_label: Option<String>,
    /// Make the bucket first if it is not there
    #[arg(long)]
    create_bucket: bool,
    /// For a store without create-if-absent: you see to it that only one process writes at any time
    #[arg(long)]
    single_writer: bool,
}

#[derive(Serialize)]
struct Document<'a> {
    url: String,
    config: &'a Config,
}

impl Init {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let url = session.url(&self.url)?;
        let fits = match url.item {
            Item::Repository => true,
            // One repository for each experiment: the name is part of the repository's.
            Item::Experiment(_) => url.repository.is_template(),
            _ => false,
        };
        if !fits {
            return Err(Failure::fix(format!("{url} names something in a repository"))
                .hint(format!("leave out what follows the '#': petra init {}", url.repository)));
        }
        let key = self.key(session).await?;
        let activity = session.activity("init");
        let location = url.resolved_repository()?;
        let store = store::open(&location).await.at(&url)?;
        let writers = if self.single_writer { Writers::Single } else { Writers::Many };
        let init = async || {
            let (store, chunking, ctx) = (store.clone(), self.chunking, &activity.context);
            match &key {
                Some(key) => Repository::init_encrypted(writers, store, chunking, key, ctx).await,
                None => Repository::init_for(writers, store, chunking, ctx).await,
            }
        };
        let repository = match init().await {
            Err(Error::Store(error))
                if self.create_bucket && error.cause == StoreErrorCause::NoContainer =>
            {
                if let RepositoryUrl::S3(bucket) = &location {
                    let store = S3Store::connect(bucket).await.at(&url)?;
                    store.create_bucket().await.map_err(Error::from).at(&url)?;
                }
                init().await.at(&url)?
            }
            result => result.at(&url)?,
        };
        drop(activity);
        let document = Document { url: url.to_string(), config: repository.config() };
        session.out.report(&document, || format!("{url}\n"))?;
        if self.single_writer {
            session.out.say(
                "only one process may change the repository at any time: snapshots, copies, deletions, policies, \
                 keys, gc, repair; any number may read",
            );
        }
        let run = if url.experiment().is_some() { "/RUN" } else { "#EXPERIMENT/RUN" };
        let example = quoted(&format!("{url}{run}"));
        if repository.keys().is_some() {
            session
                .out
                .say("without the passphrase or key file nobody can read it again: keep it safe");
        }
        session.out.say(&format!("next: petra snapshot IMAGE {example}"));
        Ok(())
    }

    /// The first key of an encrypted repository.
    async fn key(&self, session: &Session) -> Result<Option<NewKey>, Failure> {
        let secret = match (self.encrypt, session.secret()?) {
            (true, Some(secret)) => secret,
            (true, None) => secrets::ask_new(session).await?,
            (false, None) => return Ok(None),
            (false, Some(_)) => {
                return Err(Failure::fix("a passphrase or key file was given, but not --encrypt")
                    .hint("say --encrypt, or take away the option or variable"));
            }
        };
        let label = self.key_label.as_ref().map(|label| Name::new("label", label)).transpose()?;
        Ok(Some(NewKey { label, ..NewKey::new(secret) }))
    }
}
