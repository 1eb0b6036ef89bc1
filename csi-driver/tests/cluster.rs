//! A cluster in one machine: a controller, and two nodes with a pool each, which it reaches over mutual TLS.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a test may panic"
)]

mod authority;
mod common;

use std::fs;

use authority::Authority;
use common::*;
use petra_csi::TOPOLOGY;
use petra_csi::agent::tls::{CONTROLLER, NODE};
use petra_csi::proto::csi::volume_capability::access_mode::Mode;
use petra_csi::proto::csi::*;
use petra_tests::s3::free_address;
use petra_tests::volume::noise;
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_one_node_is_cloned_on_another() {
    let Some(mut machine) = Machine::new() else { return };
    let authority = Authority::new();
    let mut nodes = vec![];
    let mut addresses = vec![];
    for (name, filesystem) in [("near", "btrfs"), ("far", "xfs")] {
        let pool = machine.pool(name, filesystem);
        let address = free_address();
        let options = [
            "--role=node".to_owned(),
            format!("--node-name={name}"),
            format!("--pool={}", pool.display()),
            format!("--agent={address}"),
            format!("--agent-tls={}", authority.issue(NODE).display()),
        ];
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        nodes.push(machine.start(&format!("{name}.sock"), &options).await);
        addresses.push(format!("--node=https://{address}"));
    }
    let tls = format!("--agent-tls={}", authority.issue(CONTROLLER).display());
    let options = ["--role=controller", &tls, &addresses[0], &addresses[1]];
    let controller = machine.start("controller.sock", &options).await;
    let (near, far) = (&nodes[0], &nodes[1]);

    // A volume is where its pod is to be.
    let request = on_node(wanted("data", 512 * MIB, &writer()), "near");
    let volume = controller.create(request.clone()).await.unwrap();
    assert_eq!(volume.accessible_topology[0].segments[TOPOLOGY], "near");
    assert_eq!(controller.create(request).await.unwrap(), volume);
    let at = near.publish(&machine, &volume.volume_id, &writer(), "data").await.unwrap();
    let bytes = noise(1, 30_000_000);
    fs::write(at.join("file"), &bytes).unwrap();
    // Other nodes do not know it.
    let refused = far.publish(&machine, &volume.volume_id, &writer(), "x").await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);

    let snapshot = controller.ready_snapshot(&volume.volume_id, "s").await;
    let clone = from_snapshot(wanted("clone", 0, &writer()), &snapshot.snapshot_id);
    let clone = controller.create(on_node(clone, "far")).await.unwrap();
    assert_eq!(clone.accessible_topology[0].segments[TOPOLOGY], "far");
    let at = far.publish(&machine, &clone.volume_id, &writer(), "clone").await.unwrap();
    assert!(fs::read(at.join("file")).unwrap() == bytes);

    // One snapshot, read on both nodes at the same time.
    let readers = mounted("", Mode::MultiNodeReaderOnly);
    let shared = from_snapshot(wanted("shared", 0, &readers), &snapshot.snapshot_id);
    let shared = controller.create(shared).await.unwrap();
    for (node, name) in [(near, "shared-near"), (far, "shared-far")] {
        let at = node.publish(&machine, &shared.volume_id, &readers, name).await.unwrap();
        assert!(fs::read(at.join("file")).unwrap() == bytes, "{name}");
    }

    // A clone of a volume is on its node, and a group on one node.
    let elsewhere = from_volume(wanted("copy", 0, &writer()), &volume.volume_id);
    let refused = controller.create(on_node(elsewhere, "far")).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    let group = CreateVolumeGroupSnapshotRequest {
        name: "g".to_owned(),
        source_volume_ids: vec![volume.volume_id.clone(), clone.volume_id.clone()],
        ..Default::default()
    };
    let refused = controller.groups.clone().create_volume_group_snapshot(group).await;
    assert_eq!(refused.unwrap_err().code(), Code::FailedPrecondition);

    // Both nodes have their part of the room and of the lists.
    let capacity = |name: &str| {
        let segments = [(TOPOLOGY.to_owned(), name.to_owned())].into();
        let request = GetCapacityRequest {
            accessible_topology: Some(Topology { segments }),
            ..Default::default()
        };
        let mut controller = controller.controller.clone();
        async move { controller.get_capacity(request).await.unwrap().into_inner().available_capacity }
    };
    assert!(capacity("near").await > 0 && capacity("far").await > 0);
    assert_eq!(capacity("nowhere").await, 0);
    let list = ListVolumesRequest { max_entries: 1, ..Default::default() };
    let first = controller.controller.clone().list_volumes(list).await.unwrap().into_inner();
    let rest = ListVolumesRequest { starting_token: first.next_token, ..Default::default() };
    let rest = controller.controller.clone().list_volumes(rest).await.unwrap().into_inner();
    let ids = first.entries.iter().chain(&rest.entries);
    let mut ids: Vec<_> = ids.map(|entry| entry.volume.clone().unwrap().volume_id).collect();
    let mut known =
        vec![volume.volume_id.clone(), clone.volume_id.clone(), shared.volume_id.clone()];
    ids.sort();
    known.sort();
    assert_eq!(ids, known);

    // While a node is away nobody says that its volumes are gone.
    let far_driver = format!("petra-csi.*unix://{}", machine.path("far.sock").display());
    std::process::Command::new("pkill").args(["-STOP", "-f", &far_driver]).status().unwrap();
    let away = controller.delete(&clone.volume_id).await.unwrap_err();
    assert!(matches!(away.code(), Code::Unavailable | Code::DeadlineExceeded), "{away}");
    let listed = controller.controller.clone().list_volumes(ListVolumesRequest::default()).await;
    assert_eq!(listed.unwrap_err().code(), Code::Unavailable);
    // Nor that it has none of a name, so that there are never two. What can't be on it is made.
    let there = on_node(wanted("new", 0, &writer()), "far");
    for request in [there, wanted("new", 0, &writer())] {
        assert_eq!(controller.create(request).await.unwrap_err().code(), Code::Unavailable);
    }
    let new = controller.create(on_node(wanted("new", 0, &writer()), "near")).await.unwrap();
    controller.delete(&new.volume_id).await.unwrap();
    std::process::Command::new("pkill").args(["-CONT", "-f", &far_driver]).status().unwrap();

    for (node, id, name) in [
        (near, &shared.volume_id, "shared-near"),
        (far, &shared.volume_id, "shared-far"),
        (near, &volume.volume_id, "data"),
        (far, &clone.volume_id, "clone"),
    ] {
        persistently(|| node.unpublish(&machine, id, name)).await.unwrap();
    }
    for id in [&shared.volume_id, &volume.volume_id, &clone.volume_id] {
        persistently(|| controller.delete(id)).await.unwrap();
    }
    controller.delete_snapshot(&snapshot.snapshot_id).await.unwrap();
    machine.assert_nothing_left().await;
    wait_until("no pin is left", || machine.pins() == 0).await;
}
