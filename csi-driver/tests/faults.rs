//! Drivers that are killed: at every step of a call, and at random. Callers come again, as Kubernetes does, and everything
//! converges: the data is right, nothing is left.
//!
//! `PETRA_TEST_ROUNDS` makes more of them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a test may panic"
)]

mod common;

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::*;
use petra_csi::proto::csi::volume_capability::access_mode::Mode;
use petra_csi::proto::csi::*;
use petra_tests::require;
use petra_tests::volume::noise;
use tonic::{Code, Status};

/// What changes something outside of a process.
const STEPS: &str = "rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,mount,umount2,move_mount,open_tree,\
                     mount_setattr,ioctl,fsync,fdatasync,ftruncate,flock,execve";

fn rounds(default: u64) -> u64 {
    std::env::var("PETRA_TEST_ROUNDS").map_or(default, |text| text.parse().unwrap())
}

/// Someone who does every call until it is done, whatever happens to the driver.
struct Stubborn {
    machine: Machine,
    client: Client,
    restarts: u64,
}

impl Stubborn {
    async fn new(filesystem: &str) -> Option<Self> {
        let mut machine = Machine::new()?;
        machine.pool("pool", filesystem);
        let client = machine.start_all().await;
        Some(Self { machine, client, restarts: 0 })
    }

    fn driver(&self) -> u32 {
        let socket = format!("unix://{}", self.machine.path("all.sock").display());
        let found = Command::new("pgrep").args(["-f", &format!("petra-csi.*{socket}")]).output();
        let found = String::from_utf8(found.unwrap().stdout).unwrap();
        found.lines().next().and_then(|line| line.parse().ok()).unwrap_or(0)
    }

