//! Which blocks of a lazy image are there.
//!
//! | copy | where | survives | has |
//! |---|---|---|---|
//! | working | a file in memory (tmpfs), mapped | the image server's death | every block that was ever written or filled |
//! | durable | a file beside the image | a power cut | those of them whose data are known to be on the disk |
//!
//! Bits are only ever set, and only after the data are in the image file. A [`sync`](Presence::sync) first takes a
//! copy of the bits, then makes the image durable, then writes the copy: so no bit on the disk is ahead of its data,
//! and every write that was flushed has its bit. What a power cut takes are bits of data that nobody was promised.
//!
//! ```text
//! durable: header | 2 slots: this boot | 2 slots: bits 0 .. 32,575 | 2 slots: the next 32,576 bits | ...
//! slot, 4 KiB: checksum (16 bytes of BLAKE3), sequence number (8), 509 words
//! ```
//!
//! Of two slots the valid one with the higher number counts, and the other is the next to be written: a torn write
//! leaves what was there before. The first pair says in which boot the volume is in use, or that it was closed; with
//! it a working copy that got lost without a reboot is noticed, for then acknowledged writes might be forgotten.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

use memmap2::MmapRaw;
use petra_engine::SnapshotId;
use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};

use super::durable::{Durable, Pair, SLOT, SLOTS_AT_ONCE, WORDS, read_slots, slot_offset};
use crate::error::{Error, Result};
use crate::sys::files;

pub use super::durable::Medium;

/// The unit of presence.
pub const BLOCK_BYTES: u64 = 4096;

/// The version of both files.
const VERSION: u32 = 1;
const DURABLE_MAGIC: &[u8; 8] = b"PtPresen";
const WORKING_MAGIC: &[u8; 8] = b"PtPreWrk";

/// Tells one boot of a machine from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootId(pub [u8; 16]);

impl BootId {
    /// No boot: the volume was closed.
    pub(super) const NONE: Self = Self([0; 16]);

    /// The boot that this is.
    pub fn current() -> Result<Self> {
        let path = Path::new("/proc/sys/kernel/random/boot_id");
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
        let id = u128::from_str_radix(&digits, 16);
        let id = id.map_err(|_| Error::Io {
            action: "read",
            path: path.into(),
            cause: io::Error::other(format!("{text:?} is no boot id")),
        })?;
        Ok(Self(id.to_be_bytes()))
    }
}

/// Of which volume a presence map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeIdentity {
    /// The volume.
    pub id: SnapshotId,
    /// Its length.
    pub len_bytes: u64,
}

impl VolumeIdentity {
    fn blocks(&self) -> u64 {
        self.len_bytes.div_ceil(BLOCK_BYTES)
    }

    pub(super) fn words(&self) -> usize {
        self.blocks().div_ceil(64) as usize
    }

    fn pages(&self) -> usize {
        self.words().div_ceil(WORDS)
    }

