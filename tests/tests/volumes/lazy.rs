//! Lazy images through real mounts: what is read, what is written, and what survives what.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{IoSlice, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use petra_engine::store::StoreErrorCause;
use petra_tests::lab::objects;
use petra_tests::lazy::{Agent, ImageServer, LazyLab, wait_until};
use petra_tests::recording::{Fate, Operation};
use petra_tests::require;
use petra_tests::volume::{Volume, noise, prose};
use petra_volume::fuse::Negotiated;
use petra_volume::lazy::presence::{BootId, Presence};
use petra_volume::lazy::wire::{HEADER_BYTES, Header, Hello, ToAgent, ToServer};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;

/// Noise, prose, and zeros between.
fn volume() -> Volume {
    Volume::zeros(150 * MIB)
        .with(0, &noise(1, 5 << 20))
        .with(20 * MIB + 4096, &prose(2, 3 << 20))
        .with(63 * MIB, &noise(3, 4 << 20))
        .with(149 * MIB, &noise(4, 1 << 20))
}

fn open(lab: &LazyLab) -> File {
    OpenOptions::new().read(true).write(true).open(lab.file()).unwrap()
}

fn read(file: &File, at: u64, len: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, at).map(|()| bytes)
}

/// A lab with a server, an agent and the open file; `None` where this machine can't.
fn start(volume: &Volume, direct: bool, hydrate: bool) -> Option<(LazyLab, Agent, ImageServer)> {
    let lab = LazyLab::new(volume, direct)?;
    let agent = lab.agent(hydrate);
    let server = lab.server();
    Some((lab, agent, server))
}

#[test]
fn everything_comes_when_it_is_read() {
    for direct in [false, true] {
        let volume = volume();
        let Some((lab, _agent, server)) = start(&volume, direct, false) else { return };
        let file = open(&lab);
        // Backwards, so that no read-ahead helps; across bounds of blocks, chunks and segments.
        for at in (0..150 * MIB - 70_000).rev().step_by(3_333_333) {
            let found = read(&file, at, 70_000).unwrap();
            assert!(found == volume.read(at..at + 70_000), "other bytes at {at}");
        }
        drop(file);
        assert_eq!(volume.difference(&lab.file()), None);
        let requests = lab.store.log().len();
        assert_eq!(volume.difference(&lab.file()), None);
        assert_eq!(lab.store.log().len(), requests, "what is there is not fetched again");
        server.unmount();
        assert_eq!(volume.difference(&lab.dir.path().join("image")), None);
    }
}

/// What lies beyond the snapshot is there from the beginning, and zeros; the snapshot may end in the midst of a block.
#[test]
fn a_clone_is_larger_than_its_snapshot() {
    for (source_bytes, direct) in
        [(12 * MIB, true), (12 * MIB + 512, true), (9 * MIB + 3584, false)]
    {
        let volume = Volume::zeros(source_bytes)
            .with(3 * MIB, &noise(1, 2 << 20))
            .with(source_bytes - 100_000, &noise(2, 100_000));
        let Some(lab) = LazyLab::larger(&volume, 150 * MIB, direct) else { return };
        let agent = lab.agent(false);
        let server = lab.server();
        let file = open(&lab);
        let mut expected = volume.clone();
        expected.resize(150 * MIB);
        // The far end first, which needs no agent, then around the snapshot's end.
        assert!(read(&file, 100 * MIB, 1 << 20).unwrap() == expected.read(100 * MIB..101 * MIB));
        let before = lab.store.log().len();
        file.write_all_at(&noise(3, 1 << 16), 140 * MIB).unwrap();
        expected.write(140 * MIB, &noise(3, 1 << 16));
        assert_eq!(lab.store.log().len(), before, "nothing of it comes from the repository");
        let end = source_bytes / BLOCK * BLOCK;
        for at in [end + 8192, end, end - 8192] {
            assert!(read(&file, at, 8192).unwrap() == expected.read(at..at + 8192), "at {at}");
        }
        drop(agent);
        let agent = lab.agent(true);
        agent.wait_for("Hydrated");
        drop(file);
        assert_eq!(expected.difference(&lab.file()), None);
        server.unmount();
        assert_eq!(expected.difference(&lab.dir.path().join("image")), None);
    }
}

