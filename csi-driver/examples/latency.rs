//! Measures how long pods wait for their volumes:
//!
//! ```text
//! cargo build --release -p petra && cargo run --release -p petra-csi --example latency
//! ```
//!
//! It needs root and versitygw (a real S3 server), and starts a driver with a pool of its own on a file.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a program for people who measure"
)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use common::*;
use futures::future::join_all;
use petra_tests::s3::VersityGw;
use petra_tests::volume::noise;

const CLONES: usize = 50;
const GIB: i64 = 1 << 30;

/// From the first call until a pod could start.
async fn start(machine: &Machine, client: &Client, name: &str, snapshot: &str) -> Duration {
    let begun = Instant::now();
    let request = from_snapshot(wanted(name, 0, &writer()), snapshot);
    let volume = persistently(|| client.create(request.clone())).await.unwrap();
    client.publish(machine, &volume.volume_id, &writer(), name).await.unwrap();
    begun.elapsed()
}

async fn end(machine: &Machine, client: &Client, pool: &str, name: &str) {
    let id = format!("{pool}/{name}");
    client.unpublish(machine, &id, name).await.unwrap();
    persistently(|| client.delete(&id)).await.unwrap();
}

fn peak_rss_mib(pattern: &str) -> u64 {
    let found = Command::new("pgrep").args(["-f", pattern]).output().unwrap();
    let found = String::from_utf8(found.stdout).unwrap();
    let status = fs::read_to_string(format!("/proc/{}/status", found.lines().next().unwrap()));
    let status = status.unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

fn median(mut samples: Vec<Duration>) -> u128 {
    samples.sort_unstable();
    samples[samples.len() / 2].as_millis()
}

#[tokio::main]
async fn main() {
    let mut machine = Machine::new().expect("root and the program petra");
    let server = VersityGw::start().expect("versitygw");
    let environment = server.access().environment();
    machine.environment.extend(environment.map(|(name, value)| (name.to_owned(), value)));
    let url = server.access().url("p").to_string();
    machine.petra(&["init", &url]);
    machine.pool("pool", "btrfs");
    let pool = format!("--pool={}", machine.path("pool").display());
    let store = format!("--repository=store={url}");
    let client =
        machine.start("all.sock", &["--role=all", "--node-name=here", &pool, &store]).await;
    println!("| what | measured | goal |\n|---|---|---|");
    for (size, name) in [(8 * GIB, "8g"), (1024 * GIB, "1t")] {
        let mut request = wanted(&format!("origin-{name}"), size, &writer());
        request.parameters = [("repository".to_owned(), "store".to_owned())].into();
        let origin = client.create(request).await.unwrap().volume_id;
        let at = client.publish(&machine, &origin, &writer(), "origin").await.unwrap();
        for n in 0..50 {
            fs::write(at.join(n.to_string()), noise(n, 4 << 20)).unwrap();
        }
        let snapshot = client.ready_snapshot(&origin, &format!("s-{name}")).await.snapshot_id;
        let pool = origin.split('/').next().unwrap().to_owned();
        client.unpublish(&machine, &origin, "origin").await.unwrap();
        let mut samples = vec![];
        for n in 0..9 {
            let clone = format!("c-{name}-{n}");
            samples.push(start(&machine, &client, &clone, &snapshot).await);
            end(&machine, &client, &pool, &clone).await;
        }
        println!(
            "| create, stage, publish of {name} on the same node | {} ms | <= 300 ms |",
            median(samples)
        );
        if name == "8g" {
            let begun = Instant::now();
            let names: Vec<_> = (0..CLONES).map(|n| format!("many-{n}")).collect();
            join_all(names.iter().map(|name| start(&machine, &client, name, &snapshot))).await;
            let took = begun.elapsed();
            for name in &names {
                for n in 0..50 {
                    let file = machine.path(&format!("target-{name}")).join(n.to_string());
                    assert!(fs::read(file).unwrap() == noise(n, 4 << 20), "{name} has other bytes");
                }
            }
            let rss = peak_rss_mib("petra-csi --endpoint");
            for name in &names {
                end(&machine, &client, &pool, name).await;
            }
            println!(
                "| {CLONES} clones of it, created and published in parallel | {:.2} s, driver's peak RSS {rss} MiB | <= 10 s, 400 MiB |",
                took.as_secs_f64()
            );
        }
        // Without its origin, and so without a copy on this node, a clone is lazy.
        persistently(|| client.delete(&origin)).await.unwrap();
        let mut samples = vec![];
        for n in 0..5 {
            let clone = format!("l-{name}-{n}");
            samples.push(start(&machine, &client, &clone, &snapshot).await);
            end(&machine, &client, &pool, &clone).await;
        }
        println!("| the same, lazily from S3 on loopback | {} ms | <= 800 ms |", median(samples));
    }
}
