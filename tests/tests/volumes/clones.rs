//! Volumes made from snapshots and from volumes that are in use, at other sizes too.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use petra_engine::record::SnapshotRecord;
use petra_engine::restore::{RestoreOptions, restore};
use petra_engine::store::MemoryStore;
use petra_engine::target::FileTarget;
use petra_engine::{ErrorKind, Name};
use petra_tests::lab::{context, init};
use petra_tests::pool::{TestPool, hash, volume_name};
use petra_tests::volume::noise;
use petra_volume::clones::{self, CloneRequest, CopyRequest, How};
use petra_volume::freeze::GuardCommand;
use petra_volume::pool::Filesystem;
use petra_volume::snapshot::{GroupRequest, take};
use petra_volume::{BackendKind, Error, Volume};

use super::snapshot::group;

const MIB: u64 = 1 << 20;

fn request(name: &str, source: &Volume) -> CopyRequest {
    CopyRequest {
        name: volume_name(name),
        source: source.name().clone(),
        size_bytes: None,
        metadata: BTreeMap::from([("key".to_owned(), name.to_owned())]),
        guard: GuardCommand::new(env!("CARGO_BIN_EXE_petra-test-freezer"), ["guard"]),
        limit: Duration::from_secs(60),
    }
}

fn copies(volume: &Volume) -> usize {
    fs::read_dir(volume.directory().join("copies")).map_or(0, Iterator::count)
}

#[test]
fn a_copy_of_a_volume_in_use_is_one_point_in_time() {
    for kind in [BackendKind::Btrfs, BackendKind::Xfs] {
        let Some(lab) = TestPool::new(kind) else { return };
        let source = lab.create("source", 320 * MIB, Filesystem::Ext4);
        let at = lab.path("at");
        source.lock().unwrap().mount(&at, false).unwrap();
        fs::write(at.join("kept"), noise(1, 3_000_000)).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                // Second after first: a copy never has more of the second.
                for n in 0_u64.. {
                    for name in ["first", "second"] {
                        fs::write(at.join("new"), n.to_string()).unwrap();
                        fs::File::open(at.join("new")).unwrap().sync_all().unwrap();
                        fs::rename(at.join("new"), at.join(name)).unwrap();
                    }
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                }
            });
            std::thread::sleep(Duration::from_millis(300));
            for n in 0..3 {
                let name = format!("copy {n}");
                let copy = clones::copy(&lab.pool, &request(&name, &source)).unwrap();
                let state = copy.state().unwrap();
                assert_eq!((state.size_bytes, state.filesystem), (320 * MIB, Filesystem::Ext4));
                assert_eq!(state.metadata["key"], name);
                let there = lab.path(&name);
                copy.lock().unwrap().mount(&there, false).unwrap();
                assert!(fs::read(there.join("kept")).unwrap() == noise(1, 3_000_000));
                let read = |file: &str| -> u64 {
                    fs::read_to_string(there.join(file)).unwrap().parse().unwrap()
                };
                let (first, second) = (read("first"), read("second"));
                assert!(first == second || first == second + 1, "{first} {second}");
            }
            stop.store(true, Ordering::Relaxed);
            writer.join().unwrap();
        });
        assert_eq!(copies(&source), 0);
        assert_eq!(lab.pool.recover().unwrap().done, []);
        let taken = clones::copy(&lab.pool, &request("copy 1", &source)).unwrap_err();
        assert!(matches!(taken, Error::Exists { .. }), "{taken}");
    }
}

#[test]
fn a_copy_of_a_volume_may_be_larger_but_not_smaller() {
    for kind in [BackendKind::Btrfs, BackendKind::Xfs] {
        let Some(lab) = TestPool::new(kind) else { return };
        let source = lab.create("source", 64 * MIB, Filesystem::Ext4);
        let sized = |name, size_bytes| CopyRequest { size_bytes, ..request(name, &source) };
        let copy = clones::copy(&lab.pool, &sized("larger", Some(200 * MIB))).unwrap();
        let state = copy.state().unwrap();
        assert_eq!((state.size_bytes, state.grow_filesystem), (200 * MIB, true));
        assert_eq!(fs::metadata(copy.image()).unwrap().len(), 200 * MIB);
        let at = lab.path("at");
        copy.lock().unwrap().mount(&at, false).unwrap();
        assert!(copy.stats().unwrap().filesystem_space.unwrap().total_bytes > 150 * MIB);
        let error = clones::copy(&lab.pool, &sized("smaller", Some(63 * MIB))).unwrap_err();
        assert!(matches!(error, Error::Request(_)), "{error}");

        // A crash between the copy and its deletion.
        let rubbish = source.lock().unwrap().begin_copy().and_then(|copy| {
            copy.finish()?;
            copy.publish()
        });
        assert!(source.copy(rubbish.unwrap()).exists());
        assert_eq!(lab.pool.recover().unwrap().done.len(), 1);
        assert_eq!(copies(&source), 0);
    }
}

