//! What commands about live volumes share: how the processes behind them are started, and how those open repositories.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use petra_engine::access::SecretsDirectory;
use petra_engine::{Access, Error, Repository, RepositoryUrl};
use petra_volume::agent::Repositories;
use petra_volume::programs::Programs;
use petra_volume::volume::{DEFAULT_PATIENCE, Serving};

use crate::failure::Failure;
use crate::session::Session;

/// For commands that start an image server.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Patience {
    /// For how many seconds a read of a lazy clone waits while the repository is away, before it fails
    #[arg(long = "patience", value_name = "SECONDS", default_value_t = DEFAULT_PATIENCE.as_secs())]
    seconds: u64,
}

impl From<Patience> for Duration {
    fn from(patience: Patience) -> Self {
        Self::from_secs(patience.seconds)
    }
}

/// Processes of this very program, which open repositories with the same secret.
pub fn programs(session: &Session) -> Result<Programs, Failure> {
    let find = |cause| Error::Io { action: "find", path: "petra".into(), cause };
    let program = std::env::current_exe().map_err(find)?;
    Ok(Programs::new(program, session.secret_options().map_err(find)?))
}

/// Serves lazy clones with such processes.
pub fn serving(session: &Session, patience: Patience) -> Result<Serving, Failure> {
    Ok(Serving { programs: programs(session)?, patience: patience.into() })
}

/// Fails where the processes behind a lazy clone could not open its repository, since its passphrase was typed.
pub fn can_be_served(session: &Session, repository: &Repository) -> Result<(), Failure> {
    if repository.config().encryption.is_none() || session.secret()?.is_some() {
        return Ok(());
    }
    if session.access(&repository.location().parse()?)?.secret.is_some() {
        return Ok(());
    }
    let text =
        "a clone fetches after this command has ended, and can't ask for the passphrase again";
    let hint = "give it as --passphrase-file or --key-file, or in the environment";
    Err(Failure::fix(text).hint(hint))
}

/// Opens repositories with what is kept for them, or with the secret that this process was given.
#[derive(Debug)]
struct Opener {
    directory: Option<SecretsDirectory>,
    given: Access,
}

#[async_trait]
impl Repositories for Opener {
    async fn open(&self, url: &str) -> petra_engine::Result<Repository> {
        let url: RepositoryUrl = url.parse()?;
        // Read each time: there may be new ones.
        let kept = match &self.directory {
            Some(directory) => directory.access(&url)?,
            None => None,
        };
        match kept {
            Some(access) if access.secret.is_some() => access.open(&url).await,
            // A machine's volumes may come from several repositories.
            Some(access) => {
                Access { secret: self.given.secret.clone(), ..access }.open_any(&url).await
            }
            None => self.given.open_any(&url).await,
        }
    }
}

/// Opens repositories for an agent.
pub fn repositories(session: &Session) -> Result<Arc<dyn Repositories>, Failure> {
    let given = Access { s3: None, secret: session.secret()? };
    Ok(Arc::new(Opener { directory: session.secrets_directory(), given }))
}
