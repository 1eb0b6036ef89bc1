//! The command line as a whole: options that every command has, and how a wrong one is refused.

use std::path::PathBuf;
use std::process::ExitCode;

use anstream::ColorChoice;
use clap::error::ErrorKind;
use clap::{ArgAction, Parser};
use tracing_subscriber::EnvFilter;

use crate::commands::Command;
use crate::failure::{Exit, Failure};
use crate::output::Output;

/// Stands below `--help` and in the man page; the README and docs/cli.md repeat it.
const AFTER_HELP: &str = "\
URLs:
  REPOSITORY#EXPERIMENT/RUN/SNAPSHOT[/VOLUME]

  REPOSITORY is file:///DIRECTORY, a path with a '/' in it, or
  s3://BUCKET[/PREFIX][?endpoint=URL&region=NAME&path-style=true&profile=NAME].
  SNAPSHOT is an id, the beginning of one, a name, or @latest. Names are
  percent-encoded. #@ID names a snapshot by its id alone. A URL that begins with
  '#' belongs to the repository of --repository or PETRA_REPOSITORY.

Exit codes:
    0  done
    1  internal error
    2  the command line, its surroundings or permissions must be changed first
    3  stored data is missing or damaged: a person should look
    4  the store is away or busy: the same command may work later
    5  partial success: restored with --keep-going, some ranges are missing
  130  cancelled";

/// Snapshot any volume, restore it anywhere by URL.
#[derive(Debug, Parser)]
#[command(name = "petra", version, after_help = AFTER_HELP, max_term_width = 100)]
#[command(disable_help_subcommand = true, arg_required_else_help = true)]
pub struct Args {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Print one JSON document instead of text, and errors as JSON.
    #[arg(long, global = true)]
    pub json: bool,
    /// Show no progress and no summary, only warnings and errors.
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// Log what happens; twice for the requests too. PETRA_LOG holds a finer filter.
    #[arg(long, short, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// Threads that read, hash and compress [default: one per processor, at most 16].
    #[arg(long, global = true, value_name = "N")]
    pub threads: Option<std::num::NonZeroUsize>,
    /// The repository of URLs that begin with '#', and of `ls` without a URL.
    #[arg(long, global = true, value_name = "URL", env = "PETRA_REPOSITORY")]
    pub repository: Option<String>,
    /// Open an encrypted repository with the passphrase in this file [env: PETRA_PASSPHRASE_FILE, PETRA_PASSPHRASE].
    #[arg(long, global = true, value_name = "FILE", conflicts_with = "key_file")]
    pub passphrase_file: Option<PathBuf>,
    /// Open an encrypted repository with this key file [env: PETRA_KEY_FILE].
    #[arg(long, global = true, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// A directory with the secrets of several repositories, of which those of the URL at hand go before all others.
    #[arg(long, global = true, value_name = "DIR", hide = true)]
    pub secrets: Option<PathBuf>,
}

impl Global {
    /// Sends logs to standard error, where they were asked for.
    pub fn start_logs(&self) {
        let filter = match (std::env::var("PETRA_LOG"), self.verbose) {
            (Ok(filter), _) if !filter.is_empty() => filter,
            (_, 0) => return,
            (_, 1) => "warn,petra=debug,petra_engine=debug,petra_volume=debug".to_owned(),
            (_, 2) => "debug".to_owned(),
            (_, 3..) => "trace".to_owned(),
        };
        tracing_subscriber::fmt()
            .with_env_filter(EnvFilter::new(filter))
            .with_writer(std::io::stderr)
            .with_ansi(anstream::AutoStream::choice(&std::io::stderr()) != ColorChoice::Never)
            .init();
    }
}

/// Answers a command line that clap did not take: with help, a version or an error.
pub fn refuse(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A reader that went away has seen enough.
            let _ = error.print();
            Exit::Ok.into()
        }
        // The options could not be parsed, so this one is looked for by hand.
        _ if std::env::args_os().any(|arg| arg == "--json") => {
            let text = error.render().to_string();
            let line = text.lines().next().unwrap_or_default();
            let what = line.strip_prefix("error: ").unwrap_or(line);
            let failure = Failure::fix(what).hint("see petra --help");
            Output::new(true, false).failure(&failure);
            failure.exit.into()
        }
        _ => {
            let _ = error.print();
            Exit::Fix.into()
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
    }
}
