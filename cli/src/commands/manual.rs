//! `petra completions` and `petra man`.

use std::path::PathBuf;

use clap::CommandFactory;
use clap_complete::Shell;
use petra_engine::Error;

use crate::args::Args;
use crate::failure::Failure;
use crate::session::Session;

/// Options of `petra completions`.
#[derive(Debug, clap::Args)]
pub struct Completions {
    /// The shell that will read the script
    shell: Shell,
}

impl Completions {
    pub fn run(self, session: &Session) -> Result<(), Failure> {
        let mut script = vec![];
        clap_complete::generate(self.shell, &mut Args::command(), "petra", &mut script);
        session.out.raw(&script)
    }
}

/// Options of `petra man`.
#[derive(Debug, clap::Args)]
pub struct Man {
    /// Write petra.1 and a page for each command there, rather than petra.1 to standard output
    #[arg(value_name = "DIR")]
    directory: Option<PathBuf>,
}

impl Man {
    pub fn run(self, session: &Session) -> Result<(), Failure> {
        let Some(directory) = self.directory else {
            let mut page = vec![];
            clap_mangen::Man::new(Args::command())
                .render(&mut page)
                .map_err(|cause| Error::Io { action: "render", path: "petra.1".into(), cause })?;
            return session.out.raw(&page);
        };
        std::fs::create_dir_all(&directory)
            .and_then(|()| clap_mangen::generate_to(Args::command(), &directory))
            .map_err(|cause| Error::Io { action: "write", path: directory, cause })?;
        Ok(())
    }
}
