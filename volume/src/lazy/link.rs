//! The image server's link to the agent: connects for ever, sends what is wanted, takes what comes.
//!
//! ```text
//! agent -> socket -> this thread -> some messages -> the thread that stores
//!                         \-> the image at once, when a request waits for it
//! ```
//!
//! One thread receives while another one stores what came before. All messages go the same way, so that a flush, or a
//! question for what is absent, follows all data that was sent before it. Data that a request waits for overtakes them: it
//! is there earlier than it must be, which changes no answer for the worse.

use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use memmap2::MmapMut;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::server::Inner;
use super::wire::{HEADER_BYTES, Header, Hello, MAX_BODY, ToAgent, ToServer};
use crate::fuse::{Negotiated, become_io_flusher, resident};

/// Between attempts to connect while there is no agent.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LAST_PAUSE: Duration = Duration::from_millis(500);
/// How long an agent may take to say that it accepts the server.
const WELCOME: Duration = Duration::from_secs(30);
/// How long the last message may take.
const FAREWELL: Duration = Duration::from_secs(2);
/// Absent ranges in one answer.
const RANGES: usize = 1024;
/// Messages that came and are not stored yet, of 1 MiB at most: enough that neither thread waits for each single one,
/// and few enough that what is urgent gets past them soon.
const MESSAGES: usize = 4;

/// Where messages to the agent go: nowhere, while there is none.
///
/// It never blocks, so that no request waits for an agent that hangs. It holds no more than a want for each window that
/// is under way.
#[derive(Debug, Default)]
pub(super) struct Outbox(Mutex<Option<Open>>);

#[derive(Debug)]
struct Open {
    sender: Sender<Vec<u8>>,
    /// Answers when all was sent.
    done: Receiver<()>,
}

impl Outbox {
    fn open(&self) -> MutexGuard<'_, Option<Open>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a message, if there is an agent.
    pub(super) fn send(&self, message: Vec<u8>) {
        if let Some(open) = &*self.open() {
            // The link finds out by itself that the agent is gone.
            let _ = open.sender.send(message);
        }
    }

    /// Sends the last message and waits until it is sent.
    pub(super) fn end(&self, message: &[u8]) {
        let open = self.open().take();
        if let Some(Open { sender, done }) = open {
            let _ = sender.send(message.to_vec());
            drop(sender);
            let _ = done.recv_timeout(FAREWELL);
        }
    }
}

/// The thread that talks to agents.
pub(super) struct Link {
    pub(super) server: Arc<Inner>,
    pub(super) socket: PathBuf,
    pub(super) device: Arc<OwnedFd>,
    pub(super) negotiated: Negotiated,
    /// For reads that waited: one for each thread.
    pub(super) buffers: (MmapMut, MmapMut),
}

/// A message on its way to the image.
type Received = (Header, MmapMut);

