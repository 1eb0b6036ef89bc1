//! Sources that change, things that are no sources, devices, and full disks.

use std::fs::OpenOptions;
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use petra_engine::restore::{RestoreOptions, restore};
use petra_engine::snapshot::snapshot;
use petra_engine::source::{FileSource, Source};
use petra_engine::store::{LocalStore, MemoryStore, StoreErrorCause};
use petra_engine::target::FileTarget;
use petra_engine::url::Item;
use petra_engine::{Error, Repository, Result};
use petra_tests::lab::{check, context, init, name, request_of, take, verify_all};
use petra_tests::loop_device::LoopDevice;
use petra_tests::mount::Tmpfs;
use petra_tests::volume::{Volume, noise};

async fn new_repo() -> Repository {
    init(Arc::new(MemoryStore::new())).await
}

/// A file that something happens to once some of it was read.
#[derive(Debug)]
struct Changing {
    file: FileSource,
    path: PathBuf,
    change: fn(&Path),
    done: AtomicBool,
}

impl Source for Changing {
    fn len_bytes(&self) -> u64 {
        self.file.len_bytes()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if offset > 0 && !self.done.swap(true, Ordering::Relaxed) {
            (self.change)(&self.path);
        }
        self.file.read_at(buf, offset)
    }

    fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        self.file.next_data(from)
    }

    fn check_unchanged(&self) -> Result<()> {
        self.file.check_unchanged()
    }
}

async fn refused(change: fn(&Path)) -> String {
    let repo = new_repo().await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("source");
    Volume::noise(1, 2 << 20).save(&path);
    // Clocks of file systems may be coarse.
    thread::sleep(Duration::from_millis(20));
    let file = FileSource::open(&path).unwrap();
    let source = Changing { file, path, change, done: AtomicBool::new(false) };
    let request = request_of("r", vec![(name("v"), Arc::new(source))]);
    let error = snapshot(&repo, request, &context()).await.unwrap_err();
    assert!(matches!(error, Error::SourceChanged { .. }), "{error}");
    assert_eq!(repo.snapshots(&Item::Repository).await.unwrap(), []);
    error.to_string()
}

#[tokio::test]
async fn a_file_that_is_written_is_refused() {
    let error = refused(|path| {
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(b"new", 5).unwrap();
    });
    let error = error.await;
    assert!(error.contains("modification time"), "{error}");
}

#[tokio::test]
async fn a_file_that_shrinks_is_refused() {
    let error =
        refused(|path| OpenOptions::new().write(true).open(path).unwrap().set_len(9).unwrap());
    let error = error.await;
    assert!(error.contains("it ended within"), "{error}");
}

#[tokio::test]
async fn a_file_that_grows_is_refused() {
    let error = refused(|path| {
        OpenOptions::new().append(true).open(path).unwrap().write_all(b"x").unwrap()
    });
    let error = error.await;
    assert!(error.contains("now it has 2097153"), "{error}");
}

#[test]
fn directories_pipes_and_devices_of_characters_are_no_sources() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    for path in [dir.path(), &pipe, Path::new("/dev/null")] {
        let error = FileSource::open(path).unwrap_err().to_string();
        assert!(error.contains("neither a file nor a block device"), "{error}");
        let error = FileTarget::open_existing(path, 0).unwrap_err().to_string();
        assert!(error.contains("neither a file nor a block device"), "{error}");
    }
    assert!(matches!(FileSource::open(&dir.path().join("none")), Err(Error::Io { .. })));
}

#[tokio::test]
async fn a_device_goes_to_a_device() {
    let volume = Volume::zeros(8 << 20).with(1 << 20, &noise(1, 300_000));
    let Some(source) = LoopDevice::attach(|path| volume.save(path)) else { return };
    let old = Volume::noise(2, 9 << 20);
    let Some(target) = LoopDevice::attach(|path| old.save(path)) else { return };
    let repo = new_repo().await;
    let opened = FileSource::open(source.path()).unwrap();
    assert_eq!(opened.len_bytes(), 8 << 20);
    let request = request_of("r", vec![(name("v"), Arc::new(opened))]);
    let taken = snapshot(&repo, request, &context()).await.unwrap();
    let record = &taken.volumes[0];
    check(&repo, record, &volume).await.unwrap();
    for in_place in [false, true] {
        let opened = FileTarget::open_existing(target.path(), record.len_bytes).unwrap();
        let options = RestoreOptions { in_place, ..RestoreOptions::default() };
        let report = restore(&repo, record, opened, &options, &context()).await.unwrap();
        assert_eq!(report.written_bytes == 0, in_place);
        let mut expected = old.clone();
        expected.zero(0..8 << 20);
        expected.write(1 << 20, &noise(1, 300_000));
        assert_eq!(expected.difference(target.path()), None, "only the volume's part changes");
    }
    let error = FileTarget::open_existing(target.path(), 10 << 20).unwrap_err().to_string();
    assert!(error.contains("the device has 9437184 bytes, the volume 10485760"), "{error}");
}

#[tokio::test]
async fn a_full_disk_under_the_repository() {
    let Some(disk) = Tmpfs::mount("size=6m") else { return };
    let store = Arc::new(LocalStore::new(&disk.path().join("repo")));
    let repo = init(store).await;
    let first = take(&repo, &Volume::noise(1, 2 << 20)).await.unwrap();
    let error = take(&repo, &Volume::noise(2, 5 << 20)).await.unwrap_err();
    let Error::Store(error) = error else { panic!("{error}") };
    assert_eq!(error.cause, StoreErrorCause::Full, "{error}");
    assert_eq!(verify_all(&repo, true).await.unwrap().problems, []);
    check(&repo, &first.volumes[0], &Volume::noise(1, 2 << 20)).await.unwrap();
    take(&repo, &Volume::noise(1, 2 << 20).with(0, b"changed")).await.unwrap();
}

#[tokio::test]
async fn a_full_disk_under_the_target() {
    let Some(disk) = Tmpfs::mount("size=1m") else { return };
    let repo = new_repo().await;
    let taken = take(&repo, &Volume::noise(1, 3 << 20)).await.unwrap();
    let path = disk.path().join("target");
    let target = FileTarget::create(&path, 3 << 20).unwrap();
    let options = RestoreOptions::default();
    let restored = restore(&repo, &taken.volumes[0], target, &options, &context()).await;
    let error = restored.unwrap_err();
    assert!(matches!(error, Error::Io { action: "write", .. }), "{error}");
    assert!(error.to_string().contains("No space left"), "{error}");
    assert_eq!(std::fs::read_dir(disk.path()).unwrap().count(), 0);
}

/// Of restores to one target at once, those that begin are whole.
#[test]
fn restores_to_one_target_do_not_mix() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("target");
    for round in 0..200 {
        thread::scope(|scope| {
            for byte in [1_u8, 2, 3] {
                let path = &path;
                scope.spawn(move || {
                    use petra_engine::target::Sink;
                    let Ok(mut target) = FileTarget::create(path, 4) else { return };
                    target.write_at(&[byte; 4], 0).unwrap();
                    target.finish().unwrap();
                });
            }
        });
        let bytes = std::fs::read(&path).unwrap();
        assert!(bytes[0] != 0 && bytes == [bytes[0]; 4], "round {round}: {bytes:?}");
        std::fs::remove_file(&path).unwrap();
    }
}
