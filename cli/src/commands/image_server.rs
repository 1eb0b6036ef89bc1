//! `petra image-server`: started by the agent, not by people.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use petra_engine::SnapshotId;
use petra_engine::context::SystemHost;
use petra_volume::Pool;
use petra_volume::fuse::Negotiated;
use petra_volume::lazy::presence::VolumeIdentity;
use petra_volume::lazy::server::{Inheritance, Server, ServerOptions};
use petra_volume::programs::Programs;
use tokio::net::UnixStream;
use tokio::task::spawn_blocking;

use crate::failure::{Exit, Failure};
use crate::node::{self, Patience};
use crate::session::Session;

/// How often is looked whether there is an agent. The second time that there is none one is started: a service manager
/// that starts its own one again is faster.
const LOOK: Duration = Duration::from_secs(15);

/// Options of `petra image-server`.
#[derive(Debug, clap::Args)]
pub struct ImageServer {
    /// The volume's id
    #[arg(long, value_name = "ID")]
    volume: SnapshotId,
    /// The volume's length in bytes
    #[arg(long, value_name = "BYTES")]
    length: u64,
    /// The pool that it is in, whose agent is started where there is none
    #[arg(long, value_name = "DIR")]
    pool: PathBuf,
    /// The local image
    #[arg(long, value_name = "FILE")]
    image: PathBuf,
    /// The presence map
    #[arg(long, value_name = "FILE")]
    presence: PathBuf,
    /// The working copy of the presence map, in a tmpfs
    #[arg(long, value_name = "FILE")]
    working: PathBuf,
    /// Where to mount the file system
    #[arg(long, value_name = "DIR")]
    mount: PathBuf,
    /// The agent's socket
    #[arg(long, value_name = "SOCKET")]
    agent: PathBuf,
    /// All users of the image keep to blocks of 4 KiB
    #[arg(long)]
    direct: bool,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    #[command(flatten)]
    patience: Patience,
    /// Go on where a dead image server was, with its FUSE descriptor as standard input
    #[arg(long, value_name = "AGREED")]
    resume: Option<Negotiated>,
}

impl ImageServer {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        let options = ServerOptions {
            volume: VolumeIdentity { id: self.volume, len_bytes: self.length },
            image: self.image,
            presence: self.presence,
            working: self.working,
            mount: self.mount,
            socket: self.agent.clone(),
            direct: self.direct,
            read_only: self.read_only,
            patience: self.patience.into(),
            // While one waits for the disk, others go on.
            threads: (2 * threads).clamp(4, 16),
        };
        let inherited = match self.resume {
            None => None,
            Some(negotiated) => {
                let device = std::io::stdin().as_fd().try_clone_to_owned();
                let device =
                    device.map_err(|error| Failure::fix(format!("no descriptor: {error}")))?;
                Some(Inheritance { device, negotiated })
            }
        };
        let server = Arc::new(Server::start(&options, inherited)?);
        // Whoever started this waits for the line.
        session.out.report(&"ready", || "ready\n".to_owned())?;
        let serving = {
            let server = server.clone();
            // Not a task of the runtime, which would wait for it after a signal.
            let (done, ended) = tokio::sync::oneshot::channel();
            std::thread::spawn(move || done.send(server.run()));
            ended
        };
        tokio::spawn(keep_agent(node::programs(session)?, self.pool, self.agent));
        tokio::select! {
            ended = serving => {
                let died = |_| Failure::new(Exit::Internal, "the image server's thread died");
                Ok(ended.map_err(died)??)
            }
            () = session.cancel.cancelled() => {
                // The file system stays mounted: a successor can go on.
                server.flush()?;
                Ok(())
            }
        }
    }
}

/// Sees to it that there is an agent: one that was killed is missed by nobody else before somebody attaches a volume.
async fn keep_agent(programs: Programs, pool: PathBuf, socket: PathBuf) {
    let mut missed = 0;
    loop {
        tokio::time::sleep(LOOK).await;
        let is_there = UnixStream::connect(&socket).await.is_ok();
        missed = if is_there { 0 } else { missed + 1 };
        if missed < 2 {
            continue;
        }
        let (programs, pool) = (programs.clone(), pool.clone());
        let started = spawn_blocking(move || {
            programs.ensure_agent(&Pool::open(&pool, Arc::new(SystemHost))?)
        });
        match started.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the pool has no agent, and none starts"),
            Err(error) => tracing::warn!(%error, "the pool has no agent"),
        }
    }
}
