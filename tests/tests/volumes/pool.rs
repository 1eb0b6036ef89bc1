//! Pools and volumes: making, attaching, mounting, growing, copying, deleting, and what is refused.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use petra_engine::SnapshotId;
use petra_engine::context::SystemHost;
use petra_tests::loop_device::LoopDevice;
use petra_tests::pool::{TestPool, can_have_pools, hash, loop_devices_below, volume_name};
use petra_tests::volume::noise;
use petra_volume::pool::{Content, CreateRequest, Filesystem, InitRequest, Place};
use petra_volume::{BackendKind, Error, LockedVolume, Pool, Volume};

pub const MIB: u64 = 1 << 20;
pub const BACKENDS: [BackendKind; 2] = [BackendKind::Btrfs, BackendKind::Xfs];

pub fn write(path: &Path, bytes: &[u8]) {
    let mut file = fs::File::create(path).unwrap();
    file.write_all(bytes).unwrap();
    file.sync_all().unwrap();
}

/// A copy of a locked volume that stays.
pub fn copy(locked: &mut LockedVolume) -> SnapshotId {
    let copy = locked.begin_copy().unwrap();
    copy.finish().unwrap();
    locked.keep_copy(copy, |_| {}).unwrap()
}

/// A volume with what a copy of another one holds.
pub fn clone(lab: &TestPool, of: &Volume, copy: SnapshotId, name: &str) -> Volume {
    let state = of.state().unwrap();
    let content = Content::CopyOf(of.copy(copy));
    let request = CreateRequest::new(volume_name(name), state.size_bytes, state.filesystem);
    lab.pool.create(CreateRequest { content, ..request }).unwrap()
}

/// The kernel asks for a right here that root in a container may lack.
fn may_grow_mounted_ext4() -> bool {
    const CAP_SYS_RESOURCE: u64 = 24;
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(line.trim(), 16).unwrap() >> CAP_SYS_RESOURCE & 1 == 1
}

#[test]
fn a_volume_lives() {
    for kind in BACKENDS {
        for filesystem in [Filesystem::Ext4, Filesystem::Xfs, Filesystem::Btrfs] {
            let Some(lab) = TestPool::new(kind) else { return };
            let volume = lab.create("data 1", 320 * MIB, filesystem);
            let at = lab.path("at");
            let mut locked = volume.lock().unwrap();
            let attachment = locked.attach(false).unwrap();
            assert!(attachment.direct_io, "{kind} {filesystem}");
            assert_eq!(locked.attach(false).unwrap(), attachment, "once is enough");
            locked.mount(&at, false).unwrap();
            locked.mount(&at, false).unwrap();
            write(&at.join("file"), b"one");

            let before = volume.stats().unwrap().filesystem_space.unwrap().total_bytes;
            let grown = locked.grow(640 * MIB);
            if filesystem == Filesystem::Ext4 && !may_grow_mounted_ext4() {
                let error = grown.unwrap_err().to_string();
                assert!(error.contains("grows when it is mounted next"), "{error}");
                locked.unmount().unwrap();
                locked.mount(&at, false).unwrap();
            } else {
                grown.unwrap();
            }
            let after = volume.stats().unwrap().filesystem_space.unwrap().total_bytes;
            assert!(after > before + 250 * MIB, "{kind} {filesystem}: {before} {after}");

            rustix::fs::syncfs(fs::File::open(&at).unwrap()).unwrap();
            let taken = copy(&mut locked);
            write(&at.join("file"), b"two");
            let first = hash(&volume.copy_image(taken));
            let second = clone(&lab, &volume, taken, "clone");
            let clone_at = lab.path("clone");
            second.lock().unwrap().mount(&clone_at, false).unwrap();
            assert_eq!(fs::read(clone_at.join("file")).unwrap(), b"one");
            write(&clone_at.join("file"), b"three");
            assert_eq!(fs::read(at.join("file")).unwrap(), b"two");
            assert_eq!(hash(&volume.copy_image(taken)), first, "{kind} {filesystem}");

            let error = lab.pool.volume(volume.name()).unwrap().lock_for(Default::default());
            assert!(matches!(error, Err(Error::Busy { .. })));
            let error = locked.detach().unwrap_err();
            assert!(matches!(error, Error::InUse { .. }), "{error}");
            locked.unmount().unwrap();
            locked.detach().unwrap();
            locked.detach().unwrap();
            // What is not mounted grows when it is.
            locked.grow(700 * MIB).unwrap();
            locked.mount(&at, false).unwrap();
            let grown = volume.stats().unwrap().filesystem_space.unwrap().total_bytes;
            assert!(grown > after + 30 * MIB, "{kind} {filesystem}: {after} {grown}");
            locked.unmount().unwrap();
            locked.detach().unwrap();
            locked.delete_copy(taken).unwrap();
            locked.delete(true).unwrap();

            let names = lab.pool.volumes().unwrap();
            assert_eq!(names.iter().map(|v| v.name().as_str()).collect::<Vec<_>>(), ["clone"]);
            let mut locked = second.lock().unwrap();
            locked.unmount().unwrap();
            locked.detach().unwrap();
            locked.delete(true).unwrap();
            for empty in ["new", "trash", "volumes"] {
                let left = fs::read_dir(lab.pool.root().join(empty)).unwrap().count();
                assert_eq!(left, 0, "{kind} {filesystem}: {empty}");
            }
            assert_eq!(loop_devices_below(lab.pool.root()).len(), 0);
        }
    }
}

