//! Doubts about copies by reference, settled by trying: a copy never changes, and is one point in time, with direct
//! writes in flight, with and without a freeze.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use petra_tests::lazy::wait_until;
use petra_tests::pool::{TestPool, hash};
use petra_volume::BackendKind;
use petra_volume::pool::Filesystem;
use rustix::fs::{FallocateFlags, OFlags};

use super::pool::{BACKENDS, MIB, copy, write};

const BLOCK: usize = 4096;

/// Memory that direct I/O takes.
#[repr(align(4096))]
struct Block([u8; BLOCK]);

fn open_direct(path: &Path) -> File {
    let flags = OFlags::DIRECT.bits().cast_signed();
    File::options().read(true).write(true).custom_flags(flags).open(path).unwrap()
}

fn block_of(number: u64) -> Block {
    let mut block = Block([number as u8; BLOCK]);
    block.0[..8].copy_from_slice(&number.to_le_bytes());
    block
}

/// The number in each block.
fn numbers(image: &Path) -> Vec<u64> {
    let bytes = fs::read(image).unwrap();
    let first = |block: &[u8]| u64::from_le_bytes(block[..8].try_into().unwrap());
    bytes.chunks(BLOCK).map(first).collect()
}

/// The hash of what is on the disk: the page cache is not asked.
fn hash_on_disk(path: &Path) -> blake3::Hash {
    let direct = OFlags::DIRECT.bits().cast_signed();
    let image = File::options().read(true).custom_flags(direct).open(path).unwrap();
    let mut hasher = blake3::Hasher::new();
    let mut memory = vec![0; MIB as usize + BLOCK];
    let from = memory.as_ptr().align_offset(BLOCK);
    let buffer = &mut memory[from..from + MIB as usize];
    for at in 0..image.metadata().unwrap().len() / MIB {
        image.read_exact_at(buffer, at * MIB).unwrap();
        hasher.update(buffer);
    }
    hasher.finalize()
}

/// Sets a flag when it is dropped, also by a panic.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A single writer numbers its writes, one after the other, and flushes now and then. What was flushed before the copy
/// was begun is in it. On XFS a copy holds a prefix of the writes: with each, all before it. On btrfs, where the kernel
/// notes writes to new places in any order, with each write all that was flushed before it, as on a disk that loses power.
#[test]
fn a_copy_is_one_point_in_time() {
    const BLOCKS: u64 = 2500;
    const FLUSH: u64 = 16;
    for kind in BACKENDS {
        let Some(lab) = TestPool::new(kind) else { return };
        // Several pieces, over which the blocks are spread.
        let volume = lab.create("v", 64 * MIB, Filesystem::Raw);
        let spread = 64 * MIB / BLOCK as u64 / BLOCKS;
        // Neighbours in time are far apart in the image.
        let at = |number: u64| number * 7919 % BLOCKS * spread;
        let mut locked = volume.lock().unwrap();
        let device = locked.attach(false).unwrap().device;
        let stop = AtomicBool::new(false);
        let (written, flushed) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let device = open_direct(&device);
                for number in 1.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    device.write_all_at(&block_of(number).0, at(number) * BLOCK as u64).unwrap();
                    written.store(number, Ordering::Relaxed);
                    if number % FLUSH == 0 {
                        device.sync_data().unwrap();
                        flushed.store(number, Ordering::Relaxed);
                    }
                }
            });
            let _stop = Stop(&stop);
            for round in 0..12 {
                std::thread::sleep(Duration::from_millis(30));
                let before = (written.load(Ordering::Relaxed), flushed.load(Ordering::Relaxed));
                let taken = copy(&mut locked);
                let after = written.load(Ordering::Relaxed) + 1;
                let found = numbers(&volume.copy_image(taken));
                let last = *found.iter().max().unwrap();
                let (least, whole) = match kind {
                    BackendKind::Xfs => (before.0, last),
                    BackendKind::Btrfs => {
                        (before.1, before.1.max(last.saturating_sub(1) / FLUSH * FLUSH))
                    }
                };
                assert!(
                    (least..=after).contains(&last),
                    "{kind}, {round}: {before:?} {last} {after}"
                );
                for n in (whole.saturating_sub(BLOCKS) + 1..=whole).filter(|n| *n > 0) {
                    let there = found[at(n) as usize];
                    // Or what was written to the same place since.
                    assert!(
                        there == n || (there == n + BLOCKS && there > whole),
                        "{kind}, round {round}: {last} is there, and {there} instead of {n}"
                    );
                }
                locked.delete_copy(taken).unwrap();
            }
        });
        locked.detach().unwrap();
    }
}

