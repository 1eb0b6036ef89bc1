//! Making pools.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use petra_engine::context::Host;
use rustix::fs::{SeekFrom, seek};
use rustix::mount::MountFlags;

use super::state::{self, FORMAT, PoolState};
use super::{DEFAULT_OVERCOMMIT_PERCENT, Pool, entries};
use crate::backend::{BackendKind, detect};
use crate::device::System;
use crate::error::{Error, Result};
use crate::sys::loops::{LoopDevice, Options};
use crate::sys::tools::{MKFS_BTRFS, MKFS_XFS, WIPEFS, argument};
use crate::sys::{files, mounts};

/// The smallest pool that is formatted, in bytes: less is not worth what the file system takes for itself.
pub const MIN_POOL_BYTES: u64 = 512 << 20;
/// How much at the beginning and the end of a device must be zeros: all known file systems, partition tables and RAID
/// members have something there.
const MARGIN_BYTES: u64 = 1 << 20;

/// Where a pool shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// An empty or new directory on btrfs or XFS.
    Directory(PathBuf),
    /// A block device without data, to be formatted, and mounted at a directory.
    Device {
        /// The device.
        device: PathBuf,
        /// The directory.
        at: PathBuf,
    },
    /// A file to be made, formatted, and mounted at a directory: for trying out.
    File {
        /// The file, which must not exist.
        file: PathBuf,
        /// Its size in bytes; it takes room as it is filled.
        size_bytes: u64,
        /// The directory.
        at: PathBuf,
    },
}

/// A pool to make.
#[derive(Clone, Debug)]
pub struct InitRequest {
    /// Where.
    pub place: Place,
    /// What a device or file is formatted with (btrfs by default); what a directory must be on.
    pub filesystem: Option<BackendKind>,
    /// How much may be promised, in percent of what is usable.
    pub overcommit_percent: u32,
    /// What is held back, in bytes; None for a default that follows the size.
    pub reserve_bytes: Option<u64>,
}

impl InitRequest {
    /// A pool with the default limits.
    pub fn new(place: Place) -> Self {
        Self {
            place,
            filesystem: None,
            overcommit_percent: DEFAULT_OVERCOMMIT_PERCENT,
            reserve_bytes: None,
        }
    }
}

/// A pool that was made.
#[derive(Debug)]
pub struct Initialised {
    /// The pool.
    pub pool: Pool,
    /// What was mounted where, and has to be again after a reboot.
    pub mounted: Option<(PathBuf, PathBuf)>,
}

impl Pool {
    /// Makes a pool. Never touches a device, file or directory that holds anything.
    pub fn init(request: &InitRequest, host: Arc<dyn Host>) -> Result<Initialised> {
        if request.overcommit_percent == 0 {
            let detail = "with an overcommit of 0 percent no volume could be made";
            return Err(Error::Request(detail.to_owned()));
        }
        let kind = request.filesystem.unwrap_or(BackendKind::Btrfs);
        match &request.place {
            Place::Directory(root) => {
                check_directory(root)?;
                let is_new = !root.exists();
                std::fs::create_dir_all(root).map_err(Error::io("create", root))?;
                let made = lay_out(root, request, host).inspect_err(|_| {
                    if is_new {
                        let _ = std::fs::remove_dir(root);
                    }
                });
                Ok(Initialised { pool: made?, mounted: None })
            }
            Place::Device { device, at } => {
                check_mount_point(at)?;
                check_device(device)?;
                format(device, kind)?;
                mount_new(device, at, kind)?;
                let pool = lay_out(at, request, host)?;
                Ok(Initialised { pool, mounted: Some((device.clone(), at.clone())) })
            }
            Place::File { file, size_bytes, at } => {
                check_mount_point(at)?;
                let made = make_in_file(file, *size_bytes, at, kind);
                let pool = made.and_then(|()| lay_out(at, request, host))?;
                Ok(Initialised { pool, mounted: Some((file.clone(), at.clone())) })
            }
        }
    }
}

/// Writes what makes a directory a pool. `pool.json` comes last: without it there is none.
fn lay_out(root: &Path, request: &InitRequest, host: Arc<dyn Host>) -> Result<Pool> {
    let backend = detect(root)?;
    if let Some(wanted) = request.filesystem
        && wanted != backend
    {
        let detail = format!("it is {backend}, and {wanted} was asked for");
        return Err(Error::Unsupported { path: root.to_owned(), detail });
    }
    for name in ["new", "trash", "volumes"] {
        let path = root.join(name);
        match std::fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::io("create", path)(error));
            }
            _ => {}
        }
    }
    // Images are for root alone, as devices are.
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(root, private).map_err(Error::io("change the mode of", root))?;
    let now = i64::try_from(host.unix_ms()).unwrap_or(i64::MAX);
    let state = PoolState {
        format: FORMAT,
        id: host.new_id(),
        backend,
        created: Timestamp::from_millisecond(now).unwrap_or_default(),
        overcommit_percent: request.overcommit_percent,
        reserve_bytes: request.reserve_bytes,
    };
    state::write(&root.join("pool.json"), &state)?;
    Pool::open(root, host)
}

