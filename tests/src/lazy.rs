//! Lazy images for tests: an image server in a process of its own, and an agent in this one.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use petra_engine::reader::VolumeReader;
use petra_engine::record::VolumeRecord;
use petra_engine::store::{MemoryStore, Store};
use petra_engine::{Repository, SnapshotId};
use petra_volume::fuse::Negotiated;
use petra_volume::lazy::agent::{AgentEvent, AgentEvents, AgentOptions, Room, serve};
use petra_volume::lazy::connection::{Connection, End};
use petra_volume::lazy::presence::{Presence, VolumeIdentity};
use petra_volume::lazy::server::{Inheritance, Server, ServerOptions};
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::lab::{context, init, take};
use crate::recording::Recording;
use crate::require;
use crate::volume::Volume;

/// A volume in a repository in memory, and the directory of a lazy clone of it.
#[derive(Debug)]
pub struct LazyLab {
    /// Where the clone is: `image`, `presence`, `working`, `socket`, and `lazy`, where it is mounted.
    pub dir: TempDir,
    /// The store under the repository.
    pub store: Arc<Recording>,
    /// The memory under that.
    pub memory: Arc<MemoryStore>,
    /// The repository.
    pub repo: Repository,
    /// The snapshot's volume.
    pub record: VolumeRecord,
    /// For the agent.
    pub runtime: Runtime,
    /// The image is read and written past the page cache.
    pub direct: bool,
    /// The clone.
    pub identity: VolumeIdentity,
}

impl LazyLab {
    /// Takes a snapshot of a volume and prepares a clone of it. `None` where this machine has no FUSE.
    pub fn new(volume: &Volume, direct: bool) -> Option<Self> {
        Self::larger(volume, volume.len(), direct)
    }

    /// The same with a clone of another length.
    pub fn larger(volume: &Volume, len_bytes: u64, direct: bool) -> Option<Self> {
        if !require::root() {
            return None;
        }
        if !Path::new("/dev/fuse").exists() {
            require::unmet("there is no /dev/fuse");
            return None;
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
        let memory = Arc::new(MemoryStore::new());
        let store = Recording::new(memory.clone() as Arc<dyn Store>);
        let (repo, record) = runtime.block_on(async {
            let repo = init(store.clone()).await;
            let taken = take(&repo, volume).await.expect("a snapshot");
            let record = taken.volumes.into_iter().next().expect("one volume");
            (repo, record)
        });
        let dir = tempfile::tempdir().expect("temporary directory");
        let identity = VolumeIdentity { id: SnapshotId::from_parts(1, 5), len_bytes };
        let image = File::create(dir.path().join("image")).expect("a new file");
        image.set_len(len_bytes).expect("a sparse file");
        std::fs::create_dir(dir.path().join("lazy")).expect("a directory");
        let presence = dir.path().join("presence");
        Presence::create(&presence, identity, record.len_bytes).expect("a presence map");
        Some(Self { dir, store, memory, repo, record, runtime, direct, identity })
    }

    /// The file that the image server serves.
    pub fn file(&self) -> PathBuf {
        self.dir.path().join("lazy/image")
    }

    /// Starts an image server and waits until the file is there.
    pub fn server(&self) -> ImageServer {
        self.server_with(Duration::from_secs(60), None)
    }

    /// The same with another patience, or in place of a dead one.
    pub fn server_with(&self, patience: Duration, inherited: Option<Inheritance>) -> ImageServer {
        let program = std::env::current_exe().expect("this program");
        // Tests are in `deps`, programs above it.
        let program = program.parent().and_then(Path::parent).expect("a target directory");
        let mut command = Command::new(program.join("petra-test-child"));
        command
            .arg("image-server")
            .arg(self.dir.path())
            .arg(self.identity.id.to_string())
            .arg(self.identity.len_bytes.to_string())
            .arg(self.direct.to_string())
            .arg(patience.as_millis().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        if let Some(Inheritance { device, negotiated }) = inherited {
            command.arg(negotiated.to_string()).stdin(Stdio::from(device));
        }
        let mut child = command.spawn().expect("an image server");
        let output = child.stdout.take().expect("its output");
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line).expect("a line");
        assert_eq!(line, "ready\n", "the image server");
        ImageServer { child, mount: self.dir.path().join("lazy") }
    }

    /// Starts an agent.
    pub fn agent(&self, hydrate: bool) -> Agent {
        self.agent_with(hydrate, vec![], None)
    }

    /// Starts an agent with a start list, that records for a time.
    pub fn agent_with(
        &self,
        hydrate: bool,
        start_list: Vec<Range<u64>>,
        record_for: Option<Duration>,
    ) -> Agent {
        let state = Arc::new(AgentState::default());
        let socket = self.dir.path().join("socket");
        // Of an agent that was killed.
        let _ = std::fs::remove_file(&socket);
        let listener = {
            let _runtime = self.runtime.enter();
            UnixListener::bind(&socket).expect("a socket")
        };
        let reader = VolumeReader::open(&self.repo, &self.record, &context()).expect("a reader");
        let reader = Arc::new(reader);
        let cancel = CancellationToken::new();
        let task = self.runtime.spawn({
            let (state, cancel) = (state.clone(), cancel.clone());
            async move {
                loop {
                    let Ok((stream, _)) = listener.accept().await else { return };
                    let Ok(connection) = Connection::accept(stream).await else { continue };
                    let options = AgentOptions {
                        reader: reader.clone(),
                        start_list: start_list.clone(),
                        hydrate,
                        record_for,
                        room: state.clone(),
                        events: state.clone(),
                    };
                    let end = serve(connection, options, &cancel).await;
                    *lock(&state.end) = end.ok();
                }
            }
        });
        Agent { task, state }
    }
}

/// What the child process does.
pub fn image_server(arguments: &[String]) {
    let [dir, id, len_bytes, direct, patience, inherited @ ..] = arguments else {
        panic!("arguments are missing")
    };
    let dir = Path::new(dir);
    let id = id.parse().expect("an id");
    let options = ServerOptions {
        volume: VolumeIdentity { id, len_bytes: len_bytes.parse().expect("a length") },
        image: dir.join("image"),
        presence: dir.join("presence"),
        working: dir.join("working"),
        mount: dir.join("lazy"),
        socket: dir.join("socket"),
        direct: direct == "true",
        read_only: false,
        patience: Duration::from_millis(patience.parse().expect("a time")),
        threads: 4,
    };
    let inherited = inherited.first().map(|negotiated| {
        let negotiated: Negotiated = negotiated.parse().expect("what was agreed on");
        let device = std::io::stdin().as_fd().try_clone_to_owned().expect("a descriptor");
        Inheritance { device, negotiated }
    });
    let server = Server::start(&options, inherited).expect("an image server");
    print_ready();
    server.run().expect("an orderly end");
}

#[expect(clippy::print_stdout, reason = "the parent waits for it")]
fn print_ready() {
    println!("ready");
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An image server in a process of its own. Unmounted and ended when dropped, also by a panic.
#[derive(Debug)]
pub struct ImageServer {
    child: Child,
    mount: PathBuf,
}

impl ImageServer {
    /// Kills it, as kill -9 does.
    pub fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("its end");
    }

    /// Stops or continues it.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("a signal");
    }

