//! A frozen file system is thawed whatever dies.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use petra_tests::disk::Disk;
use petra_volume::freeze::{FrozenGroup, GuardCommand, thaw_all, while_frozen};
use petra_volume::{Error, ErrorKind};

const LONG: Duration = Duration::from_secs(60);
/// As long as a writer is given to show that it does not wait.
const MOMENT: Duration = Duration::from_millis(300);
const SIZE: u64 = 320 << 20;

fn guard() -> GuardCommand {
    GuardCommand::new(env!("CARGO_BIN_EXE_petra-test-freezer"), ["guard"])
}

fn mounts(disks: &[&Disk]) -> Vec<PathBuf> {
    disks.iter().map(|disk| disk.path().to_owned()).collect()
}

/// Starts to write, and says when that was possible.
fn write(to: &Path) -> Receiver<Instant> {
    let (done, written) = mpsc::channel();
    let path = to.join(format!("file-{:?}", thread::current().id()));
    thread::spawn(move || {
        let mut file = File::create(path).unwrap();
        file.write_all(b"bytes").unwrap();
        file.sync_all().unwrap();
        // The test may have ended.
        let _ = done.send(Instant::now());
    });
    written
}

fn is_frozen(disk: &Disk) -> bool {
    write(disk.path()).recv_timeout(MOMENT).is_err()
}

/// A process that freezes, and thaws when its input ends.
fn start(disks: &[&Disk]) -> (Child, impl FnMut() -> String + use<>) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_petra-test-freezer"));
    command.arg("freeze").args(mounts(disks)).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = move || said.next().unwrap().unwrap();
    assert_eq!(next(), "frozen");
    (child, next)
}

/// The guard of a process.
fn guard_of(parent: u32) -> rustix::process::Pid {
    for entry in fs::read_dir("/proc").unwrap() {
        let path = entry.unwrap().path();
        let status = fs::read_to_string(path.join("status")).unwrap_or_default();
        if status.lines().any(|line| line == format!("PPid:\t{parent}")) {
            let pid = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
            return rustix::process::Pid::from_raw(pid).unwrap();
        }
    }
    panic!("no guard of {parent}");
}

/// What there is to prepare before a freeze.
fn nothing() -> petra_volume::Result<()> {
    Ok(())
}

