//! Loop devices: block devices that stand on files.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::io::Errno;
use rustix::ioctl::{Getter, IntegerSetter, NoArg, Opcode, Setter, ioctl};

use super::mounts::Number;

const CTL_GET_FREE: Opcode = 0x4C82;
const CONFIGURE: Opcode = 0x4C0A;
const CLR_FD: Opcode = 0x4C01;
const GET_STATUS64: Opcode = 0x4C05;
const SET_CAPACITY: Opcode = 0x4C07;

const READ_ONLY: u32 = 1;
const AUTOCLEAR: u32 = 4;
const DIRECT_IO: u32 = 16;

/// The kernel's number for loop devices.
const MAJOR: u32 = 7;
/// How often another process may take the free device before us.
const ATTEMPTS: usize = 64;
/// How long a device that is being detached may be held by one who just looks at it, as udev does.
const DETACH_WAIT: Duration = Duration::from_secs(5);
const DETACH_STEP: Duration = Duration::from_millis(10);

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    fd: u32,
    block_bytes: u32,
    info: Info,
    reserved: [u64; 8],
}

const NO_INFO: Info = Info {
    device: 0,
    inode: 0,
    rdevice: 0,
    offset: 0,
    size_limit: 0,
    number: 0,
    encrypt_type: 0,
    encrypt_key_size: 0,
    flags: 0,
    file_name: [0; 64],
    crypt_name: [0; 64],
    encrypt_key: [0; 32],
    init: [0; 2],
};

/// How to attach a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    /// Nobody can write through the device.
    pub read_only: bool,
    /// The size of the device's blocks, in bytes.
    pub sector_bytes: u32,
    /// Detach when the last user closes or unmounts it.
    pub autoclear: bool,
}

/// A loop device, attached or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LoopDevice {
    number: u32,
}

/// What a loop device stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Backing {
    device: u64,
    inode: u64,
    /// Nobody can write through the device.
    pub read_only: bool,
    /// It bypasses the page cache.
    pub direct_io: bool,
}

impl Backing {
    /// True if it is this very file.
    pub(crate) fn is(&self, metadata: &std::fs::Metadata) -> bool {
        // The kernel gives device numbers in the form of its own, which is that of stat(2) for all that matter.
        (self.device, self.inode) == (metadata.dev(), metadata.ino())
    }
}

impl fmt::Display for LoopDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/dev/loop{}", self.number)
    }
}