fn init(place: Place) -> Result<Pool, Error> {
    Pool::init(&InitRequest::new(place), Arc::new(SystemHost)).map(|made| made.pool)
}

#[test]
fn pools_are_not_made_over_anything() {
    if !can_have_pools() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let said = |result: Result<Pool, Error>| result.unwrap_err().to_string();

    fs::create_dir_all(path("full/some")).unwrap();
    let error = said(init(Place::Directory(path("full"))));
    assert!(error.contains("not empty: it holds some"), "{error}");
    let error = said(init(Place::Directory("/dev/shm/petra-no-pool".into())));
    assert!(!Path::new("/dev/shm/petra-no-pool").exists());
    assert!(error.contains("needs btrfs, or XFS with reflink"), "{error}");
    assert!(error.contains("tmpfs"), "{error}");

    write(&path("there.img"), b"someone's");
    let file =
        |name: &str, size_bytes| Place::File { file: path(name), size_bytes, at: path("at") };
    let error = said(init(file("there.img", 1 << 30)));
    assert!(error.contains("create") && error.contains("exists"), "{error}");
    assert_eq!(fs::read(path("there.img")).unwrap(), b"someone's");
    let error = said(init(file("new.img", 1 << 20)));
    assert!(error.contains("at least"), "{error}");

    for (offset, what) in [(0, "byte 0"), ((1 << 30) - 5, "at byte 1073741819")] {
        let made = LoopDevice::attach(|image| {
            let image = fs::File::create(image).unwrap();
            image.set_len(1 << 30).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&image, b"x", offset).unwrap();
        });
        let Some(device) = made else { return };
        let before = hash(device.path());
        let place = Place::Device { device: device.path().into(), at: path("at") };
        let error = said(init(place));
        assert!(error.contains("in use: it holds data") && error.contains(what), "{error}");
        assert_eq!(hash(device.path()), before);
    }
    let made = LoopDevice::attach(|image| {
        fs::File::create(image).unwrap().set_len(1 << 30).unwrap();
        let done = std::process::Command::new("mkfs.ext4").arg("-q").arg(image).status();
        assert!(done.unwrap().success());
    });
    let Some(device) = made else { return };
    let error = said(init(Place::Device { device: device.path().into(), at: path("at") }));
    assert!(error.contains("it holds ext4"), "{error}");
    assert!(Pool::open(&path("full"), Arc::new(SystemHost)).is_err());
}

