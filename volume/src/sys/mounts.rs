//! The mounts of this mount namespace, and making and ending them.

use std::ffi::{CString, OsString};
use std::fmt;
use std::fs::Metadata;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::{CWD, major, minor};
use rustix::io::Errno;
use rustix::mount::{
    MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree,
};

use crate::mount_options::{OF_FILESYSTEM, OF_MOUNT, flags_of};

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
    /// Which directory or file of the file system is seen there.
    pub root: PathBuf,
    /// Where it is mounted.
    pub at: PathBuf,
    /// `ext4` and so on.
    pub filesystem: String,
    /// The device's path, for file systems that have one.
    pub source: PathBuf,
    /// Nobody can write to the file system through any mount.
    pub read_only: bool,
    /// What holds for this mount ([`OF_MOUNT`]), and for all of the file system ([`OF_FILESYSTEM`]).
    pub flags: MountFlags,
    /// The options of the file system.
    pub options: String,
}

impl Mount {
    /// `36 35 98:0 /root /at rw,noatime master:1 - ext4 /dev/sda1 rw,errors=continue`
    pub(crate) fn parse(line: &[u8]) -> Option<Self> {
        let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
        let separator = fields.iter().position(|field| *field == b"-")?;
        let [_, _, device, root, at, flags, ..] = fields.as_slice() else { return None };
        let [filesystem, source, options, ..] = fields.get(separator + 1..)? else { return None };
        Some(Self {
            device: std::str::from_utf8(device).ok()?.parse().ok()?,
            root: unescape(root).into(),
            at: unescape(at).into(),
            filesystem: String::from_utf8_lossy(filesystem).into_owned(),
            source: unescape(source).into(),
            // The options of the file system, not of this mount of it: a read-only bind mount of a file
            // system that is written elsewhere protects nothing.
            read_only: options.split(|b| *b == b',').any(|option| option == b"ro"),
            flags: flags_of(flags) & OF_MOUNT | flags_of(options) & OF_FILESYSTEM,
            options: String::from_utf8_lossy(options).into_owned(),
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
    flags: MountFlags,
    data: &str,
) -> io::Result<()> {
    let data = CString::new(data)?;
    Ok(rustix::mount::mount(device, at, filesystem, flags, Some(data.as_c_str()))?)
}

/// `struct mount_attr`.
#[repr(C)]
struct Attributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// Mounts a directory or file at another place, with these of [`OF_MOUNT`]. It appears there with its flags, so that no
/// crash leaves one that can be written by mistake. Linux 5.12 is needed.
pub(crate) fn bind(from: &Path, at: &Path, flags: MountFlags) -> io::Result<()> {
    let clone = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    let tree = open_tree(CWD, from, clone)?;
    set_attributes(&tree, flags)?;
    Ok(move_mount(&tree, c"", CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// Gives a mount that is not attached anywhere these flags, and takes all others from it.
fn set_attributes(tree: &impl AsFd, flags: MountFlags) -> io::Result<()> {
    const PAIRS: [(MountFlags, MountAttrFlags); 7] = [
        (MountFlags::RDONLY, MountAttrFlags::MOUNT_ATTR_RDONLY),
        (MountFlags::NOSUID, MountAttrFlags::MOUNT_ATTR_NOSUID),
        (MountFlags::NODEV, MountAttrFlags::MOUNT_ATTR_NODEV),
        (MountFlags::NOEXEC, MountAttrFlags::MOUNT_ATTR_NOEXEC),
        (MountFlags::NODIRATIME, MountAttrFlags::MOUNT_ATTR_NODIRATIME),
        (MountFlags::NOSYMFOLLOW, MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW),
        (MountFlags::NOATIME, MountAttrFlags::MOUNT_ATTR_NOATIME),
    ];
    // Access times are one number, of which 0 is relatime.
    let mut clear = u64::from(MountAttrFlags::MOUNT_ATTR__ATIME.bits());
    let mut set = 0;
    for (flag, attribute) in PAIRS {
        if flags.contains(flag) {
            set |= u64::from(attribute.bits());
        } else if flag != MountFlags::NOATIME {
            clear |= u64::from(attribute.bits());
        }
    }
    if !flags.intersects(MountFlags::NOATIME | MountFlags::RELATIME) {
        set |= u64::from(MountAttrFlags::MOUNT_ATTR_STRICTATIME.bits());
    }
    let attributes = Attributes { set, clear, propagation: 0, user_namespace: 0 };
    // SAFETY: the call reads an empty path, and a structure of the size that it is told; both live through it.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<Attributes>(),
        )
    };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Ends the topmost mount at a directory. [`Errno::BUSY`] while someone uses it.
pub(crate) fn unmount(at: &Path) -> io::Result<()> {
    Ok(rustix::mount::unmount(at, UnmountFlags::NOFOLLOW)?)
}

/// A path as the kernel writes it. What is mounted there is not asked, since it might not answer; None where its directory
/// does not exist.
pub(crate) fn resolve(path: &Path) -> io::Result<Option<PathBuf>> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::INVAL.into());
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    match parent.canonicalize() {
        Ok(parent) => Ok(Some(parent.join(name))),
        Err(error)
            if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_what_holds_for_a_mount() {
        let line = b"36 35 7:3 /a\\040b /at ro,noatime master:1 - ext4 /dev/loop3 rw,sync,discard";
        let mount = Mount::parse(line).unwrap();
        assert_eq!((mount.root, mount.at), ("/a b".into(), "/at".into()));
        let flags = MountFlags::RDONLY | MountFlags::NOATIME | MountFlags::SYNCHRONOUS;
        assert_eq!((mount.flags, mount.read_only), (flags, false));
        assert_eq!(mount.options, "rw,sync,discard");
    }

    #[test]
    fn a_path_is_found_without_asking_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        std::os::unix::fs::symlink(&real, real.join("link")).unwrap();
        assert_eq!(resolve(&real.join("link/x")).unwrap(), Some(real.join("x")));
        assert_eq!(resolve(&real.join("no/x")).unwrap(), None);
        assert!(resolve(Path::new("/")).is_err());
    }
}
