//! What all commands share.

use std::ffi::OsString;
use std::future::Future;
use std::sync::{Arc, OnceLock};

use petra_engine::access::SecretsDirectory;
use petra_engine::store::Store;
use petra_engine::{Access, Context, Error, PetraUrl, Repository, RepositoryUrl, Secret};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use crate::args::Global;
use crate::failure::{At, Failure};
use crate::location;
use crate::output::Output;
use crate::progress::Activity;
use crate::secrets;

/// One run of the command line.
#[derive(Debug)]
pub struct Session {
    /// Where results and talk go.
    pub out: Output,
    /// Cancelled by a signal.
    pub cancel: CancellationToken,
    global: Global,
    /// Repositories that are open: several URLs of one command are often in one of them.
    opened: Mutex<Vec<(RepositoryUrl, Repository)>>,
    asked: OnceLock<Secret>,
}

impl Session {
    /// A session with these options.
    pub fn new(global: &Global, out: Output) -> Self {
        Self {
            out,
            cancel: CancellationToken::new(),
            global: global.clone(),
            opened: Mutex::default(),
            asked: OnceLock::new(),
        }
    }

    /// The repository of `--repository` or `PETRA_REPOSITORY`.
    pub fn default_repository(&self) -> Option<&str> {
        self.global.repository.as_deref().filter(|url| !url.is_empty())
    }

    /// Reads a URL as typed.
    pub fn url(&self, text: &str) -> Result<PetraUrl, Failure> {
        location::parse(text, self.default_repository())
    }

    /// Opens the repository of a URL.
    pub async fn open(&self, url: &PetraUrl) -> Result<Repository, Failure> {
        let repository = url.resolved_repository()?;
        let mut opened = self.opened.lock().await;
        if let Some((_, open)) = opened.iter().find(|(at, _)| *at == repository) {
            return Ok(open.clone());
        }
        tracing::debug!(%repository, "open");
        let mut access = self.access(&repository)?;
        if access.secret.is_none() {
            access.secret = self.secret()?;
        }
        let store = self.unless_cancelled(access.store(&repository)).await.at(url)?;
        let open = self.open_store(store, access.secret, url).await?;
        opened.push((repository, open.clone()));
        Ok(open)
    }

    /// Opens the repository in a store, with the secret that was given or is asked for.
    async fn open_store(
        &self,
        store: Arc<dyn Store>,
        secret: Option<Secret>,
        url: &PetraUrl,
    ) -> Result<Repository, Failure> {
        let opened = self.unless_cancelled(async {
            match &secret {
                Some(secret) => Repository::unlock(store.clone(), secret).await,
                None => Repository::open(store.clone()).await,
            }
        });
        match opened.await {
            Err(Error::Encrypted { location }) if secrets::can_ask(self.out) => {
                let secret = match self.asked.get() {
                    Some(secret) => secret.clone(),
                    None => secrets::ask(&format!("passphrase of {location}: "), self).await?,
                };
                // A command that opens two repositories asks once.
                let secret = self.asked.get_or_init(|| secret).clone();
                self.unless_cancelled(Repository::unlock(store, &secret)).await.at(url)
            }
            opened => opened.at(url),
        }
    }

    /// The secret that options or the environment hold.
    pub fn secret(&self) -> Result<Option<Secret>, Failure> {
        secrets::given(&self.global)
    }

    /// The directory with secrets of several repositories.
    pub fn secrets_directory(&self) -> Option<SecretsDirectory> {
        secrets::directory(&self.global)
    }

    /// What that directory holds for a repository.
    pub fn access(&self, repository: &RepositoryUrl) -> Result<Access, Failure> {
        let Some(directory) = self.secrets_directory() else { return Ok(Access::default()) };
        Ok(directory.access(repository)?.unwrap_or_default())
    }

    /// The options that name the secret, for other processes of this program, in any directory.
    pub fn secret_options(&self) -> std::io::Result<Vec<OsString>> {
        secrets::options(&self.global)
    }

    /// Waits for a request that takes no context of its own. Such a request changes nothing, so that it can be
    /// dropped at any point.
    pub async fn unless_cancelled<T, E: From<Error>>(
        &self,
        request: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        tokio::select! {
            result = request => result,
            () = self.cancel.cancelled() => Err(Error::Cancelled.into()),
        }
    }

    /// The context of an operation that shows nothing.
    pub fn context(&self) -> Context {
        let mut context = Context { cancel: self.cancel.clone(), ..Context::default() };
        if let Some(threads) = self.global.threads {
            context.limits.threads = threads.get();
        }
        context
    }

    /// Begins an operation that shows its progress until the returned value is dropped.
    pub fn activity(&self, label: &'static str) -> Activity {
        // Log lines would tear a bar apart.
        let may_draw = self.global.verbose == 0;
        Activity::begin(label, self.out, self.context(), may_draw)
    }
}