impl LoopDevice {
    /// Attaches a file. Its data goes around the page cache where the file system can do that. The device comes open, since
    /// one with `autoclear` would be gone if nobody had it open.
    pub(crate) fn attach(image: &File, options: Options) -> io::Result<(Self, File)> {
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
        let mut flags = DIRECT_IO;
        if options.read_only {
            flags |= READ_ONLY;
        }
        if options.autoclear {
            flags |= AUTOCLEAR;
        }
        for _ in 0..ATTEMPTS {
            // SAFETY: the opcode takes nothing and gives the number as its result.
            let number = unsafe { ioctl(&control, GetFree) }?;
            let device = Self { number };
            let node = device.open(!options.read_only)?;
            let config = Config {
                fd: u32::try_from(image.as_raw_fd()).map_err(|_| Errno::BADF)?,
                block_bytes: options.sector_bytes,
                info: Info { flags, ..NO_INFO },
                reserved: [0; 8],
            };
            // SAFETY: the opcode takes this structure; `image` keeps its descriptor open during the call.
            match unsafe { ioctl(&node, Setter::<CONFIGURE, Config>::new(config)) } {
                Ok(()) => return Ok((device, node)),
                // Another process was faster.
                Err(Errno::BUSY) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::Error::other("other processes took every free loop device"))
    }

    /// All devices that are attached.
    pub(crate) fn attached() -> io::Result<Vec<Self>> {
        let entries = match std::fs::read_dir("/sys/block") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            entries => entries?,
        };
        let mut devices = vec![];
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix("loop")?.parse().ok());
            if let Some(number) = number
                && entry.path().join("loop/backing_file").exists()
            {
                devices.push(Self { number });
            }
        }
        devices.sort_unstable();
        Ok(devices)
    }

    /// What it stands on; None when it is not attached.
    pub(crate) fn backing(self) -> io::Result<Option<Backing>> {
        // Not opened where that can be avoided: an open device can't be detached by others.
        if !self.sys("loop/backing_file").exists() {
            return Ok(None);
        }
        let node = self.open(false)?;
        // SAFETY: the opcode writes this structure, which is plain numbers.
        match unsafe { ioctl(&node, Getter::<GET_STATUS64, Info>::new()) } {
            Ok(info) => Ok(Some(Backing {
                device: info.device,
                inode: info.inode,
                read_only: info.flags & READ_ONLY != 0,
                direct_io: info.flags & DIRECT_IO != 0,
            })),
            Err(Errno::NXIO) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The path of the file that it stands on, as the kernel tells it: for people.
    pub(crate) fn backing_path(self) -> Option<PathBuf> {
        let text = std::fs::read_to_string(self.sys("loop/backing_file")).ok()?;
        Some(text.trim_end().into())
    }

    /// Detaches it. [`Errno::BUSY`] while someone uses it.
    pub(crate) fn detach(self) -> io::Result<()> {
        let node = self.open(false)?;
        // SAFETY: the opcode takes nothing.
        match unsafe { ioctl(&node, NoArg::<CLR_FD>::new()) } {
            Ok(()) | Err(Errno::NXIO) => {}
            Err(error) => return Err(error.into()),
        }
        drop(node);
        // While others have it open, the kernel only notes that it shall go with the last of them.
        let mut waited = Duration::ZERO;
        while self.sys("loop/backing_file").exists() {
            if waited >= DETACH_WAIT {
                return Err(Errno::BUSY.into());
            }
            sleep(DETACH_STEP);
            waited += DETACH_STEP;
        }
        Ok(())
    }

    /// Makes the device as large as its file has become.
    pub(crate) fn follow_size(self) -> io::Result<()> {
        let node = self.open(false)?;
        // SAFETY: the opcode takes nothing that it reads.
        Ok(unsafe { ioctl(&node, IntegerSetter::<SET_CAPACITY>::new_usize(0)) }?)
    }

    /// The device's path.
    pub(crate) fn path(self) -> PathBuf {
        self.to_string().into()
    }

    /// The device's number.
    pub(crate) fn number(self) -> Number {
        Number { major: MAJOR, minor: self.number }
    }

    fn sys(self, name: &str) -> PathBuf {
        format!("/sys/block/loop{}/{name}", self.number).into()
    }

    fn open(self, write: bool) -> io::Result<File> {
        let path = self.path();
        let open = || OpenOptions::new().read(true).write(write).open(&path);
        match open() {
            // A container may have a /dev of its own, where nobody makes nodes.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let mode = Mode::RUSR | Mode::WUSR;
                let device = makedev(MAJOR, self.number);
                match mknodat(CWD, &path, FileType::BlockDevice, mode, device) {
                    Ok(()) | Err(Errno::EXIST) => open(),
                    Err(error) => Err(error.into()),
                }
            }
            file => file,
        }
    }
}

/// `LOOP_CTL_GET_FREE`.
struct GetFree;

// SAFETY: the opcode reads and writes no memory; its result is the device's number.
unsafe impl rustix::ioctl::Ioctl for GetFree {
    type Output = u32;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        CTL_GET_FREE
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(
        output: rustix::ioctl::IoctlOutput,
        _: *mut std::ffi::c_void,
    ) -> rustix::io::Result<u32> {
        u32::try_from(output).map_err(|_| Errno::INVAL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_size() {
        assert_eq!((size_of::<Info>(), size_of::<Config>()), (232, 304));
    }
}