    async fn call<T, F: Future<Output = Result<T, Status>>>(
        &mut self,
        what: &str,
        call: impl Fn(Client) -> F,
    ) -> T {
        let begun = Instant::now();
        loop {
            let status = match call(self.client.clone()).await {
                Ok(done) => return done,
                Err(status) => status,
            };
            assert!(begun.elapsed() < PATIENCE, "{what} never works: {status}");
            // Whatever was killed, the call may be told anything but that it makes no sense.
            let nonsense = [Code::InvalidArgument, Code::AlreadyExists, Code::OutOfRange];
            assert!(!nonsense.contains(&status.code()), "{what}: {status}");
            if self.driver() == 0 {
                self.restarts += 1;
                self.restart(begun).await;
            } else {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }

    /// Starts drivers until one lives long enough to answer.
    async fn restart(&mut self, begun: Instant) {
        let socket = self.machine.path("all.sock");
        loop {
            if self.driver() == 0 {
                self.machine.end_driver("-KILL");
                self.machine.launch_all();
            }
            if let Ok(client) = Client::connect(&socket).await {
                self.client = client;
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "no driver: {}", self.machine.log("all.sock"));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn create(&mut self, request: CreateVolumeRequest) -> String {
        let made = self.call("create", |client| {
            let request = request.clone();
            async move { client.create(request).await }
        });
        made.await.volume_id
    }

    async fn delete(&mut self, id: &str) {
        self.call("delete", |client| {
            let id = id.to_owned();
            async move { client.delete(&id).await }
        })
        .await;
    }

    async fn publish(&mut self, id: &str, name: &str) -> PathBuf {
        self.publish_as(id, name, &writer()).await
    }

    async fn publish_as(&mut self, id: &str, name: &str, how: &VolumeCapability) -> PathBuf {
        let target = self.machine.path(&format!("target-{name}"));
        let staging = self.machine.path(&format!("staging-{name}"));
        fs::create_dir_all(&staging).unwrap();
        let (staging, target_text) = (text(&staging), text(&target));
        self.call("publish", |client| {
            let (volume_id, how) = (id.to_owned(), Some(how.clone()));
            let (staging, target) = (staging.clone(), target_text.clone());
            async move {
                let stage = NodeStageVolumeRequest {
                    volume_id: volume_id.clone(),
                    staging_target_path: staging.clone(),
                    volume_capability: how.clone(),
                    ..Default::default()
                };
                client.node.clone().node_stage_volume(stage).await?;
                let publish = NodePublishVolumeRequest {
                    volume_id,
                    staging_target_path: staging,
                    target_path: target,
                    volume_capability: how,
                    ..Default::default()
                };
                client.node.clone().node_publish_volume(publish).await
            }
        })
        .await;
        target
    }

    async fn unpublish(&mut self, id: &str, name: &str) {
        let target = text(&self.machine.path(&format!("target-{name}")));
        let staging = text(&self.machine.path(&format!("staging-{name}")));
        self.call("unpublish", |client| {
            let (volume_id, staging, target) = (id.to_owned(), staging.clone(), target.clone());
            async move {
                let volume_id_too = volume_id.clone();
                let request = NodeUnpublishVolumeRequest { volume_id, target_path: target };
                client.node.clone().node_unpublish_volume(request).await?;
                let request = NodeUnstageVolumeRequest {
                    volume_id: volume_id_too,
                    staging_target_path: staging,
                };
                client.node.clone().node_unstage_volume(request).await
            }
        })
        .await;
    }

    /// Publishes a volume, and sees that it has these bytes. What is behind a clone may be killed as well: then its reader
    /// fails, and another one comes.
    async fn has(&mut self, id: &str, name: &str, how: &VolumeCapability, bytes: &[u8]) {
        let begun = Instant::now();
        loop {
            let at = self.publish_as(id, name, how).await;
            match fs::read(at.join("file")) {
                Ok(found) => return assert!(found == bytes, "{name} has other bytes"),
                Err(error) => assert!(begun.elapsed() < PATIENCE, "{name} is never read: {error}"),
            }
            self.unpublish(id, name).await;
        }
    }

    /// The life of a volume: made, written, snapshotted, cloned, deleted.
    async fn life(&mut self, round: u64) {
        let name = format!("v{round}");
        let volume = self.create(wanted(&name, 64 * MIB, &writer())).await;
        let at = self.publish(&volume, &name).await;
        let bytes = noise(round, 1_000_000);
        fs::write(at.join("file"), &bytes).unwrap();
        let begun = Instant::now();
        let snapshot = loop {
            let taken = self.call("snapshot", |client| {
                let (volume, name) = (volume.clone(), format!("s{round}"));
                async move { client.snapshot(&volume, &name).await }
            });
            let taken = taken.await;
            if taken.ready_to_use {
                break taken.snapshot_id;
            }
            assert!(begun.elapsed() < PATIENCE, "the snapshot is never uploaded");
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        let clone_name = format!("c{round}");
        let clone = self.create(from_snapshot(wanted(&clone_name, 0, &writer()), &snapshot)).await;
        self.has(&clone, &clone_name, &writer(), &bytes).await;
        for (id, name) in [(&clone, &clone_name), (&volume, &name)] {
            self.unpublish(id, name).await;
            self.delete(id).await;
        }
        self.call("delete snapshot", |client| {
            let id = snapshot.clone();
            async move { client.delete_snapshot(&id).await }
        })
        .await;
    }

    /// The life of a group: two volumes, one of which grows, a snapshot of both; and when they are gone, a lazy clone of
    /// the one, and readers of the other.
    async fn life_of_group(&mut self, round: u64) {
        let bytes = [noise(round, 1_000_000), noise(round + 1000, 1_000_000)];
        let names = ["a", "b"].map(|name| format!("{name}{round}"));
        let mut volumes = vec![];
        for (name, bytes) in names.iter().zip(&bytes) {
            let volume = self.create(wanted(name, 64 * MIB, &writer())).await;
            let at = self.publish(&volume, name).await;
            fs::write(at.join("file"), bytes).unwrap();
            volumes.push(volume);
        }
        let grown = self.call("expand", |client| {
            let expand = ControllerExpandVolumeRequest {
                volume_id: volumes[0].clone(),
                capacity_range: Some(CapacityRange { required_bytes: 96 * MIB, limit_bytes: 0 }),
                ..Default::default()
            };
            async move { client.controller.clone().controller_expand_volume(expand).await }
        });
        assert_eq!(grown.await.into_inner().capacity_bytes, 96 * MIB);
        let begun = Instant::now();
        let group = loop {
            let taken = self.call("group snapshot", |client| {
                let take = CreateVolumeGroupSnapshotRequest {
                    name: format!("g{round}"),
                    source_volume_ids: volumes.clone(),
                    ..Default::default()
                };
                async move { client.groups.clone().create_volume_group_snapshot(take).await }
            });
            let group = taken.await.into_inner().group_snapshot.unwrap();
            if group.ready_to_use {
                break group;
            }
            assert!(begun.elapsed() < PATIENCE, "the group is never uploaded");
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        for (volume, name) in volumes.iter().zip(&names) {
            self.unpublish(volume, name).await;
            self.delete(volume).await;
        }
        let readers = mounted("", Mode::MultiNodeReaderOnly);
        for ((volume, bytes), how) in volumes.iter().zip(&bytes).zip([writer(), readers]) {
            let name = format!("of-{}", volume.rsplit('/').next().unwrap());
            let member = group.snapshots.iter().find(|member| member.source_volume_id == *volume);
            let id = &member.unwrap().snapshot_id;
            let clone = self.create(from_snapshot(wanted(&name, 0, &how), id)).await;
            self.has(&clone, &name, &how, bytes).await;
            self.unpublish(&clone, &name).await;
            self.delete(&clone).await;
        }
        self.call("delete group", |client| {
            let group_snapshot_id = group.group_snapshot_id.clone();
            let delete =
                DeleteVolumeGroupSnapshotRequest { group_snapshot_id, ..Default::default() };
            async move { client.groups.clone().delete_volume_group_snapshot(delete).await }
        })
        .await;
    }
}

/// Kills whatever of a process and its children comes to its step of this number.
fn kill_at(process: u32, step: u64) -> Child {
    let inject = format!("inject={STEPS}:signal=KILL:when={step}");
    let child = Command::new("strace")
        .args(["-f", "-qq", "-e", &format!("trace={STEPS}"), "-e", &inject, "-e", "signal=none"])
        .args(["-o", "/dev/null", "-p", &process.to_string()])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // It is attached when all threads are traced.
    let begun = Instant::now();
    let tracer = format!("TracerPid:\t{}", child.id());
    while !fs::read_to_string(format!("/proc/{process}/status"))
        .unwrap_or_default()
        .contains(&tracer)
    {
        assert!(begun.elapsed() < PATIENCE, "strace does not attach");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

/// Lives as many lives as there are rounds, each with a kill so many steps later than the one before.
async fn killed_at_steps(rounds: u64, stride: u64, of_groups: bool) {
    if require::tool("strace").is_none() {
        return;
    }
    let Some(mut stubborn) = Stubborn::new("xfs").await else { return };
    for round in 0..rounds {
        // Each thread counts for itself.
        let mut strace = kill_at(stubborn.driver(), 1 + round * stride);
        if of_groups {
            stubborn.life_of_group(round).await;
        } else {
            stubborn.life(round).await;
        }
        strace.kill().unwrap();
        strace.wait().unwrap();
        stubborn.machine.assert_nothing_left().await;
        let pins = || stubborn.machine.pins() == 0;
        wait_until("no pin is left", pins).await;
    }
    assert!(stubborn.restarts > 0, "nothing was killed");
    println!("{} drivers killed in {rounds} rounds", stubborn.restarts);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_driver_may_be_killed_at_every_step() {
    killed_at_steps(rounds(24), 1, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_driver_may_be_killed_at_steps_of_a_group() {
    killed_at_steps(rounds(10), 3, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn drivers_agents_and_uploads_may_be_killed_at_any_time() {
    let Some(mut stubborn) = Stubborn::new("btrfs").await else { return };
    let home = stubborn.machine.path("").display().to_string();
    let stop = AtomicBool::new(false);
    let seed = std::env::var("PETRA_TEST_SEED").map_or(1, |text| text.parse().unwrap());
    println!("PETRA_TEST_SEED={seed}");
    std::thread::scope(|scope| {
        let killer = scope.spawn(|| {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut kills = 0;
            while !stop.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(random.u64(20..500)));
                let victim = ["petra-csi", "pool agent", "volume upload", "freeze-guard"];
                let victim = victim[[0, 0, 0, 1, 2, 2, 2, 3][random.usize(..8)]];
                let killed = Command::new("pkill")
                    .args(["-KILL", "-f", &format!("{victim}.*{home}")])
                    .status();
                kills += u64::from(killed.unwrap().success());
            }
            kills
        });
        let lived = tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(async {
                // The killer must end, also after a panic.
                let stubborn = std::panic::AssertUnwindSafe(&mut stubborn);
                futures::FutureExt::catch_unwind(std::panic::AssertUnwindSafe(async move {
                    let stubborn = stubborn;
                    for round in 0..rounds(12) {
                        stubborn.0.life(round).await;
                    }
                }))
                .await
            })
        });
        stop.store(true, Ordering::Relaxed);
        let kills = killer.join().unwrap();
        if let Err(panic) = lived {
            std::panic::resume_unwind(panic);
        }
        assert!(kills > 0, "nothing was killed");
        println!("{kills} processes killed");
    });
    // A last call makes sure that a driver is there to clear up.
    stubborn
        .call("probe", |client| async move { client.identity.clone().probe(ProbeRequest {}).await })
        .await;
    stubborn.machine.assert_nothing_left().await;
    wait_until("no pin is left", || stubborn.machine.pins() == 0).await;
    stubborn.machine.petra(&["gc", &stubborn.machine.repository(), "--grace", "0"]);
    stubborn.machine.petra(&["verify", &stubborn.machine.repository(), "--read-data"]);
}
