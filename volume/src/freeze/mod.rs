//! Holding file systems still while copies are taken.
//!
//! A frozen file system is clean on its device, and whoever writes to it waits: so it must be thawed whatever dies.
//!
//! | who dies | who thaws |
//! |---|---|
//! | the process that froze | its guard, when the pipe between them closes |
//! | the guard | the process that froze, as it does anyway |
//! | both | recovery at the next start, by [`thaw_all`] |
//! | nobody, but the copies take too long | the guard, after a time limit; the copies are then worthless, which shows when thawing them |
//!
//! A freeze writes out what is dirty first, and that is what takes time. So each file system is synced twice before:
//! once for what is dirty now, and once for what became dirty meanwhile. Between the two the caller may do of its work what
//! needs no freeze. All are synced and frozen at the same time, so that a group waits for its slowest and not for the sum.

mod guard;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{OFlags, syncfs};
use rustix::io::Errno;
use rustix::ioctl::{NoArg, Opcode, ioctl, opcode};

pub use guard::{GuardCommand, guard_main};

use crate::error::{Error, Result};
use guard::Guard;

/// After this time a guard thaws, whatever goes on.
pub const TIME_LIMIT: Duration = Duration::from_secs(20);

const FIFREEZE: Opcode = opcode::read_write::<i32>(b'X', 119);
const FITHAW: Opcode = opcode::read_write::<i32>(b'X', 120);

/// A mounted file system that can be frozen.
#[derive(Debug)]
struct Mount {
    dir: File,
    path: PathBuf,
    /// Which file system it is.
    device: u64,
}

impl Mount {
    /// Opens where a file system is mounted. While it is open it stays mounted.
    fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::DIRECTORY.bits().cast_signed();
        let dir = OpenOptions::new().read(true).custom_flags(flags).open(path);
        let dir = dir.map_err(Error::io("open", path))?;
        let device = dir.metadata().map_err(Error::io("open", path))?.dev();
        Ok(Self { dir, path: path.to_owned(), device })
    }

    fn sync(&self) -> Result<()> {
        syncfs(&self.dir).map_err(Error::io("sync", &self.path))
    }

    fn freeze(&self) -> Result<()> {
        // SAFETY: the opcode is FIFREEZE, which ignores its argument.
        match unsafe { ioctl(&self.dir, NoArg::<FIFREEZE>::new()) } {
            Ok(()) => Ok(()),
            Err(Errno::BUSY) => Err(Error::InUse {
                what: self.path.display().to_string(),
                by: "someone who froze the file system before (fsfreeze -u thaws it)".to_owned(),
            }),
            Err(Errno::OPNOTSUPP) => Err(Error::Unsupported {
                path: self.path.clone(),
                detail: "this file system can't be frozen".to_owned(),
            }),
            Err(error) => Err(Error::io("freeze", &self.path)(error)),
        }
    }

    /// Gives false for a file system that was not frozen.
    fn thaw(&self) -> Result<bool> {
        loop {
            // SAFETY: the opcode is FITHAW, which ignores its argument.
            match unsafe { ioctl(&self.dir, NoArg::<FITHAW>::new()) } {
                Ok(()) => return Ok(true),
                Err(Errno::INVAL) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(error) => return Err(Error::io("thaw", &self.path)(error)),
            }
        }
    }
}

/// File systems that are frozen. They are thawed when this is dropped, or when the process dies.
#[derive(Debug)]
pub struct FrozenGroup {
    /// Those that were frozen by this.
    frozen: Vec<Mount>,
    guard: Guard,
    since: Instant,
}

