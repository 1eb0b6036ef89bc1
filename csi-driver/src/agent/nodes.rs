//! The nodes that a controller knows: one in its own process, or those at given addresses.
//!
//! A host name that stands for several addresses, as that of a headless service does, means one node for each. Names are
//! looked up again after 30 seconds, and at once for a pool that nobody has.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::future::join_all;
use petra_engine::SnapshotId;
use tokio::net::lookup_host;
use tokio::sync::Mutex;
use tokio::time::timeout;
use tonic::Status;

use super::remote::{Address, AddressError, RemoteAgent};
use super::tls::Tls;
use super::{NodeAgent, NodeInfo};
use crate::telemetry::{Readings, Source};

/// How long what a node said of itself is believed.
const FRESH: Duration = Duration::from_secs(5);
/// How long the addresses of a name are believed.
const RESOLVED: Duration = Duration::from_secs(30);
/// Questions about pools that nobody has are not passed on more often.
const PATIENCE: Duration = Duration::from_secs(1);
/// A node that takes longer to say who it is counts as away.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);

/// The nodes of a controller.
#[derive(Debug)]
pub struct Nodes {
    place: Place,
    known: Mutex<Known>,
}

#[derive(Debug)]
enum Place {
    /// In this process.
    Here(Arc<dyn NodeAgent>),
    /// At these addresses.
    There { given: Vec<Address>, tls: Tls },
}

/// A node that answers.
#[derive(Clone, Debug)]
pub struct Node {
    /// To ask it for things.
    pub agent: Arc<dyn NodeAgent>,
    /// What it said of itself, some seconds ago at most.
    pub info: NodeInfo,
}

/// A node that does not answer, or a name that stands for none.
#[derive(Clone, Debug)]
pub struct Away {
    /// Its name, as far as it is known, or where it should be.
    pub node: String,
    /// Why.
    pub status: Status,
}

/// All nodes.
#[derive(Clone, Debug, Default)]
pub struct Everyone {
    /// Those that answer.
    pub there: Vec<Node>,
    /// Those that don't.
    pub away: Vec<Away>,
}

#[derive(Debug, Default)]
struct Known {
    everyone: Everyone,
    asked: Option<Instant>,
    resolved: Option<Instant>,
    agents: HashMap<Address, RemoteAgent>,
    /// Names that could not be looked up the last time.
    unresolved: Vec<Away>,
    /// The names of all nodes that ever answered, by pool.
    pools: HashMap<String, String>,
    /// And by address.
    names: HashMap<Address, String>,
}

impl Nodes {
    /// The node of this process.
    pub fn local(agent: Arc<dyn NodeAgent>) -> Self {
        Self { place: Place::Here(agent), known: Mutex::default() }
    }

    /// Nodes at `https://HOST:PORT`.
    pub fn remote<U: AsRef<str>>(
        urls: impl IntoIterator<Item = U>,
        tls: Tls,
    ) -> Result<Self, AddressError> {
        let given =
            urls.into_iter().map(|url| Address::parse(url.as_ref())).collect::<Result<_, _>>();
        Ok(Self { place: Place::There { given: given?, tls }, known: Mutex::default() })
    }

    /// The node that has a pool. `UNAVAILABLE` while it is away, or may be. `NOT_FOUND` where no node has it for certain:
    /// all are there, and all of their addresses were given, since a name may stand for fewer nodes today than yesterday.
    pub async fn by_pool(&self, pool: SnapshotId) -> Result<Arc<dyn NodeAgent>, Status> {
        let wanted = pool.to_string();
        let mut known = self.known.lock().await;
        for patience in [FRESH, PATIENCE] {
            self.ask(&mut known, patience, patience == PATIENCE).await;
            let found = known.everyone.there.iter().find(|node| node.info.pool == wanted);
            if let Some(node) = found {
                return Ok(node.agent.clone());
            }
        }
        if let Some(node) = known.pools.get(&wanted) {
            return Err(Status::unavailable(format!(
                "node {node}, which has pool {pool}, is away"
            )));
        }
        let nobody = format!("no node that is there has pool {pool}");
        if !known.everyone.away.is_empty() {
            let away = list(&known.everyone.away);
            return Err(Status::unavailable(format!("{nobody}; away: {away}")));
        }
        if self.may_hide_nodes() {
            return Err(Status::unavailable(nobody));
        }
        Err(Status::not_found(nobody))
    }

