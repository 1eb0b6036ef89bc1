//! What this machine's kernel and tools can do, found out by trying.

use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use petra_engine::context::Host;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::MountFlags;
use serde::Serialize;

use crate::backend::detect;
use crate::error::{Error, Result};
use crate::pool::Pool;
use crate::sys::fiemap::{SYNC, fiemap};
use crate::sys::loops::{LoopDevice, Options};
use crate::sys::mounts;
use crate::sys::tools::{E2FSCK, MKFS_BTRFS, MKFS_EXT4, MKFS_XFS, RESIZE2FS, WIPEFS};

/// How one thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// It works.
    Ok,
    /// Something is slower, or not possible, without it.
    Lacking,
    /// Volumes do not work without it.
    Missing,
}

/// What was found of one thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was tried.
    pub name: &'static str,
    /// The result.
    pub health: Health,
    /// What was found, or what is not possible without it.
    pub detail: String,
}

impl Finding {
    fn new(name: &'static str, health: Health, detail: impl Into<String>) -> Self {
        Self { name, health, detail: detail.into() }
    }

    fn of(name: &'static str, found: Result<String, String>, otherwise: Health) -> Self {
        match found {
            Ok(detail) => Self::new(name, Health::Ok, detail),
            Err(detail) => Self::new(name, otherwise, detail),
        }
    }
}

/// Looks at the machine, and at a pool if one is given. Leaves nothing behind.
pub fn examine(pool: Option<&Pool>, host: &dyn Host) -> Vec<Finding> {
    let mut findings = vec![kernel(), root()];
    findings.push(Finding::of("loop devices", loop_devices(), Health::Missing));
    if let Some(pool) = pool {
        findings.extend(examine_pool(pool, host));
    }
    findings.extend(fuse(host));
    findings.push(io_uring());
    findings.extend(tools());
    findings
}

fn kernel() -> Finding {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    Finding::new("kernel", Health::Ok, release)
}

fn root() -> Finding {
    const SYS_ADMIN: u32 = 21;
    const SYS_RESOURCE: u32 = 24;
    let has = capabilities();
    if has >> SYS_ADMIN & 1 == 0 {
        return Finding::new("rights", Health::Missing, "CAP_SYS_ADMIN is needed: run as root");
    }
    if has >> SYS_RESOURCE & 1 == 0 {
        let detail = "without CAP_SYS_RESOURCE an ext4 grows only when it is mounted next";
        return Finding::new("rights", Health::Lacking, detail);
    }
    Finding::new("rights", Health::Ok, "root")
}

/// What this process may do, a bit for each right.
fn capabilities() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or_default()
}

fn loop_devices() -> Result<String, String> {
    let path = "/dev/loop-control";
    File::options()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|error| format!("{path}: {error}"))?;
    Ok("can be made".to_owned())
}

fn examine_pool(pool: &Pool, host: &dyn Host) -> Vec<Finding> {
    let reflink = detect(pool.root())
        .map(|kind| format!("{kind}, copies by reference"))
        .map_err(|error| error.to_string());
    // Where no name of a volume is looked for, and recovery cleans up.
    let path = pool.trash_directory().join(host.new_id().to_string());
    let tried = Trial::new(pool, &path);
    let (maps, direct) = match &tried {
        Ok(trial) => (trial.extent_maps(), trial.direct_io()),
        Err(error) => (Err(error.to_string()), Err(error.to_string())),
    };
    vec![
        Finding::of("pool", reflink, Health::Missing),
        Finding::of("extent maps", maps, Health::Lacking),
        Finding::of("loop direct I/O", direct, Health::Lacking),
    ]
}

/// An image to try things on.
struct Trial<'a> {
    pool: &'a Pool,
    path: PathBuf,
    image: File,
}

impl<'a> Trial<'a> {
    fn new(pool: &'a Pool, path: &Path) -> Result<Self> {
        pool.backend().create(path, 1 << 20)?;
        let image = path.join(crate::backend::IMAGE);
        let opened = File::options().read(true).write(true).open(&image);
        let image = opened.map_err(Error::io("open", image))?;
        rustix::io::pwrite(&image, &[1; 8192], 4096).map_err(Error::io("write", path))?;
        Ok(Self { pool, path: path.to_owned(), image })
    }

    fn extent_maps(&self) -> Result<String, String> {
        let mut plain = 0;
        fiemap(&self.image, 0..1 << 20, SYNC, |extent| {
            plain += if extent.is_plain() { extent.length } else { 0 };
            ControlFlow::Continue(())
        })
        .map_err(|error| format!("no FIEMAP, so snapshots read everything: {error}"))?;
        match plain {
            8192 => Ok("FIEMAP".to_owned()),
            _ => Err(format!("FIEMAP shows {plain} of 8192 bytes, so snapshots read them all")),
        }
    }