#[test]
fn pools_on_a_device_and_in_a_directory() {
    let made = LoopDevice::attach(|image| {
        fs::File::create(image).unwrap().set_len(1 << 30).unwrap();
    });
    let Some(device) = made else { return };
    if !can_have_pools() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    struct Unmounted<'a>(&'a Path);
    impl Drop for Unmounted<'_> {
        fn drop(&mut self) {
            petra_tests::pool::take_apart(self.0);
        }
    }
    let _guard = Unmounted(dir.path());
    let at = dir.path().join("at");
    let pool = init(Place::Device { device: device.path().into(), at: at.clone() }).unwrap();
    assert_eq!(pool.state().backend, BackendKind::Btrfs);
    let again = init(Place::Directory(at.clone())).unwrap_err();
    assert!(matches!(again, Error::Exists { what: "pool", .. }), "{again}");
    let device_again = Place::Device { device: device.path().into(), at: dir.path().join("b") };
    let error = init(device_again).unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error}");

    // A directory of a file system that is mounted already.
    let second = init(Place::Directory(at.join("second"))).unwrap();
    let request = CreateRequest::new(volume_name("v"), MIB, Filesystem::Raw);
    second.create(request).unwrap();
    let mut wrong = InitRequest::new(Place::Directory(at.join("third")));
    wrong.filesystem = Some(BackendKind::Xfs);
    let error = Pool::init(&wrong, Arc::new(SystemHost)).unwrap_err();
    assert!(error.to_string().contains("it is btrfs, and xfs was asked for"), "{error}");
}

#[test]
fn requests_that_make_no_sense() {
    let Some(lab) = TestPool::new(BackendKind::Btrfs) else { return };
    let volume = lab.create("v", 16 * MIB, Filesystem::Ext4);
    let said = |size_bytes, filesystem, sector_bytes| {
        let request = CreateRequest::new(volume_name("w"), size_bytes, filesystem);
        let request = CreateRequest { sector_bytes, ..request };
        lab.pool.create(request).unwrap_err().to_string()
    };
    for (error, expected) in [
        (said(MIB - 4096, Filesystem::Raw, 4096), "at least 1048576 bytes"),
        (said(128 * MIB, Filesystem::Xfs, 4096), "at least 314572800 bytes"),
        (said(MIB + 512, Filesystem::Raw, 4096), "a multiple of 4096"),
        (said(MIB + 1, Filesystem::Raw, 512), "a multiple of 512"),
        (said(MIB, Filesystem::Raw, 1024), "512 or 4096"),
        (said(u64::MAX - 4095, Filesystem::Raw, 4096), "at most"),
    ] {
        assert!(error.contains(expected), "{error}");
    }
    let request = CreateRequest::new(volume_name("v"), 16 * MIB, Filesystem::Raw);
    let error = lab.pool.create(request).unwrap_err();
    assert_eq!(error.to_string(), format!("volume \"v\" exists already in {}", lab.pool));

    let mut locked = volume.lock().unwrap();
    let error = locked.grow(8 * MIB).unwrap_err();
    assert!(error.to_string().contains("volumes don't shrink"), "{error}");
    locked.attach(true).unwrap();
    let error = locked.attach(false).unwrap_err();
    assert!(error.to_string().contains("attached read-only to /dev/loop"), "{error}");
    let error = locked.delete(true).unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error}");
    let mut locked = volume.lock().unwrap();
    locked.mount(&lab.path("at"), true).unwrap();
    assert!(fs::write(lab.path("at/x"), "x").is_err());
    locked.unmount().unwrap();
    locked.detach().unwrap();
    copy(&mut locked);
    let error = locked.delete(true).unwrap_err();
    assert!(error.to_string().contains("1 of its copies"), "{error}");
    volume.lock().unwrap().delete(false).unwrap();
    let error = volume.lock().unwrap_err();
    assert!(matches!(error, Error::Unknown { what: "volume", .. }), "{error}");

    let raw = lab.create("raw", MIB, Filesystem::Raw);
    let error = raw.lock().unwrap().mount(&lab.path("at"), false).unwrap_err();
    assert!(error.to_string().contains("holds no ext4, XFS or btrfs"), "{error}");
    assert!(raw.attachment().unwrap().is_none());
    assert!(lab.pool.volume(&volume_name("rwa")).is_err());

    // Foreign and damaged files harm nobody else.
    write(&lab.pool.root().join("volumes/raw/volume.json"), b"{\"format\": 9}");
    fs::create_dir(lab.pool.root().join("volumes/made by hand")).unwrap();
    let states: Vec<Error> =
        lab.pool.volumes().unwrap().iter().map(|v| v.state().unwrap_err()).collect();
    assert!(matches!(states[0], Error::Damaged { .. }), "{}", states[0]);
    assert!(matches!(states[1], Error::Version { found: 9, .. }), "{}", states[1]);
    lab.create("after", MIB, Filesystem::Raw);
    assert_eq!(lab.reopened().recover().unwrap().problems.len(), 2);
    assert!(lab.pool.root().join("volumes/raw/live/image").exists());
}

