//! An incremental snapshot of a volume that was written in every way equals a full one.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use petra_engine::Repository;
use petra_engine::restore::{RestoreOptions, restore};
use petra_engine::snapshot::snapshot;
use petra_engine::source::{FileSource, Source};
use petra_engine::store::MemoryStore;
use petra_engine::target::FileTarget;
use petra_tests::lab::{context, init, name, request_of};
use petra_tests::pool::{TestPool, hash};
use petra_tests::require;
use petra_tests::volume::noise;
use petra_volume::copy_source::CopySource;
use petra_volume::extents::{ExtentMap, differing};
use petra_volume::pool::Filesystem;
use petra_volume::snapshot::{read_ahead, take};
use petra_volume::{BackendKind, Volume};
use rustix::fs::{FallocateFlags, OFlags, fallocate};

use super::snapshot::group;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
/// Three segments, the last one short.
const SIZE: u64 = 150 * MIB;
/// Volumes grow up to here.
const MAX_SIZE: u64 = 200 * MIB;
/// Most writes go to places of this length around some centres, so that changes meet.
const NEIGHBOURHOOD: u64 = 512 << 10;

/// How many rounds each test does: PETRA_TEST_ROUNDS, or few.
fn rounds(few: u64) -> u64 {
    std::env::var("PETRA_TEST_ROUNDS").map_or(few, |text| text.parse().unwrap())
}

/// Writes to a volume in every way that there is.
struct Writer {
    random: fastrand::Rng,
    volume: Volume,
    device: PathBuf,
    size: u64,
}

impl Writer {
    /// A place to write to, in blocks or not.
    fn place(&mut self, max_len: u64, in_blocks: bool) -> Range<u64> {
        let centre = self.random.u64(0..6) * (self.size / 6);
        let unit = if in_blocks { BLOCK } else { 1 };
        let start = (centre + self.random.u64(0..NEIGHBOURHOOD)) / unit * unit;
        let len = self.random.u64(1..=max_len / unit) * unit;
        start..(start + len).min(self.size)
    }

    fn bytes(&mut self, len: u64) -> Vec<u8> {
        match self.random.u8(0..4) {
            0 => vec![0; len as usize],
            1 => vec![self.random.u8(..); len as usize],
            _ => noise(self.random.u64(..), len as usize),
        }
    }

    fn open(&self, path: &Path, flags: OFlags) -> File {
        let flags = flags.bits().cast_signed();
        OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).unwrap()
    }

    fn write_buffered(&mut self) {
        let place = self.place(100_000, false);
        let bytes = self.bytes(place.end - place.start);
        let file = self.open(&self.device, OFlags::empty());
        file.write_all_at(&bytes, place.start).unwrap();
        if self.random.bool() {
            file.sync_all().unwrap();
        }
    }

    fn write_direct(&mut self) {
        let file = self.open(&self.device, OFlags::DIRECT);
        for _ in 0..self.random.u64(1..8) {
            let place = self.place(16 * BLOCK, true);
            let bytes = self.bytes(place.end - place.start);
            // Aligned as direct I/O wants it.
            let mut memory = vec![0; bytes.len() + BLOCK as usize];
            let at = memory.as_ptr().align_offset(BLOCK as usize);
            memory[at..at + bytes.len()].copy_from_slice(&bytes);
            file.write_all_at(&memory[at..at + bytes.len()], place.start).unwrap();
        }
    }

    /// What fstrim does through the device, and what zeroing does.
    fn fallocate_device(&mut self, flags: FallocateFlags) {
        let place = self.place(64 * BLOCK, true);
        let file = self.open(&self.device, OFlags::empty());
        fallocate(&file, flags, place.start, place.end - place.start).unwrap();
    }

    /// What someone may do to the image itself.
    fn fallocate_image(&mut self, flags: FallocateFlags) {
        // Nothing may be waiting in the device's cache for the same place.
        self.open(&self.device, OFlags::empty()).sync_all().unwrap();
        let place = self.place(64 * BLOCK, true);
        let file = self.open(&self.volume.image(), OFlags::empty());
        match fallocate(&file, flags, place.start, place.end - place.start) {
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
            Err(error) => panic!("{flags:?}: {error}"),
        }
    }

    fn grow(&mut self) {
        let size = (self.size + self.random.u64(1..3000) * BLOCK).min(MAX_SIZE);
        if size > self.size {
            self.volume.lock().unwrap().grow(size).unwrap();
            self.size = size;
        }
    }

    fn round(&mut self) {
        for _ in 0..self.random.u64(0..5) {
            match self.random.u8(0..20) {
                0..6 => self.write_buffered(),
                6..12 => self.write_direct(),
                12..14 => {
                    self.fallocate_device(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE);
                }
                14 | 15 => self.fallocate_device(FallocateFlags::ZERO_RANGE),
                16 => self.fallocate_image(FallocateFlags::KEEP_SIZE),
                17 => self.fallocate_image(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE),
                18 => self.fallocate_image(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE),
                _ => self.grow(),
            }
        }
    }
}