    /// Unmounts its file system and waits for its orderly end.
    pub fn unmount(mut self) {
        // Another test may just start a process, which has this one's files for a moment.
        wait_until("an unmount", || {
            let mut unmount = Command::new("umount");
            let done = unmount.arg(&self.mount).stderr(Stdio::null()).status();
            done.expect("umount(8)").success()
        });
        assert!(self.child.wait().expect("its end").success());
    }

    /// Unmounts what is left after it was killed.
    pub fn clear_mount(&self) {
        let unmounted = Command::new("umount").arg("--lazy").arg(&self.mount).status();
        assert!(unmounted.expect("umount(8)").success());
    }
}

impl Drop for ImageServer {
    fn drop(&mut self) {
        // A panic in a drop would hide the first one.
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let mut unmount = Command::new("umount");
            let _ = unmount.arg("--lazy").arg(&self.mount).stderr(Stdio::null()).status();
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// An agent in this process.
#[derive(Debug)]
pub struct Agent {
    task: JoinHandle<()>,
    state: Arc<AgentState>,
}

/// What it was told.
#[derive(Debug, Default)]
struct AgentState {
    events: Mutex<Vec<String>>,
    recorded: Mutex<Vec<Range<u64>>>,
    end: Mutex<Option<End>>,
    /// The disk is full, as far as it is told.
    short: AtomicBool,
}

impl Room for AgentState {
    fn is_short(&self) -> bool {
        self.short.load(Ordering::Relaxed)
    }
}

impl AgentEvents for AgentState {
    fn event(&self, _: SnapshotId, event: AgentEvent<'_>) {
        if let AgentEvent::Recorded { ranges } = event {
            *lock(&self.recorded) = ranges.to_vec();
        }
        let text = format!("{event:?}");
        let word = text.split([' ', '{']).next().unwrap_or_default();
        lock(&self.events).push(word.to_owned());
    }
}

impl Agent {
    /// The names of the events so far.
    pub fn events(&self) -> Vec<String> {
        lock(&self.state.events).clone()
    }

    /// Waits for an event.
    pub fn wait_for(&self, event: &str) {
        wait_until(event, || self.events().iter().any(|seen| seen == event));
    }

    /// Makes it believe that the disk is full, or that it is not.
    pub fn set_short(&self, short: bool) {
        self.state.short.store(short, Ordering::Relaxed);
    }

    /// What was recorded.
    pub fn recorded(&self) -> Vec<Range<u64>> {
        lock(&self.state.recorded).clone()
    }

    /// Waits until the server died, and gives what it left.
    pub fn inheritance(&self) -> Inheritance {
        let mut found = None;
        wait_until("the server's death", || {
            found = lock(&self.state.end).take();
            found.is_some()
        });
        match found {
            Some(End::Died(inherited)) => inherited,
            end => panic!("{end:?}"),
        }
    }

    /// Ends it at once, as kill -9 does: also what it holds is gone.
    pub fn kill(self) {
        self.task.abort();
        wait_until("the agent's end", || self.task.is_finished());
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Waits for something that must come.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what} does not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}