#[test]
fn a_full_pool_refuses_new_volumes_before_writes_fail() {
    for kind in BACKENDS {
        let Some(lab) = TestPool::with_size(kind, 512 * MIB) else { return };
        let status = lab.pool.status().unwrap();
        let too_much = status.limit_bytes / MIB * MIB + 2 * MIB;
        let request = CreateRequest::new(volume_name("w"), too_much, Filesystem::Raw);
        let error = lab.pool.create(request).unwrap_err();
        assert!(matches!(error, Error::NoRoom { .. }), "{error}");

        let volume = lab.create("v", 1 << 30, Filesystem::Ext4);
        let at = lab.path("at");
        let mut locked = volume.lock().unwrap();
        let early = copy(&mut locked);
        locked.mount(&at, false).unwrap();
        // Filled up to the reserve.
        let mut file = fs::File::create(at.join("file")).unwrap();
        while lab.pool.check_free().is_ok() {
            file.write_all(&vec![1; 8 << 20]).unwrap();
            file.sync_all().unwrap();
            let root = fs::File::open(lab.pool.root()).unwrap();
            rustix::fs::syncfs(root).unwrap();
        }
        let refused = |error: Error| assert!(matches!(error, Error::NoRoom { .. }), "{error}");
        refused(
            lab.pool
                .create(CreateRequest::new(volume_name("w"), MIB, Filesystem::Raw))
                .unwrap_err(),
        );
        refused(locked.begin_copy().unwrap_err());
        refused(locked.grow(1100 * MIB).unwrap_err());
        // The application goes on in the reserve, and then gets an error that it can see.
        file.write_all(&vec![2; 8 << 20]).unwrap();
        file.sync_all().unwrap();
        let mut failed = None;
        for _ in 0..200 {
            let written = file.write_all(&vec![3; 8 << 20]).and_then(|()| file.sync_all());
            if let Err(error) = written {
                failed = Some(error);
                break;
            }
        }
        let failed = failed.expect("an end of the pool").to_string();
        assert!(failed.contains("space left") || failed.contains("Input/output"), "{failed}");
        drop(file);
        // What was there stays readable, and deletion makes room. A child of another test may have the file for a moment,
        // until it runs its program.
        let mut unmounted = locked.unmount();
        for _ in 0..100 {
            if !matches!(unmounted, Err(Error::InUse { .. })) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
            unmounted = locked.unmount();
        }
        unmounted.unwrap();
        locked.detach().unwrap();
        locked.delete_copy(early).unwrap();
        locked.delete(true).unwrap();
        lab.create("w", MIB, Filesystem::Raw);
    }
}

