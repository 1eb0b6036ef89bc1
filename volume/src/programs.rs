//! How the processes of this crate are started: by the embedding program, which runs itself with another command.
//!
//! They are processes and not threads so that one can die, or be replaced, without the others. All are sessions of
//! their own: a signal to a terminal's processes is not meant for them.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use petra_engine::SnapshotId;
use tokio::sync::oneshot;

use crate::error::{Error, Result};
use crate::lazy::server::{Inheritance, ServerOptions};
use crate::pool::Pool;
use crate::volume::served::SOCKET;

/// What an image server and an agent write on their standard output when they are ready.
pub const READY: &[u8] = b"ready\n";
/// The environment variable that says what a process logs.
const LOG: &str = "PETRA_LOG";
/// What a process says about its failure is shortened to this, in bytes.
const MAX_COMPLAINT: u64 = 4096;
/// A log of uploads that is longer is begun anew.
const MAX_LOG_BYTES: u64 = 1 << 20;

/// The embedding program. It must know these commands:
///
/// | command | does |
/// |---|---|
/// | `image-server ...` | runs a [`Server`](crate::lazy::server::Server) with these options |
/// | `pool agent --pool DIR --until-idle` | runs an [`Agent`](crate::agent::Agent) |
/// | `volume upload --quiet --pool DIR [ID]` | uploads what waits, or one upload |
/// | `freeze-guard` | runs the guard of a freeze |
#[derive(Clone, Debug)]
pub struct Programs {
    program: PathBuf,
    options: Vec<OsString>,
}

impl Programs {
    /// The program that is run, and options that it gets before each of the commands. It runs in `/`: paths in the options
    /// must be absolute.
    pub fn new(program: impl Into<PathBuf>, options: Vec<OsString>) -> Self {
        Self { program: program.into(), options }
    }

    /// The program itself.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Starts an image server, or a successor of one, and waits until its file can be used. Its log goes to `log`. It
    /// starts the pool's agent whenever there is none.
    pub fn start_image_server(
        &self,
        pool: &Pool,
        options: &ServerOptions,
        inherited: Option<Inheritance>,
        log: &Path,
    ) -> Result<()> {
        let mut args = vec![OsString::from("image-server")];
        args.extend(["--pool".into(), pool.root().as_os_str().to_owned()]);
        args.extend(server_args(options));
        let mut stdin = Stdio::null();
        if let Some(Inheritance { device, negotiated }) = inherited {
            args.extend(["--resume".into(), negotiated.to_string().into()]);
            stdin = device.into();
        }
        self.start(args, stdin, log)
    }

    /// Starts the agent of a pool, and waits until it listens. It ends by itself when it has nothing to do.
    pub fn start_agent(&self, pool: &Pool) -> Result<()> {
        let args = [
            "pool".into(),
            "agent".into(),
            "--until-idle".into(),
            "--pool".into(),
            pool.root().as_os_str().to_owned(),
        ];
        let log = pool.run_directory()?.join("agent.log");
        self.start(args.to_vec(), Stdio::null(), &log)
    }

    /// Starts the agent of a pool, unless it has one.
    pub fn ensure_agent(&self, pool: &Pool) -> Result<()> {
        if has_agent(pool)? {
            return Ok(());
        }
        match self.start_agent(pool) {
            // Another one was faster.
            Err(Error::Tool { .. }) if has_agent(pool)? => Ok(()),
            started => started,
        }
    }

