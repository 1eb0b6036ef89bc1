//! Making volumes.
//!
//! A volume is made in `new/ULID` and renamed when it is whole. Its maker holds a lock on that directory, so that recovery
//! can tell one in the making from what a crash left.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use petra_engine::{Name, SnapshotId};

use super::state::{self, BaseState, Filesystem, LazyState, VolumeState, Wanted};
use super::{Pool, entries};
use crate::backend::IMAGE;
use crate::error::{Error, Result};
use crate::lazy::presence::{Presence, VolumeIdentity};
use crate::sys::tools::{MKFS_BTRFS, MKFS_EXT4, MKFS_XFS, argument};
use crate::sys::{btrfs, files};
use crate::volume::Volume;

/// The smallest volume, in bytes. File systems need more.
pub const MIN_VOLUME_BYTES: u64 = 1 << 20;
/// The largest volume, in bytes: a repository takes no larger ones.
pub const MAX_VOLUME_BYTES: u64 = petra_engine::format::MAX_VOLUME_BYTES;
/// The blocks of a new volume's device, in bytes: those of what pools are on.
pub const LARGEST_SECTOR_BYTES: u32 = 4096;
/// Metadata of a volume, in bytes: its state is rewritten with each change.
const MAX_METADATA_BYTES: usize = 64 << 10;

/// The smallest new volume with this file system, in bytes.
pub fn min_volume_bytes(filesystem: Filesystem) -> u64 {
    match filesystem {
        Filesystem::Ext4 => 8 << 20,
        Filesystem::Btrfs => 128 << 20,
        Filesystem::Xfs => 300 << 20,
        Filesystem::Raw => MIN_VOLUME_BYTES,
    }
}

/// What a new volume begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// An empty file system, or zeros for a raw volume.
    Formatted,
    /// Zeros, to be filled by the caller: what comes holds the file system.
    Empty,
    /// What a copy holds, by reference: the directory of the copy.
    CopyOf(PathBuf),
}

/// A volume to make.
#[derive(Clone, Debug)]
pub struct CreateRequest {
    /// Its name.
    pub name: Name,
    /// Its length in bytes.
    pub size_bytes: u64,
    /// The block size of its device: 4096 for new volumes; 512 for clones of volumes that may have been used so.
    pub sector_bytes: u32,
    /// What it holds, or shall hold.
    pub filesystem: Filesystem,
    /// What it begins with.
    pub content: Content,
    /// What a [`Content::CopyOf`] holds in a repository. The volume gets a copy of its own of it, as the base of its first
    /// snapshot.
    pub base: Option<BaseState>,
    /// The URL of the snapshot that it is made from.
    pub origin: Option<String>,
    /// Where its data comes from, for a lazy clone.
    pub lazy: Option<LazyState>,
    /// Delete it when it is unmounted.
    pub ephemeral: bool,
    /// It is larger than the file system that comes, which is to grow at the next mount.
    pub grow_filesystem: bool,
    /// Whatever is to be remembered with it.
    pub metadata: BTreeMap<String, String>,
}

impl CreateRequest {
    /// A new volume.
    pub fn new(name: Name, size_bytes: u64, filesystem: Filesystem) -> Self {
        Self {
            name,
            size_bytes,
            sector_bytes: LARGEST_SECTOR_BYTES,
            filesystem,
            content: Content::Formatted,
            base: None,
            origin: None,
            lazy: None,
            ephemeral: false,
            grow_filesystem: false,
            metadata: BTreeMap::new(),
        }
    }

    fn check(&self) -> Result<()> {
        let is_new = self.content == Content::Formatted;
        let min_bytes = if is_new { min_volume_bytes(self.filesystem) } else { 1 };
        let text_bytes = self.metadata.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>();
        let Self { name, size_bytes, sector_bytes, filesystem, .. } = self;
        let wrong = if *size_bytes < min_bytes {
            format!("a volume with {filesystem} has at least {min_bytes} bytes")
        } else if *size_bytes > MAX_VOLUME_BYTES {
            format!("a volume has at most {MAX_VOLUME_BYTES} bytes (1 PiB)")
        } else if !matches!(*sector_bytes, 512 | LARGEST_SECTOR_BYTES) {
            format!("a volume's device has blocks of 512 or 4096 bytes, not of {sector_bytes}")
        } else if !size_bytes.is_multiple_of(u64::from(*sector_bytes)) {
            format!("its size must be a multiple of {sector_bytes} bytes")
        } else if text_bytes > MAX_METADATA_BYTES {
            let text = format!("the metadata of volume {name} exceed {MAX_METADATA_BYTES} bytes");
            return Err(Error::Request(text));
        } else {
            return Ok(());
        };
        Err(Error::Request(format!("volume {name} can't have {size_bytes} bytes: {wrong}")))
    }
}

