//! Mounting a volume's file system.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::{LockedVolume, Volume};
use crate::error::{Error, Result};
use crate::mount_options::MountOptions;
use crate::pool::state::Filesystem;
use crate::sys::loops::LoopDevice;
use crate::sys::mounts;
use crate::{binds, clones};

impl Volume {
    /// Where the volume is mounted, in this mount namespace. Asked from the kernel.
    pub fn mounts(&self) -> Result<Vec<PathBuf>> {
        let mut found = vec![];
        for (device, _) in self.attachments()? {
            found.extend(self.mounts_of(device)?);
        }
        Ok(found)
    }

    pub(crate) fn mounts_of(&self, device: LoopDevice) -> Result<Vec<PathBuf>> {
        let all = mounts::all().map_err(Error::io("read", "/proc/self/mountinfo"))?;
        let ours = all.into_iter().filter(|mount| mount.is_on(device.number()));
        Ok(ours.map(|mount| mount.at).collect())
    }
}

impl LockedVolume {
    /// Mounts the volume, and attaches it first if it is not. The directory is made when it is missing. Does nothing when
    /// it is mounted there already.
    pub fn mount(&mut self, at: &Path, read_only: bool) -> Result<()> {
        self.mount_with(at, &MountOptions::default().read_only(read_only))
    }

    /// The same with other options. Where it is mounted already they are not compared: see
    /// [`Place::is_mounted_with`](crate::binds::Place::is_mounted_with).
    pub fn mount_with(&mut self, at: &Path, options: &MountOptions) -> Result<()> {
        let mounts = self.volume.mounts()?;
        // What is there is not asked, since a volume whose device died does not answer.
        if let Some(at) = binds::resolve(at)?.filter(|at| mounts.contains(at)) {
            return self.end_mount(at, options);
        }
        std::fs::create_dir_all(at).map_err(Error::io("create", at))?;
        let at = at.canonicalize().map_err(Error::io("look at", at))?;
        if mounts.contains(&at) {
            return self.end_mount(at, options);
        }
        if let Some(there) = mounts.first() {
            return Err(self.volume.in_use(format!("mounted at {}", there.display())));
        }
        // Only a device that is writable can be mounted so; a read-only mount can be of either.
        let before = self.volume.attachment()?;
        let is_new = before.is_none();
        let read_only = options.is_read_only();
        let attachment = match before {
            Some(attachment) if read_only || !attachment.read_only => attachment,
            _ => self.attach(read_only)?,
        };
        let mounted = self.mount_device(attachment.device, at, options);
        if mounted.is_err() && is_new {
            // Refused by itself if it did get mounted. The first error tells more.
            let _ = self.detach();
        }
        mounted
    }

    /// Does what follows a mount, in case that a crash came between.
    fn end_mount(&mut self, at: PathBuf, options: &MountOptions) -> Result<()> {
        self.change(|state| state.wanted.mounted_at = Some(at))?;
        if !self.state.grow_filesystem || options.is_read_only() {
            return Ok(());
        }
        match self.grow_to(self.state.size_bytes) {
            // It grows at the next mount.
            Err(Error::Unsupported { .. }) => Ok(()),
            grown => grown,
        }
    }

    fn mount_device(&mut self, device: PathBuf, at: PathBuf, options: &MountOptions) -> Result<()> {
        let filesystem = self.filesystem_on(&device)?;
        let mount = || {
            mount(&device, &at, filesystem, options).map_err(|cause| {
                if filesystem == Filesystem::Btrfs && cause.raw_os_error() == Some(EXIST) {
                    // Kernels before 6.7.
                    let detail = "another btrfs with the same id is mounted, as that of a copy or clone of it has; this \
                                  kernel can mount only one of them at a time (6.7 and later can)";
                    return Error::Unsupported { path: device.clone(), detail: detail.to_owned() };
                }
                let words = options.of_filesystem();
                if cause.raw_os_error() == Some(INVAL) && !words.is_empty() {
                    return Error::Request(format!(
                        "{filesystem} on {} can't be mounted with the options {}",
                        device.display(),
                        words.join(",")
                    ));
                }
                Error::io("mount", &device)(cause)
            })
        };
        mount()?;
        self.change(|state| state.wanted.mounted_at = Some(at.clone()))?;
        if self.state.grow_filesystem && !options.is_read_only() {
            match self.grow_to(self.state.size_bytes) {
                Err(Error::Unsupported { .. }) if filesystem == Filesystem::Ext4 => {
                    mounts::unmount(&at).map_err(Error::io("unmount", &at))?;
                    self.grow_unmounted_ext4(&device)?;
                    mount()?;
                }
                grown => grown?,
            }
        }
        Ok(())
    }

    /// What is on the volume: what it was made with, or what its device shows.
    fn filesystem_on(&self, device: &Path) -> Result<Filesystem> {
        match self.detect(device)? {
            Filesystem::Raw => Err(Error::Request(format!(
                "{} holds no ext4, XFS or btrfs that could be mounted; as a block device it is {}",
                self.volume,
                device.display()
            ))),
            filesystem => Ok(filesystem),
        }
    }

    /// What the volume was made with, or what its device or image shows.
    pub(super) fn detect(&self, file: &Path) -> Result<Filesystem> {
        if self.state.filesystem != Filesystem::Raw {
            return Ok(self.state.filesystem);
        }
        let mut beginning = vec![0; clones::DETECT_BYTES.min(self.state.size_bytes as usize)];
        File::open(file)
            .and_then(|file| file.read_exact_at(&mut beginning, 0))
            .map_err(Error::io("read", file))?;
        Ok(clones::detect(&beginning))
    }

    /// Ends all mounts of the volume. Refused while one is in use.
    pub fn unmount(&mut self) -> Result<()> {
        // Later mounts first: they may lie over earlier ones.
        for at in self.volume.mounts()?.into_iter().rev() {
            mounts::unmount(&at).map_err(|cause| {
                if cause.kind() == io::ErrorKind::ResourceBusy {
                    let by =
                        format!("files at {} are open, or it is a current directory", at.display());
                    self.volume.in_use(by)
                } else {
                    Error::io("unmount", &at)(cause)
                }
            })?;
        }
        self.note_unwanted(|state| state.wanted.mounted_at = None)
    }
}

const EXIST: i32 = Errno::EXIST.raw_os_error();
const INVAL: i32 = Errno::INVAL.raw_os_error();
const ROFS: i32 = Errno::ROFS.raw_os_error();

/// Mounts a device. A read-only one whose journal was not emptied is mounted without it, since it can't be replayed.
fn mount(
    device: &Path,
    at: &Path,
    filesystem: Filesystem,
    options: &MountOptions,
) -> io::Result<()> {
    // A clone has its origin's id, which XFS takes for the same file system mounted twice.
    let (always, without_journal) = match filesystem {
        Filesystem::Ext4 => ("", "noload"),
        Filesystem::Xfs => ("nouuid", "nouuid,norecovery"),
        Filesystem::Btrfs => ("", "rescue=nologreplay"),
        Filesystem::Raw => return Err(Errno::INVAL.into()),
    };
    let mount = |always| {
        let data = options.data(always);
        mounts::mount(device, at, filesystem.as_str(), options.flags(), &data)
    };
    match mount(always) {
        Err(error) if options.is_read_only() && error.raw_os_error() == Some(ROFS) => {
            mount(without_journal)
        }
        mounted => mounted,
    }
}
