//! Whether a volume can be used.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use memmap2::MmapMut;
use rustix::fs::OFlags;
use rustix::mount::MountFlags;

use super::Volume;
use crate::error::{Error, Result};
use crate::sys::mounts::{self, Mount};

/// A server that died may have a successor after this.
const SUCCESSOR: Duration = Duration::from_secs(2);
/// What is read to see whether that works: the largest block of a device.
const BLOCK_BYTES: usize = 4096;
/// What a file system says of itself after an error that ended its writes.
const STOPPED: [&str; 2] = ["shutdown", "emergency_ro"];

impl Volume {
    /// What is wrong with a volume that is attached, in words for people. Reads a block past all caches, which takes as long
    /// as it takes: that of a lazy clone may have to come from a repository that is away.
    pub fn trouble(&self) -> Result<Option<String>> {
        let Some(attachment) = self.attachment()? else { return Ok(None) };
        if !self.is_alive(SUCCESSOR)? {
            return Ok(Some("its image server died: it must be staged again".to_owned()));
        }
        if let Err(error) = read_block(&attachment.device) {
            return Ok(Some(format!("{} can't be read: {error}", attachment.device.display())));
        }
        let all = mounts::all().map_err(Error::io("read", "/proc/self/mountinfo"))?;
        for (device, _) in self.attachments()? {
            let mut ours = all.iter().filter(|mount| mount.is_on(device.number()));
            if let Some(trouble) = ours.find_map(trouble_at) {
                return Ok(Some(trouble));
            }
        }
        Ok(None)
    }
}

/// Reads the device's first block, and not from memory.
fn read_block(device: &Path) -> io::Result<()> {
    let direct = OFlags::DIRECT.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(direct).open(device)?;
    // Aligned as direct reads want it.
    let mut block = MmapMut::map_anon(BLOCK_BYTES)?;
    file.read_exact_at(&mut block, 0)
}

/// What is wrong with a mounted file system.
fn trouble_at(mount: &Mount) -> Option<String> {
    let (at, filesystem) = (mount.at.display(), &mount.filesystem);
    // A mount that was made read-only has both.
    let became_read_only = mount.read_only && !mount.flags.contains(MountFlags::RDONLY);
    if became_read_only || mount.options.split(',').any(|option| STOPPED.contains(&option)) {
        return Some(format!("its {filesystem} at {at} can't be written any more, after an error"));
    }
    let error = File::open(&mount.at).err()?;
    // Nobody must see what is there, or it was unmounted meanwhile.
    let is_broken = error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error());
    is_broken.then(|| format!("its {filesystem} at {at} can't be read: {error}"))
}