impl Pool {
    /// Makes a volume. When this returns it is durable; after a crash or an error there is none of this name.
    pub fn create(&self, request: CreateRequest) -> Result<Volume> {
        request.check()?;
        let draft = self.draft(&request)?;
        let made = self.fill(&draft, &request).and_then(|()| {
            let _lock = self.lock_list()?;
            let volume = Volume::at(self.clone(), request.name.clone());
            match files::rename_new(&draft.path, volume.directory()) {
                Ok(()) => Ok(volume),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                    Err(self.exists(&request.name))
                }
                Err(error) => Err(Error::io("rename", &draft.path)(error)),
            }
        });
        if made.is_err() {
            // What stays is found by the next recovery.
            let _ = self.remove_volume_directory(&draft.path);
        }
        made
    }

    /// The directory that the volume is made in, with its state, which counts from now on.
    fn draft(&self, request: &CreateRequest) -> Result<Draft> {
        let _lock = self.lock_list()?;
        if Volume::at(self.clone(), request.name.clone()).directory().exists() {
            return Err(self.exists(&request.name));
        }
        self.check_promise(request.size_bytes)?;
        let id = self.host().new_id();
        let path = self.new_directory().join(id.to_string());
        std::fs::create_dir(&path).map_err(Error::io("create", &path))?;
        let directory = File::open(&path).map_err(Error::io("open", &path))?;
        files::try_lock(&directory).map_err(Error::io("lock", &path))?;
        let state = self.first_state(id, request);
        state::write(&path.join("volume.json"), &state)?;
        Ok(Draft { state, path, _directory: directory })
    }

    fn first_state(&self, id: SnapshotId, request: &CreateRequest) -> VolumeState {
        let now = i64::try_from(self.host().unix_ms()).unwrap_or(i64::MAX);
        let base =
            request.base.clone().map(|base| BaseState { copy: self.host().new_id(), ..base });
        VolumeState {
            format: state::FORMAT,
            id,
            name: request.name.clone(),
            size_bytes: request.size_bytes,
            sector_bytes: request.sector_bytes,
            filesystem: request.filesystem,
            created: Timestamp::from_millisecond(now).unwrap_or_default(),
            origin: request.origin.clone(),
            lazy: request.lazy.clone(),
            copies: base.iter().map(|base| base.copy).collect(),
            base,
            wanted: Wanted::default(),
            grow_filesystem: request.grow_filesystem,
            ephemeral: request.ephemeral,
            metadata: request.metadata.clone(),
        }
    }

    fn fill(&self, draft: &Draft, request: &CreateRequest) -> Result<()> {
        let path = &draft.path;
        if let Some(lazy) = &request.lazy {
            let identity = VolumeIdentity { id: draft.state.id, len_bytes: request.size_bytes };
            // What lies beyond is zeros, which the image holds already.
            Presence::create(&path.join("presence"), identity, lazy.volume.len_bytes)?;
        }
        let live = path.join("live");
        let image = live.join(IMAGE);
        let copies = path.join("copies");
        std::fs::create_dir(&copies).map_err(Error::io("create", &copies))?;
        match &request.content {
            Content::Formatted => {
                self.backend().create(&live, request.size_bytes)?;
                format(&image, request)?;
            }
            Content::Empty => self.backend().create(&live, request.size_bytes)?,
            Content::CopyOf(copy) => {
                self.backend().clone_from_copy(copy, &live)?;
                if let Some(base) = &draft.state.base {
                    let own =
                        self.backend().begin_copy(copy, &copies.join(base.copy.to_string()))?;
                    own.finish()?;
                    own.publish()?;
                }
            }
        }
        let file = File::options().write(true).open(&image).map_err(Error::io("open", &image))?;
        let len_bytes = file.metadata().map_err(Error::io("look at", &image))?.len();
        if len_bytes > request.size_bytes {
            let detail = format!("it has {len_bytes} bytes, not at most {}", request.size_bytes);
            return Err(Error::Damaged { path: image, detail });
        }
        file.set_len(request.size_bytes).map_err(Error::io("set the length of", &image))?;
        file.sync_all().map_err(Error::io("sync", &image))?;
        files::sync_directory(path).map_err(Error::io("sync", path))
    }

    fn exists(&self, name: &Name) -> Error {
        Error::Exists { what: "volume", name: name.to_string(), within: self.to_string() }
    }

    /// Deletes what a directory of a volume holds, and itself. Can be repeated, and by several at once.
    pub(crate) fn remove_volume_directory(&self, path: &Path) -> Result<()> {
        let copies = path.join("copies");
        for copy in entries(&copies)? {
            self.backend().delete(&copies.join(copy))?;
        }
        self.backend().delete(&path.join("live"))?;
        // A copy that was moved to the trash by itself.
        if btrfs::is_subvolume(path).unwrap_or(false) || path.join(IMAGE).exists() {
            return self.backend().delete(path);
        }
        match std::fs::remove_dir_all(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("delete", path)(error))
            }
            _ => Ok(()),
        }
    }
}

/// A directory in `new` that is this process's as long as it has it open.
struct Draft {
    state: VolumeState,
    path: PathBuf,
    _directory: File,
}

/// Makes an empty file system in an image whose device will have blocks of this size.
fn format(image: &Path, request: &CreateRequest) -> Result<()> {
    let path = argument(image);
    let needed_for = format!("a volume with {}", request.filesystem);
    let run = |tool: crate::sys::tools::Tool, options: &[&str]| {
        let options = options.iter().map(|option| (*option).into());
        tool.run(options.chain([path.clone()]), &needed_for)
    };
    match request.filesystem {
        // -F: a file is no device, and that is meant. Blocks of 4 KiB also where small volumes would get smaller ones, which
        // no device with sectors of 4 KiB takes. Nobody needs blocks that only root can use.
        Filesystem::Ext4 => run(MKFS_EXT4, &["-q", "-F", "-b", "4096", "-m", "0"]).map(drop),
        Filesystem::Xfs => {
            let sectors = format!("size={}", request.sector_bytes);
            run(MKFS_XFS, &["-q", "-s", &sectors]).map(drop)
        }
        Filesystem::Btrfs => run(MKFS_BTRFS, &["-q"]).map(drop),
        Filesystem::Raw => Ok(()),
    }
}
