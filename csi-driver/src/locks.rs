//! One operation at a time on one thing: the second one is told to come again, as the CSI specification has it. All calls
//! that change a volume or snapshot have the same key for it: its id.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use tonic::Status;

/// Keys that operations are under way on.
#[derive(Clone, Debug, Default)]
pub struct Locks(Arc<Mutex<HashSet<String>>>);

/// An operation that is under way. It ends when this is dropped.
#[derive(Debug)]
pub struct Operation {
    locks: Locks,
    keys: Vec<String>,
}

impl Locks {
    /// Begins an operation on some things: `ABORTED` where one of them is busy.
    pub fn begin<K: Into<String>>(
        &self,
        keys: impl IntoIterator<Item = K>,
    ) -> Result<Operation, Status> {
        let mut busy = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut operation = Operation { locks: self.clone(), keys: vec![] };
        for key in keys {
            let key = key.into();
            if !busy.insert(key.clone()) {
                // The lock is held here, so it can't be left to `drop`.
                for key in operation.keys.drain(..) {
                    busy.remove(&key);
                }
                return Err(Status::aborted(format!("an operation on {key} is under way")));
            }
            operation.keys.push(key);
        }
        Ok(operation)
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        if self.keys.is_empty() {
            return;
        }
        let mut busy = self.locks.0.lock().unwrap_or_else(PoisonError::into_inner);
        for key in &self.keys {
            busy.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_one_is_told_to_come_again() {
        let locks = Locks::default();
        let first = locks.begin(["a", "b"]).unwrap();
        let refused = locks.begin(["c", "b"]).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Aborted);
        // What it got before it was refused is free again.
        let other = locks.begin(["c"]).unwrap();
        drop(first);
        locks.begin(["a", "b"]).unwrap();
        drop(other);
        locks.begin(["c"]).unwrap();
    }
}