impl Link {
    /// Talks to one agent after the other.
    pub(super) fn run(mut self) {
        become_io_flusher();
        let mut pause = FIRST_PAUSE;
        while !self.server.ending.load(Ordering::Relaxed) {
            match self.connect() {
                Ok(stream) => {
                    pause = FIRST_PAUSE;
                    let result = self.talk(&stream);
                    *self.server.outbox.open() = None;
                    // Ends the thread that sends.
                    let _ = stream.shutdown(Shutdown::Both);
                    if let Err(error) = result {
                        tracing::debug!(volume = %self.server.volume.id, %error, "the agent is gone");
                    }
                }
                Err(error) => {
                    tracing::trace!(socket = %self.socket.display(), %error, "no agent");
                }
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    /// Connects and says who this is.
    fn connect(&self) -> io::Result<UnixStream> {
        let stream = UnixStream::connect(&self.socket)?;
        let hello = Hello { volume: self.server.volume, negotiated: self.negotiated };
        let hello = ToAgent::Hello(hello).encode();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let device = [self.device.as_fd()];
        if !control.push(SendAncillaryMessage::ScmRights(&device)) {
            return Err(io::Error::other("no room for a descriptor"));
        }
        let sent = sendmsg(&stream, &[IoSlice::new(&hello)], &mut control, SendFlags::NOSIGNAL)?;
        (&stream).write_all(hello.get(sent..).unwrap_or_default())?;
        stream.set_read_timeout(Some(WELCOME))?;
        let mut header = [0; HEADER_BYTES];
        (&stream).read_exact(&mut header)?;
        let header = Header::parse(&header).map_err(io::Error::other)?;
        match ToServer::decode(header, &[]).map_err(io::Error::other)? {
            ToServer::Welcome => {}
            _ => return Err(io::Error::other("the agent's first message is not a welcome")),
        }
        stream.set_read_timeout(None)?;
        Ok(stream)
    }

    fn talk(&mut self, stream: &UnixStream) -> io::Result<()> {
        let (sender, messages) = mpsc::channel::<Vec<u8>>();
        let (all_sent, done) = mpsc::channel();
        let mut writer = stream.try_clone()?;
        std::thread::Builder::new().name("petra-link-out".to_owned()).spawn(move || {
            // Ends with the outbox, or when the agent is gone.
            while let Ok(message) = messages.recv() {
                if writer.write_all(&message).is_err() {
                    break;
                }
            }
            let _ = all_sent.send(());
        })?;
        *self.server.outbox.open() = Some(Open { sender, done });
        self.server.begin_again();
        let (received, to_store) = mpsc::sync_channel(MESSAGES);
        let (stored, free) = mpsc::channel();
        // One more is being received.
        for _ in 0..=MESSAGES {
            // It can't fail: the other end is here.
            let _ = stored.send(resident(MAX_BODY).map_err(io::Error::other)?);
        }
        let (server, (own, others)) = (&self.server, &mut self.buffers);
        std::thread::scope(|scope| {
            let store = move || store(server, &to_store, &stored, others);
            std::thread::Builder::new()
                .name("petra-store".to_owned())
                .spawn_scoped(scope, store)?;
            receive(server, stream, received, &free, own)
        })
    }
}

/// Takes messages in until the agent is gone. What came is stored all the same.
fn receive(
    server: &Arc<Inner>,
    mut stream: &UnixStream,
    received: SyncSender<Received>,
    free: &Receiver<MmapMut>,
    buffer: &mut [u8],
) -> io::Result<()> {
    let ended = || io::Error::other("the thread that stores has ended");
    let mut body = free.recv().map_err(|_| ended())?;
    loop {
        let mut header = [0; HEADER_BYTES];
        stream.read_exact(&mut header)?;
        let header = Header::parse(&header).map_err(io::Error::other)?;
        let place = body.get_mut(..header.body_bytes).unwrap_or_default();
        stream.read_exact(place)?;
        match ToServer::decode(header, place).map_err(io::Error::other)? {
            ToServer::Data { offset, bytes } if server.is_waited_for(offset, bytes.len()) => {
                server.fill(offset, bytes, buffer);
            }
            _ => {
                received.send((header, body)).map_err(|_| ended())?;
                body = free.recv().map_err(|_| ended())?;
            }
        }
    }
}

/// Does what the agent says, one message after the other.
fn store(
    server: &Arc<Inner>,
    received: &Receiver<Received>,
    stored: &Sender<MmapMut>,
    buffer: &mut [u8],
) {
    become_io_flusher();
    while let Ok((header, body)) = received.recv() {
        // It was understood before it was passed on.
        if let Ok(message) =
            ToServer::decode(header, body.get(..header.body_bytes).unwrap_or_default())
        {
            take(server, message, buffer);
        }
        // Nobody receives any more.
        let _ = stored.send(body);
    }
}

/// Does what the agent says.
fn take(server: &Arc<Inner>, message: ToServer<'_>, buffer: &mut [u8]) {
    match message {
        ToServer::Welcome => {}
        ToServer::Data { offset, bytes } => server.fill(offset, bytes, buffer),
        ToServer::Zeros(range) => server.fill_zeros(range, buffer),
        ToServer::Failed { range, reason } => server.fail(&range, &reason, buffer),
        ToServer::AskAbsent { question, range } => {
            let (end, ranges) = server.absent(&range, RANGES);
            server.outbox.send(ToAgent::Absent { question, end, ranges }.encode());
        }
        ToServer::Flush { question } => {
            // Not here: a slow disk must not hold back what requests wait for.
            let flush = {
                let server = server.clone();
                move || {
                    become_io_flusher();
                    let done = match server.image.sync() {
                        Ok(()) => true,
                        Err(error) => {
                            tracing::warn!(volume = %server.volume.id, %error, "cannot sync");
                            false
                        }
                    };
                    server.outbox.send(ToAgent::Flushed { question, done }.encode());
                }
            };
            let thread = std::thread::Builder::new().name("petra-flush".to_owned()).spawn(flush);
            if thread.is_err() {
                server.outbox.send(ToAgent::Flushed { question, done: false }.encode());
            }
        }
        ToServer::StopRecording { question } => {
            let ranges = server.recorded();
            server.outbox.send(ToAgent::Recorded { question, ranges }.encode());
        }
    }
}
