//! What commands about live volumes share: how the processes behind them are started, and how those open repositories.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use petra_engine::{Error, Repository, RepositoryUrl, Secret, store};
use petra_volume::agent::Repositories;
use petra_volume::programs::Programs;
use petra_volume::volume::Serving;

use crate::failure::Failure;
use crate::session::Session;

/// How long a read of a lazy clone waits for a repository that is away.
const PATIENCE: Duration = Duration::from_secs(600);

/// Serves lazy clones with processes of this very program.
pub fn serving() -> Result<Serving, Failure> {
    let program = std::env::current_exe().map_err(|cause| Error::Io {
        action: "find",
        path: "petra".into(),
        cause,
    })?;
    Ok(Serving { programs: Programs::new(program), patience: PATIENCE })
}

/// Opens repositories with the secret that this process was given.
#[derive(Debug)]
struct Opener {
    secret: Option<Secret>,
}

#[async_trait]
impl Repositories for Opener {
    async fn open(&self, url: &str) -> petra_engine::Result<Repository> {
        let url: RepositoryUrl = url.parse()?;
        let store = store::open(&url).await?;
        match &self.secret {
            Some(secret) => match Repository::unlock(store.clone(), secret).await {
                // A machine's volumes may come from several repositories.
                Err(Error::NotEncrypted { .. }) => Repository::open(store).await,
                opened => opened,
            },
            None => Repository::open(store).await,
        }
    }
}

/// Opens repositories for an agent.
pub fn repositories(session: &Session) -> Result<Arc<dyn Repositories>, Failure> {
    Ok(Arc::new(Opener { secret: session.secret()? }))
}
