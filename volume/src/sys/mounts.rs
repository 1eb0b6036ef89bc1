//! The mounts of this mount namespace, and making and ending them.

use std::ffi::{CString, OsString};
use std::fmt;
use std::fs::Metadata;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::{major, minor};
use rustix::mount::{MountFlags, UnmountFlags};

/// A device's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Number {
    /// The driver's.
    pub major: u32,
    /// The device's among the driver's.
    pub minor: u32,
}

impl Number {
    /// The number of the device that a node stands for.
    pub(crate) fn of_node(metadata: &Metadata) -> Self {
        Self { major: major(metadata.rdev()), minor: minor(metadata.rdev()) }
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl FromStr for Number {
    type Err = io::Error;

    fn from_str(text: &str) -> io::Result<Self> {
        let parse = || {
            let (major, minor) = text.trim().split_once(':')?;
            Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
        };
        parse().ok_or_else(|| io::Error::other(format!("{text:?} is not a device number")))
    }
}

/// One line of `mountinfo`.
#[derive(Debug)]
pub(crate) struct Mount {
    /// The device's number; made up for btrfs and others that stand on several.
    pub device: Number,
    /// Where it is mounted.
    pub at: PathBuf,
    /// `ext4` and so on.
    pub filesystem: String,
    /// The device's path, for file systems that have one.
    pub source: PathBuf,
    /// Nobody can write to the file system through any mount.
    pub read_only: bool,
}

impl Mount {
    /// `36 35 98:0 /root /at rw,noatime master:1 - ext4 /dev/sda1 rw,errors=continue`
    pub(crate) fn parse(line: &[u8]) -> Option<Self> {
        let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
        let separator = fields.iter().position(|field| *field == b"-")?;
        let [_, _, device, _, at, ..] = fields.as_slice() else { return None };
        let [filesystem, source, options, ..] = fields.get(separator + 1..)? else { return None };
        Some(Self {
            device: std::str::from_utf8(device).ok()?.parse().ok()?,
            at: unescape(at).into(),
            filesystem: String::from_utf8_lossy(filesystem).into_owned(),
            source: unescape(source).into(),
            // The options of the file system, not of this mount of it: a read-only bind mount of a file
            // system that is written elsewhere protects nothing.
            read_only: options.split(|b| *b == b',').any(|option| option == b"ro"),
        })
    }

    /// True if the file system stands on this device.
    pub(crate) fn is_on(&self, device: Number) -> bool {
        // btrfs and overlays report a made-up number with major 0; their source still names the device.
        let made_up = self.device.major == 0;
        self.device == device
            || made_up
                && self.source.is_absolute()
                && std::fs::metadata(&self.source).is_ok_and(|metadata| {
                    metadata.file_type().is_block_device() && Number::of_node(&metadata) == device
                })
    }
}

/// The kernel writes blanks, line ends and backslashes in paths as `\` and three octal digits.
pub(crate) fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let escaped = match after {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] if *first == b'\\' => {
                Some((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'))
            }
            _ => None,
        };
        out.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { after.get(3..).unwrap_or_default() } else { after };
    }
    OsString::from_vec(out)
}

/// All mounts that this process sees.
pub(crate) fn all() -> io::Result<Vec<Mount>> {
    Ok(parse_all(&std::fs::read("/proc/self/mountinfo")?))
}

/// The mounts of a `mountinfo` file.
pub(crate) fn parse_all(mountinfo: &[u8]) -> Vec<Mount> {
    mountinfo.split(|b| *b == b'\n').filter_map(Mount::parse).collect()
}

/// The mount that a path lies on.
pub(crate) fn containing(path: &Path) -> io::Result<Option<Mount>> {
    let path = path.canonicalize()?;
    // Later lines lie over earlier ones.
    let around = all()?.into_iter().filter(|mount| path.starts_with(&mount.at));
    Ok(around.max_by_key(|mount| mount.at.components().count()))
}

/// Mounts a device. `data` is what the file system takes as options.
pub(crate) fn mount(
    device: &Path,
    at: &Path,
    filesystem: &str,
    read_only: bool,
    data: &str,
) -> io::Result<()> {
    let mut flags = MountFlags::NOATIME;
    if read_only {
        flags |= MountFlags::RDONLY;
    }
    let data = CString::new(data)?;
    Ok(rustix::mount::mount(device, at, filesystem, flags, Some(data.as_c_str()))?)
}

/// Ends the topmost mount at a directory. [`Errno::BUSY`] while someone uses it.
pub(crate) fn unmount(at: &Path) -> io::Result<()> {
    Ok(rustix::mount::unmount(at, UnmountFlags::NOFOLLOW)?)
}
