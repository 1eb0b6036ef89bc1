//! The guard: a process that thaws when the one that froze can't.
//!
//! It is started before the freeze, by a command of the embedding program that runs [`guard_main`]. Through its
//! standard input it gets the time limit in milliseconds and the mount points, each ended by a zero byte, and one more
//! zero byte. It opens them and answers `ready` and a newline. From then on it waits: for the byte `f` (the freeze begins,
//! and with it the time), for the byte `d` (done: exit and touch nothing), for the end of the input (thaw, exit), or for the
//! time limit (thaw, and again and again until one of the others happens, since a freeze may still be under way).

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::setsid;

use super::{Mount, guard_error};
use crate::error::{Error, Result};

/// How long a guard may take to be ready, or to exit.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two attempts to thaw after the time limit.
const AGAIN: Duration = Duration::from_millis(100);
/// Mount points in bytes, all together.
const MAX_REQUEST_BYTES: usize = 1 << 20;

const READY: &[u8] = b"ready\n";
const BEGIN: u8 = b'f';
const DONE: u8 = b'd';

/// How the embedding program starts a guard.
#[derive(Clone, Debug)]
pub struct GuardCommand {
    program: PathBuf,
    args: Vec<OsString>,
}

impl GuardCommand {
    /// A program and its arguments, which calls [`guard_main`].
    pub fn new<I: Into<OsString>>(
        program: impl Into<PathBuf>,
        args: impl IntoIterator<Item = I>,
    ) -> Self {
        Self { program: program.into(), args: args.into_iter().map(Into::into).collect() }
    }

    /// The program that runs now, with other arguments. It is found even if its file was replaced.
    pub fn this_program<I: Into<OsString>>(args: impl IntoIterator<Item = I>) -> Self {
        Self::new("/proc/self/exe", args)
    }
}

/// A guard that is ready.
#[derive(Debug)]
pub(super) struct Guard {
    child: Child,
    /// Closes when this process dies.
    input: Option<ChildStdin>,
    limit: Duration,
}

impl Guard {
    /// Starts one, and waits until it is ready.
    pub fn start<'a>(
        command: &GuardCommand,
        mounts: impl Iterator<Item = &'a Path>,
        limit: Duration,
    ) -> Result<Self> {
        let mut request = limit.as_millis().to_string().into_bytes();
        request.push(0);
        for path in mounts {
            request.extend_from_slice(path.as_os_str().as_bytes());
            request.push(0);
        }
        request.push(0);
        let mut child = Command::new(&command.program)
            .args(&command.args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|cause| {
                guard_error(io::Error::new(
                    cause.kind(),
                    format!("{}: {cause}", command.program.display()),
                ))
            })?;
        let input = child.stdin.take();
        let output = child.stdout.take();
        let mut guard = Self { child, input, limit };
        let mut answer = Vec::new();
        let result = guard.send(&request).and_then(|()| {
            let mut output = output.ok_or(Errno::PIPE)?;
            read_line(&mut output, &mut answer)
        });
        let said = String::from_utf8_lossy(&answer).trim().to_owned();
        match result {
            Ok(()) if answer == READY => Ok(guard),
            Ok(()) => Err(guard_error(io::Error::other(format!("it said {said:?}")))),
            Err(error) => Err(guard_error(error)),
        }
    }

    /// After this time it thaws.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// Tells it that the freeze begins: its time runs from now on.
    pub fn begin(&mut self) -> Result<()> {
        self.send(&[BEGIN]).map_err(guard_error)
    }

    /// Tells it that all is thawed, and waits for its end.
    pub fn dismiss(&mut self) {
        // One that died needs to be told nothing.
        let _ = self.send(&[DONE]);
        self.end();
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let input = self.input.as_mut().ok_or(Errno::PIPE)?;
        input.write_all(bytes)
    }

    /// Waits for its end, but not for ever: the kernel may hold it.
    fn end(&mut self) {
        drop(self.input.take());
        let asked = Instant::now();
        while let Ok(None) = self.child.try_wait() {
            if asked.elapsed() > PATIENCE {
                tracing::warn!(pid = self.child.id(), "a freeze guard does not exit");
                let _ = self.child.kill();
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.input.is_some() {
            self.end();
        }
    }
}

/// Reads one line of some bytes, if it comes soon.
fn read_line(from: &mut (impl Read + AsFd), line: &mut Vec<u8>) -> io::Result<()> {
    let asked = Instant::now();
    while line.last() != Some(&b'\n') && line.len() < 4096 {
        let rest = PATIENCE.saturating_sub(asked.elapsed());
        if !wait(from.as_fd(), Some(rest))? {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not answer"));
        }
        let mut byte = [0];
        if from.read(&mut byte)? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it exited"));
        }
        line.extend_from_slice(&byte);
    }
    Ok(())
}

/// Waits until there is something to read, or the end. False after the time, if there is one.
fn wait(fd: BorrowedFd<'_>, time: Option<Duration>) -> io::Result<bool> {
    let until = time.map(|time| Instant::now() + time);
    loop {
        let rest = until.map(|until| until.saturating_duration_since(Instant::now()));
        let time = rest.map(|rest| Timespec {
            tv_sec: i64::try_from(rest.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: rest.subsec_nanos().into(),
        });
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], time.as_ref()) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// What a guard process does. The embedding program calls it first thing, with nothing else going on.
pub fn guard_main() -> ExitCode {
    // Signals for the terminal's other processes are not for this one. It fails where the process leads a session.
    let _ = setsid();
    // Without a buffer, in which a byte could wait unseen.
    let input = io::stdin().as_fd().try_clone_to_owned().map(File::from).map_err(guard_error);
    let (limit, mounts, mut input) = match input.and_then(prepare) {
        Ok(prepared) => prepared,
        Err(error) => {
            let _ = writeln!(io::stdout(), "{error}");
            return ExitCode::FAILURE;
        }
    };
    let mut output = io::stdout();
    if output.write_all(READY).and_then(|()| output.flush()).is_err() {
        return ExitCode::FAILURE;
    }
    let mut time = None;
    loop {
        match wait(input.as_fd(), time) {
            Ok(false) | Err(_) => time = Some(AGAIN),
            Ok(true) => {
                let mut byte = [0];
                match input.read(&mut byte) {
                    Ok(1) if byte == [BEGIN] => {
                        time = Some(limit);
                        continue;
                    }
                    Ok(1) if byte == [DONE] => {}
                    _ => thaw(&mounts),
                }
                return ExitCode::SUCCESS;
            }
        }
        thaw(&mounts);
    }
}

fn thaw(mounts: &[Mount]) {
    for mount in mounts {
        // Nobody is left to tell.
        let _ = mount.thaw();
    }
}

/// Reads the request and opens the mount points.
fn prepare(mut input: File) -> Result<(Duration, Vec<Mount>, File)> {
    let bad = || Error::Request("a freeze guard got no proper request".to_owned());
    let mut request = Vec::new();
    while !request.ends_with(&[0, 0]) {
        let mut byte = [0];
        if request.len() > MAX_REQUEST_BYTES || !matches!(input.read(&mut byte), Ok(1)) {
            return Err(bad());
        }
        request.extend_from_slice(&byte);
    }
    let mut parts = request.split(|byte| *byte == 0).filter(|part| !part.is_empty());
    let limit = parts.next().and_then(|part| str::from_utf8(part).ok()?.parse().ok());
    let limit = Duration::from_millis(limit.ok_or_else(bad)?);
    let mounts = parts.map(|part| Mount::open(Path::new(OsStr::from_bytes(part))));
    Ok((limit, mounts.collect::<Result<_>>()?, input))
}
