//! `petra-csi`: Petra's CSI driver. [`petra_csi`] says what is where.

use std::process::ExitCode;

use clap::Parser;
use petra_csi::args::Args;
use petra_csi::run;

fn main() -> ExitCode {
    run::main(&Args::parse())
}
