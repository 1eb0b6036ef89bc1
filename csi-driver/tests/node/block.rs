//! Volumes as block devices.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};

use petra_csi::proto::csi::volume_capability::access_mode::Mode;
use petra_volume::pool::Filesystem;
use tonic::Code;

use crate::lab::{How, Lab, MIB, mounts_at};

fn open(lab: &Lab, target: &str) -> File {
    File::options().read(true).write(true).open(lab.file(target)).unwrap()
}

/// The kernel opens a read-only device for writing, and refuses the writes.
fn can_write(lab: &Lab, target: &str) -> bool {
    open(lab, target).write_all_at(&[1; 4096], 0).is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_volume_lives_on_a_node() {
    let Some(lab) = Lab::new() else { return };
    let volume = lab.pool.create("v", 16 * MIB, Filesystem::Raw);
    let id = lab.id(&volume);
    let published = lab.publish(&id, "one", How::block(), false).await;
    assert_eq!(published, Err(Code::FailedPrecondition), "it is not staged");
    assert!(!lab.file("one").exists());
    for _ in 0..2 {
        lab.stage(&id, "staging", How::block()).await.unwrap();
    }
    assert!(volume.attachment().unwrap().is_some());
    for _ in 0..2 {
        lab.publish(&id, "one", How::block(), false).await.unwrap();
        lab.publish(&id, "two", How::block(), false).await.unwrap();
    }
    lab.stage(&id, "staging", How::block()).await.unwrap();
    assert_eq!(mounts_at(&lab.file("one")), 1);
    assert!(lab.file("one").metadata().unwrap().file_type().is_block_device());
    open(&lab, "one").write_all_at(b"text", 4096).unwrap();
    let mut bytes = [0; 4];
    open(&lab, "two").read_exact_at(&mut bytes, 4096).unwrap();
    assert_eq!(&bytes, b"text");

    let stats = lab.stats(&id, "one").await.unwrap();
    assert_eq!((stats.usage.len(), stats.usage[0].total), (1, 16 << 20));
    assert!(!stats.volume_condition.as_ref().unwrap().abnormal);
    assert_eq!(lab.expand(&id, "one", 20 * MIB + 1).await, Ok(20 * MIB + 4096));
    let end = open(&lab, "two").seek(SeekFrom::End(0)).unwrap();
    assert_eq!(end, 20 * MIB + 4096);
    assert!(!volume.state().unwrap().grow_filesystem);

    assert_eq!(lab.unstage(&id, "staging").await, Err(Code::FailedPrecondition));
    let mount = How::mount(&[]);
    assert_eq!(lab.stage(&id, "staging", mount).await, Err(Code::FailedPrecondition));
    for _ in 0..2 {
        lab.unpublish(&id, "one").await.unwrap();
        lab.unpublish(&id, "two").await.unwrap();
    }
    assert!(!lab.file("one").exists());
    assert_eq!(lab.expand(&id, "staging", 24 * MIB).await, Ok(24 * MIB));
    for _ in 0..2 {
        lab.unstage(&id, "staging").await.unwrap();
    }
    assert!(lab.is_clean());
    // What is no file system can't be mounted.
    let refused = lab.stage(&id, "staging", How::mount(&[])).await;
    assert_eq!(refused, Err(Code::InvalidArgument));
    assert!(lab.is_clean());
}

/// The kernel lets a device be written through a read-only mount of its node, so it is the device that must be read-only.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_is_read_only_for_all_or_none() {
    let Some(lab) = Lab::new() else { return };
    let volume = lab.pool.create("v", 16 * MIB, Filesystem::Raw);
    let id = lab.id(&volume);
    lab.stage(&id, "staging", How::block()).await.unwrap();
    lab.publish(&id, "one", How::block(), true).await.unwrap();
    lab.publish(&id, "one", How::block(), true).await.unwrap();
    assert!(!can_write(&lab, "one"));
    assert_eq!(lab.publish(&id, "one", How::block(), false).await, Err(Code::AlreadyExists));
    assert_eq!(lab.publish(&id, "two", How::block(), false).await, Err(Code::FailedPrecondition));
    lab.publish(&id, "two", How::block(), true).await.unwrap();
    lab.stage(&id, "staging", How::block()).await.unwrap();
    lab.unpublish(&id, "one").await.unwrap();
    lab.unpublish(&id, "two").await.unwrap();

    let single = || How::block().mode(Mode::SingleNodeSingleWriter);
    lab.publish(&id, "one", single(), false).await.unwrap();
    assert!(can_write(&lab, "one"));
    assert_eq!(lab.publish(&id, "two", single(), false).await, Err(Code::FailedPrecondition));
    lab.unpublish(&id, "one").await.unwrap();
    lab.unstage(&id, "staging").await.unwrap();

    let reader = || How::block().mode(Mode::SingleNodeReaderOnly);
    lab.stage(&id, "staging", reader()).await.unwrap();
    assert!(volume.attachment().unwrap().unwrap().read_only);
    lab.publish(&id, "one", reader(), false).await.unwrap();
    assert!(!can_write(&lab, "one"));
    lab.unpublish(&id, "one").await.unwrap();
    lab.unstage(&id, "staging").await.unwrap();
    assert!(lab.is_clean());
}
