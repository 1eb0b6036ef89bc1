//! Showing a volume at more than one place: bind mounts of its file system or of its device.
//!
//! What is where is asked from the kernel's list of mounts. A volume whose device died does not answer, and who asks it
//! may wait for ever, so nothing here does.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use rustix::mount::MountFlags;

use crate::error::{Error, Result};
use crate::mount_options::{MountOptions, OF_FILESYSTEM, OF_MOUNT};
use crate::sys::mounts::{self, Mount, Number};
use crate::volume::Volume;

/// How many mounts may lie over each other at one place.
const MAX_DEPTH: usize = 64;
/// File systems that hold device nodes, and always answer.
const NODES: [&str; 2] = ["devtmpfs", "tmpfs"];

/// A place where a volume can be used.
#[derive(Debug)]
pub struct Place {
    /// Where.
    pub at: PathBuf,
    /// It is the volume's device, not its file system.
    pub is_device: bool,
    mount: Mount,
}

impl Place {
    /// Nobody can write there. Of a device its attachment tells.
    pub fn is_read_only(&self) -> bool {
        !self.is_device && (self.mount.read_only || self.mount.flags.contains(MountFlags::RDONLY))
    }

    /// True if its file system is mounted there with these options, as far as the kernel tells.
    pub fn is_mounted_with(&self, options: &MountOptions) -> bool {
        let of_filesystem = options.flags() & OF_FILESYSTEM;
        self.is_bound_with(options) && self.mount.flags & OF_FILESYSTEM == of_filesystem
    }

    /// The same for a bind mount, which shares with others what holds for the whole file system.
    pub fn is_bound_with(&self, options: &MountOptions) -> bool {
        self.mount.flags & OF_MOUNT == options.flags() & OF_MOUNT
    }
}

impl Volume {
    /// Where the volume can be used in this mount namespace: mounts of its file system, and its device at other places than
    /// in `/dev`.
    pub fn places(&self) -> Result<Vec<Place>> {
        let devices = self.attachments()?;
        if devices.is_empty() {
            return Ok(vec![]);
        }
        let mut places = vec![];
        for mount in all()? {
            let is_device = if devices.iter().any(|(device, _)| mount.is_on(device.number())) {
                false
            } else if devices.iter().any(|(device, _)| shows(&mount, device.number())) {
                true
            } else {
                continue;
            };
            places.push(Place { at: mount.at.clone(), is_device, mount });
        }
        Ok(places)
    }
}

/// True for a device's node that is mounted over a file. In `/dev` a container may have it so.
fn shows(mount: &Mount, device: Number) -> bool {
    NODES.contains(&mount.filesystem.as_str())
        && mount.root != Path::new("/")
        && !mount.at.starts_with("/dev")
        && std::fs::symlink_metadata(&mount.at).is_ok_and(|metadata| {
            metadata.file_type().is_block_device() && Number::of_node(&metadata) == device
        })
}

fn all() -> Result<Vec<Mount>> {
    mounts::all().map_err(Error::io("read", "/proc/self/mountinfo"))
}

/// A path as the kernel writes it, without asking what is there. None where its directory does not exist.
pub fn resolve(path: &Path) -> Result<Option<PathBuf>> {
    mounts::resolve(path).map_err(Error::io("look at", path))
}

/// True if anything is mounted at a place, as [`resolve`] gives it.
pub fn is_mount_point(at: &Path) -> Result<bool> {
    Ok(all()?.iter().any(|mount| mount.at == at))
}

/// Mounts a directory at another place, too. That directory is made when it is missing; its own must exist.
pub fn bind_directory(from: &Path, at: &Path, options: &MountOptions) -> Result<()> {
    match std::fs::create_dir(at) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Error::io("create", at)(error));
        }
        _ => {}
    }
    if !std::fs::symlink_metadata(at).map_err(Error::io("look at", at))?.is_dir() {
        return Err(in_the_way(at, "something that is no directory"));
    }
    mounts::bind(from, at, options.flags()).map_err(Error::io("mount a directory at", at))
}

/// Mounts a device's node at another place, too. An empty file is made there when it is missing; its directory must exist.
pub fn bind_device(device: &Path, at: &Path) -> Result<()> {
    let made = OpenOptions::new().write(true).create_new(true).open(at);
    match made {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Error::io("create", at)(error));
        }
        _ => {}
    }
    if !std::fs::symlink_metadata(at).map_err(Error::io("look at", at))?.is_file() {
        return Err(in_the_way(at, "something that is no file"));
    }
    // The kernel's flags for a mount do not hold for what is done with a device.
    let options = MountOptions::default();
    mounts::bind(device, at, options.flags()).map_err(Error::io("mount a device at", at))
}

fn in_the_way(at: &Path, by: &str) -> Error {
    Error::InUse { what: at.display().to_string(), by: by.to_owned() }
}

/// Ends what is mounted at a place, as [`resolve`] gives it. Refused while it is in use.
pub fn unbind(at: &Path) -> Result<()> {
    for _ in 0..MAX_DEPTH {
        if !is_mount_point(at)? {
            return Ok(());
        }
        match mounts::unmount(at) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                return Err(in_the_way(at, "files there are open, or it is a current directory"));
            }
            // Someone else was faster, which the next look shows.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
            ended => ended.map_err(Error::io("unmount", at))?,
        }
    }
    Err(in_the_way(at, "more mounts than can be ended"))
}

/// Removes the empty directory or file on which something was mounted. What holds anything was not made for that, and
/// stays.
pub fn remove_place(at: &Path) -> Result<()> {
    let removed = match std::fs::symlink_metadata(at) {
        Ok(metadata) if metadata.is_dir() => std::fs::remove_dir(at),
        Ok(metadata) if metadata.is_file() && metadata.len() == 0 => std::fs::remove_file(at),
        Ok(_) => return Ok(()),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
            tracing::warn!(at = %at.display(), "not removed, since it holds files");
            Ok(())
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("remove", at)(error))
        }
        _ => Ok(()),
    }
}
