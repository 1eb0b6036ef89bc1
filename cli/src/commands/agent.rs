//! `petra pool agent`: started when it is needed, or by a service manager.

use std::io::Write;

use petra_engine::Context;
use petra_volume::agent::Agent as PoolAgent;
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
        let agent = PoolAgent::new(pool, node::programs(session)?, repositories, ctx);
        Ok(agent.run(self.until_idle, ready).await?)
    }
}

/// Says that this process is ready, to whoever started it.
fn ready() {
    let mut stdout = std::io::stdout().lock();
    // Nobody may be listening.
    let _ = stdout.write_all(READY).and_then(|()| stdout.flush());
}
