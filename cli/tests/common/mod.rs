//! Runs the real binary in a directory of its own and makes its output comparable.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::fmt::Write as _;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

/// A directory, and what was done in it.
pub struct Sandbox {
    /// Settings for the commands.
    pub environment: Vec<(String, String)>,
    directory: TempDir,
    transcript: String,
}

/// How a command ended.
pub struct Done {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Sandbox {
    pub fn new() -> Self {
        Self {
            environment: vec![],
            directory: tempfile::tempdir().unwrap(),
            transcript: String::new(),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The binary, in this directory, without the settings of whoever runs the tests.
    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_petra"));
        command.current_dir(self.directory.path());
        // With one worker the chunks of two volumes lie in the packs in the same order each time.
        command.args(["--threads", "1"]);
        let ours = |name: &str| name.starts_with("PETRA_") || name.starts_with("AWS_");
        for (name, _) in std::env::vars().filter(|(name, _)| ours(name)) {
            command.env_remove(name);
        }
        command.env("HOME", self.directory.path());
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs the words of a line and notes what was said.
    pub fn run(&mut self, line: &str) -> Done {
        let words: Vec<&str> = line.split_whitespace().collect();
        self.run_words(&words)
    }

    /// Runs these arguments and notes what was said.
    pub fn run_words(&mut self, words: &[&str]) -> Done {
        let done = Done::new(self.command().args(words).output().unwrap());
        let _ = writeln!(self.transcript, "$ petra {}", words.join(" "));
        self.transcript += &done.stdout;
        for line in done.stderr.lines() {
            let _ = writeln!(self.transcript, "! {line}");
        }
        if done.code != 0 {
            let _ = writeln!(self.transcript, "[exit {}]", done.code);
        }
        self.transcript.push('\n');
        done
    }

    /// Runs a line that must succeed; its standard output without the line's end.
    pub fn ok(&mut self, line: &str) -> String {
        let done = self.run(line);
        assert_eq!(done.code, 0, "petra {line}: {}", done.stderr);
        done.stdout.trim_end().to_owned()
    }

    /// Runs a line that must succeed with `--json`.
    pub fn json(&mut self, line: &str) -> Value {
        serde_json::from_str(&self.ok(&format!("--json {line}"))).unwrap()
    }

    /// Runs a line that must fail with this code and say this on standard error.
    pub fn fails(&mut self, line: &str, code: i32, said: &[&str]) {
        let done = self.run(line);
        assert_eq!(done.code, code, "petra {line}: {}{}", done.stdout, done.stderr);
        for words in said {
            assert!(done.stderr.contains(words), "petra {line}: no {words:?} in:\n{}", done.stderr);
        }
    }

    /// What was said so far, comparable; starts anew.
    pub fn transcript(&mut self) -> String {
        let text = std::mem::take(&mut self.transcript);
        // On some systems the temporary directory is reached through a link.
        let real = self.directory.path().canonicalize().unwrap();
        let text = text.replace(&*real.to_string_lossy(), "[DIR]");
        normalised(&text.replace(&*self.directory.path().to_string_lossy(), "[DIR]"))
    }

    /// Forgets what was said so far.
    pub fn forget(&mut self) {
        self.transcript.clear();
    }

    /// A volume of `len` bytes with some data at its beginning, in a file of this name.
    pub fn volume(&self, name: &str, len: u64, data: usize, seed: u64) -> PathBuf {
        let path = self.path(name);
        let file = File::create(&path).unwrap();
        file.set_len(len).unwrap();
        file.write_all_at(&noise(data, seed), 0).unwrap();
        path
    }

    /// Overwrites a part of a file.
    pub fn overwrite(&self, name: &str, at: u64, len: usize, seed: u64) {
        let file = File::options().write(true).open(self.path(name)).unwrap();
        file.write_all_at(&noise(len, seed), at).unwrap();
    }

    /// A repository `repo` with the snapshots `initial` and `final` of a workspace and a data volume.
    pub fn with_story() -> Self {
        let mut sandbox = Self::new();
        sandbox.volume("work.img", 8 << 20, 3 << 20, 1);
        sandbox.volume("models.img", 4 << 20, 1 << 20, 2);
        sandbox.ok("init ./repo");
        sandbox.ok(
            "snapshot work.img models=models.img ./repo#iris/run-1 --name initial \
             --label step=train --label phase=initial --message before --metadata image=jupyter:1.2",
        );
        std::fs::copy(sandbox.path("work.img"), sandbox.path("work-before.img")).unwrap();
        sandbox.overwrite("work.img", 1 << 20, 1000, 3);
        sandbox.ok(
            "snapshot work.img models=models.img ./repo#iris/run-1 --name final --label phase=final",
        );
        sandbox.forget();
        sandbox
    }

    pub fn assert_same(&self, a: &str, b: &str) {
        let read = |name: &str| std::fs::read(self.path(name)).unwrap();
        assert!(read(a) == read(b), "{a} and {b} differ");
    }
}

impl Done {
    fn new(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Bytes that do not compress, the same for the same seed.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Replaces what differs from run to run or with the repository's format: ids, digests, sizes, counts of objects,
/// times. Columns shrink to two blanks, since their widths follow the sizes.
fn normalised(text: &str) -> String {
    let mut ids: Vec<String> = vec![];
    let mut out = String::new();
    for line in text.lines() {
        // What is said has no columns.
        let talk = line.starts_with('!');
        let indent = line.len() - line.trim_start().len();
        out += &" ".repeat(indent);
        let words: Vec<&str> = line.split(' ').skip(indent).collect();
        let mut n = 0;
        while let Some(word) = words.get(n) {
            n += 1;
            if word.is_empty() {
                // Between columns: the blank before is there already, one more makes two.
                if (talk || !out.ends_with("  ")) && n < words.len() {
                    out.push(' ');
                }
                continue;
            }
            match words.get(n).and_then(|unit| measure(word, unit)) {
                Some(hidden) => {
                    out += &hidden;
                    n += 1;
                }
                None => out += &hide(word, &mut ids),
            }
            if n < words.len() {
                out.push(' ');
            }
        }
        out.push('\n');
    }
    out
}

/// A number and its unit, hidden.
fn measure(number: &str, unit: &str) -> Option<String> {
    let bare = unit.trim_end_matches([',', ';', ':', ')']);
    let after = unit.strip_prefix(bare)?;
    let before = number.strip_suffix(number.trim_start_matches('('))?;
    let digits = number.trim_start_matches('(');
    if !digits.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let hidden = match bare {
        "B" | "KiB" | "MiB" | "GiB" => "<size>",
        "s" => "<time>",
        "object" | "objects" => "<n> objects",
        "pack" | "packs" => "<n> packs",
        "request" | "requests" => "<n> requests",
        _ => return None,
    };
    Some(format!("{before}{hidden}{after}"))
}

/// A word with its ids, digests, large numbers, dates and ratios hidden.
fn hide(word: &str, ids: &mut Vec<String>) -> String {
    let numeric = |text: &str, also: &str| {
        text.starts_with(|c: char| c.is_ascii_digit())
            && text.chars().all(|c| c.is_ascii_digit() || also.contains(c))
    };
    let bare = word.trim_matches(['(', ')', ',']);
    if bare.len() == 10 && bare.contains('-') && numeric(bare, "-") {
        return word.replace(bare, "<date>");
    }
    if bare.strip_suffix('Z').is_some_and(|time| numeric(time, ":")) {
        return word.replace(bare, "<time>");
    }
    if bare == "(-)" || bare.strip_suffix('x').is_some_and(|ratio| numeric(ratio, ".")) {
        return word.replace(bare, "<ratio>");
    }
    let mut out = String::new();
    for part in word.split_inclusive(|c: char| !c.is_ascii_alphanumeric()) {
        let token = part.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
        let hidden = if token.len() == 26 && token.starts_with('0') {
            let known = ids.iter().position(|id| id == token).unwrap_or_else(|| {
                ids.push(token.to_owned());
                ids.len() - 1
            });
            format!("<id-{}>", known + 1)
        } else if token.len() == 64 {
            "<digest>".to_owned()
        } else if token.len() > 4 && numeric(token, "") {
            "<number>".to_owned()
        } else {
            token.to_owned()
        };
        out += &hidden;
        out += part.strip_prefix(token).unwrap_or_default();
    }
    out
}

/// A document with the types of its values instead of them: an array has the shape of its first element.
pub fn shape(document: &Value) -> Value {
    match document {
        Value::Null => "null".into(),
        Value::Bool(_) => "boolean".into(),
        Value::Number(_) => "number".into(),
        Value::String(_) => "string".into(),
        Value::Array(values) => values.iter().take(1).map(shape).collect(),
        Value::Object(fields) => {
            fields.iter().map(|(name, value)| (name.clone(), shape(value))).collect()
        }
    }
}

/// The object files below a folder of a repository, largest first.
pub fn objects(folder: &Path) -> Vec<PathBuf> {
    let mut found = vec![];
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { found.push(path) }
        }
    }
    found.sort_by_key(|path| std::cmp::Reverse(path.metadata().unwrap().len()));
    found
}