fn check_directory(root: &Path) -> Result<()> {
    let holds = match std::fs::metadata(root) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("look at", root)(error)),
        Ok(metadata) if !metadata.is_dir() => "is no directory".to_owned(),
        Ok(_) => {
            let names = entries(root)?;
            // An init that was interrupted has left these, empty.
            let ours = |name: &std::ffi::OsString| {
                ["new", "trash", "volumes", "pool.json.new"].iter().any(|our| name == our)
            };
            if root.join("pool.json").exists() {
                let within = files::parent(root).display().to_string();
                let name = root.file_name().unwrap_or_default().to_string_lossy().into_owned();
                return Err(Error::Exists { what: "pool", name, within });
            }
            let Some(name) = names.iter().find(|name| !ours(name)) else { return Ok(()) };
            format!("is not empty: it holds {}", name.to_string_lossy())
        }
    };
    Err(Error::Request(format!("{} {holds}", root.display())))
}

fn check_mount_point(at: &Path) -> Result<()> {
    match entries(at) {
        Ok(names) if names.is_empty() => Ok(()),
        Ok(_) => Err(Error::Request(format!("{} is not empty", at.display()))),
        Err(error) => Err(error),
    }
}

/// Fails unless a block device is unused and holds nothing.
fn check_device(path: &Path) -> Result<()> {
    let metadata = std::fs::metadata(path).map_err(Error::io("look at", path))?;
    if !metadata.file_type().is_block_device() {
        return Err(Error::Request(format!("{} is no block device", path.display())));
    }
    let uses = System::default().uses(path).map_err(Error::io("look at", path))?;
    if let Some(used) = uses.first() {
        let what = path.display().to_string();
        return Err(Error::InUse { what, by: used.to_string() });
    }
    // Exclusively: the kernel refuses that while anyone has it mounted, also where this process can't see that.
    let exclusive = rustix::fs::OFlags::EXCL.bits().cast_signed();
    let mut options = File::options();
    std::os::unix::fs::OpenOptionsExt::custom_flags(options.read(true), exclusive);
    let device = options.open(path).map_err(Error::io("open", path))?;
    let end = seek(&device, SeekFrom::End(0)).map_err(Error::io("read the size of", path))?;
    if end < MIN_POOL_BYTES {
        return Err(too_small(path, end));
    }
    for start in [0, end - MARGIN_BYTES] {
        if let Some(at) = first_data(&device, start).map_err(Error::io("read", path))? {
            let detail = match signatures(path) {
                Some(found) => format!("it holds {found}"),
                None => format!("it holds data, at byte {at}"),
            };
            return Err(Error::InUse { what: path.display().to_string(), by: detail });
        }
    }
    Ok(())
}

/// The first byte in a margin that is not zero.
fn first_data(device: &File, start: u64) -> io::Result<Option<u64>> {
    let mut margin = vec![0; MARGIN_BYTES as usize];
    std::os::unix::fs::FileExt::read_exact_at(device, &mut margin, start)?;
    Ok(margin.iter().position(|byte| *byte != 0).map(|at| start + at as u64))
}

/// What is on a device, in the words of `wipefs`, if that is installed and knows.
fn signatures(device: &Path) -> Option<String> {
    let arguments = ["--no-act", "--noheadings", "--output", "TYPE"].map(std::ffi::OsString::from);
    let said = WIPEFS.run(arguments.into_iter().chain([argument(device)]), "a look").ok()?;
    let types: Vec<&str> = said.split_whitespace().collect();
    (!types.is_empty()).then(|| types.join(", "))
}

fn too_small(path: &Path, size_bytes: u64) -> Error {
    let path = path.display();
    Error::Request(format!(
        "{path} has {size_bytes} bytes, and a pool needs at least {MIN_POOL_BYTES}"
    ))
}

fn format(path: &Path, kind: BackendKind) -> Result<()> {
    let path = argument(path);
    let needed_for = format!("a pool on {kind}");
    match kind {
        BackendKind::Btrfs => {
            MKFS_BTRFS.run(["-q".into(), "-L".into(), "petra".into(), path], &needed_for)
        }
        BackendKind::Xfs => MKFS_XFS.run(
            ["-q".into(), "-m".into(), "reflink=1".into(), "-L".into(), "petra".into(), path],
            &needed_for,
        ),
    }
    .map(drop)
}

fn mount_new(device: &Path, at: &Path, kind: BackendKind) -> Result<()> {
    std::fs::create_dir_all(at).map_err(Error::io("create", at))?;
    let filesystem = kind.to_string();
    mounts::mount(device, at, &filesystem, MountFlags::NOATIME, "")
        .map_err(Error::io("mount", device))
}

/// Makes a file system in a new file and mounts it. After an error there is no such file.
fn make_in_file(path: &Path, size_bytes: u64, at: &Path, kind: BackendKind) -> Result<()> {
    if size_bytes < MIN_POOL_BYTES {
        return Err(too_small(path, size_bytes));
    }
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(Error::io("create", path))?;
    let made = || {
        file.set_len(size_bytes).map_err(Error::io("set the length of", path))?;
        let options = Options { read_only: false, sector_bytes: 4096, autoclear: true };
        let (device, _open) =
            LoopDevice::attach(&file, options).map_err(Error::io("attach", path))?;
        // The device and not the file, so that the file system gets its block size. It goes with the mount, or with `_open`.
        format(&device.path(), kind)?;
        mount_new(&device.path(), at, kind)
    };
    made().inspect_err(|_| drop(std::fs::remove_file(path)))
}
