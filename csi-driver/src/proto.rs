//! The generated wire interfaces.
#![allow(missing_docs, clippy::all, clippy::pedantic, reason = "generated code")]

/// The Container Storage Interface (`proto/csi.proto`).
pub mod csi {
    tonic::include_proto!("csi.v1");
}

/// What a controller asks of a node (`proto/agent.proto`).
pub mod agent {
    tonic::include_proto!("petra.agent.v1");
}