/// Two repositories: one gets incremental snapshots, the other one reads everything.
struct Repositories {
    incremental: Repository,
    full: Repository,
}

impl Repositories {
    async fn new() -> Self {
        let new = async || init(Arc::new(MemoryStore::new())).await;
        Self { incremental: new().await, full: new().await }
    }
}

/// Takes a snapshot, and compares it with a full one of the same copy. Gives how many bytes had to be looked at, where
/// that is known.
async fn compare(
    lab: &TestPool,
    volume: &Volume,
    to: &Repositories,
    restored: bool,
) -> Option<u64> {
    let base = volume.state().unwrap().base;
    let group = group(&[volume]);
    let ahead = read_ahead(&lab.pool, &group, &to.incremental, &context()).await.unwrap();
    let mut taken = take(&lab.pool, &group).unwrap();
    taken.upload.set_ahead(ahead);
    let copy = volume.copy_image(taken.upload.state().volumes[0].copy);
    let full = FileSource::open(&copy).unwrap();
    let changed = base.filter(|base| base.repository == to.incremental.config().id).map(|base| {
        let source = CopySource::open(&copy).unwrap();
        let path = volume.copy_image(base.copy);
        let source = source.with_base(&path, base.snapshot, base.volume).unwrap();
        let known = std::fs::metadata(volume.copy_image(base.copy)).unwrap().len();
        let changed = source.changed(0..known, base.snapshot).unwrap();
        changed.iter().map(|range| range.end - range.start).sum()
    });
    let record = taken.upload.run(&to.incremental, &context()).await.unwrap();
    let request = request_of("full", vec![(name("full"), Arc::new(full))]);
    let expected = snapshot(&to.full, request, &context()).await.unwrap();
    assert_eq!(record.volumes[0].len_bytes, expected.volumes[0].len_bytes);
    assert_eq!(record.volumes[0].content, expected.volumes[0].content, "content differs");
    assert_eq!(record.volumes[0].data_bytes, expected.volumes[0].data_bytes);
    if restored {
        let path = lab.path("restored");
        let target = FileTarget::create(&path, record.volumes[0].len_bytes).unwrap();
        let options = RestoreOptions::default();
        restore(&to.incremental, &record.volumes[0], target, &options, &context()).await.unwrap();
        assert_eq!(hash(&path), hash(&copy), "restored bytes differ");
        std::fs::remove_file(path).unwrap();
    }
    changed
}