    fn direct_io(&self) -> Result<String, String> {
        let options = Options { read_only: true, sector_bytes: 4096, autoclear: true };
        let (device, _open) =
            LoopDevice::attach(&self.image, options).map_err(|error| error.to_string())?;
        match device.backing() {
            Ok(Some(backing)) if backing.direct_io => Ok("blocks of 4 KiB".to_owned()),
            Ok(_) => Err("not possible here: volumes are slower and use the page cache".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        let _ = self.pool.backend().delete(&self.path);
    }
}

/// What a FUSE mount offers.
struct Offer {
    major: u32,
    minor: u32,
    flags: u64,
}

fn fuse(host: &dyn Host) -> Vec<Finding> {
    const PASSTHROUGH: u64 = 1 << 37;
    const RESEND: u64 = 1 << 39;
    const IO_URING: u64 = 1 << 41;
    let offer = match ask_fuse(host) {
        Ok(offer) => offer,
        Err(error) => {
            let detail = format!("no lazy clones without it: {error}");
            return vec![Finding::new("FUSE", Health::Lacking, detail)];
        }
    };
    let flag = |name, bit, without: &str| {
        let found = if offer.flags & bit != 0 { Ok("yes".to_owned()) } else { Err(without.into()) };
        Finding::of(name, found, Health::Lacking)
    };
    vec![
        Finding::new("FUSE", Health::Ok, format!("protocol {}.{}", offer.major, offer.minor)),
        flag(
            "FUSE resend",
            RESEND,
            "an image server that dies means I/O errors (kernel 6.9 has it)",
        ),
        flag("FUSE passthrough", PASSTHROUGH, "not offered (kernel 6.9 has it)"),
        flag(
            "FUSE over io_uring",
            IO_URING,
            "not offered (kernel 6.14 has it; /sys/module/fuse/parameters/enable_uring)",
        ),
    ]
}

/// Mounts a FUSE file system that serves nothing, to read the kernel's first request.
fn ask_fuse(host: &dyn Host) -> Result<Offer, io::Error> {
    let connection = File::options().read(true).write(true).open("/dev/fuse")?;
    let at = std::env::temp_dir().join(format!("petra-doctor-{}", host.new_id()));
    std::fs::create_dir(&at)?;
    let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", connection.as_raw_fd());
    let request = mounts::mount(Path::new("petra"), &at, "fuse", MountFlags::RDONLY, &data)
        .and_then(|()| {
            let request = read_first(&connection);
            let unmounted = mounts::unmount(&at);
            request.and_then(|request| unmounted.map(|()| request))
        });
    let removed = std::fs::remove_dir(&at);
    let request = request?;
    removed?;
    parse_init(&request).ok_or_else(|| io::Error::other("its first request was not understood"))
}

fn read_first(connection: &File) -> io::Result<Vec<u8>> {
    let second = Timespec { tv_sec: 1, tv_nsec: 0 };
    let mut events = [PollFd::new(connection, PollFlags::IN)];
    if poll(&mut events, Some(&second))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    // The kernel wants room for the largest request before it gives the smallest.
    let mut request = vec![0; 1 << 20];
    let len = rustix::io::read(connection, &mut request)?;
    request.truncate(len);
    Ok(request)
}

/// `struct fuse_in_header` and `struct fuse_init_in`.
fn parse_init(request: &[u8]) -> Option<Offer> {
    const INIT: u32 = 26;
    let number = |at: usize| {
        let bytes = request.get(at..at.checked_add(4)?)?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?))
    };
    if number(4)? != INIT {
        return None;
    }
    let more = u64::from(number(56).unwrap_or_default());
    Some(Offer {
        major: number(40)?,
        minor: number(44)?,
        flags: u64::from(number(52)?) | more << 32,
    })
}

fn io_uring() -> Finding {
    let path = "/proc/sys/kernel/io_uring_disabled";
    match std::fs::read_to_string(path).as_deref().map(str::trim) {
        Ok("0") => Finding::new("io_uring", Health::Ok, "allowed"),
        Ok(value) => Finding::new("io_uring", Health::Lacking, format!("{path} is {value}")),
        Err(error) => Finding::new("io_uring", Health::Lacking, format!("{path}: {error}")),
    }
}

fn tools() -> Vec<Finding> {
    let needed = [
        (MKFS_EXT4, "volumes with ext4"),
        (MKFS_XFS, "volumes with XFS, pools on XFS"),
        (MKFS_BTRFS, "volumes with btrfs, pools on btrfs"),
        (E2FSCK, "growing an ext4 that is not mounted"),
        (RESIZE2FS, "growing an ext4 that is not mounted"),
        (WIPEFS, "saying what a device holds"),
    ];
    let look = |(tool, purpose): (crate::sys::tools::Tool, &str)| {
        let found = tool.find().map(|path| path.display().to_string());
        let without = format!("needed for {purpose} (Debian package: {})", tool.package);
        Finding::of(tool.name, found.ok_or(without), Health::Lacking)
    };
    needed.into_iter().map(look).collect()
}

#[cfg(test)]
mod tests {
    use petra_engine::context::SystemHost;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_machine_is_described() {
        let findings = examine(None, &SystemHost);
        let names: Vec<&str> = findings.iter().map(|finding| finding.name).collect();
        for name in ["kernel", "rights", "loop devices", "FUSE", "io_uring", "mkfs.ext4"] {
            assert!(names.contains(&name), "{name} in {names:?}");
        }
        assert!(findings.iter().all(|finding| !finding.detail.is_empty()), "{findings:?}");
    }

    #[test]
    fn the_kernels_first_request() {
        let mut request = vec![0; 104];
        for (at, number) in [(4, 26u32), (40, 7), (44, 45), (52, 1 << 30), (56, 1 << 7)] {
            request[at..at + 4].copy_from_slice(&number.to_ne_bytes());
        }
        let offer = parse_init(&request).unwrap();
        assert_eq!((offer.major, offer.minor, offer.flags), (7, 45, 1 << 30 | 1 << 39));
        request[4] = 1;
        assert!(parse_init(&request).is_none());
    }

    proptest! {
        #[test]
        fn requests_of_any_length_are_survived(request in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = parse_init(&request);
        }
    }
}