    /// A header: magic, version, volume, length, boot, checksum.
    fn header(&self, magic: &[u8; 8], boot: BootId) -> [u8; SLOT] {
        let mut header = Vec::with_capacity(SLOT);
        header.extend_from_slice(magic);
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&(BLOCK_BYTES as u32).to_le_bytes());
        header.extend_from_slice(&self.id.to_bytes());
        header.extend_from_slice(&self.len_bytes.to_le_bytes());
        header.extend_from_slice(&boot.0);
        let checksum = blake3::hash(&header);
        header.extend_from_slice(checksum.as_bytes());
        header.resize(SLOT, 0);
        let mut block = [0; SLOT];
        block.copy_from_slice(&header);
        block
    }

    /// Checks a header, and gives the boot that it speaks of.
    fn check(&self, header: &[u8], magic: &[u8; 8], path: &Path) -> Result<BootId> {
        let damaged = |detail: String| Error::Damaged { path: path.to_owned(), detail };
        let (Some(found_magic), Some(version), Some(boot)) =
            (header.first_chunk::<8>(), word32(header, 8), array::<16>(header, 40))
        else {
            return Err(damaged("its header is cut off".to_owned()));
        };
        if found_magic != magic {
            return Err(damaged("it is no presence map of a lazy image".to_owned()));
        }
        if version > VERSION {
            return Err(Error::Version {
                path: path.to_owned(),
                found: version,
                supported: VERSION,
            });
        }
        let boot = BootId(boot);
        let own = self.header(magic, boot);
        if own.as_slice() == header {
            return Ok(boot);
        }
        let sum = header.get(..56).map(blake3::hash);
        if sum.is_none_or(|sum| header.get(56..88) != Some(sum.as_bytes().as_slice())) {
            return Err(damaged("its header has a wrong checksum".to_owned()));
        }
        let id = array::<16>(header, 16).map(SnapshotId::from_bytes).unwrap_or(self.id);
        let len = word64(header, 32).unwrap_or_default();
        Err(damaged(format!(
            "it belongs to volume {id} of {len} bytes, not to {} of {} bytes",
            self.id, self.len_bytes
        )))
    }
}

pub(super) fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn word32(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

pub(super) fn word64(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_le_bytes)
}

/// Which blocks of an image are there. Bits are read and set from any thread.
pub struct Presence<M = File> {
    identity: VolumeIdentity,
    path: PathBuf,
    working_path: PathBuf,
    map: MmapRaw,
    present: AtomicU64,
    /// Pages with bits that the durable copy may lack.
    dirty: Vec<AtomicBool>,
    /// Held while syncing.
    /// Held to set bits together with their marks, by any number; alone to take all that is marked.
    setting: RwLock<()>,
    durable: Mutex<Durable<M>>,
}

impl<M> std::fmt::Debug for Presence<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Presence").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Presence<File> {
    /// Makes the presence map of a new volume of whose first `source_bytes` no block is there. What lies beyond them is
    /// there from the beginning. Durable when it returns.
    pub fn create(path: &Path, identity: VolumeIdentity, source_bytes: u64) -> Result<()> {
        let new = files::spare_of(path);
        if path.symlink_metadata().is_ok() {
            let within = path.parent().unwrap_or(Path::new("/")).display().to_string();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            return Err(Error::Exists { what: "presence map", name, within });
        }
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(true).mode(0o600).open(&new);
        let file = file.map_err(Error::io("create", &new))?;
        let len = slot_offset(identity.pages() + 1, false);
        // A block that holds the source's end comes with the rest of the source.
        let present = source_bytes.div_ceil(BLOCK_BYTES)..identity.blocks();
        file.write_all_at(&identity.header(DURABLE_MAGIC, BootId::NONE), 0)
            .and_then(|()| file.set_len(len))
            .and_then(|()| write_present(&file, identity, present))
            .and_then(|()| file.sync_all())
            .map_err(Error::io("write", &new))?;
        std::fs::rename(&new, path).map_err(Error::io("rename", &new))?;
        sync_directory(path)
    }

    /// Opens a presence map for this process alone. `working` is a path in a tmpfs.
    pub fn open(
        path: &Path,
        working: &Path,
        identity: VolumeIdentity,
        boot: BootId,
    ) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(Error::io("open", path))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let what = format!("the lazy image of {}", path.display());
            return Err(Error::Busy { what, holder: "another image server".to_owned() });
        }
        Self::load(file, path, working, identity, boot)
    }
}

/// Writes the pages of a new map in which these blocks are there.
fn write_present(file: &File, identity: VolumeIdentity, present: Range<u64>) -> io::Result<()> {
    if present.is_empty() {
        return Ok(());
    }
    let pairs = vec![Pair::default(); identity.pages() + 1];
    let durable = Durable { medium: file.try_clone()?, identity, pairs };
    let page_blocks = 64 * WORDS as u64;
    for page in present.start / page_blocks..present.end.div_ceil(page_blocks) {
        let words = (0..WORDS as u64).map(|word| {
            let first = page * page_blocks + word * 64;
            bits_from(present.start, first) & !bits_from(present.end, first)
        });
        durable.write(page as usize + 1, words)?;
    }
    Ok(())
}

