//! Volumes with a file system.

use std::fs;
use std::process::Command;

use petra_csi::proto::csi::VolumeUsage;
use petra_csi::proto::csi::volume_capability::access_mode::Mode;
use petra_csi::proto::csi::volume_usage::Unit;
use petra_tests::pool::volume_name;
use petra_tests::require;
use petra_volume::pool::{Content, CreateRequest, Filesystem};
use tonic::Code;

use crate::lab::{How, Lab, MIB, may_grow_ext4, mounts_at, options, write};

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_lives_on_a_node() {
    let Some(lab) = Lab::new() else { return };
    for filesystem in [Filesystem::Ext4, Filesystem::Xfs, Filesystem::Btrfs] {
        let volume = lab.pool.create(filesystem.as_str(), 320 * MIB, filesystem);
        let id = lab.id(&volume);
        let how = || How::mount(&["nosuid", "discard"]);
        for _ in 0..2 {
            lab.stage(&id, "staging", how()).await.unwrap();
        }
        let flags = options(&lab.file("staging")).unwrap();
        assert!(["rw", "nosuid", "noatime"].iter().all(|flag| flags.contains(&(*flag).to_owned())));
        for _ in 0..2 {
            lab.publish(&id, "one", how(), false).await.unwrap();
            lab.publish(&id, "two", how(), true).await.unwrap();
        }
        assert_eq!((mounts_at(&lab.file("staging")), mounts_at(&lab.file("one"))), (1, 1));
        write(&lab.file("one").join("file"), b"text");
        assert_eq!(fs::read(lab.file("two").join("file")).unwrap(), b"text");
        let error = fs::write(lab.file("two").join("file"), b"more").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);

        let stats = lab.stats(&id, "two").await.unwrap();
        assert!(!stats.volume_condition.as_ref().unwrap().abnormal);
        let of = |unit: Unit| stats.usage.iter().find(|usage| usage.unit() == unit).copied();
        let VolumeUsage { total, used, available, .. } = of(Unit::Bytes).unwrap();
        assert!(total > 200 << 20 && available > 0 && used + available == total, "{stats:?}");
        assert_eq!(of(Unit::Inodes).is_some(), filesystem != Filesystem::Btrfs);

        let expanded = lab.expand(&id, "one", 640 * MIB).await;
        if filesystem == Filesystem::Ext4 && !may_grow_ext4() {
            // It has its size, and grows at the next mount.
            assert_eq!(expanded, Err(Code::FailedPrecondition));
        } else {
            assert_eq!(expanded, Ok(640 * MIB));
            assert_eq!(lab.expand(&id, "staging", 0).await, Ok(640 * MIB));
            let grown = lab.stats(&id, "one").await.unwrap().usage[0].total;
            assert!(grown > total + (250 << 20), "{filesystem}: {total} {grown}");
        }

        assert_eq!(lab.unstage(&id, "staging").await, Err(Code::FailedPrecondition));
        assert_eq!(fs::read(lab.file("one").join("file")).unwrap(), b"text");
        for _ in 0..2 {
            lab.unpublish(&id, "one").await.unwrap();
            lab.unpublish(&id, "two").await.unwrap();
        }
        assert!(!lab.file("one").exists() && !lab.file("two").exists());
        for _ in 0..2 {
            lab.unstage(&id, "staging").await.unwrap();
        }
        assert!(lab.is_clean());

        lab.stage(&id, "again", how()).await.unwrap();
        assert_eq!(fs::read(lab.file("again").join("file")).unwrap(), b"text");
        let grown = lab.stats(&id, "again").await.unwrap().usage[0].total;
        assert!(grown > total + (250 << 20), "{filesystem}: {total} {grown}");
        lab.unstage(&id, "again").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn read_only_is_read_only_for_all() {
    let Some(lab) = Lab::new() else { return };
    for filesystem in [Filesystem::Ext4, Filesystem::Xfs, Filesystem::Btrfs] {
        let volume = lab.pool.create(filesystem.as_str(), 320 * MIB, filesystem);
        let id = lab.id(&volume);
        for mode in [Mode::SingleNodeReaderOnly, Mode::MultiNodeReaderOnly] {
            let how = || How::mount(&[]).mode(mode);
            lab.stage(&id, "staging", how()).await.unwrap();
            assert!(volume.attachment().unwrap().unwrap().read_only);
            for target in ["one", "two"] {
                lab.publish(&id, target, how(), false).await.unwrap();
                assert!(fs::write(lab.file(target).join("file"), b"x").is_err());
            }
            // What is staged read-only can't be written elsewhere.
            let writer = How::mount(&[]);
            let refused = lab.publish(&id, "three", writer, false).await;
            assert_eq!(refused, Err(Code::FailedPrecondition));
            assert_eq!(lab.trouble(&id, "one").await, None);
            for target in ["one", "two"] {
                lab.unpublish(&id, target).await.unwrap();
            }
            lab.unstage(&id, "staging").await.unwrap();
        }
    }
    assert!(lab.is_clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn modes_say_how_many_pods_there_are() {
    let Some(lab) = Lab::new() else { return };
    let volume = lab.pool.create("v", 16 * MIB, Filesystem::Ext4);
    let id = lab.id(&volume);
    let how = |mode| How::mount(&[]).mode(mode);
    lab.stage(&id, "staging", how(Mode::SingleNodeSingleWriter)).await.unwrap();
    let single = || how(Mode::SingleNodeSingleWriter);
    lab.publish(&id, "one", single(), false).await.unwrap();
    lab.publish(&id, "one", single(), false).await.unwrap();
    assert_eq!(lab.publish(&id, "two", single(), false).await, Err(Code::FailedPrecondition));
    assert!(!lab.file("two").exists());
    lab.unpublish(&id, "one").await.unwrap();
    lab.publish(&id, "two", single(), false).await.unwrap();
    for mode in [Mode::SingleNodeMultiWriter, Mode::SingleNodeWriter] {
        lab.publish(&id, mode.as_str_name(), how(mode), false).await.unwrap();
        assert!(lab.file(mode.as_str_name()).join("lost+found").exists());
    }
    for mode in [Mode::MultiNodeSingleWriter, Mode::MultiNodeMultiWriter, Mode::Unknown] {
        let refused = lab.publish(&id, "x", how(mode), false).await;
        assert_eq!(refused, Err(Code::InvalidArgument));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_options_at_the_same_place_are_refused() {
    let Some(lab) = Lab::new() else { return };
    let volume = lab.pool.create("v", 16 * MIB, Filesystem::Ext4);
    let id = lab.id(&volume);
    lab.stage(&id, "staging", How::mount(&["nodev", "relatime"])).await.unwrap();
    for other in [
        How::mount(&["nodev"]),
        How::mount(&["nodev", "relatime", "ro"]),
        How::mount(&["relatime"]),
        How::mount(&["nodev", "relatime", "sync"]),
        How::mount(&["nodev", "relatime"]).mode(Mode::SingleNodeReaderOnly),
        How::block(),
    ] {
        let refused = lab.stage(&id, "staging", other).await;
        assert_eq!(refused, Err(Code::AlreadyExists));
    }
    let same = || How::mount(&["nodev,relatime"]);
    lab.stage(&id, "staging", same()).await.unwrap();
    // Elsewhere it is in use.
    assert_eq!(lab.stage(&id, "other", same()).await, Err(Code::FailedPrecondition));
    lab.unstage(&id, "other").await.unwrap();

    lab.publish(&id, "one", same(), false).await.unwrap();
    assert_eq!(lab.publish(&id, "one", same(), true).await, Err(Code::AlreadyExists));
    let other = How::mount(&["relatime"]);
    assert_eq!(lab.publish(&id, "one", other, false).await, Err(Code::AlreadyExists));
    assert_eq!(lab.publish(&id, "one", How::block(), false).await, Err(Code::AlreadyExists));
    // One mount may have flags that others have not.
    let strict = How::mount(&["strictatime", "noexec", "nodiratime", "nosymfollow"]);
    lab.publish(&id, "two", strict.clone(), false).await.unwrap();
    lab.publish(&id, "two", strict, false).await.unwrap();
    let flags = options(&lab.file("two")).unwrap();
    assert_eq!(flags, ["rw", "noexec", "nodiratime", "nosymfollow"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn options_that_nobody_knows_are_told() {
    let Some(lab) = Lab::new() else { return };
    for filesystem in [Filesystem::Ext4, Filesystem::Xfs, Filesystem::Btrfs] {
        let volume = lab.pool.create(filesystem.as_str(), 320 * MIB, filesystem);
        let id = lab.id(&volume);
        for nonsense in ["no-such-option", "", "-o ro", "a\0b"] {
            let refused = lab.stage(&id, "staging", How::mount(&[nonsense])).await;
            assert_eq!(refused, Err(Code::InvalidArgument), "{filesystem} {nonsense:?}");
            assert!(lab.is_clean(), "{filesystem} {nonsense:?}");
        }
    }
}

/// A clone may be larger than what it was made from; what it holds shows when it is mounted.
#[tokio::test(flavor = "multi_thread")]
async fn a_larger_clone_grows_its_file_system() {
    let Some(lab) = Lab::new() else { return };
    for filesystem in [Filesystem::Ext4, Filesystem::Xfs, Filesystem::Btrfs] {
        let origin = lab.pool.create(filesystem.as_str(), 320 * MIB, filesystem);
        let mut locked = origin.lock().unwrap();
        let copy = locked.begin_copy().unwrap();
        copy.finish().unwrap();
        let copy = locked.keep_copy(copy, |_| {}).unwrap();
        drop(locked);
        let name = volume_name(&format!("clone of {filesystem}"));
        let request = CreateRequest::new(name, 640 * MIB, Filesystem::Raw);
        let content = Content::CopyOf(origin.copy(copy));
        let clone = lab.pool.pool.create(CreateRequest { content, ..request }).unwrap();
        clone.lock().unwrap().change(|state| state.grow_filesystem = true).unwrap();
        let id = lab.id(&clone);

        // Nothing can be written, so it stays as it is.
        let reader = How::mount(&[]).mode(Mode::SingleNodeReaderOnly);
        lab.stage(&id, "staging", reader).await.unwrap();
        assert!(lab.stats(&id, "staging").await.unwrap().usage[0].total < 321 << 20);
        lab.unstage(&id, "staging").await.unwrap();

        lab.stage(&id, "staging", How::mount(&[])).await.unwrap();
        let total = lab.stats(&id, "staging").await.unwrap().usage[0].total;
        assert!(total > 550 << 20, "{filesystem}: {total}");
        assert!(!clone.state().unwrap().grow_filesystem);
        if filesystem != Filesystem::Ext4 || may_grow_ext4() {
            // Nobody noted what it holds, and still it grows while it is mounted.
            assert_eq!(lab.expand(&id, "staging", 700 * MIB).await, Ok(700 * MIB));
            let grown = lab.stats(&id, "staging").await.unwrap().usage[0].total;
            assert!(grown > total + (50 << 20), "{filesystem}: {total} {grown}");
        }
        lab.unstage(&id, "staging").await.unwrap();
        clone.lock().unwrap().grow(800 * MIB).unwrap();
        lab.stage(&id, "staging", How::mount(&[])).await.unwrap();
        let grown = lab.stats(&id, "staging").await.unwrap().usage[0].total;
        assert!(grown > total + (90 << 20), "{filesystem}: {total} {grown}");
        lab.unstage(&id, "staging").await.unwrap();
    }
}

/// What a controller has made larger grows on the node, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_ends_what_a_controller_began() {
    let Some(lab) = Lab::new() else { return };
    let volume = lab.pool.create("v", 320 * MIB, Filesystem::Xfs);
    let id = lab.id(&volume);
    lab.stage(&id, "staging", How::mount(&[])).await.unwrap();
    // As after a crash before the file system has grown.
    let mut locked = volume.lock().unwrap();
    locked
        .change(|state| {
            state.size_bytes = 640 * MIB;
            state.grow_filesystem = true;
        })
        .unwrap();
    drop(locked);
    assert_eq!(lab.expand(&id, "staging", 640 * MIB).await, Ok(640 * MIB));
    assert!(lab.stats(&id, "staging").await.unwrap().usage[0].total > 550 << 20);
    assert_eq!(lab.expand(&id, "staging", 100 * MIB).await, Ok(640 * MIB));
    assert_eq!(lab.expand(&id, "elsewhere", 700 * MIB).await, Err(Code::NotFound));
    assert_eq!(lab.expand(&id, "staging", u64::MAX >> 1).await, Err(Code::OutOfRange));
    assert_eq!(lab.expand(&id, "staging", 1 << 60).await, Err(Code::OutOfRange));
    assert_eq!(lab.expand(&id, "staging", 1 << 48).await, Err(Code::ResourceExhausted));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_that_failed_is_told() {
    let Some(lab) = Lab::new() else { return };
    if require::tool("xfs_io").is_none() {
        return;
    }
    for filesystem in [Filesystem::Ext4, Filesystem::Xfs] {
        let volume = lab.pool.create(filesystem.as_str(), 320 * MIB, filesystem);
        let id = lab.id(&volume);
        lab.stage(&id, "staging", How::mount(&[])).await.unwrap();
        lab.publish(&id, "one", How::mount(&[]), false).await.unwrap();
        assert_eq!(lab.trouble(&id, "one").await, None);
        let mut shutdown = Command::new("xfs_io");
        let done = shutdown.args(["-x", "-c", "shutdown"]).arg(lab.file("staging")).status();
        assert!(done.unwrap().success());
        let trouble = lab.trouble(&id, "one").await;
        assert!(trouble.is_some_and(|trouble| trouble.contains("file") || trouble.contains("its")));
        // It can be taken down and is well again.
        lab.unpublish(&id, "one").await.unwrap();
        lab.unstage(&id, "staging").await.unwrap();
        lab.stage(&id, "staging", How::mount(&[])).await.unwrap();
        assert_eq!(lab.trouble(&id, "staging").await, None);
        lab.unstage(&id, "staging").await.unwrap();
    }
}
