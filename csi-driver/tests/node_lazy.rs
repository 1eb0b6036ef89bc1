//! A lazy clone on a node, with the processes behind it. Needs root, loop devices, FUSE and the program `petra`.
//!
//! Apart from the other tests: while an image server is dead, programs that look at all loop devices fail, as mkfs.btrfs
//! does.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a test may panic"
)]

#[path = "node/lab.rs"]
#[allow(dead_code, reason = "each test binary uses its part")]
mod lab;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use petra_tests::lazy::wait_until;
use petra_tests::pool::TestPool;
use petra_tests::require;
use petra_tests::volume::noise;
use petra_volume::BackendKind;
use petra_volume::pool::Filesystem;
use rustix::process::{Pid, Signal, kill_process};
use tonic::Code;

use lab::{How, Lab, MIB, write};

/// The program `petra`: beside this test, where a build of the workspace puts it, or where the environment says.
fn petra() -> Option<PathBuf> {
    let built = || {
        let test = std::env::current_exe().ok()?;
        Some(test.parent()?.parent()?.join("petra"))
    };
    let program = std::env::var_os("PETRA_TEST_PROGRAM").map(PathBuf::from).or_else(built);
    let found = program.filter(|program| program.is_file());
    if found.is_none() {
        require::unmet("the program petra is not built");
    }
    found
}