/// The bits of those of 64 blocks, beginning with `first`, that lie at `from` or behind it.
fn bits_from(from: u64, first: u64) -> u64 {
    match u32::try_from(from.saturating_sub(first)) {
        Ok(skipped) => u64::MAX.checked_shl(skipped).unwrap_or(0),
        Err(_) => 0,
    }
}

fn sync_directory(path: &Path) -> Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    synced.map_err(Error::io("sync", directory))
}

/// Reads what a presence map has on the disk: the bits of all blocks, one after the other.
#[cfg(fuzzing)]
pub(crate) fn read_durable<M: Medium>(
    medium: M,
    path: &Path,
    identity: VolumeIdentity,
) -> Result<Vec<u64>> {
    let mut header = vec![0; SLOT];
    medium.read(&mut header, 0).map_err(Error::io("read", path))?;
    identity.check(&header, DURABLE_MAGIC, path)?;
    let pairs = vec![Pair::default(); identity.pages() + 1];
    Ok(read_slots(&mut Durable { medium, identity, pairs }, path)?.0)
}

impl<M: Medium> Presence<M> {
    /// Opens a presence map in any medium.
    pub fn load(
        medium: M,
        path: &Path,
        working: &Path,
        identity: VolumeIdentity,
        boot: BootId,
    ) -> Result<Self> {
        let mut header = vec![0; SLOT];
        medium.read(&mut header, 0).map_err(Error::io("read", path))?;
        identity.check(&header, DURABLE_MAGIC, path)?;
        let pages = identity.pages();
        // A server that was killed while it synced may have written slots that are not on the disk yet. What is read
        // below counts as durable, so it has to be.
        medium.sync().map_err(Error::io("sync", path))?;
        let mut durable = Durable { medium, identity, pairs: vec![Pair::default(); pages + 1] };

        let (bits, opened_in) = read_slots(&mut durable, path)?;
        let torn: Vec<usize> = (0..=pages)
            .filter(|pair| durable.pairs.get(*pair).is_some_and(|state| state.torn))
            .collect();
        // The mark itself is written alone.
        if opened_in == BootId::NONE && torn.iter().any(|pair| *pair > 0) {
            let detail = "a page is damaged although the volume was closed: this was no torn write";
            return Err(Error::Damaged { path: path.to_owned(), detail: detail.to_owned() });
        }

        let map = match open_working(working, &identity, boot)? {
            Some(map) => map,
            None if opened_in == boot => {
                let detail = format!(
                    "its working copy {} is gone although the machine was not restarted: writes since the last flush may be lost",
                    working.display()
                );
                return Err(Error::Damaged { path: path.to_owned(), detail });
            }
            None => create_working(working, &identity, boot, &bits)?,
        };
        let presence = Self {
            identity,
            path: path.to_owned(),
            working_path: working.to_owned(),
            map,
            present: AtomicU64::new(0),
            dirty: (0..pages).map(|_| AtomicBool::new(false)).collect(),
            setting: RwLock::default(),
            durable: Mutex::new(durable),
        };
        presence.take_stock(&bits, &torn);
        // Only now: with this mark, a working copy must be there.
        let mut durable = presence.durable.lock().unwrap_or_else(PoisonError::into_inner);
        if opened_in != boot {
            durable.write_boot(boot).map_err(Error::io("write", path))?;
        }
        drop(durable);
        Ok(presence)
    }