/// What a copy shares can't be overwritten in place, so that overwrites fill a pool. All that the application was told to
/// be there stays there, and so does the copy.
#[test]
fn overwrites_of_what_a_copy_shares_fill_a_pool() {
    const STEP: usize = 64 << 10;
    for kind in BACKENDS {
        let Some(lab) = TestPool::with_size(kind, 512 * MIB) else { return };
        let volume = lab.create("v", 256 * MIB, Filesystem::Raw);
        let mut locked = volume.lock().unwrap();
        let device = locked.attach(false).unwrap().device;
        let flags = rustix::fs::OFlags::DIRECT.bits().cast_signed();
        let open = || fs::File::options().read(true).write(true).custom_flags(flags).open(&device);
        let file = open().unwrap();
        let mut memory = vec![0; STEP + 4096];
        let from = memory.as_ptr().align_offset(4096);
        let buffer = &mut memory[from..from + STEP];
        let steps = 256 * MIB / STEP as u64;
        for n in 0..steps {
            buffer.copy_from_slice(&noise(n, STEP));
            file.write_all_at(buffer, n * STEP as u64).unwrap();
        }
        let taken = copy(&mut locked);
        let copied = hash(&volume.copy_image(taken));
        let free_bytes = lab.pool.status().unwrap().free_bytes;

        // Scattered, so that extents are shared in part.
        let place = |n: u64| n * 1021 % steps;
        let mut overwritten = 0;
        let failed = loop {
            buffer.copy_from_slice(&noise(1 << 32 | overwritten, STEP));
            match file.write_all_at(buffer, place(overwritten) * STEP as u64) {
                Ok(()) => overwritten += 1,
                Err(error) => break error,
            }
            assert!(overwritten < steps, "{kind}: the pool is not full");
        };
        let text = failed.to_string();
        assert!(text.contains("space left") || text.contains("Input/output"), "{text}");
        let mib = |bytes: u64| bytes / MIB;
        println!(
            "{kind}: {} MiB were overwritten with {} MiB free at first, {} MiB at the end",
            mib(overwritten * STEP as u64),
            mib(free_bytes),
            mib(lab.pool.status().unwrap().free_bytes),
        );
        // One byte takes one byte, and a little for the tree of extents.
        assert!(overwritten * STEP as u64 > free_bytes / 2, "{kind}: {overwritten} steps");

        let check = |buffer: &mut [u8]| {
            let file = open().unwrap();
            let mut expected: Vec<u64> = (0..steps).collect();
            for n in 0..overwritten {
                expected[place(n) as usize] = 1 << 32 | n;
            }
            for at in (0..steps).filter(|at| *at != place(overwritten)) {
                file.read_exact_at(buffer, at * STEP as u64).unwrap();
                let expected = noise(expected[at as usize], STEP);
                assert!(*buffer == expected, "{kind}: other bytes in step {at}");
            }
        };
        check(buffer);
        assert_eq!(hash(&volume.copy_image(taken)), copied, "{kind}");
        // The pool itself needs none of what somebody else has filled to the last block.
        if let Ok(other) = fs::File::create(lab.pool.root().join("other")) {
            let write =
                |at| other.write_all_at(&buffer[..4096], at).and_then(|()| other.sync_all());
            assert!((0..512 * MIB).step_by(4096).any(|at| write(at).is_err()), "{kind}: no end");
        }
        assert!(fs::write(lab.pool.root().join("more"), "some").is_err(), "{kind}");
        // Also when nothing of it is in memory any more.
        drop(file);
        locked.detach().unwrap();
        locked.attach(false).unwrap();
        check(buffer);
        assert_eq!(hash(&volume.copy_image(taken)), copied, "{kind}");
        for n in 0..100 {
            locked.change(|state| state.wanted.patience_seconds = Some(n)).unwrap();
        }
        // The copy goes, and there is room again.
        locked.delete_copy(taken).unwrap();
        lab.pool.check_free().unwrap();
        open().unwrap().write_all_at(buffer, place(overwritten) * STEP as u64).unwrap();
        locked.detach().unwrap();
    }
}

/// Each with a pool of its own opening, as processes have.
#[test]
fn makers_at_the_same_time() {
    let Some(lab) = TestPool::new(BackendKind::Btrfs) else { return };
    let quarter = lab.pool.status().unwrap().limit_bytes / 4 / 4096 * 4096;
    let make = |name: String, size_bytes| {
        let pool = lab.reopened();
        pool.create(CreateRequest::new(volume_name(&name), size_bytes, Filesystem::Raw)).map(drop)
    };
    let all = |make: &(dyn Fn(u64) -> Result<(), Error> + Sync)| -> Vec<Result<(), Error>> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|n| scope.spawn(move || make(n))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    };
    let (made, refused): (Vec<_>, Vec<_>) =
        all(&|_| make("same".to_owned(), MIB)).into_iter().partition(Result::is_ok);
    assert_eq!((made.len(), refused.len()), (1, 7));
    assert!(refused.iter().all(|error| matches!(error, Err(Error::Exists { .. }))), "{refused:?}");
    lab.pool.volume(&volume_name("same")).unwrap().lock().unwrap().delete(true).unwrap();

    let (made, refused): (Vec<_>, Vec<_>) =
        all(&|n| make(format!("v {n}"), quarter)).into_iter().partition(Result::is_ok);
    assert_eq!((made.len(), refused.len()), (4, 4), "no more than may be promised");
    assert!(refused.iter().all(|error| matches!(error, Err(Error::NoRoom { .. }))), "{refused:?}");
    assert_eq!(lab.pool.status().unwrap().volumes, 4);
    assert!(lab.pool.recover().unwrap().done.is_empty());
}
