//! What a crash leaves, and what recovery makes of it.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use petra_engine::SnapshotId;
use petra_tests::pool::{TestPool, loop_devices_below};
use petra_volume::pool::{Filesystem, Recovered};
use petra_volume::{Error, Pool};

use super::pool::{BACKENDS, MIB, copy, write};

/// What recovery says that it did, in short.
fn recover(pool: &Pool) -> Vec<&'static str> {
    let recovery = pool.recover().unwrap();
    assert!(recovery.problems.is_empty(), "{:?}", recovery.problems);
    let mut did: Vec<&str> = recovery
        .done
        .iter()
        .map(|done| match done {
            Recovered::Deleted { .. } => "deleted",
            Recovered::DeletedCopy { .. } => "deleted copy",
            Recovered::ForgotCopy { .. } => "forgot copy",
            Recovered::Detached { .. } => "detached",
            Recovered::Thawed { .. } => "thawed",
        })
        .collect();
    did.sort_unstable();
    did
}

fn left(pool: &Pool, directory: &str) -> usize {
    fs::read_dir(pool.root().join(directory)).unwrap().count()
}

#[test]
fn what_was_half_made_or_deleted_goes() {
    for kind in BACKENDS {
        let Some(lab) = TestPool::new(kind) else { return };
        let (pool, backend) = (&lab.pool, lab.pool.backend());
        assert_eq!(recover(pool), [""; 0]);
        let volume = lab.create("v", 16 * MIB, Filesystem::Ext4);

        // A volume in the making, one that has got no further than a directory, and one that is being deleted.
        for directory in ["new/1", "new/2", "trash/1"] {
            fs::create_dir(pool.root().join(directory)).unwrap();
        }
        let whole = pool.root().join("trash/1");
        backend.create(&pool.root().join("new/1/live"), MIB).unwrap();
        backend.create(&whole.join("live"), MIB).unwrap();
        fs::create_dir(whole.join("copies")).unwrap();
        let pending = backend.begin_copy(&whole.join("live"), &whole.join("copies/1")).unwrap();
        pending.finish().unwrap();
        pending.publish().unwrap();
        // Copies that nobody noted, whole and half, and a noted one that is gone.
        let copies = volume.directory().join("copies");
        let pending = backend.begin_copy(&volume.live(), &copies.join("whole")).unwrap();
        pending.finish().unwrap();
        pending.publish().unwrap();
        fs::create_dir(copies.join("half")).unwrap();
        write(&copies.join("half/image.partial"), b"some");
        let mut locked = volume.lock().unwrap();
        let kept = copy(&mut locked);
        let gone = SnapshotId::from_parts(1, 1);
        locked.change(|state| state.copies.extend([gone])).unwrap();

        assert_eq!(recover(pool), ["deleted"; 3], "a volume that is locked is left alone");
        drop(locked);
        assert_eq!(recover(pool), ["deleted copy", "deleted copy", "forgot copy"]);
        assert_eq!(recover(pool), [""; 0]);
        assert_eq!((left(pool, "new"), left(pool, "trash")), (0, 0));
        assert_eq!(volume.state().unwrap().copies, [kept].into());
        assert!(volume.copy_image(kept).exists());
    }
}

#[test]
fn a_maker_at_work_is_left_alone() {
    let Some(lab) = TestPool::new(petra_volume::BackendKind::Btrfs) else { return };
    let draft = lab.pool.root().join("new/1");
    fs::create_dir(&draft).unwrap();
    let maker = fs::File::open(&draft).unwrap();
    rustix::fs::flock(&maker, rustix::fs::FlockOperation::LockExclusive).unwrap();
    assert_eq!(recover(&lab.pool), [""; 0]);
    assert!(draft.exists());
    drop(maker);
    assert_eq!(recover(&lab.pool), ["deleted"]);
}

#[test]
fn devices_that_nobody_wants_are_detached() {
    for kind in BACKENDS {
        let Some(lab) = TestPool::new(kind) else { return };
        let volume = lab.create("v", 16 * MIB, Filesystem::Ext4);
        let mut locked = volume.lock().unwrap();
        locked.mount(&lab.path("at"), false).unwrap();
        drop(locked);
        assert_eq!(recover(&lab.pool), [""; 0], "it is wanted");
        let mut locked = volume.lock().unwrap();
        locked.change(|state| state.wanted = Default::default()).unwrap();
        drop(locked);
        assert_eq!(recover(&lab.pool), [""; 0], "someone has it mounted");
        let mut locked = volume.lock().unwrap();
        locked.unmount().unwrap();
        drop(locked);
        assert_eq!(recover(&lab.pool), ["detached"]);
        assert_eq!(volume.attachment().unwrap(), None);

        // A crash between the device and its volume's end.
        volume.lock().unwrap().attach(false).unwrap();
        fs::rename(volume.directory(), lab.pool.root().join("trash/1")).unwrap();
        assert_eq!(recover(&lab.pool), ["deleted", "detached"]);
        assert!(loop_devices_below(lab.pool.root()).is_empty());
    }
}