    /// Counts what is there, and finds pages that are not durable.
    fn take_stock(&self, durable_bits: &[u64], torn: &[usize]) {
        let mut present = 0;
        for (n, word) in self.words().iter().enumerate() {
            let bits = word.load(Ordering::Relaxed);
            present += u64::from(bits.count_ones());
            if durable_bits.get(n) != Some(&bits) {
                self.mark(n);
            }
        }
        self.present.store(present, Ordering::Relaxed);
        // So that a slot that is damaged from now on can be told from one that was torn.
        for page in torn.iter().filter_map(|pair| pair.checked_sub(1)) {
            self.mark(page * WORDS);
        }
    }

    fn mark(&self, word: usize) {
        if let Some(page) = self.dirty.get(word / WORDS) {
            page.store(true, Ordering::Release);
        }
    }

    fn words(&self) -> &[AtomicU64] {
        let bytes = self.map.as_mut_ptr();
        // SAFETY: the mapping is `SLOT + 8 * words` bytes long (`map_working` sees to that) and lives as long as
        // `self`; it begins at a page, so the words after the header are aligned; all access to them, in this
        // process and any other, is atomic.
        unsafe { std::slice::from_raw_parts(bytes.add(SLOT).cast(), self.identity.words()) }
    }

    /// How many blocks the image has.
    pub fn blocks(&self) -> u64 {
        self.identity.blocks()
    }

    /// How many of them are there.
    pub fn present_blocks(&self) -> u64 {
        self.present.load(Ordering::Relaxed)
    }

    /// True when all blocks are there.
    pub fn is_complete(&self) -> bool {
        self.present_blocks() == self.blocks()
    }

