//! Petra's CSI driver: volumes, clones and snapshots for Kubernetes, by URL.
//!
//! ```text
//! CSI calls --> identity                                  who this is
//!          --> controller  --(NodeAgent)--> agent::local  volumes and snapshots of one pool     [petra_volume]
//!          |        |                  \--> agent::remote the same on another node, over gRPC
//!          |        \--> repositories                     what is in a repository already       [petra_engine]
//!          \-> node                                       devices and mounts of this node       [petra_volume]
//! ```
//!
//! The controller keeps nothing: volumes are in the pools of nodes, snapshots in repositories, and the ids that it gives
//! out say where ([`handle`]). `petra-csi --role=all` is controller and node in one process. docs/kubernetes.md is for
//! those who install it.
//!
//! | module | what it knows |
//! |---|---|
//! | [`agent`] | what a controller asks of a node, here and far away |
//! | [`args`] | the command line |
//! | [`capability`] | which ways to use a volume there are |
//! | [`controller`] | the services Controller, GroupController and SnapshotMetadata |
//! | [`failure`] | errors as gRPC codes |
//! | [`handle`] | the ids of volumes and snapshots |
//! | [`identity`] | the service Identity |
//! | [`locks`] | one operation at a time on one thing |
//! | [`node`] | the service Node |
//! | [`proto`] | the generated wire interfaces |
//! | [`repositories`] | repositories by name, opened once |
//! | [`run`] | starting and ending a process |
//! | [`shutdown`] | ending without breaking off what is under way |
//! | [`socket`] | the Unix socket that calls come through |
//! | [`telemetry`] | logs, events and metrics |
//! | [`template`] | experiment, run and names of snapshots, from what Kubernetes says |

pub mod agent;
pub mod args;
pub mod capability;
pub mod controller;
pub mod failure;
pub mod handle;
pub mod identity;
pub mod locks;
pub mod node;
pub mod proto;
pub mod repositories;
pub mod run;
pub mod shutdown;
pub mod socket;
pub mod telemetry;
pub mod template;

/// The driver's name in a cluster.
pub const DRIVER: &str = "csi.petra.dev";
/// The topology key whose value is a node's name.
pub const TOPOLOGY: &str = "topology.petra.dev/node";
/// The longest string in a CSI call, in bytes (unless it is said to be longer).
pub const MAX_STRING_BYTES: usize = 128;
