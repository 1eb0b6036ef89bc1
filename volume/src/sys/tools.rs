//! Programs of the system: `mkfs.ext4` and its kin.

use std::env;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Error, Result};

/// Where such programs are, although not in everyone's `PATH`.
const MORE_PLACES: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];
/// How much of what a program said goes into an error.
const MAX_STDERR_CHARS: usize = 500;

/// A program and the Debian package that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tool {
    pub name: &'static str,
    pub package: &'static str,
}

/// Makes ext4.
pub(crate) const MKFS_EXT4: Tool = Tool { name: "mkfs.ext4", package: "e2fsprogs" };
/// Checks ext4.
pub(crate) const E2FSCK: Tool = Tool { name: "e2fsck", package: "e2fsprogs" };
/// Grows ext4 that is not mounted.
pub(crate) const RESIZE2FS: Tool = Tool { name: "resize2fs", package: "e2fsprogs" };
/// Makes XFS.
pub(crate) const MKFS_XFS: Tool = Tool { name: "mkfs.xfs", package: "xfsprogs" };
/// Makes btrfs.
pub(crate) const MKFS_BTRFS: Tool = Tool { name: "mkfs.btrfs", package: "btrfs-progs" };
/// Knows what a device holds.
pub(crate) const WIPEFS: Tool = Tool { name: "wipefs", package: "util-linux" };

impl Tool {
    /// Where it is installed.
    pub(crate) fn find(self) -> Option<PathBuf> {
        let path = env::var_os("PATH").unwrap_or_default();
        let places = env::split_paths(&path).chain(MORE_PLACES.iter().map(PathBuf::from));
        places.map(|place| place.join(self.name)).find(|file| file.is_file())
    }

    /// Runs it; gives what it wrote to standard output.
    pub(crate) fn run(
        self,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
        needed_for: &str,
    ) -> Result<String> {
        let Self { name, package } = self;
        let Some(path) = self.find() else {
            return Err(Error::MissingTool { tool: name, package, needed_for: needed_for.into() });
        };
        let arguments: Vec<OsString> =
            arguments.into_iter().map(|argument| argument.as_ref().to_owned()).collect();
        let done = Command::new(&path)
            .args(&arguments)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .output()
            .map_err(Error::io("run", &path))?;
        if done.status.success() {
            return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
        }
        let words = arguments.iter().map(|argument| argument.to_string_lossy());
        let tool = std::iter::once(name.into()).chain(words).collect::<Vec<_>>().join(" ");
        Err(Error::Tool { tool, status: done.status.to_string(), stderr: shortened(&done.stderr) })
    }
}

/// The end of what a program said, where the reason most often is.
fn shortened(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let text = lines.join("; ");
    let skip = text.chars().count().saturating_sub(MAX_STDERR_CHARS);
    if skip == 0 { text } else { text.chars().skip(skip).collect() }
}

/// A path as an argument, which no option can be mistaken for.
pub(crate) fn argument(path: &Path) -> OsString {
    if path.is_absolute() { path.as_os_str().to_owned() } else { Path::new(".").join(path).into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_tells_what_the_program_said() {
        let ls = Tool { name: "ls", package: "coreutils" };
        assert!(ls.run(["/"], "tests").unwrap().contains("tmp"));
        let Error::Tool { tool, stderr, .. } = ls.run(["/no/such"], "tests").unwrap_err() else {
            panic!("another error")
        };
        assert_eq!(tool, "ls /no/such");
        assert!(stderr.contains("No such file"), "{stderr}");
    }

    #[test]
    fn a_missing_program_is_named_with_its_package() {
        let tool = Tool { name: "mkfs.petra", package: "petra-progs" };
        let error = tool.run(["x"], "volumes").unwrap_err().to_string();
        assert_eq!(
            error,
            "the program mkfs.petra is not installed, and volumes needs it (Debian package: petra-progs)"
        );
    }

    #[test]
    fn long_talk_is_cut_at_its_beginning() {
        let text = format!("{}\n\nend", "x".repeat(1000));
        assert_eq!(shortened(text.as_bytes()).chars().count(), MAX_STDERR_CHARS);
        assert!(shortened(text.as_bytes()).ends_with("x; end"));
    }
}
