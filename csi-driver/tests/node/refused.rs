//! Calls with fields, paths and ids that are not right, and what the service says of itself.

use petra_csi::node::clone_name;
use petra_csi::proto::csi::node_server::Node as _;
use petra_csi::proto::csi::volume_capability::access_mode::Mode;
use petra_csi::proto::csi::{
    NodeExpandVolumeRequest, NodeGetCapabilitiesRequest, NodeGetInfoRequest, NodeStageVolumeRequest,
};
use petra_engine::SnapshotId;
use petra_tests::pool::TestPool;
use petra_volume::BackendKind;
use petra_volume::pool::Filesystem;
use tonic::{Code, Request};

use crate::lab::{How, Lab, MIB, mounts_at};

const OTHER: &str = "01ARZ3NDEKTSV4RRFFQ69G5FAV";

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_is_told() {
    let Some(lab) = Lab::new() else { return };
    let volume = lab.pool.create("v", 16 * MIB, Filesystem::Ext4);
    let id = lab.id(&volume);
    let how = || How::mount(&[]);
    let invalid = Err(Code::InvalidArgument);
    assert_eq!(lab.stage("", "staging", how()).await, invalid);
    assert_eq!(lab.unstage("", "staging").await, invalid);
    assert_eq!(lab.publish("", "one", how(), false).await, invalid);
    assert_eq!(lab.unpublish("", "one").await, invalid);
    assert_eq!(lab.stats("", "one").await.map(drop), invalid);
    assert_eq!(lab.expand("", "one", 0).await.map(drop), invalid);
    for bad in ["", "./relative", "/", "/a/../b"] {
        assert_eq!(lab.stage(&id, bad, how()).await, invalid, "{bad}");
        assert_eq!(lab.unstage(&id, bad).await, invalid, "{bad}");
        assert_eq!(lab.publish(&id, bad, how(), false).await, invalid, "{bad}");
        assert_eq!(lab.unpublish(&id, bad).await, invalid, "{bad}");
        // Statistics are of a volume at a path: where it can't be, it is not found.
        let stats = if bad.is_empty() { invalid } else { Err(Code::NotFound) };
        assert_eq!(lab.stats(&id, bad).await.map(drop), stats, "{bad}");
        assert_eq!(lab.expand(&id, bad, 0).await.map(drop), invalid, "{bad}");
    }
    let request = NodeStageVolumeRequest {
        volume_id: id.clone(),
        staging_target_path: lab.path("staging"),
        ..Default::default()
    };
    let status = lab.node.node_stage_volume(Request::new(request)).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(lab.is_clean());

    // Publishing needs what a stage has made.
    let precondition = Err(Code::FailedPrecondition);
    assert_eq!(lab.publish_from(&id, "", "one", how(), false).await, precondition);
    assert_eq!(lab.publish(&id, "one", how(), false).await, precondition);
    lab.stage(&id, "staging", how()).await.unwrap();
    assert_eq!(lab.publish_from(&id, "elsewhere", "one", how(), false).await, precondition);
    let deep = format!("{}/a/b", lab.path("no"));
    assert_eq!(lab.publish(&id, &deep, how(), false).await, precondition);
    lab.unpublish(&id, &deep).await.unwrap();
    std::fs::write(lab.file("a file"), "text").unwrap();
    assert_eq!(lab.publish(&id, "a file", how(), false).await, precondition);
    assert!(!lab.file("one").exists());
    assert_eq!(lab.stats(&id, "one").await.map(drop), Err(Code::NotFound));
    assert_eq!(lab.stats(&id, "a file").await.map(drop), Err(Code::NotFound));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_volume_of_this_node_is_told() {
    let Some(lab) = Lab::new() else { return };
    let volume = lab.pool.create("v", 16 * MIB, Filesystem::Ext4);
    let ours = lab.pool.pool.state().id;
    let how = || How::mount(&[]);
    let unknown = Err(Code::NotFound);
    for id in [
        format!("{ours}/w"),
        format!("{OTHER}/v"),
        "nonsense".to_owned(),
        format!("{ours}/../v"),
        "x".repeat(2000),
    ] {
        assert_eq!(lab.stage(&id, "staging", how()).await, unknown, "{id}");
        assert_eq!(lab.publish(&id, "one", how(), false).await, unknown, "{id}");
        assert_eq!(lab.stats(&id, "one").await.map(drop), unknown, "{id}");
        assert_eq!(lab.expand(&id, "one", 0).await.map(drop), unknown, "{id}");
        // Nothing is there to be ended, which is what is asked for.
        lab.unpublish(&id, "one").await.unwrap();
        lab.unstage(&id, "staging").await.unwrap();
    }
    // Another volume's places are left alone.
    let id = lab.id(&volume);
    let other = lab.id(&lab.pool.create("other", 16 * MIB, Filesystem::Ext4));
    lab.stage(&id, "staging", how()).await.unwrap();
    lab.publish(&id, "one", how(), false).await.unwrap();
    assert_eq!(lab.unpublish(&other, "one").await, Err(Code::FailedPrecondition));
    assert_eq!(lab.unpublish("nonsense", "one").await, unknown);
    assert_eq!(lab.unstage("nonsense", "staging").await, unknown);
    lab.unstage(&other, "staging").await.unwrap();
    assert_eq!(lab.stage(&other, "staging", how()).await, Err(Code::AlreadyExists));
    lab.stage(&other, "staging of other", how()).await.unwrap();
    let refused = lab.publish_from(&other, "staging of other", "one", how(), false).await;
    assert_eq!(refused, Err(Code::AlreadyExists));
    let refused = lab.publish_from(&other, "staging", "two", how(), false).await;
    assert_eq!(refused, Err(Code::FailedPrecondition));
    assert_eq!((mounts_at(&lab.file("one")), mounts_at(&lab.file("staging"))), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_that_many_nodes_read_are_clones_of_their_own() {
    let Some(lab) = Lab::new() else { return };
    let (pin, snapshot) = (SnapshotId::from_parts(1, 7), SnapshotId::from_parts(1, 9));
    let id = format!("ro/{pin}/2/main#@{snapshot}");
    let how = || How::mount(&[]).mode(Mode::MultiNodeReaderOnly);
    let refused = lab.stage(&id, "staging", How::mount(&[])).await;
    assert_eq!(refused, Err(Code::FailedPrecondition), "nobody can write to it");
    assert_eq!(lab.publish(&id, "one", how(), false).await, Err(Code::NotFound));
    lab.unstage(&id, "staging").await.unwrap();

    for round in 1..=2 {
        for _ in 0..2 {
            lab.stage_with(&id, "staging", how(), &[("key", "secret")]).await.unwrap();
        }
        {
            let made = lab.clones.made.lock().unwrap();
            assert_eq!(made.len(), round, "once each time");
            let last = made.last().unwrap();
            assert_eq!((last.repository.as_str(), last.number), ("main", 2));
            assert_eq!((last.snapshot, &last.name), (snapshot, &clone_name(pin)));
            assert_eq!(last.secrets["key"], "secret");
        }
        lab.publish(&id, "one", how(), false).await.unwrap();
        assert!(std::fs::write(lab.file("one").join("file"), "text").is_err());
        assert_eq!(lab.trouble(&id, "one").await, None);
        assert_eq!(lab.expand(&id, "one", 0).await, Ok(16 * MIB));
        assert_eq!(lab.expand(&id, "one", 32 * MIB).await, Err(Code::FailedPrecondition));
        lab.unpublish(&id, "one").await.unwrap();
        for _ in 0..2 {
            lab.unstage(&id, "staging").await.unwrap();
        }
        assert!(lab.is_clean());
        assert!(lab.pool.pool.volumes().unwrap().is_empty(), "it was made for this");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_says_who_it_is() {
    let Some(pool) = TestPool::new(BackendKind::Btrfs) else { return };
    let lab = Lab::over(pool, "/no/petra".into());
    let info = lab.node.node_get_info(Request::new(NodeGetInfoRequest {})).await.unwrap();
    let info = info.into_inner();
    assert_eq!((info.node_id.as_str(), info.max_volumes_per_node), ("node-1", 0));
    assert_eq!(info.accessible_topology.unwrap().segments["topology.petra.dev/node"], "node-1");
    let request = Request::new(NodeGetCapabilitiesRequest {});
    let capabilities = lab.node.node_get_capabilities(request).await.unwrap().into_inner();
    assert_eq!(capabilities.capabilities.len(), 5);
    let request = NodeExpandVolumeRequest { volume_id: "x".into(), ..Default::default() };
    let status = lab.node.node_expand_volume(Request::new(request)).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
}
