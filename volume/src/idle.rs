//! Working only when nobody else wants to: uploads must not slow the application whose data they read.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// `ioprio_set`: a thread.
const IOPRIO_WHO_PROCESS: libc::c_int = 1;
/// The class of those that get the disk when nobody else asks for it, in the upper bits.
const IOPRIO_IDLE: libc::c_int = 3 << 13;

/// Gives all threads of this process the lowest priority for processor and disk, for good: threads that are started
/// later inherit it. For a process that does nothing but such work.
pub fn whole_process() -> Result<()> {
    // Threads that start while the list is read inherit it from those that have it already, or are seen the next time.
    for _ in 0..2 {
        let failed = || Error::io("list", "/proc/self/task");
        for entry in std::fs::read_dir("/proc/self/task").map_err(failed())? {
            let name = entry.map_err(failed())?.file_name();
            let thread = name.to_str().and_then(|name| name.parse().ok());
            if let Some(thread) = thread {
                set_idle(thread).map_err(Error::io("lower the priority of", "/proc/self"))?;
            }
        }
    }
    Ok(())
}

fn set_idle(thread: libc::pid_t) -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the pointer is to a `sched_param` that lives through the call, which only reads it.
    let set = unsafe { libc::sched_setscheduler(thread, libc::SCHED_IDLE, &raw const parameters) };
    check(set.into())?;
    // SAFETY: three integers as ioprio_set(2) takes them; it touches no memory of ours.
    let set =
        unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, thread, IOPRIO_IDLE) };
    check(set)
}

fn check(result: libc::c_long) -> io::Result<()> {
    let error = io::Error::last_os_error();
    // A thread that has ended needs no priority.
    if result >= 0 || error.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(error) }
}

/// A bound on bytes per second, shared by all who read.
#[derive(Debug)]
pub struct Rate {
    bytes_per_s: u64,
    /// When all that was taken so far is paid for.
    paid: Mutex<Instant>,
}

impl Rate {
    /// A rate; 0 counts as 1.
    pub fn new(bytes_per_s: u64) -> Self {
        Self { bytes_per_s: bytes_per_s.max(1), paid: Mutex::new(Instant::now()) }
    }

    /// Takes some bytes, and waits until they are due. Time in which nothing was taken is lost, but for a tenth of a
    /// second.
    pub fn take(&self, bytes: u64) {
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_s as f64);
        let now = Instant::now();
        let due = {
            let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
            let earliest = now.checked_sub(Duration::from_millis(100)).unwrap_or(now);
            *paid = (*paid).max(earliest) + cost;
            *paid
        };
        thread::sleep(due.saturating_duration_since(now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_kept_by_several_together() {
        let rate = Rate::new(10 << 20);
        let begun = Instant::now();
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..8).for_each(|_| rate.take(128 << 10)));
            }
        });
        // 4 MiB at 10 MiB/s, less what was free.
        let elapsed = begun.elapsed();
        assert!(elapsed >= Duration::from_millis(290), "{elapsed:?}");
    }
}
