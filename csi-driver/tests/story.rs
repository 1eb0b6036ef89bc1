//! What users of a cluster do: claims, snapshots, clones on this and another node, groups, changed blocks.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a test may panic"
)]

mod common;

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::*;
use petra_csi::proto::csi::volume_capability::access_mode::Mode;
use petra_csi::proto::csi::*;
use petra_tests::volume::noise;
use tonic::Code;

fn write_files(directory: &Path, seed: u64, count: u64) {
    for n in 0..count {
        fs::write(directory.join(format!("{seed}-{n}")), noise(seed * 1000 + n, 300_000)).unwrap();
    }
    File::open(directory).unwrap().sync_all().unwrap();
}

fn has_files(directory: &Path, seed: u64, count: u64) -> bool {
    (0..count).all(|n| {
        let bytes = fs::read(directory.join(format!("{seed}-{n}")));
        bytes.is_ok_and(|bytes| bytes == noise(seed * 1000 + n, 300_000))
    })
}

/// True where a log tells people of something.
fn is_told(log: &str, reason: &str, object: &str) -> bool {
    log.lines().any(|line| [" event: ", reason, object].iter().all(|part| line.contains(part)))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_is_written_snapshotted_and_cloned() {
    let Some(mut machine) = Machine::new() else { return };
    machine.pool("pool", "xfs");
    let client = machine.start_all().await;
    let claim =
        [("csi.storage.k8s.io/pvc/name", "data"), ("csi.storage.k8s.io/pvc/namespace", "team")];
    let mut request = wanted("pvc-1", 512 * MIB, &writer());
    request.parameters = claim.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    let volume = client.create(request).await.unwrap();
    let at = client.publish(&machine, &volume.volume_id, &writer(), "a").await.unwrap();
    write_files(&at, 1, 20);

    // Attributes take the place of those before.
    for parameters in [[("label.phase", "one"), ("label.old", "x")], [("label.phase", "two"); 2]] {
        let pairs = parameters.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let modify = ControllerModifyVolumeRequest {
            volume_id: volume.volume_id.clone(),
            mutable_parameters: pairs.into(),
            ..Default::default()
        };
        client.controller.clone().controller_modify_volume(modify).await.unwrap();
    }

    // The snapshot is a thing of its own: it is found by its URL, too.
    let snapshot = client.ready_snapshot(&volume.volume_id, "snapshot-1").await;
    assert_eq!(snapshot.source_volume_id, volume.volume_id);
    let listed = machine.petra(&["ls", &format!("{}#team/data", machine.repository())]);
    assert!(listed.contains("snapshot-1"), "{listed}");
    let info = format!("{}#team/data/snapshot-1", machine.repository());
    let info = machine.petra(&["info", &info, "--json"]);
    assert!(info.contains("phase") && info.contains("two") && !info.contains("old"), "{info}");
    write_files(&at, 2, 5);

    // Clones: of the snapshot, larger; of the volume as it is now; of the snapshot by its URL.
    let larger = from_snapshot(wanted("pvc-2", 700 * MIB, &writer()), &snapshot.snapshot_id);
    let larger = client.create(larger).await.unwrap();
    assert_eq!(larger.capacity_bytes, 700 * MIB);
    let live = from_volume(wanted("pvc-3", 0, &writer()), &volume.volume_id);
    let live = client.create(live).await.unwrap();
    let mut by_url = wanted("pvc-4", 0, &writer());
    let url = format!("{}#team/data/snapshot-1/data", machine.repository());
    by_url.parameters = HashMap::from([("from".to_owned(), url.clone())]);
    let by_url = client.create(by_url).await.unwrap();
    for (clone, has_later) in [(&larger, false), (&live, true), (&by_url, false)] {
        let name = clone.volume_id.rsplit('/').next().unwrap().to_owned();
        let at = client.publish(&machine, &clone.volume_id, &writer(), &name).await.unwrap();
        assert!(has_files(&at, 1, 20), "{name}");
        assert_eq!(has_files(&at, 2, 5), has_later, "{name}");
        let request = NodeGetVolumeStatsRequest {
            volume_id: clone.volume_id.clone(),
            volume_path: text(&at),
            ..Default::default()
        };
        let stats = client.node.clone().node_get_volume_stats(request).await.unwrap();
        let usage = stats.into_inner().usage;
        let total =
            usage.iter().find(|usage| usage.unit() == volume_usage::Unit::Bytes).unwrap().total;
        let least = if name == "pvc-2" { 600 } else { 440 };
        assert!(total > least * MIB, "{name} has {total} bytes");
    }

    // A snapshot handle that someone wrote by hand works, too.
    let by_hand = from_snapshot(wanted("pvc-5", 0, &writer()), &url);
    let by_hand = client.create(by_hand).await.unwrap();

    // What is deleted is gone, and what is in use is not.
    let refused = client.delete(&larger.volume_id).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    for name in ["pvc-2", "pvc-3", "pvc-4"] {
        let id = format!("{}/{name}", volume.volume_id.split('/').next().unwrap());
        client.unpublish(&machine, &id, name).await.unwrap();
        client.delete(&id).await.unwrap();
    }
    client.delete(&by_hand.volume_id).await.unwrap();
    client.unpublish(&machine, &volume.volume_id, "a").await.unwrap();
    client.delete(&volume.volume_id).await.unwrap();
    // What may name another snapshot tomorrow deletes none, and neither does the name of a volume that is not in it.
    for moving in [url.as_str(), "main#team/data/@latest/data"] {
        let refused = client.delete_snapshot(moving).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    }
    let elsewhere = format!("{}-too", snapshot.snapshot_id);
    client.delete_snapshot(&elsewhere).await.unwrap();
    client.delete_snapshot("main#team/data/never/data").await.unwrap();
    let listed = machine.petra(&["ls", &format!("{}#team/data", machine.repository())]);
    assert!(listed.contains("snapshot-1"), "{listed}");
    client.delete_snapshot(&snapshot.snapshot_id).await.unwrap();
    client.delete_snapshot(&snapshot.snapshot_id).await.unwrap();
    let again = from_snapshot(wanted("pvc-6", 0, &writer()), &snapshot.snapshot_id);
    assert_eq!(client.create(again).await.unwrap_err().code(), Code::NotFound);
    machine.assert_nothing_left().await;
    wait_until("no pin is left", || machine.pins() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_is_one_point_in_time() {
    let Some(mut machine) = Machine::new() else { return };
    machine.pool("pool", "btrfs");
    let client = machine.start_all().await;
    let mut ids = vec![];
    let mut files = vec![];
    for name in ["pvc-a", "pvc-b", "pvc-c"] {
        let volume = client.create(wanted(name, 256 * MIB, &writer())).await.unwrap();
        let at = client.publish(&machine, &volume.volume_id, &writer(), name).await.unwrap();
        let file = File::options().create(true).truncate(false).write(true).open(at.join("stamp"));
        files.push(file.unwrap());
        ids.push(volume.volume_id);
    }
    let stop = AtomicBool::new(false);
    let group = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            // Each stamp is durable before the next volume gets it: in a group, stamps differ by one at most, and never
            // grow along the volumes.
            let mut stamp: u64 = 0;
            while !stop.load(Ordering::Relaxed) {
                stamp += 1;
                for file in &files {
                    file.write_all_at(&stamp.to_le_bytes(), 0).unwrap();
                    file.sync_data().unwrap();
                }
            }
            stamp
        });
        let group = tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(async {
                tokio::time::sleep(Duration::from_millis(300)).await;
                let mut last = None;
                for n in 0..5 {
                    let request = CreateVolumeGroupSnapshotRequest {
                        name: format!("group-{n}"),
                        source_volume_ids: ids.clone(),
                        ..Default::default()
                    };
                    let taken = client.groups.clone().create_volume_group_snapshot(request).await;
                    last = taken.unwrap().into_inner().group_snapshot;
                }
                last.unwrap()
            })
        });
        stop.store(true, Ordering::Relaxed);
        assert!(writer.join().unwrap() > 3);
        group
    });
    assert_eq!(group.snapshots.len(), 3);
    // All five, each with its members in the order of the volumes.
    for n in 0..5 {
        let request = CreateVolumeGroupSnapshotRequest {
            name: format!("group-{n}"),
            source_volume_ids: ids.clone(),
            ..Default::default()
        };
        let group = loop {
            let again = client.groups.clone().create_volume_group_snapshot(request.clone()).await;
            let group = again.unwrap().into_inner().group_snapshot.unwrap();
            if group.ready_to_use {
                break group;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        let mut stamps = vec![];
        for id in &ids {
            let member = group.snapshots.iter().find(|s| s.source_volume_id == *id).unwrap();
            assert_eq!(member.group_snapshot_id, group.group_snapshot_id);
            let name = format!("clone-{n}-{}", stamps.len());
            let clone = from_snapshot(wanted(&name, 0, &writer()), &member.snapshot_id);
            let clone = client.create(clone).await.unwrap();
            let at = client.publish(&machine, &clone.volume_id, &writer(), &name).await.unwrap();
            let bytes = fs::read(at.join("stamp")).unwrap();
            stamps.push(u64::from_le_bytes(bytes[..8].try_into().unwrap()));
            client.unpublish(&machine, &clone.volume_id, &name).await.unwrap();
            client.delete(&clone.volume_id).await.unwrap();
            // A member goes with its group only.
            let refused = client.delete_snapshot(&member.snapshot_id).await.unwrap_err();
            assert_eq!(refused.code(), Code::InvalidArgument);
        }
        // A member by a URL that someone wrote down: it is called what the caller calls it.
        let url = format!("main#default/pvc-a/group-{n}/pvc-b");
        let list = ListSnapshotsRequest { snapshot_id: url.clone(), ..Default::default() };
        let listed = client.controller.clone().list_snapshots(list).await.unwrap().into_inner();
        let [entry] = listed.entries.as_slice() else { panic!("{listed:?}") };
        let member = entry.snapshot.clone().unwrap();
        assert_eq!((&member.snapshot_id, &member.source_volume_id), (&url, &ids[1]));
        assert!(member.ready_to_use);
        let name = format!("by-url-{n}");
        let clone = client.create(from_snapshot(wanted(&name, 0, &writer()), &url)).await.unwrap();
        client.delete(&clone.volume_id).await.unwrap();
        assert!(stamps.windows(2).all(|pair| pair[0] >= pair[1]), "{stamps:?}");
        assert!(stamps[0] - stamps[2] <= 1, "{stamps:?}");
        let get = GetVolumeGroupSnapshotRequest {
            group_snapshot_id: group.group_snapshot_id.clone(),
            ..Default::default()
        };
        client.groups.clone().get_volume_group_snapshot(get.clone()).await.unwrap();
        let delete = DeleteVolumeGroupSnapshotRequest {
            group_snapshot_id: group.group_snapshot_id,
            ..Default::default()
        };
        client.groups.clone().delete_volume_group_snapshot(delete.clone()).await.unwrap();
        client.groups.clone().delete_volume_group_snapshot(delete).await.unwrap();
        let gone = client.groups.clone().get_volume_group_snapshot(get).await.unwrap_err();
        assert_eq!(gone.code(), Code::NotFound);
    }
}

/// The blocks that a stream tells of, each message of which has at most so many.
async fn blocks<T>(
    mut stream: tonic::Streaming<T>,
    of: impl Fn(T) -> (i64, Vec<BlockMetadata>),
    max: usize,
) -> (i64, Vec<BlockMetadata>) {
    let (mut size, mut all) = (0, vec![]);
    while let Some(message) = stream.message().await.unwrap() {
        let (bytes, some) = of(message);
        assert!(some.len() <= max);
        (size, all) = (bytes, [all, some].concat());
    }
    (size, all)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_rebuilt_from_changed_blocks() {
    let Some(mut machine) = Machine::new() else { return };
    machine.pool("pool", "xfs");
    let client = machine.start_all().await;
    let volume = client.create(wanted("raw", 200 * MIB, &block())).await.unwrap();
    let at = client.publish(&machine, &volume.volume_id, &block(), "raw").await.unwrap();
    let device = File::options().write(true).open(&at).unwrap();
    let write = |offset: i64, seed: u64, len: usize| {
        device.write_all_at(&noise(seed, len), offset as u64).unwrap();
    };
    let mut snapshots = vec![];
    let rounds: [&[(i64, usize)]; 3] = [
        &[(0, 3_000_000), (70 * MIB, 9_000_000), (199 * MIB, 1 << 20)],
        &[(1_000_000, 4096), (71 * MIB + 512, 1_500_000)],
        &[(0, 512), (120 * MIB, 5_000_000)],
    ];
    for (n, writes) in rounds.iter().enumerate() {
        for (m, (offset, len)) in writes.iter().enumerate() {
            write(*offset, (n * 10 + m) as u64, *len);
        }
        device.sync_all().unwrap();
        snapshots
            .push(client.ready_snapshot(&volume.volume_id, &format!("s{n}")).await.snapshot_id);
    }
    // The images themselves, to copy blocks from.
    let images: Vec<_> = (0..3)
        .map(|n| {
            let image = machine.path(&format!("s{n}.img"));
            machine.petra(&[
                "restore",
                &format!("{}#default/raw/s{n}", machine.repository()),
                image.to_str().unwrap(),
            ]);
            File::open(image).unwrap()
        })
        .collect();
    let rebuilt = File::create_new(machine.path("rebuilt")).unwrap();
    let copy = |from: &File, blocks: &[BlockMetadata]| {
        for block in blocks {
            let mut bytes = vec![0; block.size_bytes as usize];
            from.read_exact_at(&mut bytes, block.byte_offset as u64).unwrap();
            rebuilt.write_all_at(&bytes, block.byte_offset as u64).unwrap();
        }
    };
    let allocated = |from: i64| {
        let request = GetMetadataAllocatedRequest {
            snapshot_id: snapshots[0].clone(),
            starting_offset: from,
            max_results: 3,
            ..Default::default()
        };
        let mut client = client.metadata.clone();
        async move {
            let stream = client.get_metadata_allocated(request).await.unwrap().into_inner();
            blocks(stream, |m| (m.volume_capacity_bytes, m.block_metadata), 3).await
        }
    };
    let (size, first) = allocated(0).await;
    assert_eq!(size, 200 * MIB);
    rebuilt.set_len(size as u64).unwrap();
    copy(&images[0], &first);
    // From any offset on there are the same blocks.
    for from in [1, 70 * MIB, 75 * MIB + 1, 200 * MIB] {
        let (_, rest) = allocated(from).await;
        let expected: Vec<_> = first
            .iter()
            .filter(|block| block.byte_offset + block.size_bytes > from)
            .map(|block| {
                let start = block.byte_offset.max(from);
                (start, block.byte_offset + block.size_bytes - start)
            })
            .collect();
        let rest: Vec<_> = rest.iter().map(|block| (block.byte_offset, block.size_bytes)).collect();
        assert_eq!(rest, expected);
    }
    for n in 1..3 {
        let request = GetMetadataDeltaRequest {
            base_snapshot_id: snapshots[n - 1].clone(),
            target_snapshot_id: snapshots[n].clone(),
            ..Default::default()
        };
        let stream =
            client.metadata.clone().get_metadata_delta(request).await.unwrap().into_inner();
        let (_, delta) = blocks(stream, |m| (m.volume_capacity_bytes, m.block_metadata), 256).await;
        // From any offset the rest is the same.
        let from = delta[delta.len() / 2].byte_offset + 1;
        let request = GetMetadataDeltaRequest {
            base_snapshot_id: snapshots[n - 1].clone(),
            target_snapshot_id: snapshots[n].clone(),
            starting_offset: from,
            max_results: 2,
            ..Default::default()
        };
        let stream =
            client.metadata.clone().get_metadata_delta(request).await.unwrap().into_inner();
        let (_, rest) = blocks(stream, |m| (m.volume_capacity_bytes, m.block_metadata), 2).await;
        let ends = |blocks: &[BlockMetadata]| -> Vec<i64> {
            blocks.iter().map(|block| block.byte_offset + block.size_bytes).collect()
        };
        assert_eq!(ends(&rest), ends(&delta[delta.len() / 2..]));
        assert_eq!(rest[0].byte_offset, from);
        let changed: i64 = delta.iter().map(|block| block.size_bytes).sum();
        assert!(changed > 0 && changed < 20 * MIB, "{changed} bytes changed");
        copy(&images[n], &delta);
        assert_eq!(
            petra_tests::pool::hash(&machine.path("rebuilt")),
            petra_tests::pool::hash(&machine.path(&format!("s{n}.img")))
        );
    }
    let beyond = GetMetadataAllocatedRequest {
        snapshot_id: snapshots[0].clone(),
        starting_offset: 200 * MIB + 1,
        ..Default::default()
    };
    let refused = client.metadata.clone().get_metadata_allocated(beyond).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_driver_that_is_killed_leaves_lazy_clones_alone() {
    let Some(mut machine) = Machine::new() else { return };
    machine.pool("pool", "btrfs");
    machine.environment.push(("PETRA_LOG".to_owned(), "info".to_owned()));
    let client = machine.start_all().await;
    let volume = client.create(wanted("origin", 512 * MIB, &writer())).await.unwrap();
    let at = client.publish(&machine, &volume.volume_id, &writer(), "o").await.unwrap();
    write_files(&at, 1, 100);
    let snapshot = client.ready_snapshot(&volume.volume_id, "s").await;
    client.unpublish(&machine, &volume.volume_id, "o").await.unwrap();
    // Without its origin, a clone is lazy.
    client.delete(&volume.volume_id).await.unwrap();
    let clone = from_snapshot(wanted("clone", 0, &writer()), &snapshot.snapshot_id);
    let clone = client.create(clone).await.unwrap();
    let at = client.publish(&machine, &clone.volume_id, &writer(), "c").await.unwrap();
    machine.end_driver("-KILL");
    let reading = std::thread::spawn({
        let at = at.clone();
        move || has_files(&at, 1, 100)
    });
    write_files(&at, 2, 5);
    let client = machine.start_all().await;
    // The same calls again change nothing.
    client.publish(&machine, &clone.volume_id, &writer(), "c").await.unwrap();
    assert!(reading.join().unwrap());
    assert!(has_files(&at, 2, 5));
    // People are told: by the driver, and by who brings the clone its data.
    let pool = volume.volume_id.split('/').next().unwrap();
    let agent = || fs::read_to_string(format!("/run/petra/{pool}/agent.log")).unwrap_or_default();
    wait_until("the clone is full", || is_told(&agent(), "CloneFilled", &clone.volume_id)).await;
    let id = snapshot.snapshot_id.split(['@', '/']).nth(1).unwrap();
    assert!(is_told(&machine.log("all.sock"), "SnapshotUploaded", id));
    client.unpublish(&machine, &clone.volume_id, "c").await.unwrap();
    client.delete(&clone.volume_id).await.unwrap();
    machine.assert_nothing_left().await;
    wait_until("no pin is left", || machine.pins() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_outlives_its_volume_and_is_found_among_repositories() {
    let Some(mut machine) = Machine::new() else { return };
    machine.pool("pool", "xfs");
    // A repository that nobody here can open.
    let sealed = format!("file://{}", machine.path("sealed").display());
    machine.environment.push(("PETRA_PASSPHRASE".to_owned(), "somebody else's".to_owned()));
    machine.petra(&["init", "--encrypt", &sealed]);
    machine.environment.clear();
    let pool = format!("--pool={}", machine.path("pool").display());
    let sealed = format!("--repository=sealed={sealed}");
    let options = ["--role=all", "--node-name=here", &pool, &sealed];
    let client = machine.start("all.sock", &options).await;
    let volume = client.create(wanted("v", 64 * MIB, &writer())).await.unwrap();
    let taken = client.snapshot(&volume.volume_id, "s").await.unwrap();
    let listed = || async {
        let list = ListSnapshotsRequest::default();
        let listed = client.controller.clone().list_snapshots(list).await.unwrap().into_inner();
        listed.entries.into_iter().map(|entry| entry.snapshot.unwrap()).collect::<Vec<_>>()
    };
    while !listed().await.iter().any(|found| found.ready_to_use) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // The upload ended before anybody asked for it again, and the volume is gone. Its copy is let go of a moment after the
    // snapshot is there.
    while let Err(busy) = client.delete(&volume.volume_id).await {
        assert_eq!(busy.code(), Code::FailedPrecondition, "{busy}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let again = client.snapshot(&volume.volume_id, "s").await.unwrap();
    assert_eq!((&again.snapshot_id, again.ready_to_use), (&taken.snapshot_id, true));
    assert_eq!(listed().await, [again]);
    let never = client.snapshot(&volume.volume_id, "another").await.unwrap_err();
    assert_eq!(never.code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_nodes_read_one_snapshot() {
    let Some(mut machine) = Machine::new() else { return };
    machine.pool("pool", "xfs");
    let client = machine.start_all().await;
    let volume = client.create(wanted("origin", 300 * MIB, &writer())).await.unwrap();
    let at = client.publish(&machine, &volume.volume_id, &writer(), "o").await.unwrap();
    write_files(&at, 1, 10);
    let snapshot = client.ready_snapshot(&volume.volume_id, "s").await;
    let readers = mounted("", Mode::MultiNodeReaderOnly);
    let request = from_snapshot(wanted("shared", 0, &readers), &snapshot.snapshot_id);
    let shared = client.create(request.clone()).await.unwrap();
    assert_eq!(client.create(request.clone()).await.unwrap().volume_id, shared.volume_id);
    assert!(shared.accessible_topology.is_empty());
    // The same again is the same volume, also of a URL that leads elsewhere by now; something else is refused.
    let latest = from_snapshot(wanted("latest", 0, &readers), "main#default/origin/@latest/origin");
    let first = client.create(latest.clone()).await.unwrap();
    let later = client.ready_snapshot(&volume.volume_id, "later").await;
    assert_eq!(client.create(latest).await.unwrap().volume_id, first.volume_id);
    let other = from_snapshot(wanted("shared", 0, &readers), &later.snapshot_id);
    assert_eq!(client.create(other).await.unwrap_err().code(), Code::AlreadyExists);
    // An id that does not fit is no volume, and has no pin.
    let pins = machine.pins();
    let long = machine.path(&"long".repeat(25));
    std::os::unix::fs::symlink(machine.path("repository"), &long).unwrap();
    let long = format!("file://{}#default/origin/s/origin", long.display());
    let refused = from_snapshot(wanted("long", 0, &readers), &long);
    assert_eq!(client.create(refused).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(machine.pins(), pins);
    // They are in the list, page by page and while others come and go.
    let list = |from: &str, max_entries| {
        let request = ListVolumesRequest { max_entries, starting_token: from.to_owned() };
        let mut client = client.controller.clone();
        async move {
            let listed = client.list_volumes(request).await.unwrap().into_inner();
            let volumes = listed.entries.into_iter().map(|entry| entry.volume.unwrap());
            let known = volumes.map(|volume| (volume.volume_id, volume.capacity_bytes));
            (known.collect::<Vec<_>>(), listed.next_token)
        }
    };
    let mut all = [&volume, &first, &shared].map(|v| (v.volume_id.clone(), 300 * MIB));
    all.sort();
    assert_eq!(list("", 0).await, (all.to_vec(), String::new()));
    let (page, token) = list("", 1).await;
    assert_eq!(page, all[..1]);
    let (page, token) = list(&token, 1).await;
    assert_eq!((page.as_slice(), token.as_str()), (&all[1..2], all[1].0.as_str()));
    // What is in a repository without a name is not gone.
    let unnamed = first.volume_id.replace("/main#", "/other#");
    assert_eq!(client.delete(&unnamed).await.unwrap_err().code(), Code::FailedPrecondition);
    let unnamed = later.snapshot_id.replace("main#", "other#");
    let refused = client.delete_snapshot(&unnamed).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    client.delete(&first.volume_id).await.unwrap();
    let last = list(&token, 1).await;
    assert_eq!(
        last.0,
        all.iter().skip(2).filter(|v| v.0 != first.volume_id).cloned().collect::<Vec<_>>()
    );
    assert!(list("", 0).await.0.iter().all(|listed| listed.0 != first.volume_id));
    client.delete_snapshot(&later.snapshot_id).await.unwrap();
    let at = client.publish(&machine, &shared.volume_id, &readers, "r").await.unwrap();
    assert!(has_files(&at, 1, 10));
    assert!(fs::write(at.join("x"), "x").is_err());
    // The snapshot goes, the readers stay.
    client.delete_snapshot(&snapshot.snapshot_id).await.unwrap();
    machine.petra(&["gc", &machine.repository(), "--grace", "0"]);
    client.unpublish(&machine, &shared.volume_id, "r").await.unwrap();
    let at = client.publish(&machine, &shared.volume_id, &readers, "r").await.unwrap();
    assert!(has_files(&at, 1, 10));
    client.unpublish(&machine, &shared.volume_id, "r").await.unwrap();
    client.delete(&shared.volume_id).await.unwrap();
    client.unpublish(&machine, &volume.volume_id, "o").await.unwrap();
    client.delete(&volume.volume_id).await.unwrap();
    machine.assert_nothing_left().await;
    wait_until("no pin is left", || machine.pins() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_repositories_without_a_name_is_listed() {
    let Some(mut machine) = Machine::new() else { return };
    machine.pool("pool", "xfs");
    let each = format!("file://{}", machine.path("per/{experiment}").display());
    for team in ["a", "b"] {
        machine.petra(&["init", &each.replace("{experiment}", team)]);
    }
    let client = machine.start_all().await;
    let mut taken = vec![];
    for team in ["a", "b"] {
        let mut request = wanted(&format!("of-{team}"), 64 * MIB, &writer());
        let class = [("repository", each.as_str()), ("experiment", team)];
        request.parameters = class.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let volume = client.create(request).await.unwrap();
        let at = client.publish(&machine, &volume.volume_id, &writer(), team).await.unwrap();
        write_files(&at, 1, 2);
        taken.push(client.ready_snapshot(&volume.volume_id, &format!("s-{team}")).await);
        client.unpublish(&machine, &volume.volume_id, team).await.unwrap();
        client.delete(&volume.volume_id).await.unwrap();
    }
    let readers = mounted("", Mode::MultiNodeReaderOnly);
    let request = from_snapshot(wanted("r", 0, &readers), &taken[1].snapshot_id);
    let shared = client.create(request).await.unwrap();
    // Nobody has to have asked before, and nothing but the repositories has to be left.
    machine.end_driver("-KILL");
    let client = machine.start_all().await;
    let list = |request: ListSnapshotsRequest| {
        let mut client = client.controller.clone();
        async move {
            let listed = client.list_snapshots(request).await.unwrap().into_inner();
            let snapshots = listed.entries.into_iter().map(|entry| entry.snapshot.unwrap());
            (snapshots.collect::<Vec<_>>(), listed.next_token)
        }
    };
    taken.sort_by(|a, b| a.snapshot_id.cmp(&b.snapshot_id));
    assert_eq!(list(ListSnapshotsRequest::default()).await, (taken.clone(), String::new()));
    let page = ListSnapshotsRequest { max_entries: 1, ..Default::default() };
    let (first, token) = list(page.clone()).await;
    let (second, end) = list(ListSnapshotsRequest { starting_token: token, ..page }).await;
    assert_eq!(([first, second].concat(), end.as_str()), (taken.clone(), ""));
    for snapshot in &taken {
        let id = snapshot.snapshot_id.clone();
        let by_id = ListSnapshotsRequest { snapshot_id: id, ..Default::default() };
        assert_eq!(list(by_id).await.0, std::slice::from_ref(snapshot));
    }
    let volumes = client.controller.clone().list_volumes(ListVolumesRequest::default()).await;
    let volumes = volumes.unwrap().into_inner().entries;
    assert_eq!(volumes.len(), 1);
    assert_eq!(volumes[0].volume.as_ref().unwrap().volume_id, shared.volume_id);
    // A repository that is gone takes nothing with it.
    fs::rename(machine.path("per/a"), machine.path("per/gone")).unwrap();
    machine.end_driver("-KILL");
    let client = machine.start_all().await;
    let listed = client.controller.clone().list_snapshots(ListSnapshotsRequest::default()).await;
    assert_eq!(listed.unwrap().into_inner().entries.len(), 1);
    client.delete(&shared.volume_id).await.unwrap();
    machine.assert_nothing_left().await;
}