    /// The node of this name: `NOT_FOUND`, or `UNAVAILABLE` while some are away.
    pub async fn by_node(&self, name: &str) -> Result<Node, Status> {
        let mut known = self.known.lock().await;
        for patience in [FRESH, PATIENCE] {
            self.ask(&mut known, patience, patience == PATIENCE).await;
            if let Some(node) = known.everyone.there.iter().find(|node| node.info.node == name) {
                return Ok(node.clone());
            }
        }
        let away = &known.everyone.away;
        if away.is_empty() {
            return Err(Status::not_found(format!("there is no node {name:?} with a pool")));
        }
        Err(Status::unavailable(format!("node {name:?} is not there; away: {}", list(away))))
    }

    /// Makes sure that no node of these names is away, or none at all where there are no names: `UNAVAILABLE`. One that
    /// was never heard of may be hidden behind a name that stands for fewer nodes today than yesterday.
    pub async fn nobody_away(&self, names: &[&str]) -> Result<(), Status> {
        let mut known = self.known.lock().await;
        let mut missing = vec![];
        for patience in [FRESH, PATIENCE] {
            self.ask(&mut known, patience, patience == PATIENCE).await;
            let is_there = |name: &str| known.everyone.there.iter().any(|n| n.info.node == name);
            missing = names.iter().copied().filter(|name| !is_there(name)).collect();
            if !names.is_empty() && missing.is_empty() {
                return Ok(());
            }
        }
        let away = &known.everyone.away;
        if names.is_empty() && away.is_empty() {
            return Ok(());
        }
        let was_there = |name: &&str| known.pools.values().any(|node| node == name);
        if !away.is_empty() || self.may_hide_nodes() || missing.iter().any(was_there) {
            let missing = if names.is_empty() { "any".to_owned() } else { missing.join(", ") };
            return Err(Status::unavailable(format!(
                "a node that is meant may be away: {missing}; away: {}",
                list(away)
            )));
        }
        Ok(())
    }

    /// True where a host name stands for nodes: some may be missing without anybody knowing.
    fn may_hide_nodes(&self) -> bool {
        match &self.place {
            Place::Here(_) => false,
            Place::There { given, .. } => given.iter().any(|address| !address.is_number()),
        }
    }

    /// All nodes, those that are away too.
    pub async fn all(&self) -> Everyone {
        let mut known = self.known.lock().await;
        self.ask(&mut known, FRESH, false).await;
        known.everyone.clone()
    }

    /// Asks all nodes who they are, unless that is known already.
    async fn ask(&self, known: &mut Known, patience: Duration, look_up: bool) {
        if known.asked.is_some_and(|asked| asked.elapsed() < patience) {
            return;
        }
        match &self.place {
            Place::Here(agent) => {
                known.everyone = match agent.info().await {
                    Ok(info) => {
                        Everyone { there: vec![Node { agent: agent.clone(), info }], away: vec![] }
                    }
                    Err(status) => {
                        Everyone { there: vec![], away: vec![Away { node: "here".into(), status }] }
                    }
                };
            }
            Place::There { given, tls } => {
                let stale = known.resolved.is_none_or(|resolved| resolved.elapsed() >= RESOLVED);
                if stale || look_up {
                    known.look_up(given, tls).await;
                }
                known.ask_agents().await;
            }
        }
        for Node { info, .. } in &known.everyone.there {
            known.pools.insert(info.pool.clone(), info.node.clone());
        }
        known.asked = Some(Instant::now());
    }
}