#[test]
fn hydration_brings_all_and_the_repository_is_not_needed_any_more() {
    let volume = volume();
    let Some((lab, agent, server)) = start(&volume, true, true) else { return };
    agent.wait_for("Hydrated");
    lab.store.rule(|_, _| Fate::Fail(StoreErrorCause::Unavailable));
    drop(agent);
    assert_eq!(volume.difference(&lab.file()), None);
    server.unmount();
    assert_eq!(volume.difference(&lab.dir.path().join("image")), None);
    assert!(!lab.dir.path().join("working").exists(), "the volume was closed");
    // What was zeros takes no room.
    let allocated = std::os::unix::fs::MetadataExt::blocks(
        &std::fs::metadata(lab.dir.path().join("image")).unwrap(),
    ) * 512;
    assert!(allocated < volume.data_bytes() + 4 * MIB, "{allocated} bytes");
}

/// Reads one message.
fn receive(stream: &mut UnixStream) -> (Header, Vec<u8>) {
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).unwrap();
    let header = Header::parse(&header).unwrap();
    let mut body = vec![0; header.body_bytes];
    stream.read_exact(&mut body).unwrap();
    (header, body)
}

/// What is asked after data was sent is answered when all of that data is stored.
#[test]
fn questions_and_flushes_follow_the_data_before_them() {
    let volume = Volume::noise(7, 64 << 20);
    let Some(lab) = LazyLab::new(&volume, false) else { return };
    let listener = UnixListener::bind(lab.dir.path().join("socket")).unwrap();
    let mut server = lab.server();
    let (mut stream, _) = listener.accept().unwrap();
    receive(&mut stream);
    stream.write_all(&ToServer::Welcome.encode()).unwrap();
    for (question, half) in [(1, 0..32 * MIB), (2, 32 * MIB..64 * MIB)] {
        for offset in half.clone().step_by(1 << 20) {
            let bytes = volume.read(offset..offset + MIB);
            stream.write_all(&ToServer::Data { offset, bytes: &bytes }.encode()).unwrap();
        }
        let ask = ToServer::AskAbsent { question, range: 0..64 * MIB };
        stream.write_all(&ask.encode()).unwrap();
        stream.write_all(&ToServer::Flush { question }.encode()).unwrap();
        let (header, body) = receive(&mut stream);
        let absent = (half.end < 64 * MIB).then_some(half.end..64 * MIB);
        let ranges = absent.into_iter().collect();
        let expected = ToAgent::Absent { question, end: 64 * MIB, ranges };
        assert_eq!(ToAgent::decode(header, &body), Ok(expected));
        let (header, body) = receive(&mut stream);
        let expected = ToAgent::Flushed { question, done: true };
        assert_eq!(ToAgent::decode(header, &body), Ok(expected));
        // What a restart of the machine would leave.
        let path = lab.dir.path().join("presence");
        let durable = File::open(&path).unwrap();
        let copy = lab.dir.path().join(format!("copy-{question}"));
        std::io::copy(&mut &durable, &mut File::create(&copy).unwrap()).unwrap();
        let copy = OpenOptions::new().read(true).write(true).open(copy).unwrap();
        let working = lab.dir.path().join(format!("working-{question}"));
        let boot = BootId([9; 16]);
        let presence = Presence::load(copy, &path, &working, lab.identity, boot).unwrap();
        assert_eq!(presence.present_blocks() * BLOCK, half.end);
    }
    assert_eq!(volume.difference(&lab.file()), None);
    server.kill();
    server.clear_mount();
}