/// Many writers, and writes in flight at every moment.
#[test]
fn a_copy_never_changes() {
    for kind in BACKENDS {
        let Some(lab) = TestPool::new(kind) else { return };
        let volume = lab.create("v", 64 * MIB, Filesystem::Raw);
        let mut locked = volume.lock().unwrap();
        let device = locked.attach(false).unwrap().device;
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for seed in 0..4 {
                let (device, stop) = (&device, &stop);
                scope.spawn(move || {
                    let mut random = fastrand::Rng::with_seed(seed);
                    let device = open_direct(device);
                    while !stop.load(Ordering::Relaxed) {
                        let at = random.u64(..64 * MIB / BLOCK as u64) * BLOCK as u64;
                        device.write_all_at(&block_of(random.u64(..)).0, at).unwrap();
                    }
                });
            }
            let _stop = Stop(&stop);
            let mut taken = vec![];
            for _ in 0..6 {
                std::thread::sleep(Duration::from_millis(20));
                let id = copy(&mut locked);
                taken.push((id, hash(&volume.copy_image(id))));
            }
            std::thread::sleep(Duration::from_millis(300));
            for (id, first) in &taken {
                assert_eq!(hash(&volume.copy_image(*id)), *first, "{kind}");
            }
            rustix::fs::syncfs(File::open(lab.pool.root()).unwrap()).unwrap();
            for (id, first) in taken {
                assert_eq!(hash_on_disk(&volume.copy_image(id)), first, "{kind}");
                assert!(File::options().write(true).open(volume.copy_image(id)).is_err(), "{kind}");
            }
        });
        locked.detach().unwrap();
    }
}

/// Writers with direct I/O that a freeze stops in the midst of what they do, and that go on when it ends.
#[test]
fn a_copy_under_a_freeze_never_changes() {
    const FILE_BYTES: u64 = 16 * MIB;
    for kind in BACKENDS {
        let Some(lab) = TestPool::new(kind) else { return };
        for (filesystem, size_bytes) in [(Filesystem::Ext4, 48 * MIB), (Filesystem::Xfs, 300 * MIB)]
        {
            let volume = lab.create(filesystem.as_str(), size_bytes, filesystem);
            let at = lab.path(filesystem.as_str());
            let mut locked = volume.lock().unwrap();
            locked.mount(&at, false).unwrap();
            write(&at.join("file"), &vec![1; FILE_BYTES as usize]);
            let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
            std::thread::scope(|scope| {
                for seed in 0..4 {
                    let (at, stop, written) = (&at, &stop, &written);
                    scope.spawn(move || {
                        let mut random = fastrand::Rng::with_seed(seed);
                        let file = open_direct(&at.join("file"));
                        while !stop.load(Ordering::Relaxed) {
                            let block = random.u64(..FILE_BYTES / BLOCK as u64);
                            let bytes = block_of(random.u64(..));
                            file.write_all_at(&bytes.0, block * BLOCK as u64).unwrap();
                            written.fetch_add(1, Ordering::Relaxed);
                        }
                    });
                }
                let _stop = Stop(&stop);
                let freeze = |how: &str| {
                    let mut freeze = std::process::Command::new("fsfreeze");
                    assert!(freeze.arg(how).arg(&at).status().unwrap().success());
                };
                let wait_for_writes = || {
                    let before = written.load(Ordering::Relaxed);
                    wait_until("writes", || written.load(Ordering::Relaxed) > before + 40);
                };
                let mut taken = vec![];
                for _ in 0..4 {
                    wait_for_writes();
                    let pending = locked.begin_copy().unwrap();
                    wait_for_writes();
                    freeze("--freeze");
                    let frozen = written.load(Ordering::Relaxed);
                    let finished = pending.finish();
                    // One for each writer may have ended before the freeze, and be counted after it.
                    let during = written.load(Ordering::Relaxed) - frozen;
                    freeze("--unfreeze");
                    finished.unwrap();
                    assert!(during <= 4, "{during} writes in a freeze");
                    let id = locked.keep_copy(pending, |_| {}).unwrap();
                    let first = hash_on_disk(&volume.copy_image(id));
                    taken.push((id, first));
                    wait_for_writes();
                    assert_eq!(hash(&volume.copy_image(id)), first, "{kind} {filesystem}");
                }
                wait_for_writes();
                rustix::fs::syncfs(File::open(lab.pool.root()).unwrap()).unwrap();
                for (id, first) in &taken {
                    let image = volume.copy_image(*id);
                    assert_eq!(hash_on_disk(&image), *first, "{kind} {filesystem}");
                    assert_eq!(hash(&image), *first, "{kind} {filesystem}");
                }
                let differ = taken.windows(2).all(|pair| pair[0].1 != pair[1].1);
                assert!(differ, "they are of different moments");
            });
        }
    }
}

