//! Making, finding, growing and deleting volumes.

use std::fs;

use futures::future::join_all;
use petra_csi::agent::{CSI_NAME, CreateVolumeRequest, ExpandVolumeRequest, NodeAgent, Source};
use petra_volume::BackendKind;
use petra_volume::pool::Filesystem;
use tonic::Code;

use crate::lab::{MIB, Node, create, wait_for};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volumes_are_made_once_and_found() {
    for kind in [BackendKind::Btrfs, BackendKind::Xfs] {
        let Some(node) = Node::new(kind) else { return };
        node.agent.start().await.unwrap();
        let agent = &node.agent;
        for (name, size, filesystem) in [
            ("a", 20 * MIB + 1, "ext4"),
            ("b", 300 * MIB, "xfs"),
            ("c", 200 * MIB, "btrfs"),
            ("d", MIB, "raw"),
        ] {
            let made = agent.create_volume(create(name, size, filesystem)).await.unwrap();
            assert_eq!(made.size_bytes, size.next_multiple_of(4096));
            assert_eq!(
                (made.filesystem.as_str(), made.lazy, made.attached),
                (filesystem, false, false)
            );
            assert_eq!(made.metadata[CSI_NAME], format!("csi {name}"));
            assert_eq!(made.trouble, "");
            let again = agent.create_volume(create(name, size, filesystem)).await.unwrap();
            assert_eq!(again, made);
            assert_eq!(agent.volume(name).await.unwrap(), made);
        }
        // Somebody else's.
        node.pool.create("hand-made", MIB, Filesystem::Raw);
        let names = async || -> Vec<String> {
            agent.volumes().await.unwrap().into_iter().map(|volume| volume.name).collect()
        };
        assert_eq!(names().await, ["a", "b", "c", "d"]);

        let mut other_name = create("a", 20 * MIB + 1, "ext4");
        other_name.metadata.insert(CSI_NAME.to_owned(), "another".to_owned());
        let mut nameless = create("e", MIB, "raw");
        nameless.metadata.clear();
        let from = |source: &str| CreateVolumeRequest {
            source: Some(Source::Volume(source.to_owned())),
            ..create("a", 20 * MIB + 1, "ext4")
        };
        for (request, code) in [
            (create("a", 21 * MIB, "ext4"), Code::AlreadyExists),
            (create("a", 20 * MIB + 1, "xfs"), Code::AlreadyExists),
            (from("b"), Code::AlreadyExists),
            (other_name, Code::AlreadyExists),
            (create("hand-made", MIB, "raw"), Code::AlreadyExists),
            (create("e", 20 * MIB, "xfs"), Code::OutOfRange),
            (create("e", u64::MAX, "raw"), Code::OutOfRange),
            (create("e", 1 << 49, "raw"), Code::ResourceExhausted),
            (create("e", 0, "raw"), Code::InvalidArgument),
            (create("e", MIB, "zfs"), Code::InvalidArgument),
            (create("..", MIB, "raw"), Code::InvalidArgument),
            (create("a/b", MIB, "raw"), Code::InvalidArgument),
            (nameless, Code::InvalidArgument),
        ] {
            let error = agent.create_volume(request.clone()).await.unwrap_err();
            assert_eq!(error.code(), code, "{request:?}: {error}");
        }
        assert_eq!(agent.volume("e").await.unwrap_err().code(), Code::NotFound);
        assert_eq!(names().await.len(), 4);

        // Deleted, which can be repeated.
        node.mount("a");
        let refused = agent.delete_volume("a", &[].into()).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        assert!(agent.volume("a").await.unwrap().attached);
        node.unmount("a");
        for _ in 0..2 {
            agent.delete_volume("a", &[].into()).await.unwrap();
        }
        assert_eq!(names().await, ["b", "c", "d"]);
        let before = agent.info().await.unwrap();
        assert_eq!(
            (before.node.as_str(), before.pool),
            ("here", node.pool.pool.state().id.to_string())
        );
        agent.delete_volume("b", &[].into()).await.unwrap();
        let after = agent.info().await.unwrap();
        assert_eq!(after.available_bytes, before.available_bytes + 300 * MIB);
        assert_eq!(after.largest_volume_bytes, after.available_bytes / 4096 * 4096);
        let all =
            agent.create_volume(create("all", after.largest_volume_bytes, "raw")).await.unwrap();
        assert_eq!(all.size_bytes, after.largest_volume_bytes);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_at_one_time_make_one_volume() {
    let Some(node) = Node::new(BackendKind::Btrfs) else { return };
    let made =
        join_all((0..6).map(|_| node.agent.create_volume(create("v", 20 * MIB, "ext4")))).await;
    let made: Vec<_> = made.into_iter().map(Result::unwrap).collect();
    assert!(made.iter().all(|volume| volume == &made[0]), "{made:?}");
    assert_eq!(node.agent.volumes().await.unwrap().len(), 1);

    // A call that is dropped goes on to its end.
    let call = node.agent.create_volume(create("w", 20 * MIB, "ext4"));
    assert!(tokio::time::timeout(std::time::Duration::from_millis(1), call).await.is_err());
    wait_for("the volume", async || node.agent.volume("w").await.is_ok()).await;
    let secrets = [].into();
    let deleted = join_all((0..4).map(|_| node.agent.delete_volume("v", &secrets))).await;
    assert!(deleted.iter().all(Result::is_ok), "{deleted:?}");
    assert_eq!(fs::read_dir(node.pool.pool.root().join("new")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volumes_grow_and_never_shrink() {
    let Some(node) = Node::new(BackendKind::Btrfs) else { return };
    let agent = &node.agent;
    agent.create_volume(create("v", 64 * MIB, "ext4")).await.unwrap();
    let expand = |name: &str, size_bytes| ExpandVolumeRequest { name: name.to_owned(), size_bytes };
    for (asked, expected) in [
        (100 * MIB, 100 * MIB),
        (100 * MIB, 100 * MIB),
        (MIB, 100 * MIB),
        (100 * MIB + 1, 100 * MIB + 4096),
    ] {
        assert_eq!(agent.expand_volume(expand("v", asked)).await.unwrap().size_bytes, expected);
    }
    node.mount("v");
    agent.expand_volume(expand("v", 300 * MIB)).await.unwrap();
    let image = fs::metadata(node.volume("v").image()).unwrap().len();
    assert_eq!(image, 300 * MIB);
    for (name, asked, code) in [
        ("v", u64::MAX, Code::OutOfRange),
        ("x", MIB, Code::NotFound),
        ("v", 1 << 49, Code::ResourceExhausted),
    ] {
        let error = agent.expand_volume(expand(name, asked)).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
    }
    // The same call that made it still finds it.
    let found = agent.create_volume(create("v", 64 * MIB, "ext4")).await.unwrap();
    assert_eq!(found.size_bytes, 300 * MIB);
}