#[test]
fn hydration_leaves_the_reserve_alone() {
    let volume = volume();
    let Some(lab) = LazyLab::new(&volume, false) else { return };
    let agent = lab.agent(true);
    agent.set_short(true);
    let server = lab.server();
    agent.wait_for("RoomShort");
    assert!(read(&open(&lab), 0, 4096).unwrap() == volume.read(0..4096), "what is read comes");
    std::thread::sleep(Duration::from_millis(1500));
    let image = std::fs::metadata(lab.dir.path().join("image")).unwrap();
    let allocated = std::os::unix::fs::MetadataExt::blocks(&image) * 512;
    assert!(allocated < volume.data_bytes() / 2, "{allocated} bytes");
    assert!(!agent.events().contains(&"Hydrated".to_owned()));
    agent.set_short(false);
    agent.wait_for("Hydrated");
    let told = agent.events().iter().filter(|event| *event == "RoomShort").count();
    assert_eq!(told, 1, "once");
    server.unmount();
    assert_eq!(volume.difference(&lab.dir.path().join("image")), None);
}

/// What can't be made durable is not hydrated; it is said, and tried again.
#[test]
fn a_flush_that_fails_is_tried_again() {
    let Some(lab) = LazyLab::new(&Volume::zeros(MIB), false) else { return };
    let agent = lab.agent(true);
    let mut stream = UnixStream::connect(lab.dir.path().join("socket")).unwrap();
    let negotiated = Negotiated { minor: 31, max_write: 4096, resend: false };
    let hello = ToAgent::Hello(Hello { volume: lab.identity, negotiated }).encode();
    let device = File::open("/dev/null").unwrap();
    let device = [device.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&device)));
    let sent = sendmsg(&stream, &[IoSlice::new(&hello)], &mut control, SendFlags::NOSIGNAL);
    assert_eq!(sent, Ok(hello.len()));
    let mut flushes = 0;
    while flushes < 2 {
        let (header, body) = receive(&mut stream);
        let answer = match ToServer::decode(header, &body).unwrap() {
            ToServer::AskAbsent { question, range } => {
                ToAgent::Absent { question, end: range.end, ranges: vec![] }
            }
            ToServer::Flush { question } => {
                flushes += 1;
                assert!(!agent.events().contains(&"Hydrated".to_owned()));
                ToAgent::Flushed { question, done: flushes > 1 }
            }
            _ => continue,
        };
        stream.write_all(&answer.encode()).unwrap();
    }
    agent.wait_for("Hydrated");
    assert_eq!(agent.events(), ["FlushFailed", "Hydrated"]);
}

#[test]
fn a_volume_whose_length_is_no_multiple_of_a_block() {
    let volume = Volume::noise(9, 3_000_001);
    let Some((lab, agent, server)) = start(&volume, false, true) else { return };
    assert_eq!(volume.difference(&lab.file()), None);
    let mut file = open(&lab);
    file.write_all_at(b"end", 2_999_998).unwrap();
    assert!(file.write_all_at(b"past", 2_999_999).is_err());
    let mut all = Vec::new();
    file.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), 3_000_001);
    drop(file);
    agent.wait_for("Hydrated");
    server.unmount();
    let expected = volume.with(2_999_998, b"end");
    assert_eq!(expected.difference(&lab.dir.path().join("image")), None);
}

/// What an application does, and a model of it.
fn write_at_random(lab: &LazyLab, model: &mut Volume, seed: u64, count: usize, unit: u64) {
    let file = open(lab);
    let mut random = fastrand::Rng::with_seed(seed);
    for n in 0..count {
        let at = random.u64(0..model.len() / unit) * unit;
        let len = (random.u64(1..=300_000 / unit) * unit).min(model.len() - at);
        match random.u8(0..10) {
            0..6 => {
                let bytes = noise(seed + n as u64, len as usize);
                file.write_all_at(&bytes, at).unwrap();
                model.write(at, &bytes);
            }
            6 => {
                use rustix::fs::{FallocateFlags, fallocate};
                let how = [FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE];
                let how = how[random.usize(0..2)] | FallocateFlags::KEEP_SIZE;
                fallocate(&file, how, at, len).unwrap();
                model.zero(at..at + len);
            }
            7 => file.sync_data().unwrap(),
            _ => {
                let found = read(&file, at, len as usize).unwrap();
                assert!(found == model.read(at..at + len), "step {n}: other bytes at {at}");
            }
        }
    }
}

