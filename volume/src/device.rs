//! Whether a block device or an image file is in use on this machine: mounted, attached to a loop device, part of
//! a device-mapper or RAID device, or swapped to.
//!
//! The facts come from `/proc` and `/sys` and cover this mount namespace only, so an empty answer is no proof. A
//! writer still opens a block device exclusively, which the kernel refuses while anyone has it mounted.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fmt;
use std::fs::Metadata;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::sys::mounts::{Mount, Number, parse_all, unescape};

/// One use of a device or file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Use {
    /// A file system on it, or on a part of it, is mounted.
    Mounted {
        /// Where.
        at: PathBuf,
        /// The file system as a whole is read-only, so that no mount of it can write.
        read_only: bool,
    },
    /// A loop device stands on it.
    Loop {
        /// The loop device's name, for example `loop0`.
        name: String,
    },
    /// A device-mapper, RAID or similar device is made of it.
    Held {
        /// That device's name, for example `dm-0`.
        by: String,
    },
    /// The kernel swaps to it.
    Swap,
}

impl Use {
    /// True when its bytes can change behind a reader's back.
    pub fn may_write(&self) -> bool {
        !matches!(self, Self::Mounted { read_only: true, .. })
    }
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mounted { at, read_only: false } => write!(f, "mounted at {}", at.display()),
            Self::Mounted { at, read_only: true } => {
                write!(f, "mounted read-only at {}", at.display())
            }
            Self::Loop { name } => write!(f, "attached to /dev/{name}"),
            Self::Held { by } => write!(f, "part of /dev/{by}"),
            Self::Swap => f.write_str("used as swap"),
        }
    }
}

/// Where the kernel tells about its devices.
#[derive(Clone, Debug)]
pub struct System {
    proc: PathBuf,
    sys: PathBuf,
}

impl Default for System {
    fn default() -> Self {
        Self { proc: "/proc".into(), sys: "/sys".into() }
    }
}

impl System {
    /// Reads from other directories than `/proc` and `/sys`, as a container with the host's mounted elsewhere
    /// does.
    pub fn at(proc: impl Into<PathBuf>, sys: impl Into<PathBuf>) -> Self {
        Self { proc: proc.into(), sys: sys.into() }
    }

    /// What a block device, with its partitions, or a regular file is used for; sorted. Empty for anything else.
    pub fn uses(&self, path: &Path) -> io::Result<Vec<Use>> {
        let metadata = std::fs::metadata(path)?;
        let mut found = Search::new(self)?;
        if metadata.file_type().is_block_device() {
            found.device(Number::of_node(&metadata), Some(&metadata))?;
        } else if metadata.is_file() {
            found.backing(&metadata)?;
        }
        Ok(found.uses.into_iter().collect())
    }
}

/// Follows devices to what stands on them: a disk to its partitions, a partition to a mapped device, a file to
/// its loop device, and each to its mounts.
struct Search<'a> {
    system: &'a System,
    mounts: Vec<Mount>,
    seen: BTreeSet<Number>,
    uses: BTreeSet<Use>,
}

impl<'a> Search<'a> {
    fn new(system: &'a System) -> io::Result<Self> {
        let mountinfo = std::fs::read(system.proc.join("self/mountinfo"))?;
        let mounts = parse_all(&mountinfo);
        Ok(Self { system, mounts, seen: BTreeSet::new(), uses: BTreeSet::new() })
    }

    fn device(&mut self, number: Number, node: Option<&Metadata>) -> io::Result<()> {
        if !self.seen.insert(number) {
            return Ok(());
        }
        let on_it = self.mounts.iter().filter(|mount| mount.is_on(number));
        let mounted =
            on_it.map(|mount| Use::Mounted { at: mount.at.clone(), read_only: mount.read_only });
        self.uses.extend(mounted.collect::<Vec<_>>());

        let directory = self.system.sys.join("dev/block").join(number.to_string());
        for partition in entries(&directory)? {
            if partition.join("partition").exists() {
                self.device(read_number(&partition)?, None)?;
            }
        }
        for holder in entries(&directory.join("holders"))? {
            let by = holder.file_name().unwrap_or_default().to_string_lossy().into_owned();
            self.uses.insert(Use::Held { by });
            self.device(read_number(&holder)?, None)?;
        }
        node.map_or(Ok(()), |node| self.backing(node))
    }

    /// Loop devices and swap that stand on a device node or file.
    fn backing(&mut self, metadata: &Metadata) -> io::Result<()> {
        for device in entries(&self.system.sys.join("block"))? {
            // Loop devices that are not attached have no such directory.
            let Ok(backing) = std::fs::read(device.join("loop/backing_file")) else { continue };
            if is_same(backing.trim_ascii_end(), metadata) {
                let name = device.file_name().unwrap_or_default().to_string_lossy().into_owned();
                self.uses.insert(Use::Loop { name });
                self.device(read_number(&device)?, None)?;
            }
        }
        let swaps = match std::fs::read(self.system.proc.join("swaps")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => vec![],
            swaps => swaps?,
        };
        let mut paths = swaps
            .split(|b| *b == b'\n')
            .skip(1)
            .filter_map(|line| line.split(|b| *b == b' ').next());
        if paths.any(|path| !path.is_empty() && is_same(unescape(path).as_bytes(), metadata)) {
            self.uses.insert(Use::Swap);
        }
        Ok(())
    }
}

/// True when the path leads to this very file or device.
fn is_same(path: &[u8], metadata: &Metadata) -> bool {
    std::fs::metadata(OsStr::from_bytes(path)).is_ok_and(|other| {
        if metadata.file_type().is_block_device() {
            // One device may have several nodes.
            other.file_type().is_block_device() && other.rdev() == metadata.rdev()
        } else {
            (other.dev(), other.ino()) == (metadata.dev(), metadata.ino())
        }
    })
}

/// The entries of a directory; none when it does not exist.
fn entries(directory: &Path) -> io::Result<Vec<PathBuf>> {
    match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(vec![]),
        entries => entries?.map(|entry| entry.map(|entry| entry.path())).collect(),
    }
}

fn read_number(device: &Path) -> io::Result<Number> {
    std::fs::read_to_string(device.join("dev"))?.parse()
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
