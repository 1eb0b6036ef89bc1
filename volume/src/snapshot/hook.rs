//! Commands that run before and after a freeze, so that an application can bring its files into order.

use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use crate::error::{Error, Result};

/// How often its end is looked for.
const STEP: Duration = Duration::from_millis(5);

/// A command with a time limit.
#[derive(Clone, Debug)]
pub struct Hook {
    /// The program.
    pub program: OsString,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// It is killed, with all that it started, when it takes longer.
    pub limit: Duration,
}

impl Hook {
    /// A line for the shell.
    pub fn shell(line: impl Into<OsString>, limit: Duration) -> Self {
        Self { program: "sh".into(), args: vec!["-c".into(), line.into()], limit }
    }

    /// Runs it. What it says goes to standard error. Errors: [`Error::Tool`] when it fails or takes too long.
    pub(super) fn run(&self) -> Result<()> {
        let told = self.args.iter().map(|arg| arg.to_string_lossy());
        let told: Vec<_> = std::iter::once(self.program.to_string_lossy()).chain(told).collect();
        let tool = format!("hook {}", told.join(" "));
        let failed = |cause: io::Error| Error::Tool {
            tool: tool.clone(),
            status: "not started".to_owned(),
            stderr: cause.to_string(),
        };
        let output = io::stderr().as_fd().try_clone_to_owned().map_err(failed)?;
        let mut child = Command::new(&self.program)
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(output)
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let begun = Instant::now();
        loop {
            if let Some(status) = child.try_wait().map_err(failed)? {
                if status.success() {
                    return Ok(());
                }
                return Err(Error::Tool {
                    tool,
                    status: status.to_string(),
                    stderr: "see its own output".to_owned(),
                });
            }
            if begun.elapsed() >= self.limit {
                let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
                if let Some(group) = group {
                    // It may have ended just now.
                    let _ = kill_process_group(group, Signal::KILL);
                }
                let _ = child.wait();
                return Err(Error::Tool {
                    tool,
                    status: "killed".to_owned(),
                    stderr: format!("it took longer than {} s", self.limit.as_secs_f32()),
                });
            }
            thread::sleep(STEP);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hook_succeeds_fails_or_takes_too_long() {
        let run = |line: &str, limit| Hook::shell(line, limit).run();
        let long = Duration::from_secs(20);
        run("exit 0", long).unwrap();
        let error = run("exit 3", long).unwrap_err().to_string();
        assert!(error.contains("exit status: 3"), "{error}");
        let begun = Instant::now();
        let error = run("sleep 30 & sleep 30", Duration::from_millis(100)).unwrap_err().to_string();
        assert!(error.contains("longer than 0.1 s"), "{error}");
        assert!(begun.elapsed() < long);
        let none = Hook { program: "/no/such".into(), args: vec![], limit: long };
        assert!(none.run().unwrap_err().to_string().contains("not started"));
    }
}
