//! `petra`: snapshot any volume, restore it anywhere by URL.
//!
//! | module | what it holds |
//! |---|---|
//! | [`args`] | the command line as clap sees it |
//! | [`commands`] | one module per command: its options, what it does, what it prints |
//! | [`session`] | what all commands share: output, cancellation, opening a repository |
//! | [`location`], [`lookup`] | from a URL or path as typed to a snapshot, or an error that says what is near |
//! | [`node`] | how the processes behind live volumes are started |
//! | [`secrets`] | passphrases and key files: from options, the environment or a prompt |
//! | [`failure`], [`hints`], [`volume_hints`] | exit codes, and what to do next about each error |
//! | [`output`], [`text`], [`view`] | the only place that prints; tables and numbers for people; JSON shapes |
//! | [`progress`], [`interrupt`] | what happens on a terminal while the engine works |
//!
//! Data goes to standard output, talk to standard error. The engine prints nothing and reads no environment; this
//! crate does both.

mod args;
mod commands;
mod failure;
mod hints;
mod interrupt;
mod location;
mod lookup;
mod node;
mod output;
mod progress;
mod secrets;
mod session;
mod text;
mod view;
mod volume_hints;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use crate::args::Args;
use crate::commands::Command;
use crate::failure::{Exit, Failure};
use crate::output::Output;
use crate::session::Session;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return args::refuse(&error),
    };
    if let Command::FreezeGuard = args.command {
        // Before anything is started that could hold it up.
        return petra_volume::freeze::guard_main();
    }
    let output = Output::new(args.global.json, args.global.quiet);
    args.global.start_logs();
    let result = runtime().and_then(|runtime| {
        let result = runtime.block_on(async {
            let session = Session::new(&args.global, output);
            interrupt::watch(session.cancel.clone(), output);
            args.command.run(&session).await
        });
        // After a cancellation a request may still wait for its time-out; nothing depends on it. All other threads
        // are waited for: glibc may touch a thread that ends while it is detached (its bug 19951), and crash.
        runtime.shutdown_timeout(Duration::from_secs(1));
        result
    });
    match result {
        Ok(()) => Exit::Ok.into(),
        Err(failure) => {
            output.failure(&failure);
            failure.exit.into()
        }
    }
}

/// Tasks of the engine do I/O and wait; what costs time runs on its own threads.
fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Exit::Internal, format!("cannot start threads: {error}")))
}
