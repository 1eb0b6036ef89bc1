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

    async fn publish(&mut self, id: &str, name: &str) -> PathBuf {
        let target = self.machine.path(&format!("target-{name}"));
        let staging = self.machine.path(&format!("staging-{name}"));
        fs::create_dir_all(&staging).unwrap();
        let (staging, target_text) = (text(&staging), text(&target));
        self.call("publish", |client| {
            let (volume_id, staging, target) =
                (id.to_owned(), staging.clone(), target_text.clone());
            async move {
                use petra_csi::proto::csi::{NodePublishVolumeRequest, NodeStageVolumeRequest};
                let stage = NodeStageVolumeRequest {
                    volume_id: volume_id.clone(),
                    staging_target_path: staging.clone(),
                    volume_capability: Some(writer()),
                    ..Default::default()
                };
                client.node.clone().node_stage_volume(stage).await?;
                let publish = NodePublishVolumeRequest {
                    volume_id,
                    staging_target_path: staging,
                    target_path: target,
                    volume_capability: Some(writer()),
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
                use petra_csi::proto::csi::{NodeUnpublishVolumeRequest, NodeUnstageVolumeRequest};
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

    /// The life of a volume: made, written, snapshotted, cloned, deleted.
    async fn life(&mut self, round: u64) {
        let name = format!("v{round}");
        let request = wanted(&name, 64 * MIB, &writer());
        let volume = self.call("create", |client| {
            let request = request.clone();
            async move { client.create(request).await }
        });
        let volume = volume.await.volume_id;
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
        let request = from_snapshot(wanted(&clone_name, 0, &writer()), &snapshot);
        let clone = self.call("clone", |client| {
            let request = request.clone();
            async move { client.create(request).await }
        });
        let clone = clone.await.volume_id;
        let at = self.publish(&clone, &clone_name).await;
        assert!(fs::read(at.join("file")).unwrap() == bytes, "the clone has other bytes");
        for (id, name) in [(&clone, &clone_name), (&volume, &name)] {
            self.unpublish(id, name).await;
            self.call("delete", |client| {
                let id = id.clone();
                async move { client.delete(&id).await }
            })
            .await;
        }
        self.call("delete snapshot", |client| {
            let id = snapshot.clone();
            async move { client.delete_snapshot(&id).await }
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

#[tokio::test(flavor = "multi_thread")]
async fn a_driver_may_be_killed_at_every_step() {
    if require::tool("strace").is_none() {
        return;
    }
    let Some(mut stubborn) = Stubborn::new("xfs").await else { return };
    let rounds = rounds(24);
    for round in 0..rounds {
        // Each thread counts for itself.
        let mut strace = kill_at(stubborn.driver(), 1 + round);
        stubborn.life(round).await;
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
        .call("probe", |client| async move {
            client.identity.clone().probe(petra_csi::proto::csi::ProbeRequest {}).await
        })
        .await;
    stubborn.machine.assert_nothing_left().await;
    wait_until("no pin is left", || stubborn.machine.pins() == 0).await;
    stubborn.machine.petra(&["gc", &stubborn.machine.repository(), "--grace", "0"]);
    stubborn.machine.petra(&["verify", &stubborn.machine.repository(), "--read-data"]);
}
