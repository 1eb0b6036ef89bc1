//! Pools and volumes: making, attaching, mounting, growing, copying, deleting, and what is refused.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use petra_engine::SnapshotId;
use petra_engine::context::SystemHost;
use petra_tests::pool::{TestPool, can_have_pools, hash, loop_devices_below, volume_name};
use petra_volume::pool::{
    BaseState, Content, CreateRequest, Filesystem, InitRequest, Place, Recovered,
};
use petra_volume::{BackendKind, Error, LockedVolume, Pool, Volume};

const MIB: u64 = 1 << 20;
const BACKENDS: [BackendKind; 2] = [BackendKind::Btrfs, BackendKind::Xfs];

fn write(path: &Path, bytes: &[u8]) {
    let mut file = fs::File::create(path).unwrap();
    file.write_all(bytes).unwrap();
    file.sync_all().unwrap();
}

/// A copy of a locked volume that stays.
fn copy(locked: &mut LockedVolume) -> SnapshotId {
    let mut copy = locked.begin_copy().unwrap();
    copy.finish(false).unwrap();
    locked.keep_copy(copy, |_| {}).unwrap()
}

/// A volume with what a copy of another one holds.
fn clone(lab: &TestPool, of: &Volume, copy: SnapshotId, name: &str) -> Volume {
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
            assert_eq!(loop_devices_below(lab.pool.root()), [Path::new(""); 0]);
        }
    }
}
