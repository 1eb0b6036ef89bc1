//! `petra-csi`: the place where Petra's CSI driver will be.
//!
//! The command line is fixed already, so that manifests can be written against it. It serves no CSI calls yet and
//! says so.

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};

/// Petra's CSI driver. Not there yet: this binary only parses its command line.
#[derive(Debug, Parser)]
#[command(name = "petra-csi", version)]
struct Args {
    /// The socket to serve on.
    #[arg(long, value_name = "URL", default_value = "unix:///csi/csi.sock")]
    endpoint: String,
    /// Which of the CSI services to serve.
    #[arg(long, value_enum, default_value_t = Role::All)]
    role: Role,
}

/// The services of one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Role {
    /// Controller and node in one process, for a single machine.
    All,
    /// What happens once in a cluster.
    Controller,
    /// What happens on every node.
    Node,
}

fn main() -> ExitCode {
    let args = Args::parse();
    // Standard error that is closed leaves nothing to tell anyone; the exit code still does.
    let _ = writeln!(
        std::io::stderr(),
        "error: this version has no CSI driver yet, so it can't serve {:?} on {}\n  hint: \
         snapshots and restores work from the command line: petra --help",
        args.role,
        args.endpoint
    );
    ExitCode::from(2)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
        let args =
            Args::try_parse_from(["petra-csi", "--role=node", "--endpoint=unix:///x"]).unwrap();
        assert_eq!((args.role, args.endpoint.as_str()), (Role::Node, "unix:///x"));
    }
}