#[test]
fn writes_while_the_data_comes_are_those_of_a_model() {
    for (direct, unit) in [(false, 1), (false, 512), (true, BLOCK)] {
        let mut model = volume();
        let Some((lab, agent, server)) = start(&model, direct, true) else { return };
        write_at_random(&lab, &mut model, 1000, 300, unit);
        assert_eq!(model.difference(&lab.file()), None);
        agent.wait_for("Hydrated");
        write_at_random(&lab, &mut model, 2000, 50, unit);
        server.unmount();
        assert_eq!(model.difference(&lab.dir.path().join("image")), None);
    }
}

#[test]
fn reads_wait_for_the_next_agent() {
    let volume = volume();
    let Some((lab, agent, _server)) = start(&volume, false, false) else { return };
    let file = open(&lab);
    assert!(read(&file, 0, 4096).is_ok());
    agent.kill();
    // Present data goes on.
    assert!(read(&file, 0, 4096).unwrap() == volume.read(0..4096));
    let waiting: Vec<_> = [21 * MIB, 64 * MIB, 149 * MIB]
        .into_iter()
        .map(|at| {
            let file = file.try_clone().unwrap();
            std::thread::spawn(move || (at, read(&file, at, 100_000).unwrap()))
        })
        .collect();
    std::thread::sleep(Duration::from_millis(200));
    assert!(waiting.iter().all(|thread| !thread.is_finished()));
    assert!(read(&file, 0, 4096).is_ok(), "those that wait keep nobody else");
    let agent = lab.agent(false);
    for thread in waiting {
        let (at, found) = thread.join().unwrap();
        assert!(found == volume.read(at..at + 100_000));
    }
    drop(agent);
}

#[test]
fn reads_wait_while_the_store_is_away() {
    let volume = volume();
    let Some((lab, agent, _server)) = start(&volume, false, false) else { return };
    let file = open(&lab);
    assert!(read(&file, 0, 4096).is_ok());
    lab.store.rule(|_, _| Fate::Fail(StoreErrorCause::Unavailable));
    let begun = Instant::now();
    let thread = {
        let file = file.try_clone().unwrap();
        std::thread::spawn(move || read(&file, 64 * MIB, 4096).unwrap())
    };
    agent.wait_for("StoreAway");
    // Longer than the longest pause between attempts.
    std::thread::sleep(Duration::from_secs(10));
    assert!(!thread.is_finished());
    lab.store.reset();
    assert!(thread.join().unwrap() == volume.read(64 * MIB..64 * MIB + 4096));
    assert!(begun.elapsed() >= Duration::from_secs(10));
    agent.wait_for("StoreBack");
}

#[test]
fn patience_ends() {
    let Some(lab) = LazyLab::new(&volume(), false) else { return };
    let _server = lab.server_with(Duration::from_millis(300), None);
    let begun = Instant::now();
    let error = read(&open(&lab), 0, 4096).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
    assert!(begun.elapsed() >= Duration::from_millis(300), "{:?}", begun.elapsed());
}