/// Writes, snapshots and compares; sometimes loses its base.
#[expect(clippy::print_stdout, reason = "shown when the test fails")]
async fn torture(lab: &TestPool, seed: u64, rounds: u64) {
    let volume = lab.create("v", SIZE, Filesystem::Raw);
    let device = volume.lock().unwrap().attach(false).unwrap().device;
    let random = fastrand::Rng::with_seed(seed);
    let mut writer = Writer { random, volume: volume.clone(), device, size: SIZE };
    let mut to = Repositories::new().await;
    let mut known = 0;
    for round in 0..rounds {
        println!("seed {seed}, round {round}");
        if round % 50 == 49 {
            // What is stored there is in memory.
            to = Repositories::new().await;
        }
        if writer.random.u8(0..20) == 0
            && let Some(base) = volume.state().unwrap().base
        {
            volume.lock().unwrap().delete_copy(base.copy).unwrap();
        }
        writer.round();
        if let Some(changed) = compare(lab, &volume, &to, round % 10 == 0).await {
            assert!(changed < 32 * MIB, "{changed} bytes are said to have changed");
            known += 1;
        }
    }
    assert!(known > rounds * 2 / 3, "{known} of {rounds} snapshots knew what had changed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_btrfs_it_equals_a_full_one() {
    let Some(lab) = TestPool::new(BackendKind::Btrfs) else { return };
    torture(&lab, fastrand::u64(..), rounds(60)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_xfs_it_equals_a_full_one() {
    let Some(lab) = TestPool::new(BackendKind::Xfs) else { return };
    torture(&lab, fastrand::u64(..), rounds(60)).await;
}

/// Runs a command, and says whether it succeeded.
fn run(command: &[String]) -> bool {
    let mut run = Command::new(&command[0]);
    run.args(&command[1..]).stdout(Stdio::null()).stderr(Stdio::null());
    run.status().unwrap().success()
}

/// Runs commands again and again, until it is dropped.
struct Disturbance {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<Vec<u64>>>,
}

impl Disturbance {
    fn start(commands: Vec<Vec<String>>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            let mut succeeded = vec![0; commands.len()];
            while !stopped.load(Ordering::Relaxed) {
                for (command, count) in commands.iter().zip(&mut succeeded) {
                    *count += u64::from(run(command));
                }
                thread::sleep(Duration::from_millis(10));
            }
            succeeded
        });
        Self { stop, thread: Some(thread) }
    }

    /// How often each command succeeded.
    fn end(mut self) -> Vec<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Disturbance {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic in a drop would hide the first one.
            let _ = thread.join();
        }
    }
}

/// Where the bytes of a file lie.
fn places(path: &Path) -> ExtentMap {
    ExtentMap::read(&File::open(path).unwrap(), 0..SIZE).unwrap()
}

/// What a command moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moves {
    /// Everything, copies too.
    All,
    /// The image that is in use.
    Image,
}

/// Rounds on a small volume while its extents are moved about. What has changed is then known less well, but never wrong.
async fn disturbed(lab: &TestPool, commands: impl FnOnce(&Volume) -> Vec<(Moves, Vec<String>)>) {
    let volume = lab.create("v", SIZE, Filesystem::Raw);
    let device = volume.lock().unwrap().attach(false).unwrap().device;
    let random = fastrand::Rng::with_seed(7);
    let mut writer = Writer { random, volume: volume.clone(), device, size: SIZE };
    let to = Repositories::new().await;
    let commands = commands(&volume);
    let all = commands.iter().map(|(_, command)| command.clone()).collect();
    let disturbance = Disturbance::start(all);
    for round in 0..rounds(20) {
        writer.round();
        compare(lab, &volume, &to, round % 10 == 0).await;
    }
    let succeeded = disturbance.end();
    assert!(succeeded.iter().all(|count| *count > 0), "{succeeded:?} of {commands:?}");

    // Alone, each moves what it should, though not each time: some look first whether it is worth it.
    for (moves, command) in commands {
        let mut moved = false;
        for attempt in 0..20 {
            // Many small pieces: each write after a copy goes to a place of its own.
            let image = OpenOptions::new().write(true).open(volume.image()).unwrap();
            for n in 0..200 {
                image
                    .write_all_at(&noise(attempt << 8 | n, BLOCK as usize), n * 16 * BLOCK)
                    .unwrap();
            }
            image.sync_all().unwrap();
            drop(image);
            compare(lab, &volume, &to, false).await;
            let base = volume.copy_image(volume.state().unwrap().base.unwrap().copy);
            let before = [places(&base), places(&volume.image())];
            assert!(run(&command), "{command:?}");
            let after = [places(&base), places(&volume.image())];
            let [copy_moved, image_moved] = [0, 1].map(|n| before[n] != after[n]);
            assert!(moves == Moves::All || !copy_moved, "{command:?} moved a copy");
            compare(lab, &volume, &to, true).await;
            moved = image_moved && (moves == Moves::Image || copy_moved);
            if moved {
                break;
            }
        }
        assert!(moved, "{command:?} moves nothing");
    }
}

