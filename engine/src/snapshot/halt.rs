//! How the parts of a pipeline stop together.

use std::sync::{Mutex, PoisonError};

use tokio_util::sync::{CancellationToken, DropGuard};

use crate::error::{Error, Result};

/// The first failure of any part stops all parts and becomes the result.
#[derive(Debug)]
pub struct Halt {
    token: CancellationToken,
    first: Mutex<Option<Error>>,
}

impl Halt {
    /// Stops with `parent` too.
    pub fn new(parent: &CancellationToken) -> Self {
        Self { token: parent.child_token(), first: Mutex::default() }
    }

    /// Records a failure and stops all parts.
    pub fn fail(&self, error: Error) {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.token.cancel();
    }

    /// True once the parts should stop.
    pub fn is_set(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Stops all parts when it is dropped: also when the caller gives up on the whole without waiting for its end.
    pub fn guard(&self) -> DropGuard {
        self.token.clone().drop_guard()
    }

    /// Waits until the parts should stop.
    pub async fn wait(&self) {
        self.token.cancelled().await;
    }

    /// The result of the whole.
    pub fn result(&self) -> Result<()> {
        match self.first.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(error) => Err(error),
            None if self.is_set() => Err(Error::Cancelled),
            None => Ok(()),
        }
    }
}