fn kill(process: rustix::process::Pid) {
    rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn a_group_stands_still_while_it_is_frozen() {
    let kinds = ["ext4", "xfs", "btrfs"];
    let disks: Vec<Disk> = kinds.iter().filter_map(|kind| Disk::make(kind, SIZE)).collect();
    if disks.len() < kinds.len() {
        return;
    }
    let all: Vec<&Disk> = disks.iter().collect();
    let (waiting, pause) = while_frozen(&mounts(&all), &guard(), LONG, nothing, || {
        let waiting: Vec<_> = disks.iter().map(|disk| write(disk.path())).collect();
        thread::sleep(MOMENT);
        assert!(waiting.iter().all(|written| written.try_recv().is_err()));
        Ok(waiting)
    })
    .unwrap();
    assert!(pause >= MOMENT && pause < 3 * MOMENT, "{pause:?}");
    for written in waiting {
        written.recv_timeout(MOMENT).unwrap();
    }
}

#[test]
fn what_goes_before_a_freeze_may_take_longer_than_the_freeze() {
    let Some(disk) = Disk::make("ext4", SIZE) else { return };
    let limit = Duration::from_secs(2);
    let prepare = || {
        thread::sleep(limit + MOMENT);
        Ok(())
    };
    let work = || {
        thread::sleep(MOMENT);
        Ok(())
    };
    while_frozen(&mounts(&[&disk]), &guard(), limit, prepare, work).unwrap();
    assert!(!is_frozen(&disk));
}

#[test]
fn one_file_system_named_twice_is_frozen_once() {
    let Some(disk) = Disk::make("ext4", SIZE) else { return };
    let twice = [disk.path().to_owned(), disk.path().join("lost+found/..")];
    while_frozen(&twice, &guard(), LONG, nothing, || Ok(())).unwrap();
    assert!(!is_frozen(&disk));
}

#[test]
fn work_that_fails_or_panics_leaves_nothing_frozen() {
    let Some(disk) = Disk::make("xfs", SIZE) else { return };
    let failed =
        while_frozen::<()>(&mounts(&[&disk]), &guard(), LONG, nothing, || Err(Error::Cancelled));
    assert!(matches!(failed, Err(Error::Cancelled)), "{failed:?}");
    assert!(!is_frozen(&disk));
    let panicked = thread::scope(|scope| {
        let work =
            || while_frozen::<()>(&mounts(&[&disk]), &guard(), LONG, nothing, || panic!("a test"));
        scope.spawn(work).join()
    });
    assert!(panicked.is_err());
    assert!(!is_frozen(&disk));
}

#[test]
fn the_guard_thaws_when_the_process_that_froze_is_killed() {
    let (Some(a), Some(b)) = (Disk::make("ext4", SIZE), Disk::make("xfs", SIZE)) else { return };
    let (mut child, _next) = start(&[&a, &b]);
    let waiting = [write(a.path()), write(b.path())];
    thread::sleep(MOMENT);
    assert!(waiting.iter().all(|written| written.try_recv().is_err()));
    let killed = Instant::now();
    child.kill().unwrap();
    for written in waiting {
        let at = written.recv_timeout(Duration::from_secs(1)).unwrap();
        assert!(at >= killed);
    }
    child.wait().unwrap();
}

#[test]
fn the_process_that_froze_thaws_without_its_guard() {
    let Some(disk) = Disk::make("xfs", SIZE) else { return };
    let (mut child, mut next) = start(&[&disk]);
    kill(guard_of(child.id()));
    assert!(is_frozen(&disk));
    drop(child.stdin.take());
    assert_eq!(next(), "thawed");
    assert!(!is_frozen(&disk));
    assert!(child.wait().unwrap().success());
}

#[test]
fn recovery_thaws_when_both_are_killed() {
    let (Some(a), Some(b)) = (Disk::make("ext4", SIZE), Disk::make("btrfs", SIZE)) else { return };
    let (mut child, _next) = start(&[&a]);
    kill(guard_of(child.id()));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(is_frozen(&a));
    let both = mounts(&[&a, &b]);
    assert_eq!(thaw_all(both.iter().map(PathBuf::as_path)).unwrap(), [a.path()]);
    assert!(!is_frozen(&a));
}

#[test]
fn copies_that_take_too_long_are_not_one_point_in_time() {
    let (Some(a), Some(b)) = (Disk::make("ext4", SIZE), Disk::make("xfs", SIZE)) else { return };
    let limit = Duration::from_millis(200);
    let begun = Instant::now();
    let result = while_frozen(&mounts(&[&a, &b]), &guard(), limit, nothing, || {
        write(a.path()).recv_timeout(Duration::from_secs(2)).unwrap();
        write(b.path()).recv_timeout(Duration::from_secs(2)).unwrap();
        Ok(())
    });
    let error = result.unwrap_err();
    assert!(matches!(error, Error::Thawed { .. }), "{error}");
    assert_eq!(error.kind(), ErrorKind::Retry);
    assert!(error.to_string().contains("by its guard, after 0.2 s"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(2));
}

#[test]
fn someone_elses_freeze_stays() {
    let (Some(a), Some(b)) = (Disk::make("xfs", SIZE), Disk::make("ext4", SIZE)) else { return };
    let freeze = |option: &str| {
        let status = Command::new("fsfreeze").arg(option).arg(a.path()).status().unwrap();
        assert!(status.success());
    };
    freeze("--freeze");
    let error = FrozenGroup::freeze(&mounts(&[&a, &b]), &guard(), LONG, nothing).unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error}");
    assert!(is_frozen(&a));
    assert!(!is_frozen(&b));
    freeze("--unfreeze");
    assert!(!is_frozen(&a));
}

#[test]
fn a_guard_that_can_not_be_started_freezes_nothing() {
    let Some(disk) = Disk::make("ext4", SIZE) else { return };
    let none = GuardCommand::new("/no/such/program", ["guard"]);
    let other = GuardCommand::new("/bin/echo", ["something else"]);
    for (command, words) in [(none, "/no/such/program"), (other, "something else")] {
        let error = FrozenGroup::freeze(&mounts(&[&disk]), &command, LONG, nothing).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert!(!is_frozen(&disk));
    }
}
