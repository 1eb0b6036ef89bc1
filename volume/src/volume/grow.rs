//! Making a volume larger while it is in use.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::mount::MountFlags;

use super::LockedVolume;
use crate::error::{Error, Result};
use crate::pool::MAX_VOLUME_BYTES;
use crate::pool::state::Filesystem;
use crate::sys::mounts::Mount;
use crate::sys::tools::{E2FSCK, RESIZE2FS, argument};
use crate::sys::{btrfs, mounts, resize};

impl LockedVolume {
    /// Makes the volume this large, its device and its file system too. A file system that is not mounted grows at the
    /// next mount. After a crash, the same call, or the next attach and mount, ends what was begun.
    pub fn grow(&mut self, size_bytes: u64) -> Result<()> {
        let (now, sector_bytes) = (self.state.size_bytes, u64::from(self.state.sector_bytes));
        let wrong = if size_bytes < now {
            format!("it has {now} bytes, and volumes don't shrink")
        } else if size_bytes > MAX_VOLUME_BYTES {
            format!("a volume has at most {MAX_VOLUME_BYTES} bytes (1 PiB)")
        } else if !size_bytes.is_multiple_of(sector_bytes) {
            format!("its size must be a multiple of {sector_bytes} bytes")
        } else if size_bytes > now && self.state.lazy.is_some() {
            "it is a lazy clone whose data is not all here".to_owned()
        } else {
            return self.grow_to(size_bytes);
        };
        let volume = &self.volume;
        Err(Error::Request(format!("{volume} can't be given {size_bytes} bytes: {wrong}")))
    }

    /// Also what is left of it when it has that size already.
    pub(super) fn grow_to(&mut self, size_bytes: u64) -> Result<()> {
        let more_bytes = size_bytes - self.state.size_bytes;
        if more_bytes > 0 {
            let _list = self.volume.pool.lock_list()?;
            self.volume.pool.check_promise(more_bytes)?;
            self.change(|state| {
                state.size_bytes = size_bytes;
                // Also for a raw one: until its image has grown, and longer if it does hold a file system.
                state.grow_filesystem = true;
            })?;
        } else if !self.state.grow_filesystem {
            return Ok(());
        }
        if self.state.lazy.is_none() {
            self.set_image_size(size_bytes)?;
        }
        self.resize_devices()?;
        if self.state.grow_filesystem { self.grow_mounted() } else { Ok(()) }
    }

    /// Makes an ext4 that is not mounted as large as its device. It is checked first, which takes time.
    pub(super) fn grow_unmounted_ext4(&mut self, device: &Path) -> Result<()> {
        let (device, needed_for) = (argument(device), "growing an ext4 that is not mounted");
        // Fails, too, when it had to mend something; then the second look finds it whole.
        let options = ["-f".into(), "-p".into(), device.clone()];
        E2FSCK.run(options.clone(), needed_for).or_else(|_| E2FSCK.run(options, needed_for))?;
        RESIZE2FS.run([device], needed_for)?;
        self.change(|state| state.grow_filesystem = false)
    }

    /// Gives the volume's devices the size of its image.
    pub(super) fn resize_devices(&self) -> Result<()> {
        for (device, _) in self.volume.attachments()? {
            device.follow_size().map_err(Error::io("resize", device.path()))?;
        }
        Ok(())
    }

    pub(super) fn set_image_size(&self, size_bytes: u64) -> Result<()> {
        let path = self.volume.image();
        let image = File::options().write(true).open(&path).map_err(Error::io("open", &path))?;
        image.set_len(size_bytes).map_err(Error::io("set the length of", &path))?;
        image.sync_all().map_err(Error::io("sync", path))
    }

    /// Makes the file system of the volume as large as the volume. One that nobody has mounted for writing grows at the next
    /// mount.
    fn grow_mounted(&mut self) -> Result<()> {
        let Some(mount) = self.writable_mount()? else { return self.end_growth_of_raw() };
        let size_bytes = self.state.size_bytes;
        let top = File::open(&mount.at).map_err(Error::io("open", &mount.at))?;
        // What is mounted counts: for a clone nobody may have noted what it holds.
        let grown = match mount.filesystem.parse() {
            Ok(Filesystem::Ext4) => resize::ext4(&top, size_bytes),
            Ok(Filesystem::Xfs) => resize::xfs(&top, size_bytes),
            Ok(Filesystem::Btrfs) => btrfs::grow_to_device(&top),
            Ok(Filesystem::Raw) | Err(_) => Ok(()),
        };
        grown.map_err(|cause| {
            if cause.kind() == io::ErrorKind::PermissionDenied {
                // What this kernel wants for ext4, although a user may be root.
                let detail = "to grow a mounted ext4, a process needs CAP_SYS_RESOURCE; the volume has its new size, and \
                              its file system grows when it is mounted next";
                return Error::Unsupported { path: mount.at.clone(), detail: detail.to_owned() };
            }
            Error::io("grow the file system at", &mount.at)(cause)
        })?;
        self.change(|state| state.grow_filesystem = false)
    }

    /// Where the volume holds no file system, nothing is left to be done after its image has grown.
    pub(super) fn end_growth_of_raw(&mut self) -> Result<()> {
        // What is absent in the image of a lazy clone tells nothing.
        if self.state.lazy.is_none() && self.detect(&self.volume.image())? == Filesystem::Raw {
            return self.change(|state| state.grow_filesystem = false);
        }
        Ok(())
    }

    /// A mount of the volume's file system through which it can be written: the one that shows most of it.
    fn writable_mount(&self) -> Result<Option<Mount>> {
        let all = mounts::all().map_err(Error::io("read", "/proc/self/mountinfo"))?;
        let devices = self.volume.attachments()?;
        let writable = all.into_iter().filter(|mount| {
            let is_ours = devices.iter().any(|(device, _)| mount.is_on(device.number()));
            is_ours && !mount.read_only && !mount.flags.contains(MountFlags::RDONLY)
        });
        // A bind mount may show a single file, where nothing can be asked for.
        Ok(writable.min_by_key(|mount| mount.root.components().count()))
    }
}