#[test]
fn a_process_that_waits_can_be_killed() {
    let Some(lab) = LazyLab::new(&volume(), false) else { return };
    let _server = lab.server();
    let mut reader = Command::new("head").args(["-c", "10"]).arg(lab.file()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert!(reader.try_wait().unwrap().is_none());
    reader.kill().unwrap();
    let begun = Instant::now();
    reader.wait().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_corrupt_chunk_is_an_error_for_its_range_only() {
    let volume = Volume::noise(5, 8 << 20);
    let Some(lab) = LazyLab::new(&volume, false) else { return };
    // The last byte of the first pack's data belongs to some frame; one in the middle of a chunk to one chunk.
    let packs = lab.runtime.block_on(objects(lab.repo.store(), "packs/"));
    let largest = packs.iter().max_by_key(|pack| pack.len).unwrap();
    lab.memory.damage(&largest.key, |mut body| {
        body[3_000_000] ^= 1;
        Some(body)
    });
    let agent = lab.agent(true);
    let server = lab.server();
    agent.wait_for("Incomplete");
    agent.wait_for("Damaged");
    let file = open(&lab);
    let mut bad = Vec::new();
    for at in (0..8 * MIB).step_by(BLOCK as usize) {
        match read(&file, at, BLOCK as usize) {
            Ok(found) => assert!(found == volume.read(at..at + BLOCK), "other bytes at {at}"),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
                bad.push(at / BLOCK);
            }
        }
    }
    // A chunk of at most 32 KiB, with the blocks that it shares with its neighbours.
    assert!(!bad.is_empty() && bad.len() <= 10, "{bad:?}");
    assert!(bad.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{bad:?}");
    // Whole blocks can be overwritten, and are there then.
    let at = bad[0] * BLOCK;
    let len = bad.len() * BLOCK as usize;
    file.write_all_at(&noise(6, len), at).unwrap();
    assert!(read(&file, at, len).unwrap() == noise(6, len));
    drop(file);
    server.unmount();
}

#[test]
fn a_start_list_is_what_was_read_and_comes_first() {
    let volume = volume();
    let Some(lab) = LazyLab::new(&volume, false) else { return };
    let agent = lab.agent_with(false, vec![], Some(Duration::from_millis(500)));
    let server = lab.server();
    let file = open(&lab);
    for at in [64 * MIB, 2 * MIB, 149 * MIB] {
        assert!(read(&file, at, 4096).is_ok());
    }
    agent.wait_for("Recorded");
    let recorded = agent.recorded();
    let starts: Vec<u64> = recorded.iter().map(|range| range.start / MIB).collect();
    assert_eq!(starts, [64, 2, 149], "{recorded:?}");
    drop(file);
    drop(agent);
    drop(server);

    // Another clone, with only so many requests.
    let lab = LazyLab::new(&volume, false).unwrap();
    lab.store.rule(|_, call| {
        if call.is(Operation::GetRange, "packs/") {
            Fate::Delay(Duration::from_millis(20))
        } else {
            Fate::Pass
        }
    });
    let agent = lab.agent_with(true, recorded.clone(), None);
    let _server = lab.server();
    let begun = Instant::now();
    let file = open(&lab);
    for range in recorded {
        assert!(read(&file, range.start, 4096).is_ok());
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    agent.wait_for("Hydrated");
}

/// A loop device over the image, detached whatever happens.
struct Loop(PathBuf);

impl Loop {
    fn attach(lab: &LazyLab) -> Self {
        let mut losetup = Command::new("losetup");
        losetup.args(["--find", "--show", "--direct-io=on"]);
        if lab.direct {
            losetup.args(["--sector-size", "4096"]);
        }
        let answer = losetup.arg(lab.file()).output().unwrap();
        assert!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stderr));
        Self(String::from_utf8(answer.stdout).unwrap().trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// A mount of it, undone whatever happens.
struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn mount(device: &Loop, at: &'a Path) -> Self {
        std::fs::create_dir_all(at).unwrap();
        let mounted = Command::new("mount").arg(&device.0).arg(at).output().unwrap();
        assert!(mounted.status.success(), "{}", String::from_utf8_lossy(&mounted.stderr));
        Self(at)
    }

    fn unmount(self) {
        let done = Command::new("umount").arg(self.0).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        std::mem::forget(self);
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0).status();
    }
}

/// An ext4 with files, as a volume, and its files.
fn ext4() -> Option<(Volume, BTreeMap<String, Vec<u8>>)> {
    if !require::root() {
        return None;
    }
    let mkfs = require::tool("mkfs.ext4")?;
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    let mut files = BTreeMap::new();
    for n in 0..60_u64 {
        let name = format!("directory-{}/file-{n}", n % 7);
        let len = (n * n * 400) as usize;
        let bytes = if n % 2 == 0 { noise(n, len) } else { prose(n, len) };
        let path = tree.join(&name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, &bytes).unwrap();
        files.insert(name, bytes);
    }
    let image = dir.path().join("image");
    File::create(&image).unwrap().set_len(200 * MIB).unwrap();
    let mut make = Command::new(mkfs);
    make.args(["-q", "-F", "-b", "4096", "-E", "lazy_itable_init=0,nodiscard", "-d"]);
    let made = make.arg(&tree).arg(&image).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let bytes = std::fs::read(&image).unwrap();
    Some((Volume::zeros(200 * MIB).with(0, &bytes), files))
}

fn compare(at: &Path, files: &BTreeMap<String, Vec<u8>>) {
    for (name, bytes) in files {
        assert!(std::fs::read(at.join(name)).unwrap() == *bytes, "{name} differs");
    }
}

#[test]
fn a_file_system_on_a_loop_device_on_a_lazy_image() {
    let Some((volume, mut files)) = ext4() else { return };
    for direct in [false, true] {
        let Some((lab, agent, server)) = start(&volume, direct, false) else { return };
        let device = Loop::attach(&lab);
        let at = lab.dir.path().join("mounted");
        let mounted = Mounted::mount(&device, &at);
        compare(&at, &files);
        for n in 0..20_u64 {
            let (name, bytes) = (format!("new-{n}"), noise(n + 500, 300_000));
            std::fs::write(at.join(&name), &bytes).unwrap();
            files.insert(name, bytes);
        }
        std::fs::remove_dir_all(at.join("directory-3")).unwrap();
        files.retain(|name, _| !name.starts_with("directory-3/"));
        // Discards go down to the image.
        let trimmed = Command::new("fstrim").arg(&at).output().unwrap();
        assert!(trimmed.status.success(), "{}", String::from_utf8_lossy(&trimmed.stderr));
        compare(&at, &files);
        mounted.unmount();
        drop(device);
        drop(agent);

        // The rest comes; then the image is used natively.
        let agent = lab.agent(true);
        agent.wait_for("Hydrated");
        wait_until("the loop's end", || {
            Command::new("umount").arg(lab.file().parent().unwrap()).status().unwrap().success()
        });
        drop(server);
        let check = Command::new("e2fsck").args(["-fn"]).arg(lab.dir.path().join("image")).output();
        let check = check.unwrap();
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
        if direct {
            return;
        }
        files = ext4().unwrap().1;
    }
}

/// Applications that write and read while `disturb` runs, and meet no error.
fn under_load(lab: &LazyLab, volume: &Volume, disturb: impl FnOnce()) -> Volume {
    let stop = AtomicBool::new(false);
    let done = AtomicU64::new(0);
    let writers = 3;
    let share = volume.len() / writers / BLOCK * BLOCK;
    let models: Vec<Volume> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..writers)
            .map(|writer| {
                let (stop, done) = (&stop, &done);
                let mut model = volume.clone();
                scope.spawn(move || {
                    let file = open(lab);
                    let mut random = fastrand::Rng::with_seed(writer);
                    for n in 0.. {
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                        let len = random.u64(1..20) * BLOCK;
                        let at = writer * share + random.u64(0..(share - len) / BLOCK) * BLOCK;
                        if random.bool() {
                            let bytes = noise(writer << 32 | n, len as usize);
                            file.write_all_at(&bytes, at).unwrap();
                            model.write(at, &bytes);
                        } else {
                            let found = read(&file, at, len as usize).unwrap();
                            assert!(found == model.read(at..at + len), "other bytes at {at}");
                        }
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                    model
                })
            })
            .collect();
        wait_until("some work", || done.load(Ordering::Relaxed) > 50);
        disturb();
        let before = done.load(Ordering::Relaxed);
        wait_until("more work", || done.load(Ordering::Relaxed) > before + 100);
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let mut all = volume.clone();
    for (writer, model) in (0..).zip(models) {
        let range = writer * share..(writer + 1) * share;
        all.zero(range.clone());
        all.write(range.start, &model.read(range));
    }
    all
}

#[test]
fn a_killed_server_has_a_successor_and_nobody_notices() {
    for direct in [false, true] {
        let volume = volume();
        let Some((lab, agent, first)) = start(&volume, direct, true) else { return };
        let mut servers = vec![first];
        let model = under_load(&lab, &volume, || {
            for _ in 0..3 {
                servers.last_mut().unwrap().kill();
                let inherited = agent.inheritance();
                servers.push(lab.server_with(Duration::from_secs(60), Some(inherited)));
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        assert_eq!(model.difference(&lab.file()), None);
        agent.wait_for("Hydrated");
        servers.pop().unwrap().unmount();
        assert_eq!(model.difference(&lab.dir.path().join("image")), None);
    }
}

#[test]
fn a_request_that_waits_for_data_waits_on_with_the_successor() {
    let volume = volume();
    let Some((lab, agent, mut first)) = start(&volume, false, false) else { return };
    let file = open(&lab);
    assert!(read(&file, 0, 4096).is_ok());
    lab.store.rule(|_, _| Fate::Fail(StoreErrorCause::Unavailable));
    let thread = {
        let file = file.try_clone().unwrap();
        std::thread::spawn(move || read(&file, 64 * MIB, 8192).unwrap())
    };
    agent.wait_for("StoreAway");
    first.kill();
    let second = lab.server_with(Duration::from_secs(60), Some(agent.inheritance()));
    std::thread::sleep(Duration::from_millis(100));
    assert!(!thread.is_finished());
    lab.store.reset();
    assert!(thread.join().unwrap() == volume.read(64 * MIB..64 * MIB + 8192));
    drop(file);
    second.unmount();
}

#[test]
fn without_a_holder_there_are_errors_and_no_acknowledged_write_is_lost() {
    for direct in [false, true] {
        let mut model = volume();
        let Some((lab, agent, mut server)) = start(&model, direct, false) else { return };
        write_at_random(&lab, &mut model, 77, 150, BLOCK);
        let file = open(&lab);
        agent.kill();
        server.kill();
        assert!(read(&file, 0, 4096).is_err());
        drop(file);
        server.clear_mount();
        drop(server);

        let agent = lab.agent(true);
        let server = lab.server();
        assert_eq!(model.difference(&lab.file()), None);
        agent.wait_for("Hydrated");
        server.unmount();
        assert_eq!(model.difference(&lab.dir.path().join("image")), None);
    }
}

#[test]
fn many_readers_of_one_place_cause_one_fetch() {
    let volume = Volume::noise(5, 8 << 20);
    let Some((lab, _agent, _server)) = start(&volume, false, false) else { return };
    lab.store.rule(|_, _| Fate::Delay(Duration::from_millis(50)));
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                let found = read(&open(&lab), 1_000_000, 5000).unwrap();
                assert!(found == volume.read(1_000_000..1_005_000));
            });
        }
    });
    // The root, the leaf, and frames in one or two requests.
    let requests = lab.store.log().len();
    assert!(requests <= 4, "{requests} requests");
}