/// A clone by reference has a base of its own: nothing but what was written to it is read, whatever it is called, also when
/// the volume that it was made from is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_snapshot_of_a_clone_by_reference_is_incremental() {
    const RATE: u64 = 2 * MIB;
    for kind in [BackendKind::Btrfs, BackendKind::Xfs] {
        let Some(lab) = TestPool::new(kind) else { return };
        let source = lab.create("source", 64 * MIB, Filesystem::Raw);
        let image = fs::OpenOptions::new().write(true).open(source.image()).unwrap();
        image.write_all_at(&noise(1, 64 << 20), 0).unwrap();
        let repo = init(Arc::new(MemoryStore::new())).await;
        let mut taken = take(&lab.pool, &group(&[&source])).unwrap();
        let snapshot = taken.upload.run(&repo, &context()).await.unwrap();
        let request = clone_request("other", &snapshot);
        let (clone, how) = clones::clone(&lab.pool, &repo, &request, &context()).await.unwrap();
        assert_eq!(how, How::Reference);
        source.lock().unwrap().delete(true).unwrap();
        lab.pool.recover().unwrap();

        let image = fs::OpenOptions::new().write(true).open(clone.image()).unwrap();
        image.write_all_at(&noise(2, 1 << 20), 20 * MIB).unwrap();
        drop(image);
        let slow = GroupRequest { rate_bytes_per_s: Some(RATE), ..group(&[&clone]) };
        let mut taken = take(&lab.pool, &slow).unwrap();
        let copy = hash(&clone.copy_image(taken.upload.state().volumes[0].copy));
        let begun = Instant::now();
        let second = taken.upload.run(&repo, &context()).await.unwrap();
        // All of it would take half a minute.
        assert!(begun.elapsed() < Duration::from_secs(12), "{kind}: {:?}", begun.elapsed());
        assert_eq!(second.parent, Some(snapshot.id));
        let restored = lab.path("restored");
        let target = FileTarget::create(&restored, 64 * MIB).unwrap();
        let options = RestoreOptions::default();
        restore(&repo, &second.volumes[0], target, &options, &context()).await.unwrap();
        assert_eq!(hash(&restored), copy, "{kind}");
        assert_eq!(copies(&clone), 1, "the base before is gone");
        clone.lock().unwrap().delete(true).unwrap();

        // What lives for one mount needs none.
        let ephemeral = CloneRequest { ephemeral: true, ..clone_request("x", &snapshot) };
        let (lazy, _) = clones::clone(&lab.pool, &repo, &ephemeral, &context()).await.unwrap();
        assert_eq!(copies(&lazy), 0);
    }
}

/// A clone of the only volume of a snapshot.
pub(super) fn clone_request(name: &str, snapshot: &SnapshotRecord) -> CloneRequest {
    CloneRequest {
        name: volume_name(name),
        volume: snapshot.volumes[0].clone(),
        snapshot: snapshot.clone(),
        repository: "memory".to_owned(),
        origin: "memory#e/r/s".to_owned(),
        ephemeral: false,
        held: false,
        size_bytes: None,
        metadata: BTreeMap::from([("key".to_owned(), "value".to_owned())]),
    }
}

/// A clone by reference and a lazy one, both larger than the snapshot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clones_of_a_snapshot_may_be_larger() {
    let Some(lab) = TestPool::new(BackendKind::Btrfs) else { return };
    let Some(other) = TestPool::new(BackendKind::Xfs) else { return };
    let source = lab.create("source", 64 * MIB, Filesystem::Ext4);
    let repo = init(Arc::new(MemoryStore::new())).await;
    let mut taken = take(&lab.pool, &group(&[&source])).unwrap();
    let snapshot = taken.upload.run(&repo, &context()).await.unwrap();
    let request =
        |name: &str, size_bytes| CloneRequest { size_bytes, ..clone_request(name, &snapshot) };
    for (pool, expected) in [(&lab.pool, How::Reference), (&other.pool, How::Lazy)] {
        let larger = request("larger", Some(300 * MIB));
        let (volume, how) = clones::clone(pool, &repo, &larger, &context()).await.unwrap();
        assert_eq!(how, expected);
        let state = volume.state().unwrap();
        assert_eq!((state.size_bytes, state.grow_filesystem), (300 * MIB, true));
        assert_eq!(state.metadata, larger.metadata);
        assert_eq!(state.sector_bytes, 4096, "as the volume had");
        assert_eq!(fs::metadata(volume.image()).unwrap().len(), 300 * MIB);
        let odd = request("odd", Some(64 * MIB + 512));
        let odd = clones::clone(pool, &repo, &odd, &context()).await;
        match expected {
            How::Lazy => assert_eq!(odd.unwrap().0.state().unwrap().sector_bytes, 512),
            How::Reference => assert_eq!(odd.unwrap_err().kind(), ErrorKind::Fix),
        }
        let (same, _) =
            clones::clone(pool, &repo, &request("same", None), &context()).await.unwrap();
        let state = same.state().unwrap();
        assert_eq!((state.size_bytes, state.grow_filesystem), (64 * MIB, false));
        let smaller = request("smaller", Some(63 * MIB));
        let error = clones::clone(pool, &repo, &smaller, &context()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Fix, "{error}");
    }
    assert_eq!(other.pool.noted_pins().unwrap().len(), 0);
    // One that can't be read hides no other.
    fs::write(other.pool.root().join("pins/00000000000000000000000001"), "{").unwrap();
    assert_eq!(other.pool.noted_pins().unwrap().len(), 0);

    // Its data is not here, so neither can be a copy of it.
    let lazy = other.pool.volume(&Name::new("volume", "same").unwrap()).unwrap();
    let error = clones::copy(&other.pool, &self::request("copy", &lazy)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Retry);
    assert!(error.to_string().contains("not all here yet"), "{error}");
    let reference = lab.pool.volume(&Name::new("volume", "same").unwrap()).unwrap();
    assert_eq!(hash(&reference.image()), hash(&source.image()));
}
