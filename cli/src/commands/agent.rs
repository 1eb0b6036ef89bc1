//! `petra pool agent` and `petra image-server`: the processes behind lazy clones.

use std::io::Write;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use petra_engine::{Context, SnapshotId};
use petra_volume::agent::Agent as PoolAgent;
use petra_volume::fuse::Negotiated;
use petra_volume::lazy::presence::VolumeIdentity;
use petra_volume::lazy::server::{Inheritance, Server, ServerOptions};
use petra_volume::programs::READY;

use super::pool::PoolOption;
use crate::failure::Failure;
use crate::node;
use crate::session::Session;

/// Options of `petra pool agent`.
#[derive(Debug, clap::Args)]
pub struct Agent {
    #[command(flatten)]
    pool: PoolOption,
    /// End when there is nothing to do; whoever needs it starts another one
    #[arg(long)]
    until_idle: bool,
}

impl Agent {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let pool = self.pool.open_to_change(session)?;
        let ctx = Context { cancel: session.cancel.clone(), ..Context::default() };
        let repositories = node::repositories(session)?;
        let agent = PoolAgent::new(pool, node::serving()?, repositories, ctx);
        Ok(agent.run(self.until_idle, ready).await?)
    }
}

/// Options of `petra image-server`, which other commands start.
#[derive(Debug, clap::Args)]
pub struct ImageServer {
    #[arg(long)]
    volume: SnapshotId,
    #[arg(long)]
    bytes: u64,
    #[arg(long)]
    image: PathBuf,
    #[arg(long)]
    presence: PathBuf,
    #[arg(long)]
    working: PathBuf,
    #[arg(long)]
    mount: PathBuf,
    #[arg(long)]
    socket: PathBuf,
    #[arg(long)]
    patience: u64,
    #[arg(long)]
    server_threads: usize,
    #[arg(long)]
    direct: bool,
    #[arg(long)]
    read_only: bool,
    /// What a dead server had agreed on; its descriptor is the standard input.
    #[arg(long)]
    resume: Option<Negotiated>,
}

impl ImageServer {
    pub fn run(self) -> Result<(), Failure> {
        let options = ServerOptions {
            volume: VolumeIdentity { id: self.volume, len_bytes: self.bytes },
            image: self.image,
            presence: self.presence,
            working: self.working,
            mount: self.mount,
            socket: self.socket,
            direct: self.direct,
            read_only: self.read_only,
            patience: Duration::from_secs(self.patience),
            threads: self.server_threads,
        };
        let inherited = match self.resume {
            Some(negotiated) => {
                let device = std::io::stdin().as_fd().try_clone_to_owned();
                let device = device.map_err(petra_volume::Error::io("take over", "/dev/fuse"))?;
                Some(Inheritance { device, negotiated })
            }
            None => None,
        };
        let server = Server::start(&options, inherited)?;
        ready();
        Ok(server.run()?)
    }
}

/// Says that this process is ready, to whoever started it.
fn ready() {
    let mut stdout = std::io::stdout().lock();
    // Nobody may be listening.
    let _ = stdout.write_all(READY).and_then(|()| stdout.flush());
}