/// The quick end of a copy under a freeze finds everything that was written before it.
#[test]
fn a_copy_under_a_freeze_is_the_image() {
    for kind in BACKENDS {
        let Some(lab) = TestPool::new(kind) else { return };
        let volume = lab.create("v", 48 * MIB, Filesystem::Raw);
        let mut locked = volume.lock().unwrap();
        // Holds its lock for each operation; who has it has frozen the image.
        let gate = Mutex::new(());
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut random = fastrand::Rng::with_seed(7);
                let direct = open_direct(&volume.image());
                let cached = File::options().write(true).open(volume.image()).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    let _gate: MutexGuard<'_, ()> = gate.lock().unwrap();
                    let at = random.u64(..48 * MIB / BLOCK as u64) * BLOCK as u64;
                    let len = (random.u64(1..64) * BLOCK as u64).min(48 * MIB - at);
                    let zero = |flags| rustix::fs::fallocate(&direct, flags, at, len).unwrap();
                    match random.u32(..20) {
                        0 => zero(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE),
                        1 => zero(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE),
                        2 => zero(FallocateFlags::KEEP_SIZE),
                        3 => cached.write_all_at(&block_of(random.u64(..)).0, at).unwrap(),
                        _ => direct.write_all_at(&block_of(random.u64(..)).0, at).unwrap(),
                    }
                }
            });
            let _stop = Stop(&stop);
            let mut before = None;
            for round in 0..25 {
                std::thread::sleep(Duration::from_millis(5));
                let pending = locked.begin_copy().unwrap();
                std::thread::sleep(Duration::from_millis(5));
                let frozen = gate.lock().unwrap();
                pending.finish().unwrap();
                let image = hash(&volume.image());
                drop(frozen);
                let taken = locked.keep_copy(pending, |_| {}).unwrap();
                assert_eq!(hash(&volume.copy_image(taken)), image, "{kind}, round {round}");
                // Every other copy has one beside it, so that more is shared.
                if let Some(before) = before.take() {
                    locked.delete_copy(before).unwrap();
                    locked.delete_copy(taken).unwrap();
                } else {
                    before = Some(taken);
                }
            }
        });
    }
}

/// A copy that was begun and given up leaves nothing.
#[test]
fn a_copy_that_is_given_up() {
    for kind in BACKENDS {
        let Some(lab) = TestPool::new(kind) else { return };
        let volume = lab.create("v", 16 * MIB, Filesystem::Ext4);
        let locked = volume.lock().unwrap();
        drop(locked.begin_copy().unwrap());
        let finished = locked.begin_copy().unwrap();
        finished.finish().unwrap();
        drop(finished);
        let left = fs::read_dir(volume.directory().join("copies")).unwrap().count();
        assert_eq!(left, 0, "{kind}");
    }
}