    /// The command that uploads what waits in a pool, and ends.
    pub(crate) fn upload(&self, pool: &Pool) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.options);
        command.args(["volume", "upload", "--quiet", "--pool"]).arg(pool.root());
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    /// Starts to upload something that waits, in the background: it goes on whatever happens to this process.
    pub fn start_upload(&self, pool: &Pool, upload: SnapshotId) -> Result<Background> {
        let mut args: Vec<OsString> =
            ["volume", "upload", "--quiet", "--pool"].map(OsString::from).to_vec();
        args.extend([pool.root().as_os_str().to_owned(), upload.to_string().into()]);
        let log = pool.run_directory()?.join("uploads.log");
        let (mut child, _) = self.spawn(args, Stdio::null(), Stdio::null(), &log)?;
        let pid = child.id();
        let (sender, ended) = oneshot::channel();
        std::thread::spawn(move || {
            // Nobody may be waiting for it.
            let _ = sender.send(child.wait());
        });
        Ok(Background { pid, program: self.program.clone(), ended })
    }

    fn start(&self, args: Vec<OsString>, stdin: Stdio, log: &Path) -> Result<()> {
        let name = args.first().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let (mut child, log) = self.spawn(args, stdin, Stdio::piped(), log)?;
        if is_ready(&mut child) {
            // It is not this process's to wait for; whoever comes first after its end clears it away.
            std::thread::spawn(move || child.wait());
            return Ok(());
        }
        let status = child.wait().map_err(Error::io("wait for", &self.program))?;
        let stderr = log.complaint();
        let tool = format!("{} {name}", self.program.display());
        Err(Error::Tool { tool, status: status.to_string(), stderr })
    }

    /// Starts a process in a session of its own.
    fn spawn(
        &self,
        args: Vec<OsString>,
        stdin: Stdio,
        stdout: Stdio,
        log: &Path,
    ) -> Result<(Child, Log)> {
        if std::fs::metadata(log).is_ok_and(|log| log.len() > MAX_LOG_BYTES) {
            // It is in memory, and nobody reads what is so old. Another process may have found the same.
            let _ = std::fs::remove_file(log);
        }
        let file = File::options().create(true).append(true).read(true).open(log);
        let file = file.map_err(Error::io("open", log))?;
        let from = file.metadata().map_err(Error::io("look at", log))?.len();
        let mut command = Command::new(&self.program);
        // It must not keep the directory in use in which somebody happened to be.
        command.current_dir("/");
        command.args(&self.options).args(args).stdin(stdin).stdout(stdout);
        if std::env::var_os(LOG).is_none() {
            command.env(LOG, "info");
        }
        command.stderr(file.try_clone().map_err(Error::io("open", log))?);
        // SAFETY: setsid is async-signal-safe, and nothing else happens between fork and exec.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                Ok(())
            });
        }
        let child = command.spawn().map_err(Error::io("start", &self.program))?;
        Ok((child, Log { file, from }))
    }
}

/// A process that works in the background. It is cleared away when it ends, and goes on when this is dropped.
#[derive(Debug)]
pub struct Background {
    pid: u32,
    program: PathBuf,
    ended: oneshot::Receiver<std::io::Result<ExitStatus>>,
}

impl Background {
    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for its end.
    pub async fn wait(self) -> Result<ExitStatus> {
        let ended =
            self.ended.await.map_err(|_| Error::Internal("a process was not waited for"))?;
        ended.map_err(Error::io("wait for", self.program))
    }
}

/// True while a pool has an agent.
pub(crate) fn has_agent(pool: &Pool) -> Result<bool> {
    Ok(UnixStream::connect(pool.run_directory()?.join(SOCKET)).is_ok())
}

/// The options of an image server, as arguments.
fn server_args(options: &ServerOptions) -> Vec<OsString> {
    let ServerOptions { volume, image, presence, working, mount, socket, patience, .. } = options;
    let mut args: Vec<OsString> = vec![];
    for (name, value) in [
        ("--volume", volume.id.to_string().into()),
        ("--length", volume.len_bytes.to_string().into()),
        ("--image", image.as_os_str().to_owned()),
        ("--presence", presence.as_os_str().to_owned()),
        ("--working", working.as_os_str().to_owned()),
        ("--mount", mount.as_os_str().to_owned()),
        ("--agent", socket.as_os_str().to_owned()),
        ("--patience", patience.as_secs().to_string().into()),
    ] {
        args.extend([name.into(), value]);
    }
    args.extend(options.direct.then(|| "--direct".into()));
    args.extend(options.read_only.then(|| "--read-only".into()));
    args
}

/// Waits for the word that a process is ready, or for its end.
fn is_ready(child: &mut Child) -> bool {
    let mut said = vec![];
    let limit = READY.len() as u64;
    let Some(stdout) = child.stdout.take() else { return false };
    stdout.take(limit).read_to_end(&mut said).is_ok() && said == READY
}

/// The log of a process, from where it began.
struct Log {
    file: File,
    from: u64,
}

impl Log {
    /// What it has said.
    fn complaint(&self) -> String {
        let end = self.file.metadata().map_or(self.from, |metadata| metadata.len());
        let len = end.saturating_sub(self.from).min(MAX_COMPLAINT);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
        match self.file.read_exact_at(&mut bytes, self.from) {
            Ok(()) => String::from_utf8_lossy(&bytes).trim().to_owned(),
            Err(_) => String::new(),
        }
    }
}