    /// The first block of a range that is absent (or present), at or after `range.start`.
    fn find(&self, range: Range<u64>, present: bool) -> Option<u64> {
        let mut at = range.start;
        while at < range.end {
            let bits = self.words().get((at / 64) as usize)?.load(Ordering::Acquire);
            let bits = if present { bits } else { !bits } >> (at % 64);
            if bits != 0 {
                let found = at + u64::from(bits.trailing_zeros());
                return Some(found).filter(|found| *found < range.end);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    /// The first block of a range that is absent.
    pub fn first_absent(&self, blocks: Range<u64>) -> Option<u64> {
        let blocks = blocks.start..blocks.end.min(self.blocks());
        if self.is_complete() { None } else { self.find(blocks, false) }
    }

    /// The first run of absent blocks in a range.
    pub fn absent_run(&self, blocks: Range<u64>) -> Option<Range<u64>> {
        let start = self.first_absent(blocks.clone())?;
        let end = blocks.end.min(self.blocks());
        Some(start..self.find(start..end, true).unwrap_or(end))
    }

    /// Notes that blocks are there. Their data must be in the image file.
    pub fn set(&self, blocks: Range<u64>) {
        let blocks = blocks.start..blocks.end.min(self.blocks());
        let mut at = blocks.start;
        while at < blocks.end {
            let (word, first) = ((at / 64) as usize, at % 64);
            let count = (64 - first).min(blocks.end - at);
            let mask = (u64::MAX >> (64 - count)) << first;
            if let Some(place) = self.words().get(word) {
                // A sync comes before both or after both: whoever has seen the bit relies on it, and on its mark.
                let setting = self.setting.read().unwrap_or_else(PoisonError::into_inner);
                let before = place.fetch_or(mask, Ordering::AcqRel);
                let new = u64::from((mask & !before).count_ones());
                if new > 0 {
                    self.mark(word);
                    self.present.fetch_add(new, Ordering::Relaxed);
                }
                drop(setting);
            }
            at += count;
        }
    }

    /// Makes durable what is there now. `sync_data` makes the image durable.
    pub fn sync(&self, sync_data: impl FnOnce() -> io::Result<()>, image: &Path) -> Result<()> {
        let mut durable = self.durable.lock().unwrap_or_else(PoisonError::into_inner);
        let mut pages: Vec<(usize, Vec<u64>)> = Vec::new();
        let setting = self.setting.write().unwrap_or_else(PoisonError::into_inner);
        for (page, dirty) in self.dirty.iter().enumerate() {
            if dirty.swap(false, Ordering::AcqRel) {
                let words = self.words().iter().skip(page * WORDS).take(WORDS);
                pages.push((page, words.map(|word| word.load(Ordering::Acquire)).collect()));
            }
        }
        drop(setting);
        let result = sync_data().map_err(Error::io("sync", image)).and_then(|()| {
            let written = pages
                .iter()
                .try_for_each(|(page, words)| durable.write(page + 1, words.iter().copied()));
            let synced = written
                .and_then(|()| if pages.is_empty() { Ok(()) } else { durable.medium.sync() });
            synced.map_err(Error::io("write", &self.path))
        });
        for (page, _) in &pages {
            match &result {
                Ok(()) => durable.written(page + 1),
                Err(_) => self.mark(page * WORDS),
            }
        }
        result
    }

    /// Makes all durable and says that nobody uses the volume any more; the working copy is removed.
    pub fn close(&self, sync_data: impl FnOnce() -> io::Result<()>, image: &Path) -> Result<()> {
        self.sync(sync_data, image)?;
        let mut durable = self.durable.lock().unwrap_or_else(PoisonError::into_inner);
        durable.write_boot(BootId::NONE).map_err(Error::io("write", &self.path))?;
        drop(durable);
        std::fs::remove_file(&self.working_path).map_err(Error::io("remove", &self.working_path))
    }
}

/// Opens a working copy of this boot; `None` if there is none.
fn open_working(path: &Path, identity: &VolumeIdentity, boot: BootId) -> Result<Option<MmapRaw>> {
    let file = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("open", path)(error)),
    };
    let mut header = vec![0; SLOT];
    Medium::read(&file, &mut header, 0).map_err(Error::io("read", path))?;
    // From before a reboot, in a directory that is no tmpfs after all.
    if identity.check(&header, WORKING_MAGIC, path)? != boot {
        return Ok(None);
    }
    map_working(&file, path, identity).map(Some)
}

/// Makes a working copy. It has its name only when it is whole.
fn create_working(
    path: &Path,
    identity: &VolumeIdentity,
    boot: BootId,
    bits: &[u64],
) -> Result<MmapRaw> {
    let new = files::spare_of(path);
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(true).mode(0o600).open(&new);
    let file = file.map_err(Error::io("create", &new))?;
    let len = (SLOT + 8 * identity.words()) as u64;
    // All of it at once: a tmpfs that is full later would answer a set bit with a signal.
    fallocate(&file, FallocateFlags::empty(), 0, len).map_err(Error::io("allocate", &new))?;
    let io = Error::io("write", &new);
    file.write_all_at(&identity.header(WORKING_MAGIC, boot), 0).map_err(io)?;
    let pieces = bits.chunks(WORDS * SLOTS_AT_ONCE).zip(0..);
    for (piece, n) in pieces.filter(|(piece, _)| piece.iter().any(|word| *word != 0)) {
        let bytes: Vec<u8> = piece.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let at = (SLOT + 8 * WORDS * SLOTS_AT_ONCE * n) as u64;
        file.write_all_at(&bytes, at).map_err(Error::io("write", &new))?;
    }
    let map = map_working(&file, &new, identity)?;
    std::fs::rename(&new, path).map_err(Error::io("rename", &new))?;
    Ok(map)
}

fn map_working(file: &File, path: &Path, identity: &VolumeIdentity) -> Result<MmapRaw> {
    let len = SLOT + 8 * identity.words();
    let found = file.metadata().map_err(Error::io("read the size of", path))?.len();
    if found != len as u64 {
        let detail = format!("{len} bytes expected, {found} found");
        return Err(Error::Damaged { path: path.to_owned(), detail });
    }
    MmapRaw::map_raw(file).map_err(Error::io("map", path))
}

#[cfg(test)]
#[path = "presence_tests.rs"]
mod tests;