impl FrozenGroup {
    /// Syncs and freezes the file systems that are mounted at these places. `command` starts a guard, which thaws them
    /// after `limit`. `prepare` is called in between, when little is dirty any more.
    ///
    /// Errors: [`Error::InUse`] where a file system is frozen already, [`Error::Unsupported`] where it can't be, and
    /// what the kernel and `prepare` say. Then none of them is frozen by this.
    pub fn freeze(
        mounts: &[PathBuf],
        command: &GuardCommand,
        limit: Duration,
        prepare: impl FnOnce() -> Result<()>,
    ) -> Result<Self> {
        let mut opened: Vec<Mount> = Vec::with_capacity(mounts.len());
        for path in mounts {
            let mount = Mount::open(path)?;
            // Twice the same one would wait for itself.
            if !opened.iter().any(|known| known.device == mount.device) {
                opened.push(mount);
            }
        }
        let sync = || at_once(&opened, Mount::sync).into_iter().collect::<Result<()>>();
        sync()?;
        let paths = opened.iter().map(|mount| mount.path.as_path());
        let mut guard = Guard::start(command, paths, limit)?;
        prepare()?;
        sync()?;
        guard.begin()?;
        let since = Instant::now();
        let results = at_once(&opened, Mount::freeze);
        let mut group = Self { frozen: Vec::with_capacity(opened.len()), guard, since };
        let mut failure = None;
        for (mount, result) in opened.into_iter().zip(results) {
            match result {
                Ok(()) => group.frozen.push(mount),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        match failure {
            Some(error) => {
                // Whatever the thaw says, the freeze is what failed.
                let _ = group.thaw();
                Err(error)
            }
            None => Ok(group),
        }
    }

    /// Thaws all, and gives the time from before the first freeze to after the last thaw.
    ///
    /// Errors: [`Error::Thawed`] where a file system was thawed before: what was done since the freeze is then not of
    /// one point in time.
    pub fn thaw(mut self) -> Result<Duration> {
        let result = self.thaw_frozen();
        let pause = self.since.elapsed();
        if matches!(result, Ok(()) | Err(Error::Thawed { .. })) {
            self.guard.dismiss();
        }
        // Else the guard tries as well, when its pipe closes now.
        result.map(|()| pause)
    }

    /// Of several errors, one that leaves a file system frozen is given.
    fn thaw_frozen(&mut self) -> Result<()> {
        let frozen = std::mem::take(&mut self.frozen);
        let mut first = Ok(());
        for (mount, result) in frozen.iter().zip(at_once(&frozen, Mount::thaw)) {
            let result = match result {
                Ok(true) => continue,
                Ok(false) => {
                    let limit = self.guard.limit();
                    let detail = if self.since.elapsed() >= limit {
                        format!("by its guard, after {} s", limit.as_secs_f32())
                    } else {
                        "by someone else".to_owned()
                    };
                    Error::Thawed { path: mount.path.clone(), detail }
                }
                Err(error) => error,
            };
            if matches!(first, Ok(()) | Err(Error::Thawed { .. })) {
                first = Err(result);
            }
        }
        first
    }
}

impl Drop for FrozenGroup {
    fn drop(&mut self) {
        // On the way out of a failure or panic; the guard, whose pipe closes now, does it again.
        let _ = self.thaw_frozen();
    }
}

/// Does some work while file systems are frozen, after some that needs no freeze, and gives the length of the pause too.
/// Where the result is an error, what the work made is worthless, and the file systems are not frozen.
pub fn while_frozen<T>(
    mounts: &[PathBuf],
    command: &GuardCommand,
    limit: Duration,
    prepare: impl FnOnce() -> Result<()>,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, Duration)> {
    if mounts.is_empty() {
        return Ok((work()?, Duration::ZERO));
    }
    let group = FrozenGroup::freeze(mounts, command, limit, prepare)?;
    let result = work();
    let pause = group.thaw();
    let result = result?;
    Ok((result, pause?))
}

/// Thaws all of these that are frozen, as a process may have left them that died together with its guard. Gives those
/// that were. The caller makes sure that no snapshot of them is under way.
pub fn thaw_all<'a>(mounts: impl IntoIterator<Item = &'a Path>) -> Result<Vec<PathBuf>> {
    let mut thawed = Vec::new();
    for path in mounts {
        if Mount::open(path)?.thaw()? {
            thawed.push(path.to_owned());
        }
    }
    Ok(thawed)
}

/// Works on all mounts at the same time.
fn at_once<T: Send>(mounts: &[Mount], work: impl Fn(&Mount) -> Result<T> + Sync) -> Vec<Result<T>> {
    match mounts {
        [] => Vec::new(),
        [only] => vec![work(only)],
        mounts => thread::scope(|scope| {
            let work = &work;
            let running: Vec<_> = mounts
                .iter()
                .map(|mount| thread::Builder::new().spawn_scoped(scope, move || work(mount)))
                .collect();
            let ended = running.into_iter().zip(mounts).map(|(thread, mount)| match thread {
                Ok(thread) => thread.join().map_err(|_| Error::Internal("a thread panicked"))?,
                // There are too many: it takes longer, but none may stay frozen for that.
                Err(_) => work(mount),
            });
            ended.collect()
        }),
    }
}

/// As an error of a guard.
fn guard_error(cause: io::Error) -> Error {
    Error::Io { action: "start", path: "freeze guard".into(), cause }
}
