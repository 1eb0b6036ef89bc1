//! The agent of a pool, when repositories, image servers and commands get in its way. Needs the program `petra`.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use async_trait::async_trait;
use petra_engine::store::MemoryStore;
use petra_engine::{Error, Repository, SnapshotId};
use petra_tests::lab::{context, init, name, request_of};
use petra_tests::lazy::wait_until;
use petra_tests::pool::TestPool;
use petra_tests::require;
use petra_tests::volume::Volume as Model;
use petra_volume::agent::{Agent, Repositories};
use petra_volume::clones;
use petra_volume::volume::{DEFAULT_PATIENCE, Serving};
use petra_volume::{BackendKind, Programs, Volume};
use rustix::fs::OFlags;
use rustix::process::{Pid, Signal, kill_process};
use tokio::runtime::Runtime;
use tokio::task::AbortHandle;

use crate::clones::clone_request;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
/// A repository that never answers.
const DEAF: &str = "file:///deaf";

/// A repository that opens only for those who have the right secret, when there are any.
#[derive(Debug)]
struct Door {
    repo: Repository,
    is_open: AtomicBool,
    knocks: AtomicUsize,
}

#[async_trait]
impl Repositories for Door {
    async fn open(&self, url: &str) -> petra_engine::Result<Repository> {
        if url == DEAF {
            std::future::pending::<()>().await;
        }
        self.knocks.fetch_add(1, Ordering::Relaxed);
        if self.is_open.load(Ordering::Relaxed) {
            return Ok(self.repo.clone());
        }
        Err(Error::WrongKey { location: url.to_owned(), kind: "passphrase", tried: 1 })
    }
}

/// The program `petra`: beside this test, where a build of the workspace puts it.
fn petra() -> Option<PathBuf> {
    let test = std::env::current_exe().unwrap();
    let program = test.parent().and_then(Path::parent).unwrap().join("petra");
    if !program.is_file() {
        require::unmet("the program petra is not built");
        return None;
    }
    Some(program)
}

/// A lazy clone in a pool, with an agent in this process and an image server in its own.
struct Lab {
    agent: Option<AbortHandle>,
    volume: Volume,
    model: Model,
    door: Arc<Door>,
    programs: Programs,
    runtime: Runtime,
    pool: TestPool,
}

impl Lab {
    fn new() -> Option<Self> {
        let programs = Programs::new(petra()?, vec![]);
        let pool = TestPool::new(BackendKind::Xfs)?;
        let runtime = Runtime::new().unwrap();
        let model = Model::noise(1, 24 << 20);
        let (repo, snapshot) = runtime.block_on(async {
            let repo = init(Arc::new(MemoryStore::new())).await;
            let request = request_of("r", vec![(name("v"), Arc::new(model.clone()) as _)]);
            let snapshot = petra_engine::snapshot::snapshot(&repo, request, &context()).await;
            (repo, snapshot.unwrap())
        });
        let (volume, _) = runtime
            .block_on(clones::clone(
                &pool.pool,
                &repo,
                &clone_request("clone", &snapshot),
                &context(),
            ))
            .unwrap();
        let is_open = AtomicBool::new(true);
        let door = Arc::new(Door { repo, is_open, knocks: AtomicUsize::new(0) });
        Some(Self { agent: None, volume, model, door, programs, runtime, pool })
    }

    fn start_agent(&mut self) {
        let (pool, programs) = (self.pool.pool.clone(), self.programs.clone());
        let agent = Agent::new(pool, programs, self.door.clone(), context());
        let (ready, is_ready) = std::sync::mpsc::channel();
        let task = self.runtime.spawn(async move {
            agent.run(false, || ready.send(()).unwrap()).await.unwrap();
        });
        is_ready.recv().unwrap();
        self.agent = Some(task.abort_handle());
    }

    /// Ends the agent as kill -9 does.
    fn kill_agent(&mut self) {
        self.agent.take().unwrap().abort();
        wait_until("the agent's end", || !self.has_agent());
    }

    fn has_agent(&self) -> bool {
        let run = self.pool.pool.run_directory().unwrap();
        UnixStream::connect(run.join("agent.sock")).is_ok()
    }

    fn attach(&self) -> PathBuf {
        let serving = Serving { programs: self.programs.clone(), patience: DEFAULT_PATIENCE };
        self.volume.lock().unwrap().attach_served(&serving, false).unwrap().device
    }

    /// Kills the image server.
    fn kill_server(&self) {
        let servers = self.processes("image-server");
        assert_eq!(servers.len(), 1);
        for server in servers {
            kill_process(server, Signal::KILL).unwrap();
        }
    }

    /// The processes of this pool whose command lines have this word.
    fn processes(&self, word: &str) -> Vec<Pid> {
        let root = self.pool.pool.root().to_str().unwrap();
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let ours = |id: &i32| {
            let line = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            line.contains(word) && line.contains(root)
        };
        ids.filter(ours).filter_map(Pid::from_raw).collect()
    }

    fn hydrate(&self) {
        wait_until("all data", || self.volume.state().unwrap().lazy.unwrap().hydrated);
        // Also one that somebody is at work with.
        let pins = self.pool.pool.root().join("pins");
        wait_until("the end of its pin", || fs::read_dir(&pins).unwrap().count() == 0);
    }

