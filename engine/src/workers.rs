//! Where an operation's work for the processor runs: on threads of its own, or, where the caller wants none, within
//! the task that needs it.

use std::sync::Arc;

use rayon::ThreadPool;
use rayon::iter::{IntoParallelIterator, ParallelIterator};

use crate::context::Context;
use crate::error::{Error, Result};

/// The threads of one operation. Cheap to clone; they end with the last clone.
#[derive(Clone, Debug)]
pub(crate) struct Workers(Option<Arc<ThreadPool>>);

impl Workers {
    /// Starts as many threads as the context allows.
    pub fn start(ctx: &Context) -> Result<Self> {
        if ctx.limits.threads == 0 {
            return Ok(Self(None));
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(ctx.limits.threads)
            .thread_name(|n| format!("petra-worker-{n}"))
            // Whoever waits for the work learns of it; without a handler the process would end.
            .panic_handler(|_| {})
            .build();
        let pool = pool.map_err(|_| Error::Internal("no worker threads can be started"))?;
        Ok(Self(Some(Arc::new(pool))))
    }

    /// Runs work for the processor without blocking the async runtime, unless there are no threads.
    pub async fn run<T: Send + 'static>(
        &self,
        ctx: &Context,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        ctx.check()?;
        let Some(pool) = &self.0 else { return work() };
        let (reply, result) = tokio::sync::oneshot::channel();
        pool.spawn(move || {
            // A receiver that is gone was cancelled and needs no answer.
            let _ = reply.send(work());
        });
        result.await.map_err(|_| Error::Internal("a worker panicked"))?
    }

    /// Does the same with each of some things, on all threads. The results are in the order of the things.
    pub async fn each<T: Send + 'static, U: Send + 'static>(
        &self,
        ctx: &Context,
        things: Vec<T>,
        work: impl Fn(T) -> U + Send + Sync + 'static,
    ) -> Result<Vec<U>> {
        match &self.0 {
            None => Ok(things.into_iter().map(work).collect()),
            Some(_) => self.run(ctx, || Ok(things.into_par_iter().map(work).collect())).await,
        }
    }

    /// The threads, if there are any.
    pub fn pool(&self) -> Option<Arc<ThreadPool>> {
        self.0.clone()
    }

    /// Runs work that waits for a disk or a pipe.
    pub async fn block<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        if self.0.is_none() {
            return Ok(work());
        }
        let done = tokio::task::spawn_blocking(work).await;
        done.map_err(|_| Error::Internal("work on a local file panicked"))
    }
}
