//! The one place that writes to standard output and standard error.
//!
//! Standard output carries what was asked for: text, or with `--json` one document. Everything that is said about
//! it goes to standard error.

use std::io::{self, Write};

use anstyle::{AnsiColor, Style};
use serde::Serialize;

use crate::failure::{Exit, Failure};
use crate::text::clean;

const ERROR: Style = AnsiColor::Red.on_default().bold();
const WARNING: Style = AnsiColor::Yellow.on_default().bold();
const QUIET: Style = Style::new().dimmed();

/// How to print.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    json: bool,
    quiet: bool,
}

impl Output {
    /// Output for these options.
    pub fn new(json: bool, quiet: bool) -> Self {
        Self { json, quiet }
    }

    /// True when a program reads.
    pub fn is_json(self) -> bool {
        self.json
    }

    /// True when nobody wants to hear how it is going.
    pub fn is_silent(self) -> bool {
        self.json || self.quiet
    }

    /// Prints the result of a command: the document, or the text that stands for it.
    pub fn report(
        self,
        document: &impl Serialize,
        text: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        if self.json {
            let mut text = serde_json::to_string_pretty(document).map_err(|error| {
                Failure::new(Exit::Internal, format!("cannot write JSON: {error}"))
            })?;
            text.push('\n');
            self.raw(text.as_bytes())
        } else {
            self.raw(text().as_bytes())
        }
    }

    /// Writes bytes to standard output as they are.
    pub fn raw(self, bytes: &[u8]) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        out.write_all(bytes).and_then(|()| out.flush()).map_err(|error| match error.kind() {
            // `petra ls | head -1`: there is no one to tell, and nothing to tell.
            io::ErrorKind::BrokenPipe => Failure::new(Exit::Internal, ""),
            _ => Failure::fix(format!("write standard output: {error}")),
        })
    }

    /// Says what was done. Silent with `--quiet` and `--json`.
    pub fn say(self, text: &str) {
        if !self.is_silent() {
            self.talk(&format!("{text}\n"));
        }
    }

    /// Says what a person should know although the command goes on.
    pub fn warn(self, text: &str) {
        if self.json {
            self.talk(&format!("{}\n", serde_json::json!({ "warning": { "message": text } })));
        } else {
            self.talk(&format!("{WARNING}warning:{WARNING:#} {}\n", clean(text)));
        }
    }

    /// Says why the command failed.
    pub fn failure(self, failure: &Failure) {
        if failure.message.is_empty() {
            return;
        }
        if self.json {
            #[derive(Serialize)]
            struct Document<'a> {
                error: &'a Failure,
                exit_code: u8,
            }
            let document = Document { error: failure, exit_code: failure.exit.code() };
            let text = serde_json::to_string(&document).unwrap_or_default();
            self.talk(&format!("{text}\n"));
            return;
        }
        let mut text = format!("{ERROR}error:{ERROR:#} {}\n", clean(&failure.message));
        for cause in &failure.causes {
            text += &format!("  {QUIET}caused by:{QUIET:#} {}\n", clean(cause));
        }
        if let Some(hint) = &failure.hint {
            text += &format!("  {QUIET}hint:{QUIET:#} {}\n", clean(hint));
        }
        self.talk(&text);
    }

    fn talk(self, text: &str) {
        // Takes the colours out where no terminal shows them. When standard error is closed there is no way
        // left to say so.
        let _ = anstream::stderr().write_all(text.as_bytes());
    }
}