    /// Compares some blocks with what they must be.
    fn check(&self, device: &Path, at: u64) {
        assert!(read(device, at) == self.model.read(at..at + BLOCK), "other bytes at {at}");
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Requests that wait would keep the device for ever.
        let servers = self.processes("image-server");
        for process in self.processes("agent").into_iter().chain(servers) {
            let _ = kill_process(process, Signal::KILL);
        }
        if let Some(agent) = self.agent.take() {
            agent.abort();
        }
    }
}

/// Reads a block around the page cache.
fn read(device: &Path, at: u64) -> Vec<u8> {
    let mut memory = vec![0; 2 * BLOCK as usize];
    let from = memory.as_ptr().align_offset(BLOCK as usize);
    let block = &mut memory[from..from + BLOCK as usize];
    open(device).read_exact_at(block, at).unwrap();
    block.to_vec()
}

fn open(device: &Path) -> File {
    let direct = OFlags::DIRECT.bits().cast_signed();
    OpenOptions::new().read(true).write(true).custom_flags(direct).open(device).unwrap()
}

/// Reads while something else happens.
fn reader(device: &Path, at: u64) -> JoinHandle<Vec<u8>> {
    let device = device.to_owned();
    std::thread::spawn(move || read(&device, at))
}

#[test]
fn a_successor_comes_while_a_command_has_the_volume() {
    let Some(mut lab) = Lab::new() else { return };
    lab.start_agent();
    let device = lab.attach();
    lab.hydrate();
    let locked = lab.volume.lock().unwrap();
    lab.kill_server();
    lab.check(&device, 5 * MIB);
    drop(locked);
}

#[test]
fn a_successor_that_can_t_be_started_is_tried_again() {
    let Some(mut lab) = Lab::new() else { return };
    lab.start_agent();
    let device = lab.attach();
    lab.hydrate();
    let log = format!("{}.log", lab.volume.state().unwrap().id);
    let log = lab.pool.pool.run_directory().unwrap().join(log);
    let prevent = || {
        fs::remove_file(&log).unwrap();
        fs::create_dir(&log).unwrap();
        lab.kill_server();
    };
    prevent();
    let waiting = reader(&device, 5 * MIB);
    std::thread::sleep(Duration::from_secs(3));
    assert!(!waiting.is_finished());
    fs::remove_dir(&log).unwrap();
    assert!(waiting.join().unwrap() == lab.model.read(5 * MIB..5 * MIB + BLOCK));

    // Not when nobody needs it any more.
    prevent();
    lab.volume.lock().unwrap().detach().unwrap();
    fs::remove_dir(&log).unwrap();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(lab.processes("image-server"), []);
}

#[test]
fn a_server_that_dies_while_its_repository_is_closed_has_a_successor() {
    let Some(mut lab) = Lab::new() else { return };
    lab.door.is_open.store(false, Ordering::Relaxed);
    lab.start_agent();
    let device = lab.attach();
    // What is overwritten needs nothing from the repository.
    let mut memory = vec![7; 2 * BLOCK as usize];
    let from = memory.as_ptr().align_offset(BLOCK as usize);
    let block = &mut memory[from..from + BLOCK as usize];
    open(&device).write_all_at(block, 8 * MIB).unwrap();
    let waiting = reader(&device, 5 * MIB);
    wait_until("attempts to open it", || lab.door.knocks.load(Ordering::Relaxed) >= 2);
    lab.kill_server();
    assert!(read(&device, 8 * MIB) == vec![7; BLOCK as usize]);
    assert!(!waiting.is_finished());
    lab.door.is_open.store(true, Ordering::Relaxed);
    assert!(waiting.join().unwrap() == lab.model.read(5 * MIB..5 * MIB + BLOCK));
}

#[test]
fn a_hydrated_volume_needs_no_repository_for_a_successor() {
    let Some(mut lab) = Lab::new() else { return };
    lab.start_agent();
    let device = lab.attach();
    lab.hydrate();
    lab.kill_agent();
    let knocks = lab.door.knocks.load(Ordering::Relaxed);
    lab.start_agent();
    // The server connects again twice in a second.
    std::thread::sleep(Duration::from_secs(3));
    for _ in 0..2 {
        lab.kill_server();
        lab.check(&device, 5 * MIB);
        // So does the successor.
        std::thread::sleep(Duration::from_secs(3));
    }
    assert_eq!(lab.door.knocks.load(Ordering::Relaxed), knocks);
}

#[test]
fn a_repository_that_does_not_answer_keeps_nobody_waiting() {
    let Some(mut lab) = Lab::new() else { return };
    let id = SnapshotId::from_parts(1, 1);
    lab.pool.pool.note_pin(DEAF, id, id).unwrap();
    lab.start_agent();
    std::thread::sleep(Duration::from_millis(500));
    let device = lab.attach();
    lab.check(&device, 5 * MIB);
}

#[test]
fn a_killed_agent_comes_back_by_itself_or_with_the_next_command() {
    let Some(mut lab) = Lab::new() else { return };
    lab.start_agent();
    let device = lab.attach();
    lab.kill_agent();
    assert_eq!(lab.attach(), device);
    assert!(lab.has_agent());
    for agent in lab.processes("agent\0--until-idle") {
        kill_process(agent, Signal::KILL).unwrap();
    }
    wait_until("the agent's end", || !lab.has_agent());
    wait_until("another agent", || lab.has_agent());
}