#[test]
fn a_mounted_file_system_goes_on_while_its_server_is_replaced() {
    let Some((volume, mut files)) = ext4() else { return };
    let Some((lab, agent, mut server)) = start(&volume, true, true) else { return };
    let device = Loop::attach(&lab);
    let at = lab.dir.path().join("mounted");
    let mounted = Mounted::mount(&device, &at);
    let stop = AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut written = BTreeMap::new();
            // Some 60 MiB of room, used again and again.
            for n in 0_u64.. {
                if stop.load(Ordering::Relaxed) && n > 50 {
                    break;
                }
                let (name, bytes) = (format!("new-{}", n % 100), noise(n + 500, 200_000));
                std::fs::write(at.join(&name), &bytes).unwrap();
                if n.is_multiple_of(5) {
                    File::open(at.join(&name)).unwrap().sync_all().unwrap();
                }
                written.insert(name, bytes);
            }
            written
        });
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(150));
            server.kill();
            server = lab.server_with(Duration::from_secs(60), Some(agent.inheritance()));
        }
        compare(&at, &files);
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap()
    });
    files.extend(written);
    compare(&at, &files);
    mounted.unmount();
    let mounted = Mounted::mount(&device, &at);
    compare(&at, &files);
    mounted.unmount();
    drop(device);
    agent.wait_for("Hydrated");
    server.unmount();
    let check = Command::new("e2fsck").args(["-fn"]).arg(lab.dir.path().join("image")).output();
    let check = check.unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
}
