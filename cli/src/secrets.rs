//! Passphrases and key files: from options, the environment or a prompt. None is ever printed.

use std::ffi::OsString;
use std::fs::File;
use std::io::{IsTerminal, Read, stderr, stdin};
use std::path::{Path, PathBuf};

use petra_engine::access::SecretsDirectory;
use petra_engine::{Error, Secret};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::args::Global;
use crate::failure::{Exit, Failure};
use crate::output::Output;
use crate::session::Session;

const PASSPHRASE: &str = "PETRA_PASSPHRASE";
const PASSPHRASE_FILE: &str = "PETRA_PASSPHRASE_FILE";
const KEY_FILE: &str = "PETRA_KEY_FILE";

/// The secret that the options name, or else the environment.
pub fn given(global: &Global) -> Result<Option<Secret>, Failure> {
    let named = of_files(global.passphrase_file.as_deref(), global.key_file.as_deref())?;
    if named.is_some() {
        return Ok(named);
    }
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let [passphrase, passphrase_file, key_file] = [PASSPHRASE, PASSPHRASE_FILE, KEY_FILE].map(set);
    match (passphrase, passphrase_file, key_file) {
        (None, None, None) => Ok(None),
        (Some(passphrase), None, None) => {
            Ok(Some(Secret::passphrase(passphrase.into_encoded_bytes())?))
        }
        (None, Some(file), None) => of_files(Some(Path::new(&file)), None),
        (None, None, Some(file)) => of_files(None, Some(Path::new(&file))),
        _ => Err(Failure::fix(format!(
            "more than one of {PASSPHRASE}, {PASSPHRASE_FILE} and {KEY_FILE} is set"
        ))
        .hint("unset all but one, or say --passphrase-file or --key-file")),
    }
}

/// The directory with secrets of several repositories.
pub fn directory(global: &Global) -> Option<SecretsDirectory> {
    global.secrets.as_ref().map(SecretsDirectory::new)
}

/// Options that name the same files, for a process in another directory. A passphrase in the environment is there for it
/// anyway.
pub fn options(global: &Global) -> std::io::Result<Vec<OsString>> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let (mut passphrase, mut key) = (global.passphrase_file.clone(), global.key_file.clone());
    if passphrase.is_none() && key.is_none() {
        (passphrase, key) = (set(PASSPHRASE_FILE), set(KEY_FILE));
    }
    let mut options = vec![];
    let directory = global.secrets.clone();
    let all = [("--passphrase-file", passphrase), ("--key-file", key), ("--secrets", directory)];
    for (name, file) in all {
        if let Some(file) = file {
            options.extend([name.into(), std::path::absolute(file)?.into()]);
        }
    }
    Ok(options)
}

/// The secret in one of two files.
pub fn of_files(passphrase: Option<&Path>, key: Option<&Path>) -> Result<Option<Secret>, Failure> {
    Ok(match (passphrase, key) {
        (Some(path), _) => Some(Secret::passphrase(read(path)?)?),
        (None, Some(path)) => Some(Secret::key_file(read(path)?)?),
        (None, None) => None,
    })
}

/// Reads a small file. Its length is bounded before it is read: a device would never end.
fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    const MAX_BYTES: u64 = 1 << 17;
    let io = |cause| Error::Io { action: "read", path: path.to_owned(), cause };
    let mut bytes = Vec::with_capacity(4096);
    let file = File::open(path).map_err(io)?;
    file.take(MAX_BYTES).read_to_end(&mut bytes).map_err(io)?;
    Ok(bytes)
}

/// True when there is a person to ask.
pub fn can_ask(out: Output) -> bool {
    !out.is_json() && stdin().is_terminal() && stderr().is_terminal()
}

/// Asks for a passphrase on the terminal.
pub async fn ask(prompt: &str, session: &Session) -> Result<Secret, Failure> {
    let _echo = Echo::save();
    let prompt = prompt.to_owned();
    let typed = session.unless_cancelled(async {
        let asked = tokio::task::spawn_blocking(move || rpassword::prompt_password(prompt)).await;
        match asked {
            Ok(typed) => typed.map_err(|cause| Failure::fix(format!("read the terminal: {cause}"))),
            Err(_) => Err(Failure::new(Exit::Internal, "the prompt panicked")),
        }
    });
    Ok(Secret::passphrase(typed.await?.into_bytes())?)
}

/// Asks for a new passphrase, twice.
pub async fn ask_new(session: &Session) -> Result<Secret, Failure> {
    if !can_ask(session.out) {
        return Err(Failure::fix(
            "no new passphrase or key file was given, and there is no terminal to ask",
        )
        .hint("petra key generate FILE makes a key file"));
    }
    let first = ask("new passphrase: ", session).await?;
    if first == ask("the same again: ", session).await? {
        return Ok(first);
    }
    Err(Failure::fix("the two passphrases differ").hint("nothing was changed; try again"))
}

/// Gives the terminal back as it was: a prompt that is cancelled would leave it silent.
struct Echo(Option<Termios>);

impl Echo {
    fn save() -> Self {
        Self(tcgetattr(stdin()).ok())
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // If the terminal is gone there is nothing to give back.
            let _ = tcsetattr(stdin(), OptionalActions::Now, before);
        }
    }
}