/// Whoever takes a snapshot after a deletion can wait until the kernel is done with it. XFS is done when the call returns;
/// the cleaner of btrfs is kept waiting here by a file that is open.
#[test]
fn deletions_are_waited_for() {
    let short = Duration::from_millis(300);
    for kind in BACKENDS {
        let Some(lab) = TestPool::new(kind) else { return };
        let volume = lab.create("v", 16 * MIB, Filesystem::Raw);
        let mut locked = volume.lock().unwrap();
        let live = File::options().write(true).open(volume.live().join("image")).unwrap();
        live.write_all_at(&[1; MIB as usize], 8 * MIB).unwrap();
        live.sync_all().unwrap();
        let id = copy(&mut locked);
        let held = File::open(volume.copy_image(id)).unwrap();
        assert!(held.metadata().unwrap().blocks() > 0, "{kind}");
        locked.delete_copy(id).unwrap();

        let pool = &lab.pool;
        let settle = |limit| {
            let begun = Instant::now();
            pool.backend().settle(pool.root(), limit).unwrap();
            begun.elapsed() >= limit
        };
        let is_btrfs = kind == BackendKind::Btrfs;
        assert_eq!(settle(short), is_btrfs, "{kind}");
        assert_eq!(held.metadata().unwrap().blocks() > 0, is_btrfs, "{kind}");
        drop(held);
        pool.backend().reclaim(pool.root()).unwrap();
        assert!(!settle(Duration::from_secs(60)), "{kind}");
    }
}

/// Real applications: an ext4 that is written to, a copy under fsfreeze, a clone that mounts without a journal to replay.
#[test]
fn a_frozen_file_system_is_copied_whole() {
    for kind in BACKENDS {
        let Some(lab) = TestPool::new(kind) else { return };
        for filesystem in [Filesystem::Ext4, Filesystem::Xfs] {
            let volume = lab.create(filesystem.as_str(), 320 * MIB, filesystem);
            let at = lab.path(filesystem.as_str());
            let mut locked = volume.lock().unwrap();
            locked.mount(&at, false).unwrap();
            let stop = AtomicBool::new(false);
            let id = std::thread::scope(|scope| {
                scope.spawn(|| {
                    for n in 0.. {
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                        write(&at.join(format!("file {}", n % 20)), &vec![n as u8; 100_000]);
                    }
                });
                let _stop = Stop(&stop);
                std::thread::sleep(Duration::from_millis(200));
                let pending = locked.begin_copy().unwrap();
                let freeze = |how: &str| {
                    let mut freeze = std::process::Command::new("fsfreeze");
                    assert!(freeze.arg(how).arg(&at).status().unwrap().success());
                };
                freeze("--freeze");
                pending.finish().unwrap();
                freeze("--unfreeze");
                locked.keep_copy(pending, |_| {}).unwrap()
            });
            let first = hash(&volume.copy_image(id));
            let name = format!("clone of {filesystem}");
            let clone = super::pool::clone(&lab, &volume, id, &name);
            let mut clone = clone.lock().unwrap();
            // A device that is read-only can't replay a journal.
            clone.mount(&lab.path(&name), true).unwrap();
            let files = fs::read_dir(lab.path(&name)).unwrap().flatten();
            let files: Vec<_> = files.filter(|file| file.path().is_file()).collect();
            assert!(!files.is_empty());
            for file in files {
                let bytes = fs::read(file.path()).unwrap();
                assert!(bytes.windows(2).all(|pair| pair[0] == pair[1]), "{kind} {filesystem}");
            }
            assert_eq!(hash(&volume.copy_image(id)), first);
        }
    }
}

/// What can't be copied by reference is refused when the pool is made, and not by the first snapshot.
#[test]
fn an_xfs_without_reflink_is_no_pool() {
    if !petra_tests::pool::can_have_pools() {
        return;
    }
    let made = petra_tests::loop_device::LoopDevice::attach(|image| {
        File::create(image).unwrap().set_len(512 << 20).unwrap();
        let mut mkfs = std::process::Command::new("mkfs.xfs");
        mkfs.args(["-q", "-m", "reflink=0,rmapbt=0"]).arg(image);
        assert!(mkfs.status().unwrap().success());
    });
    let Some(device) = made else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut mount = std::process::Command::new("mount");
    assert!(mount.arg(device.path()).arg(dir.path()).status().unwrap().success());
    let place = petra_volume::pool::Place::Directory(dir.path().join("pool"));
    let request = petra_volume::pool::InitRequest::new(place);
    let host = std::sync::Arc::new(petra_engine::context::SystemHost);
    let result = petra_volume::Pool::init(&request, host);
    let left = dir.path().join("pool").exists();
    petra_tests::pool::take_apart(dir.path());
    let error = result.unwrap_err().to_string();
    assert!(error.contains("a trial failed"), "{error}");
    assert!(!left);
}