fn words(command: &str, path: &Path) -> Vec<String> {
    let words = command.split(' ').map(str::to_owned);
    words.chain([path.to_str().unwrap().to_owned()]).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_balance_and_a_defragmentation_do_no_harm() {
    let Some(lab) = TestPool::new(BackendKind::Btrfs) else { return };
    let root = lab.pool.root().to_owned();
    disturbed(&lab, |volume| {
        vec![
            (Moves::Image, words("btrfs filesystem defragment -f", &volume.image())),
            (Moves::All, words("btrfs balance start --full-balance", &root)),
        ]
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn xfs_fsr_does_no_harm() {
    if require::tool("xfs_fsr").is_none() {
        return;
    }
    let Some(lab) = TestPool::new(BackendKind::Xfs) else { return };
    disturbed(&lab, |volume| vec![(Moves::Image, words("xfs_fsr -v", &volume.image()))]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_file_system_discards_is_seen() {
    for kind in [BackendKind::Btrfs, BackendKind::Xfs] {
        let Some(lab) = TestPool::new(kind) else { return };
        let volume = lab.create("v", SIZE, Filesystem::Ext4);
        let at = lab.path("at");
        volume.lock().unwrap().mount(&at, false).unwrap();
        let to = Repositories::new().await;
        for round in 0..4 {
            for n in 0..20 {
                std::fs::write(at.join(n.to_string()), noise(round << 8 | n, 1 << 20)).unwrap();
            }
            compare(&lab, &volume, &to, round == 0).await;
            let allocated = volume.stats().unwrap().allocated_bytes;
            for n in (0..20).filter(|n| n % 3 != round % 3) {
                std::fs::remove_file(at.join(n.to_string())).unwrap();
            }
            // Blocks of deleted files are free when the journal says so.
            rustix::fs::syncfs(File::open(&at).unwrap()).unwrap();
            assert!(run(&words("fstrim", &at)));
            let less = allocated - volume.stats().unwrap().allocated_bytes;
            assert!(less > 8 * MIB, "{kind}: {less} bytes are free");
            let changed = compare(&lab, &volume, &to, true).await.unwrap();
            assert!(changed > 8 * MIB, "{kind}: {changed} bytes have changed");
        }
    }
}

/// Of two uploads of one volume that overlap, the first to end deletes the base of the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_base_that_is_deleted_meanwhile_hides_no_change() {
    for kind in [BackendKind::Btrfs, BackendKind::Xfs] {
        let Some(lab) = TestPool::new(kind) else { return };
        let volume = lab.create("v", 8 * MIB, Filesystem::Raw);
        let image = File::options().write(true).open(volume.image()).unwrap();
        image.write_all_at(&noise(1, 8 << 20), 0).unwrap();
        let to = Repositories::new().await;
        compare(&lab, &volume, &to, false).await;
        let base = volume.state().unwrap().base.unwrap();
        let mut first = take(&lab.pool, &group(&[&volume])).unwrap();
        let hole = MIB..2 * MIB;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&image, flags, hole.start, MIB).unwrap();
        let second = take(&lab.pool, &group(&[&volume])).unwrap();
        let copy = volume.copy_image(second.upload.state().volumes[0].copy);
        let path = volume.copy_image(base.copy);
        let source = CopySource::open(&copy).unwrap();
        let source = source.with_base(&path, base.snapshot, base.volume).unwrap();
        let sees_it = |changed: Option<Vec<Range<u64>>>| {
            // None: all is read.
            changed.is_none_or(|ranges| {
                ranges.iter().any(|range| range.start <= hole.start && range.end >= hole.end)
            })
        };
        assert!(sees_it(source.changed(0..8 * MIB, base.snapshot)), "{kind}");
        first.upload.run(&to.incremental, &context()).await.unwrap();
        assert!(!path.exists(), "{kind}");
        assert!(sees_it(source.changed(0..8 * MIB, base.snapshot)), "{kind}");
    }
}

/// The pages of a file that are in memory.
fn cached_pages(path: &Path) -> u64 {
    let answer = Command::new("fincore").args(["-n", "-o", "PAGES"]).arg(path).output().unwrap();
    assert!(answer.status.success());
    String::from_utf8(answer.stdout).unwrap().trim().parse().unwrap()
}

fn read_all(source: &dyn Source) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    let mut at = 0;
    // As the engine reads: not aligned to anything.
    for len in [4096, 300_000, 524_288, 1].into_iter().cycle() {
        let len = (source.len_bytes() - at).min(len);
        if len == 0 {
            return hasher.finalize();
        }
        let mut bytes = vec![0; len as usize];
        source.read_at(&mut bytes, at).unwrap();
        hasher.update(&bytes);
        at += len;
    }
    unreachable!()
}

#[test]
fn reading_a_copy_leaves_the_page_cache_alone() {
    if require::tool("fincore").is_none() {
        return;
    }
    for kind in [BackendKind::Btrfs, BackendKind::Xfs] {
        let Some(lab) = TestPool::new(kind) else { return };
        let volume = lab.create("v", 16 * MIB + BLOCK, Filesystem::Raw);
        let image = OpenOptions::new().write(true).open(volume.image()).unwrap();
        image.write_all_at(&noise(1, 16 << 20), 0).unwrap();
        image.sync_all().unwrap();
        let taken = take(&lab.pool, &group(&[&volume])).unwrap();
        let copy = volume.copy_image(taken.upload.state().volumes[0].copy);
        let sources = [
            CopySource::open(&copy).unwrap(),
            CopySource::open(&copy).unwrap().without_direct().unwrap(),
        ];
        let expected = blake3::hash(&[noise(1, 16 << 20), vec![0; BLOCK as usize]].concat());
        for (source, at_most) in sources.iter().zip([16, 64]) {
            assert_eq!(read_all(source), expected);
            let pages = cached_pages(&copy);
            assert!(pages <= at_most, "{kind}: {pages} pages after {source:?}");
        }
        // And what the test would see otherwise.
        assert_eq!(read_all(&FileSource::open(&copy).unwrap()), expected);
        assert!(cached_pages(&copy) >= 4096, "{kind}");
    }
}

/// Reads a file as [`read_all`] does, with RWF_DONTCACHE. None where that does not work.
fn read_without_caching(path: &Path) -> Option<blake3::Hash> {
    const DONTCACHE: u32 = 0x80;
    let file = File::open(path).unwrap();
    let flags = rustix::io::ReadWriteFlags::from_bits_retain(DONTCACHE);
    let (mut hasher, mut buffer) = (blake3::Hasher::new(), vec![0; 524_288]);
    let mut at = 0;
    loop {
        let into = &mut [std::io::IoSliceMut::new(&mut buffer)];
        match rustix::io::preadv2(&file, into, at, flags) {
            Ok(0) => return Some(hasher.finalize()),
            Ok(found) => {
                hasher.update(&buffer[..found]);
                at += found as u64;
            }
            Err(rustix::io::Errno::OPNOTSUPP) => return None,
            Err(error) => panic!("{error}"),
        }
    }
}

/// An alternative to how copies are read. docs/volumes.md has what this prints.
#[test]
fn reading_with_dontcache() {
    if require::tool("fincore").is_none() {
        return;
    }
    for kind in [BackendKind::Btrfs, BackendKind::Xfs] {
        let Some(lab) = TestPool::new(kind) else { return };
        let volume = lab.create("v", 16 * MIB, Filesystem::Raw);
        std::fs::write(volume.image(), noise(1, 16 << 20)).unwrap();
        File::open(volume.image()).unwrap().sync_all().unwrap();
        let taken = take(&lab.pool, &group(&[&volume])).unwrap();
        let copy = volume.copy_image(taken.upload.state().volumes[0].copy);
        match read_without_caching(&copy) {
            Some(hash) => {
                assert_eq!(hash, blake3::hash(&noise(1, 16 << 20)));
                println!("{kind}: {} of 4096 pages are left", cached_pages(&copy));
            }
            None => println!("{kind}: it is not supported"),
        }
    }
}

/// FIEMAP is the oracle. Files with holes, room that was only allocated, data that is shared, moved, compressed or inline.
#[test]
fn the_tree_of_btrfs_tells_the_same_as_fiemap() {
    let Some(lab) = TestPool::new(BackendKind::Btrfs) else { return };
    let volume = lab.create("v", 64 * MIB, Filesystem::Raw);
    let image = OpenOptions::new().read(true).write(true).open(volume.image()).unwrap();
    let directory = volume.image().parent().unwrap().to_owned();
    let small = directory.join("small");
    std::fs::write(&small, b"a few bytes").unwrap();
    let packed = directory.join("packed");
    File::create(&packed).unwrap();
    assert!(Command::new("chattr").arg("+c").arg(&packed).status().unwrap().success());
    std::fs::write(&packed, vec![7; 3 << 20]).unwrap();
    let mut random = fastrand::Rng::with_seed(7);
    let mut draw = |below: u64| random.u64(0..below);
    let mut copies = vec![];
    for round in 0..12 {
        for _ in 0..60 {
            let (at, len) = (draw(60 << 8) * 4096, (1 + draw(40)) * 4096);
            match draw(8) {
                0 => {
                    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    fallocate(&image, hole, at, len * 16).unwrap();
                }
                1 => fallocate(&image, FallocateFlags::KEEP_SIZE, at, len * 8).unwrap(),
                _ => image.write_all_at(&noise(at, len as usize), at).unwrap(),
            }
        }
        if round % 3 == 0 {
            let taken = take(&lab.pool, &group(&[&volume])).unwrap();
            let copy = volume.copy_image(taken.upload.state().volumes[0].copy);
            copies.push(File::open(copy).unwrap());
        }
        // What is written here has no place yet when it is asked for.
        let files = [File::open(&small).unwrap(), File::open(&packed).unwrap()];
        for file in copies.iter().chain(&files).chain([&image]) {
            for _ in 0..40 {
                let start = draw(66 << 20);
                let range = start..start + 1 + draw(if round % 2 == 0 { 70 << 20 } else { 5000 });
                let tree = ExtentMap::read(file, range.clone()).unwrap();
                let oracle = ExtentMap::from_fiemap(file, range.clone()).unwrap();
                let unknown = differing(&oracle, &oracle);
                assert_eq!(differing(&tree, &oracle), unknown, "{range:?} in round {round}");
                assert_eq!(differing(&tree, &tree), unknown, "{range:?} in round {round}");
            }
        }
    }
    // Else the test would show nothing.
    let whole = |file| ExtentMap::from_fiemap(file, 0..64 * MIB).unwrap();
    assert!(!differing(&whole(&copies[0]), &whole(&image)).is_empty());
    let packed = whole(&File::open(&packed).unwrap());
    assert_eq!(differing(&packed, &packed), std::slice::from_ref(&(0..3 * MIB)));
}

#[test]
fn what_a_map_tells_on_each_file_system() {
    for kind in [BackendKind::Btrfs, BackendKind::Xfs] {
        let Some(lab) = TestPool::new(kind) else { return };
        let volume = lab.create("v", 64 * MIB, Filesystem::Raw);
        let image = OpenOptions::new().read(true).write(true).open(volume.image()).unwrap();
        image.write_all_at(&noise(1, 8 << 20), 0).unwrap();
        fallocate(&image, FallocateFlags::KEEP_SIZE, 32 * MIB, MIB).unwrap();
        let copy = || {
            let taken = take(&lab.pool, &group(&[&volume])).unwrap();
            File::open(volume.copy_image(taken.upload.state().volumes[0].copy)).unwrap()
        };
        let difference = |a: &File, b: &File| {
            let map = |file| ExtentMap::read(file, 0..64 * MIB).unwrap();
            differing(&map(a), &map(b))
        };
        let first = copy();
        assert_eq!(difference(&first, &copy()), [], "{kind}: nothing was written");
        image.write_all_at(&noise(2, 4096), MIB).unwrap();
        image.write_all_at(&noise(3, 4096), 32 * MIB + 8192).unwrap();
        let second = copy();
        let expected = [MIB..MIB + 4096, 32 * MIB + 8192..32 * MIB + 12288];
        assert_eq!(
            difference(&first, &second),
            expected,
            "{kind}: in data, and in unwritten space"
        );
        fallocate(&image, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, MIB).unwrap();
        let expected = std::slice::from_ref(&(0..MIB));
        assert_eq!(difference(&second, &copy()), expected, "{kind}: a hole");
    }
}
