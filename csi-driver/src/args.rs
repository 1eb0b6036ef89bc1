//! The command line of `petra-csi`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use petra_engine::RepositoryUrl;
use petra_volume::volume::DEFAULT_PATIENCE;

use crate::telemetry::Format;

/// Petra's CSI driver: volumes, clones and snapshots for Kubernetes, by URL.
#[derive(Debug, Parser)]
#[command(name = "petra-csi", version)]
pub struct Args {
    /// The socket to serve on
    #[arg(long, value_name = "URL", default_value = "unix:///csi/csi.sock")]
    pub endpoint: String,
    /// Which of the CSI services to serve
    #[arg(long, value_enum, default_value_t = Role::All)]
    pub role: Role,
    /// This node's name in the cluster [default: the machine's name]
    #[arg(long, value_name = "NAME", env = "PETRA_NODE_NAME")]
    pub node_name: Option<String>,
    /// The directory of this node's pool
    #[arg(long, value_name = "DIR", default_value = "/var/lib/petra/pool", env = "PETRA_POOL")]
    pub pool: PathBuf,
    /// The most volumes that may be used on this node at a time; 0 for any number
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    pub max_volumes: u64,
    /// For how many seconds a read of a lazy clone waits while its repository is away, before it fails
    #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_PATIENCE.as_secs())]
    pub patience: u64,
    /// The program petra [default: the one beside this program]
    #[arg(long, value_name = "FILE")]
    pub petra: Option<PathBuf>,
    /// A repository by name; may be repeated, and the first is the default
    #[arg(long = "repository", value_name = "NAME=URL", value_parser = named)]
    pub repositories: Vec<(String, RepositoryUrl)>,
    /// Serve what a controller asks of this node at this address, with mutual TLS
    #[arg(long, value_name = "ADDRESS", requires = "agent_tls")]
    pub agent: Option<SocketAddr>,
    /// The directory with ca.pem, cert.pem and key.pem, for calls between controller and nodes
    #[arg(long, value_name = "DIR")]
    pub agent_tls: Option<PathBuf>,
    /// A node that the controller uses, or a name that stands for several; may be repeated
    #[arg(long = "node", value_name = "https://HOST:PORT", requires = "agent_tls")]
    pub nodes: Vec<String>,
    /// Serve /metrics, /healthz and /readyz at this address
    #[arg(long, value_name = "ADDRESS")]
    pub metrics: Option<SocketAddr>,
    /// How to write the log on standard error
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub log_format: Format,
    /// What to log: off, error, warn, info, debug, trace, or directives such as petra_csi=debug
    #[arg(long, value_name = "FILTER", default_value = "info", env = "PETRA_LOG")]
    pub log: String,
}

/// The services of one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// Controller and node in one process, for a single machine.
    All,
    /// What happens once in a cluster.
    Controller,
    /// What happens on every node.
    Node,
}

fn named(text: &str) -> Result<(String, RepositoryUrl), String> {
    let (name, url) = text.split_once('=').ok_or("write it as NAME=URL")?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > 32 || !name.chars().all(plain) {
        return Err("a name has up to 32 letters, digits and -_.".to_owned());
    }
    Ok((name.to_owned(), url.parse().map_err(|error| format!("{error}"))?))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
        let words =
            ["petra-csi", "--role=node", "--endpoint=unix:///x", "--repository=a=file:///r"];
        let args = Args::try_parse_from(words).unwrap();
        assert_eq!((args.role, args.endpoint.as_str()), (Role::Node, "unix:///x"));
        assert_eq!(args.repositories.len(), 1);
        for wrong in ["--repository=x", "--repository=a/b=file:///r", "--node=https://h:1"] {
            assert!(Args::try_parse_from(["petra-csi", wrong]).is_err(), "{wrong}");
        }
    }
}
