//! Giving a volume a block device.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::{LockedVolume, Volume};
use crate::backend::IMAGE;
use crate::error::{Error, Result};
use crate::pool::state::VolumeState;
use crate::sys::loops::{Backing, LoopDevice, Options};

/// The device of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Its path: `/dev/loop3`.
    pub device: PathBuf,
    /// Nobody can write to it.
    pub read_only: bool,
    /// Its data goes around the page cache.
    pub direct_io: bool,
}

impl Attachment {
    fn new(loop_device: LoopDevice, backing: Backing) -> Self {
        Self {
            device: loop_device.path(),
            read_only: backing.read_only,
            direct_io: backing.direct_io,
        }
    }
}

impl Volume {
    /// The device that the volume is attached to. Asked from the kernel.
    pub fn attachment(&self) -> Result<Option<Attachment>> {
        let all = self.attachments()?;
        Ok(all.into_iter().next().map(|(device, backing)| Attachment::new(device, backing)))
    }

    pub(crate) fn attachments(&self) -> Result<Vec<(LoopDevice, Backing)>> {
        let image = self.image();
        let failed = || Error::io("find the device of", self.image());
        // The file of an image server is known by its path: to ask a server that is away would block.
        let served = self.lazy_directory().join(IMAGE);
        // The pool may be mounted elsewhere as well, so only the end of a path tells what can't be ours. To ask each device
        // would take longer.
        let end = Path::new(self.name.as_str()).join("live").join(IMAGE);
        let mut found = vec![];
        for device in LoopDevice::attached().map_err(failed())? {
            let Some(path) = device.backing_path() else { continue };
            if path != served && !path.ends_with(&end) {
                continue;
            }
            let Some(backing) = device.backing().map_err(failed())? else { continue };
            let is_ours = path == served
                || std::fs::metadata(&image).is_ok_and(|metadata| backing.is(&metadata));
            if is_ours {
                found.push((device, backing));
            }
        }
        Ok(found)
    }
}

impl LockedVolume {
    /// Attaches the volume's image to a device, unless it is attached already in this way. For a lazy clone see
    /// [`attach_served`](Self::attach_served).
    pub fn attach(&mut self, read_only: bool) -> Result<Attachment> {
        if self.state.lazy.is_some() && self.volume.attachment()?.is_none() {
            return Err(Error::Request(format!(
                "{} is a lazy clone, which needs an image server to be attached",
                self.volume
            )));
        }
        let image = self.volume.image();
        self.check_image(&image)?;
        self.attach_image(&image, read_only)
    }

    /// The same with another file in the image's place: what an image server serves.
    pub fn attach_image(&mut self, image: &Path, read_only: bool) -> Result<Attachment> {
        if let Some(attachment) = self.volume.attachment()? {
            if attachment.read_only != read_only {
                let how = if attachment.read_only { "read-only" } else { "for writing" };
                let by = format!("attached {how} to {}", attachment.device.display());
                return Err(self.volume.in_use(by));
            }
            self.want_attached(read_only)?;
            return Ok(attachment);
        }
        // Noted first: a device that nobody notes as wanted is one that a crash has left.
        self.want_attached(read_only)?;
        let file = File::options()
            .read(true)
            .write(!read_only)
            .open(image)
            .map_err(Error::io("open", image))?;
        let options =
            Options { read_only, sector_bytes: self.state.sector_bytes, autoclear: false };
        LoopDevice::attach(&file, options).map_err(Error::io("attach", image))?;
        match self.volume.attachment()? {
            Some(attachment) => Ok(attachment),
            None => Err(Error::Internal("a device that was just attached can't be found")),
        }
    }

    /// Detaches the volume. Refused while it is mounted or open.
    pub fn detach(&mut self) -> Result<()> {
        for (device, _) in self.volume.attachments()? {
            if let Some(at) = self.volume.mounts_of(device)?.first() {
                return Err(self.volume.in_use(format!("mounted at {}", at.display())));
            }
            device.detach().map_err(|cause| {
                if cause.kind() == std::io::ErrorKind::ResourceBusy {
                    self.volume.in_use(format!("{device} is open in some process"))
                } else {
                    Error::io("detach", device.path())(cause)
                }
            })?;
        }
        self.end_server()?;
        self.note_unwanted(|state| state.wanted = Default::default())
    }

    /// Changes what is wanted after it was ended. In a full pool it stays as it was: that a device is wanted which is not
    /// there does no harm, while a volume that can't be detached could not be deleted to make room.
    pub(super) fn note_unwanted(&mut self, change: impl FnOnce(&mut VolumeState)) -> Result<()> {
        match self.change(change) {
            Err(error) if error.is_full() => {
                tracing::warn!(volume = %self.volume.name(), %error, "the state is not up to date");
                Ok(())
            }
            noted => noted,
        }
    }

    fn want_attached(&mut self, read_only: bool) -> Result<()> {
        self.change(|state| {
            state.wanted.attached = true;
            state.wanted.read_only = read_only;
        })
    }

    /// Compares the image with what the state says. One that should have grown when a crash came grows now.
    fn check_image(&mut self, path: &Path) -> Result<()> {
        let len_bytes = std::fs::metadata(path).map_err(Error::io("look at", path))?.len();
        let size_bytes = self.state.size_bytes;
        if len_bytes < size_bytes && self.state.grow_filesystem {
            self.set_image_size(size_bytes)?;
            self.resize_devices()?;
            return self.end_growth_of_raw();
        }
        if len_bytes != size_bytes {
            let detail = format!("it has {len_bytes} bytes, and the volume has {size_bytes}");
            return Err(Error::Damaged { path: path.to_owned(), detail });
        }
        Ok(())
    }
}
