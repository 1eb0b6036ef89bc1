//! How a file system is mounted: the words that mount(8) takes, as flags of the kernel and options of the file system.

use rustix::mount::MountFlags;

use crate::error::{Error, Result};

/// More than the kernel takes as options of a file system, in bytes.
const MAX_DATA_BYTES: usize = 4095;

/// Flags that each mount of a file system has for itself.
pub(crate) const OF_MOUNT: MountFlags = MountFlags::RDONLY
    .union(MountFlags::NOSUID)
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC)
    .union(MountFlags::NOATIME)
    .union(MountFlags::NODIRATIME)
    .union(MountFlags::RELATIME)
    .union(MountFlags::NOSYMFOLLOW);
/// Flags that all mounts of a file system share, which the kernel tells.
pub(crate) const OF_FILESYSTEM: MountFlags =
    MountFlags::SYNCHRONOUS.union(MountFlags::DIRSYNC).union(MountFlags::LAZYTIME);

/// When a file's access time is noted: exactly one of these.
const ACCESS_TIME: MountFlags =
    MountFlags::NOATIME.union(MountFlags::RELATIME).union(MountFlags::STRICTATIME);
const NONE: MountFlags = MountFlags::empty();

/// What each word sets, and what it takes back.
const WORDS: [(&str, MountFlags, MountFlags); 28] = [
    ("defaults", NONE, NONE),
    ("ro", MountFlags::RDONLY, NONE),
    ("rw", NONE, MountFlags::RDONLY),
    ("nosuid", MountFlags::NOSUID, NONE),
    ("suid", NONE, MountFlags::NOSUID),
    ("nodev", MountFlags::NODEV, NONE),
    ("dev", NONE, MountFlags::NODEV),
    ("noexec", MountFlags::NOEXEC, NONE),
    ("exec", NONE, MountFlags::NOEXEC),
    ("nosymfollow", MountFlags::NOSYMFOLLOW, NONE),
    ("symfollow", NONE, MountFlags::NOSYMFOLLOW),
    ("sync", MountFlags::SYNCHRONOUS, NONE),
    ("async", NONE, MountFlags::SYNCHRONOUS),
    ("dirsync", MountFlags::DIRSYNC, NONE),
    ("lazytime", MountFlags::LAZYTIME, NONE),
    ("nolazytime", NONE, MountFlags::LAZYTIME),
    ("noatime", MountFlags::NOATIME, ACCESS_TIME),
    ("relatime", MountFlags::RELATIME, ACCESS_TIME),
    ("strictatime", MountFlags::STRICTATIME, ACCESS_TIME),
    // What the kernel does by itself.
    ("atime", MountFlags::RELATIME, ACCESS_TIME),
    ("norelatime", MountFlags::STRICTATIME, ACCESS_TIME),
    ("nostrictatime", MountFlags::RELATIME, ACCESS_TIME),
    ("nodiratime", MountFlags::NODIRATIME, NONE),
    ("diratime", NONE, MountFlags::NODIRATIME),
    ("silent", MountFlags::SILENT, NONE),
    ("loud", NONE, MountFlags::SILENT),
    // For who mounts at boot, not for the kernel.
    ("nofail", NONE, NONE),
    ("_netdev", NONE, NONE),
];

/// How to mount a file system. Access times are not noted unless that is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    flags: MountFlags,
    data: Vec<String>,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self { flags: MountFlags::NOATIME, data: vec![] }
    }
}

impl MountOptions {
    /// Understands the words of `mount -o`, of which one text may hold several with commas between them. What is no flag of
    /// the kernel's is left to the file system, which says what it does not know when it is mounted.
    pub fn parse(texts: impl IntoIterator<Item = impl AsRef<str>>) -> Result<Self> {
        let mut options = Self::default();
        let mut data_bytes = 0;
        for text in texts {
            for word in text.as_ref().split(',') {
                if let Some((_, set, unset)) = WORDS.iter().find(|(name, ..)| *name == word) {
                    options.flags = options.flags.difference(*unset).union(*set);
                    continue;
                }
                data_bytes += word.len() + 1;
                let is_word = word.starts_with(|first: char| first.is_ascii_alphanumeric());
                if !is_word || word.contains(char::is_control) || data_bytes > MAX_DATA_BYTES {
                    let shown: String = word.chars().take(100).collect();
                    return Err(Error::Request(format!("{shown:?} is no mount option")));
                }
                options.data.push(word.to_owned());
            }
        }
        Ok(options)
    }

    /// The same, and if `read_only` nobody can write.
    #[must_use]
    pub fn read_only(mut self, read_only: bool) -> Self {
        if read_only {
            self.flags |= MountFlags::RDONLY;
        }
        self
    }

    /// True where nobody can write.
    pub fn is_read_only(&self) -> bool {
        self.flags.contains(MountFlags::RDONLY)
    }

    /// Flags of mount(2).
    pub(crate) fn flags(&self) -> MountFlags {
        self.flags
    }

    /// What the file system is told, behind what it always is.
    pub(crate) fn data(&self, always: &str) -> String {
        let own = self.data.iter().map(String::as_str);
        let all = std::iter::once(always).filter(|text| !text.is_empty()).chain(own);
        all.collect::<Vec<_>>().join(",")
    }

    /// The options that only the file system knows; empty when there are none.
    pub(crate) fn of_filesystem(&self) -> &[String] {
        &self.data
    }
}

/// The flags among the options of a line of `mountinfo`, which calls them like mount(8) does.
pub(crate) fn flags_of(options: &[u8]) -> MountFlags {
    let mut flags = NONE;
    for option in options.split(|byte| *byte == b',') {
        let word = WORDS.iter().find(|(name, ..)| name.as_bytes() == option);
        flags |= word.map_or(NONE, |(_, set, _)| *set);
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(texts: &[&str]) -> MountOptions {
        MountOptions::parse(texts).unwrap()
    }

    #[test]
    fn words_become_flags_and_data() {
        assert_eq!(parsed(&[]), MountOptions::default());
        let options = parsed(&["ro,nodev", "discard", "relatime", "commit=30", "nosuid", "suid"]);
        let flags = MountFlags::RDONLY | MountFlags::NODEV | MountFlags::RELATIME;
        assert_eq!(options.flags(), flags);
        assert_eq!(options.data("nouuid"), "nouuid,discard,commit=30");
        assert_eq!(
            (options.data(""), parsed(&["rw"]).data("")),
            ("discard,commit=30".into(), "".into())
        );
        // The last one counts, as for mount(8).
        assert!(!parsed(&["ro", "rw"]).is_read_only());
        assert!(parsed(&["rw"]).read_only(true).is_read_only());
        assert!(parsed(&["ro"]).read_only(false).is_read_only());
        assert_eq!(parsed(&["strictatime", "noatime"]), MountOptions::default());
    }

    #[test]
    fn nonsense_is_refused() {
        let long = format!("x={}", "y".repeat(MAX_DATA_BYTES));
        for text in ["", ",", "ro,", "-o", "=x", "a\0b", "a\nb", " ro", &long] {
            let error = MountOptions::parse([text]).unwrap_err();
            assert!(matches!(error, Error::Request(_)), "{text}: {error}");
        }
    }

    #[test]
    fn the_kernels_words_are_known() {
        assert_eq!(flags_of(b"rw,noatime,seclabel"), MountFlags::NOATIME);
        let flags = MountFlags::RDONLY | MountFlags::LAZYTIME | MountFlags::SYNCHRONOUS;
        assert_eq!(flags_of(b"ro,sync,lazytime,data=ordered"), flags);
    }
}