/// What a controller has to say: its nodes say for themselves how their pools are.
#[async_trait]
impl Source for Nodes {
    async fn read(&self) -> Readings {
        let away = self.all().await.away.len().try_into().unwrap_or(u64::MAX);
        Readings { pools: vec![], away }
    }

    /// Calls can be served while nodes are away: those that are about the others, and about snapshots.
    async fn ready(&self) -> Result<(), String> {
        Ok(())
    }
}

impl Known {
    /// Finds the addresses that names stand for. Connections to those that stay are kept.
    async fn look_up(&mut self, given: &[Address], tls: &Tls) {
        let found = join_all(given.iter().map(|address| async move {
            (address, timeout(ANSWER_LIMIT, addresses(address)).await)
        }));
        let mut wanted = BTreeSet::new();
        self.unresolved.clear();
        let mut kept = vec![];
        for (address, found) in found.await {
            let failure = match found {
                Ok(Ok(found)) => {
                    wanted.extend(found);
                    continue;
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => "it takes too long".to_owned(),
            };
            let status = Status::unavailable(format!("{address} can't be looked up: {failure}"));
            self.unresolved.push(Away { node: address.to_string(), status });
            // Nothing is known of this name: the nodes that it stood for may still be there.
            kept.extend(self.agents.keys().cloned());
        }
        wanted.extend(kept.into_iter().map(|address| (address.host, address.port)));
        let mut agents = HashMap::new();
        for (host, port) in wanted {
            let address = Address { host, port };
            let agent = self
                .agents
                .remove(&address)
                .unwrap_or_else(|| RemoteAgent::at(address.clone(), tls.clone()));
            agents.insert(address, agent);
        }
        self.names.retain(|address, _| agents.contains_key(address));
        self.agents = agents;
        self.resolved = Some(Instant::now());
    }

    /// Asks all agents at the same time.
    async fn ask_agents(&mut self) {
        let asked = join_all(self.agents.values().map(|agent| async move {
            let info = timeout(ANSWER_LIMIT, agent.info()).await;
            (agent, info.unwrap_or_else(|_| Err(Status::unavailable("it does not answer"))))
        }));
        let mut everyone = Everyone { there: vec![], away: self.unresolved.clone() };
        for (agent, info) in asked.await {
            let address = agent.address();
            let pool = info.as_ref().map_err(Status::clone).and_then(|info| {
                info.pool.parse().map_err(|_| {
                    Status::internal(format!("{address} has a pool of the id {:?}", info.pool))
                })
            });
            match (info, pool) {
                (Ok(info), Ok(pool)) => {
                    self.names.insert(address.clone(), info.node.clone());
                    everyone.there.push(Node { agent: Arc::new(agent.of_pool(pool)), info });
                }
                (_, Err(status)) | (Err(status), Ok(_)) => {
                    let name = self.names.get(address).cloned();
                    let node = name.unwrap_or_else(|| address.to_string());
                    everyone.away.push(Away { node, status });
                }
            }
        }
        everyone.there.sort_by(|a, b| a.info.node.cmp(&b.info.node));
        // A node may have several addresses.
        everyone.there.dedup_by(|a, b| a.info.pool == b.info.pool);
        everyone.away.sort_by(|a, b| a.node.cmp(&b.node));
        self.everyone = everyone;
    }
}

/// The addresses that a name stands for.
async fn addresses(address: &Address) -> std::io::Result<Vec<(String, u16)>> {
    let found = lookup_host((address.host.as_str(), address.port)).await?;
    Ok(found.map(|found| (found.ip().to_string(), found.port())).collect())
}

fn list(away: &[Away]) -> String {
    const MOST: usize = 8;
    let mut names: Vec<_> = away.iter().take(MOST).map(|away| away.node.clone()).collect();
    if away.len() > MOST {
        names.push(format!("and {} more", away.len() - MOST));
    }
    names.join(", ")
}