fn run(program: &Path, words: &[&str]) {
    let mut command = Command::new(program);
    let done = command.args(words).output().unwrap();
    assert!(done.status.success(), "{words:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// The processes whose command lines have these words: an own directory is among them.
fn processes(words: [&str; 2]) -> Vec<Pid> {
    let mut found = vec![];
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        if words.iter().all(|word| line.contains(word)) {
            found.extend(Pid::from_raw(id));
        }
    }
    found
}

/// Ends processes, and waits for that.
fn kill(words: [&str; 2], signal: Signal) {
    wait_until("the end of a process", || {
        let found = processes(words);
        for process in &found {
            let _ = kill_process(*process, signal);
        }
        found.is_empty()
    });
}

/// True when all threads of a process stand still.
fn is_stopped(process: Pid) -> bool {
    let threads = fs::read_dir(format!("/proc/{}/task", process.as_raw_nonzero())).unwrap();
    threads.flatten().all(|thread| {
        fs::read_to_string(thread.path().join("stat")).is_ok_and(|stat| stat.contains(") T "))
    })
}

/// Ends the agent of a pool, also after a panic.
struct Agent(PathBuf);

impl Drop for Agent {
    fn drop(&mut self) {
        for process in processes(["agent", self.0.to_str().unwrap_or_default()]) {
            let _ = kill_process(process, Signal::TERM);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lazy_clone_lives_on_a_node() {
    let Some(program) = petra() else { return };
    let (Some(near), Some(far)) =
        (TestPool::new(BackendKind::Btrfs), TestPool::new(BackendKind::Xfs))
    else {
        return;
    };
    // A snapshot of a volume with some files.
    let data = |n: u64| noise(n, 700_000);
    let origin = near.create("v", 64 * MIB, Filesystem::Ext4);
    let mut locked = origin.lock().unwrap();
    locked.mount(&near.path("at"), false).unwrap();
    for n in 0..20 {
        write(&near.path("at").join(n.to_string()), &data(n));
    }
    locked.unmount().unwrap();
    locked.detach().unwrap();
    let repo = format!("file://{}", near.path("repo").display());
    run(&program, &["init", &repo]);
    let source = format!("v={}", origin.image().display());
    run(&program, &["snapshot", &source, &format!("{repo}#e/r"), "--name", "first"]);
    let root = far.pool.root().to_str().unwrap().to_owned();
    let url = format!("{repo}#e/r/first/v");
    run(&program, &["clone", "--pool", &root, &url, "there"]);

    let _agent = Agent(far.pool.root().to_owned());
    let lab = Lab::over(far, program);
    let volume = lab.pool.pool.volumes().unwrap().pop().unwrap();
    let id = lab.id(&volume);
    let how = || How::mount(&[]);
    for _ in 0..2 {
        lab.stage_with(&id, "staging", how(), &[("passphrase", "secret")]).await.unwrap();
    }
    {
        let kept = lab.clones.kept.lock().unwrap();
        assert!(kept.iter().all(|(url, secrets)| *url == repo && secrets.len() == 1));
    }
    lab.publish(&id, "one", how(), false).await.unwrap();
    let file = |n: u64| lab.file("one").join(n.to_string());
    assert_eq!(fs::read(file(3)).unwrap(), data(3));
    assert_eq!(lab.trouble(&id, "one").await, None);
    assert_eq!(lab.expand(&id, "one", 0).await, Ok(64 * MIB));
    assert_eq!(lab.expand(&id, "one", 128 * MIB).await, Err(Code::FailedPrecondition));
    write(&lab.file("one").join("new"), b"text");

    let server = || ["image-server", root.as_str()];
    // A server that hangs is told of, too, as often as one asks.
    let servers = processes(server());
    assert_eq!(servers.len(), 1);
    for process in &servers {
        kill_process(*process, Signal::STOP).unwrap();
        wait_until("a stop", || is_stopped(*process));
    }
    let (first, second) = tokio::join!(lab.trouble(&id, "one"), lab.trouble(&id, "one"));
    for process in &servers {
        kill_process(*process, Signal::CONT).unwrap();
    }
    for trouble in [first, second] {
        let trouble = trouble.expect("a server that does not answer");
        assert!(trouble.contains("did not answer"), "{trouble}");
    }
    wait_until("its recovery", || fs::read(file(5)).is_ok_and(|bytes| bytes == data(5)));

    // An image server that dies alone has a successor, and nobody notices.
    for process in processes(server()) {
        kill_process(process, Signal::KILL).unwrap();
    }
    assert_eq!(fs::read(file(4)).unwrap(), data(4));
    // What is read may be in memory: on a busy machine the successor comes later than anybody waits for it.
    let begun = Instant::now();
    while let Some(trouble) = lab.trouble(&id, "one").await {
        assert!(begun.elapsed() < Duration::from_secs(60), "{trouble}");
    }

    // With the agent it is gone for good, which is told and not waited for.
    kill(["agent", root.as_str()], Signal::KILL);
    kill(server(), Signal::KILL);
    // Who dies has lost his command line before his files: for a moment reads fail while he seems to live.
    let begun = Instant::now();
    loop {
        let trouble = lab.trouble(&id, "one").await.expect("a server that is dead");
        if trouble.contains("image server") {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{trouble}");
    }
    assert_eq!(lab.stage(&id, "staging", how()).await, Err(Code::FailedPrecondition));
    lab.unpublish(&id, "one").await.unwrap();
    // Nothing but the staging uses it: it is repaired. Someone may just have made a mount namespace with a copy of all
    // mounts, which keeps the device until it ends.
    let begun = Instant::now();
    while let Err(code) = lab.stage(&id, "staging", how()).await {
        assert!(code == Code::FailedPrecondition && begun.elapsed() < Duration::from_secs(60));
    }
    lab.publish(&id, "one", how(), false).await.unwrap();
    for n in 0..20 {
        assert_eq!(fs::read(file(n)).unwrap(), data(n));
    }
    assert_eq!(fs::read(lab.file("one").join("new")).unwrap(), b"text");
    assert_eq!(lab.trouble(&id, "one").await, None);

    wait_until("all of its data", || volume.state().unwrap().lazy.is_none_or(|lazy| lazy.hydrated));
    lab.unpublish(&id, "one").await.unwrap();
    lab.unstage(&id, "staging").await.unwrap();
    assert!(lab.is_clean());
    // All is here: from now on there is no server, and it grows like any other.
    lab.stage(&id, "staging", how()).await.unwrap();
    assert!(processes(server()).is_empty());
    lab.unstage(&id, "staging").await.unwrap();
    assert!(volume.state().unwrap().lazy.is_none());
    volume.lock().unwrap().grow(128 * MIB).unwrap();
    lab.stage(&id, "staging", how()).await.unwrap();
    assert!(lab.stats(&id, "staging").await.unwrap().usage[0].total > 100 << 20);
    lab.unstage(&id, "staging").await.unwrap();
    assert!(lab.is_clean());
}
