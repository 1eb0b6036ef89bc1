//! Starting and ending a process.

use std::future::Future;
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use petra_engine::Context;
use petra_engine::context::SystemHost;
use petra_volume::Pool;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::service::Routes;

use crate::agent::local::LocalAgent;
use crate::agent::nodes::Nodes;
use crate::agent::tls::Tls;
use crate::agent::{NodeAgent, Repository, server};
use crate::args::{Args, Role};
use crate::controller::{Controller, Services};
use crate::identity::{Identity, Readiness};
use crate::locks::Locks;
use crate::node::{Node, ReadOnlyClone, ReadOnlyClones};
use crate::proto::csi::controller_server::ControllerServer;
use crate::proto::csi::group_controller_server::GroupControllerServer;
use crate::proto::csi::identity_server::IdentityServer;
use crate::proto::csi::node_server::NodeServer;
use crate::proto::csi::snapshot_metadata_server::SnapshotMetadataServer;
use crate::repositories::{Repositories, Secrets};
use crate::telemetry::pools::OfPool;
use crate::telemetry::{Metrics, Observe, Source, logs, web};
use crate::{shutdown, socket};

/// What ends a process before its time, with its cause.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Runs a process until it is asked to end.
pub fn main(args: &Args) -> ExitCode {
    let run = || -> Result<(), Failure> {
        logs::start(args.log_format, &args.log)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        runtime.block_on(run(args))
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = format!("error: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                text = format!("{text}: {error}");
                cause = error.source();
            }
            // Standard error that is closed leaves nothing to tell anyone; the exit code still does.
            let _ = writeln!(std::io::stderr(), "{text}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> Result<(), Failure> {
    let end = CancellationToken::new();
    tokio::spawn({
        let end = end.clone();
        async move {
            shutdown::asked_to_end().await;
            end.cancel();
        }
    });
    let repositories = Repositories::new(args.repositories.clone());
    let metrics = Metrics::new();
    let observe = Observe::new(metrics.clone());
    let here = match args.role {
        Role::Controller => None,
        Role::All | Role::Node => Some(Here::open(args, &repositories).await?),
    };
    let nodes = match (&here, args.role) {
        (_, Role::Node) => None,
        (Some(here), _) => Some(Arc::new(Nodes::local(here.agent.clone()))),
        (None, _) => Some(Arc::new(far_nodes(args)?)),
    };
    let source: Arc<dyn Source> = match (&here, &nodes) {
        (Some(here), _) => Arc::new(OfPool { node: here.name.clone(), pool: here.pool.clone() }),
        (None, Some(nodes)) => nodes.clone(),
        (None, None) => return Err("neither controller nor node".into()),
    };
    let readiness = Arc::new(Ready(source.clone()));
    let identity = Identity::new(nodes.is_some(), readiness);
    let mut routes = Routes::new(IdentityServer::new(identity));
    if let Some(nodes) = nodes {
        let controller = Controller::new(nodes, repositories, metrics.clone(), Context::default());
        let services = Services(Arc::new(controller));
        routes = routes
            .add_service(ControllerServer::new(services.clone()))
            .add_service(GroupControllerServer::new(services.clone()))
            .add_service(SnapshotMetadataServer::new(services));
    }
    if let Some(here) = &here {
        routes = routes.add_service(NodeServer::new(here.node.clone()));
    }
    let ended = || end.clone().cancelled_owned();
    let calls = socket::serve(&args.endpoint, routes, observe.clone(), ended());
    let orders = async {
        if let (Some(here), Some(at), Some(tls)) = (&here, args.agent, &args.agent_tls) {
            let listener = TcpListener::bind(at).await?;
            let tls = Tls::open(tls)?;
            server::serve(listener, tls, here.agent.clone(), observe, ended()).await?;
        }
        Ok::<_, Failure>(())
    };
    let pages = async {
        if let Some(address) = args.metrics {
            web::serve(address, web::pages(metrics, source), ended()).await?;
        }
        Ok::<_, Failure>(())
    };
    // The first that fails ends the others.
    let calls = async { ending(&end, calls).await.map_err(Failure::from) };
    let (calls, orders, pages) = futures::join!(calls, ending(&end, orders), ending(&end, pages));
    calls.and(orders).and(pages)
}

/// Ends everything when something fails.
async fn ending<E>(
    end: &CancellationToken,
    part: impl Future<Output = Result<(), E>>,
) -> Result<(), E> {
    let done = part.await;
    if done.is_err() {
        end.cancel();
    }
    done
}

fn far_nodes(args: &Args) -> Result<Nodes, Failure> {
    let (Some(tls), false) = (&args.agent_tls, args.nodes.is_empty()) else {
        return Err("a controller needs --node https://HOST:PORT and --agent-tls DIR".into());
    };
    Ok(Nodes::remote(&args.nodes, Tls::open(tls)?)?)
}

/// What a process with a pool has.
struct Here {
    name: String,
    pool: Pool,
    agent: Arc<dyn NodeAgent>,
    node: Node,
}

impl Here {
    async fn open(args: &Args, repositories: &Repositories) -> Result<Self, Failure> {
        let name = match &args.node_name {
            Some(name) => name.clone(),
            None => rustix::system::uname().nodename().to_string_lossy().into_owned(),
        };
        let petra = match &args.petra {
            Some(petra) => std::path::absolute(petra)?,
            None => std::env::current_exe()?.with_file_name("petra"),
        };
        let at = args.pool.clone();
        let opened = tokio::task::spawn_blocking(move || Pool::open(&at, Arc::new(SystemHost)));
        let pool = opened.await??;
        let patience = Duration::from_secs(args.patience);
        let most = args.max_volumes;
        let local = LocalAgent::new(pool.clone(), name.clone(), &petra, most, patience)?;
        local.start().await?;
        let clones = Arc::new(Clones { agent: local.clone(), repositories: repositories.clone() });
        let serving = local.serving().clone();
        let node = Node::new(pool.clone(), serving, name.clone(), Locks::default(), clones, most);
        Ok(Self { name, pool, agent: Arc::new(local), node })
    }
}

/// What the node service needs of repositories, which it knows by names.
#[derive(Debug)]
struct Clones {
    agent: LocalAgent,
    repositories: Repositories,
}

#[async_trait]
impl ReadOnlyClones for Clones {
    async fn clone_read_only(&self, clone: ReadOnlyClone) -> Result<(), Status> {
        let url = self.repositories.url(&clone.repository)?.to_string();
        let repository = Repository { url, secrets: clone.secrets };
        let made =
            self.agent.clone_read_only(&repository, clone.snapshot, clone.number, clone.name);
        made.await.map(drop)
    }

    async fn keep_secrets(&self, repository: &str, secrets: &Secrets) -> Result<(), Status> {
        let url = self.repositories.url(repository)?.to_string();
        self.agent.keep_secrets(&url, secrets).await
    }
}

/// Ready while calls could be served.
struct Ready(Arc<dyn Source>);

#[async_trait]
impl Readiness for Ready {
    async fn ready(&self) -> Result<(), Status> {
        self.0.ready().await.map_err(Status::unavailable)
    }
}