#[test]
fn what_was_left_frozen_is_thawed() {
    let Some(lab) = TestPool::new(petra_volume::BackendKind::Btrfs) else { return };
    for filesystem in [Filesystem::Ext4, Filesystem::Xfs, Filesystem::Btrfs] {
        let volume = lab.create(filesystem.as_str(), 320 * MIB, filesystem);
        let at = lab.path(filesystem.as_str());
        let mut locked = volume.lock().unwrap();
        locked.mount(&at, false).unwrap();
        let done = Command::new("fsfreeze").arg("--freeze").arg(&at).status().unwrap();
        assert!(done.success());
        assert_eq!(recover(&lab.pool), [""; 0], "who froze it has the lock");
        drop(locked);
        assert_eq!(recover(&lab.pool), ["thawed"]);
        write(&at.join("file"), b"it goes on");
    }
}

#[test]
fn growth_goes_on_after_a_crash() {
    for filesystem in [Filesystem::Raw, Filesystem::Ext4] {
        let Some(lab) = TestPool::new(petra_volume::BackendKind::Btrfs) else { return };
        let volume = lab.create("v", 16 * MIB, filesystem);
        let mut locked = volume.lock().unwrap();
        let grown = |state: &mut petra_volume::pool::VolumeState| {
            state.size_bytes = 32 * MIB;
            state.grow_filesystem = true;
        };
        locked.change(grown).unwrap();
        locked.attach(false).unwrap();
        assert_eq!(fs::metadata(volume.image()).unwrap().len(), 32 * MIB);
        if filesystem == Filesystem::Ext4 {
            locked.mount(&lab.path("at"), false).unwrap();
            let space = volume.stats().unwrap().filesystem_space.unwrap();
            assert!(space.total_bytes > 20 * MIB, "{space:?}");
        }
        assert!(!locked.state().grow_filesystem);
        // An image that is not what its volume says is not used.
        locked.unmount().unwrap();
        locked.detach().unwrap();
        fs::File::options().write(true).open(volume.image()).unwrap().set_len(MIB).unwrap();
        let error = locked.attach(false).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{error}");
        assert!(loop_devices_below(lab.pool.root()).is_empty());
    }
}

#[test]
fn growth_goes_on_after_a_crash_while_it_is_mounted() {
    // A mounted ext4 needs more privileges than a test may have.
    for filesystem in [Filesystem::Xfs, Filesystem::Btrfs] {
        let Some(lab) = TestPool::new(petra_volume::BackendKind::Xfs) else { return };
        let volume = lab.create("v", 320 * MIB, filesystem);
        let mut locked = volume.lock().unwrap();
        locked.mount(&lab.path("at"), false).unwrap();
        let grown = |state: &mut petra_volume::pool::VolumeState| {
            state.size_bytes = 512 * MIB;
            state.grow_filesystem = true;
        };
        locked.change(grown).unwrap();
        // As after the crash of a driver: the pod is still there, and another one starts.
        locked.mount(&lab.path("at"), false).unwrap();
        let space = volume.stats().unwrap().filesystem_space.unwrap();
        assert!(space.total_bytes > 400 * MIB, "{filesystem}: {space:?}");
        assert!(!locked.state().grow_filesystem);
        locked.unmount().unwrap();
        locked.detach().unwrap();
    }
}

/// kill -9 in the midst of everything: after recovery there are whole volumes and no rubbish.
#[test]
fn a_process_that_is_killed() {
    for kind in BACKENDS {
        let Some(lab) = TestPool::new(kind) else { return };
        let mut random = fastrand::Rng::with_seed(4);
        for round in 0..12 {
            let mut child = Command::new(env!("CARGO_BIN_EXE_petra-test-child"))
                .arg("volumes")
                .arg(lab.pool.root())
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            std::thread::sleep(Duration::from_millis(random.u64(20..500)));
            assert_eq!(child.try_wait().unwrap(), None, "it works until it is killed");
            child.kill().unwrap();
            child.wait().unwrap();
            recover(&lab.pool);
            assert_eq!(recover(&lab.pool), [""; 0], "{kind}, round {round}");
            assert_eq!((left(&lab.pool, "new"), left(&lab.pool, "trash")), (0, 0));
            for volume in lab.pool.volumes().unwrap() {
                let state = volume.state().unwrap();
                let image = fs::metadata(volume.image()).unwrap();
                assert_eq!(image.len(), state.size_bytes);
                let copies = left(&lab.pool, &format!("volumes/{}/copies", volume.name()));
                assert_eq!(copies, state.copies.len());
                let mut locked = volume.lock().unwrap();
                locked.detach().unwrap();
                // Clones hold what was copied; the others may have been killed before they were written.
                if volume.name().as_str().starts_with('b') {
                    let bytes = fs::read(volume.image()).unwrap();
                    assert!(bytes[..1 << 20].iter().all(|byte| *byte == 7), "{kind} {round}");
                }
                locked.delete(false).unwrap();
            }
            assert!(loop_devices_below(lab.pool.root()).is_empty());
        }
    }
}
