//! An image server's connection to the agent, from its first message to its end. With it comes the FUSE descriptor, which
//! is held as long as the connection is: whatever becomes of the server, a successor can go on.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use petra_engine::SnapshotId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg, sockopt};
use rustix::process::{PidfdFlags, pidfd_open};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;

use super::server::Inheritance;
use super::wire::{HEADER_BYTES, Header, Hello, ToAgent, ToServer};
use crate::error::{Error, Result};

/// How long a server may take to say who it is.
const HELLO: Duration = Duration::from_secs(10);
/// How long a dead server's process may take to disappear.
const DEATH: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };
/// How often is looked for the death of a server that is not served yet.
const LOOK: Duration = Duration::from_millis(100);
const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
/// What the kernel holds for a server on its way. All of it comes before what is urgent.
const SEND_BYTES: usize = 2 << 20;

/// An image server that has said who it is.
#[derive(Debug)]
pub struct Connection {
    pub(super) stream: UnixStream,
    pub(super) hello: Hello,
    pub(super) device: OwnedFd,
    /// The server's process.
    pub(super) process: OwnedFd,
}

impl Connection {
    /// Takes a connection's first message.
    pub async fn accept(stream: UnixStream) -> Result<Self> {
        let accepted = tokio::time::timeout(HELLO, Self::greet(stream)).await;
        let late = || Err(io::Error::from(io::ErrorKind::TimedOut));
        accepted.unwrap_or_else(|_| late()).map_err(Error::io("greet", "an image server"))
    }

    async fn greet(mut stream: UnixStream) -> io::Result<Self> {
        let pid = sockopt::socket_peercred(&stream)?.pid;
        let process = pidfd_open(pid, PidfdFlags::empty())?;
        let mut first = [0; HEADER_BYTES];
        let (read, device) = loop {
            stream.readable().await?;
            match stream.try_io(Interest::READABLE, || receive(&stream, &mut first)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                received => break received?,
            }
        };
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        stream.read_exact(first.get_mut(read..).unwrap_or_default()).await?;
        let header = Header::parse(&first).map_err(io::Error::other)?;
        let mut body = vec![0; header.body_bytes];
        stream.read_exact(&mut body).await?;
        let message = ToAgent::decode(header, &body).map_err(io::Error::other)?;
        let (ToAgent::Hello(hello), Some(device)) = (message, device) else {
            return Err(io::Error::other("no hello, or no descriptor with it"));
        };
        // More than one message, so that neither side waits for each single one. Without CAP_NET_ADMIN it stays as it is.
        let _ = sockopt::set_socket_send_buffer_size_force(&stream, SEND_BYTES);
        stream.write_all(&ToServer::Welcome.encode()).await?;
        Ok(Self { stream, hello, device, process })
    }

    /// Who it is.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// The volume that it serves.
    pub fn volume(&self) -> SnapshotId {
        self.hello.volume.id
    }

    /// Waits until the server's process is gone. What it said before is still to be heard.
    pub async fn dead(&self) -> Result<()> {
        loop {
            match poll(&mut [PollFd::new(&self.process, PollFlags::IN)], Some(&NOW)) {
                Ok(1..) => return Ok(()),
                Ok(0) | Err(Errno::INTR) => tokio::time::sleep(LOOK).await,
                Err(error) => return Err(Error::io("watch", "an image server")(error)),
            }
        }
    }

    /// Keeps the connection of a server that is brought nothing, until the server is gone.
    pub async fn hold(mut self) -> Result<End> {
        let farewell = async {
            let mut body = Vec::new();
            loop {
                if let ToAgent::Bye = receive_message(&mut self.stream, &mut body).await? {
                    return Ok(());
                }
            }
        };
        let read = farewell.await;
        ended(read, &self.hello, self.device, self.process).await
    }
}

/// Receives one message.
pub(super) async fn receive_message(
    input: &mut (impl AsyncReadExt + Unpin),
    body: &mut Vec<u8>,
) -> io::Result<ToAgent> {
    let mut header = [0; HEADER_BYTES];
    input.read_exact(&mut header).await?;
    let header = Header::parse(&header).map_err(io::Error::other)?;
    body.resize(header.body_bytes, 0);
    input.read_exact(body).await?;
    ToAgent::decode(header, body).map_err(io::Error::other)
}

/// Receives the first bytes and the descriptor that comes with them.
fn receive(stream: &UnixStream, first: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = recvmsg(stream.as_fd(), &mut [IoSliceMut::new(first)], &mut control, flags)?;
    let mut device = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            device = descriptors.last();
        }
    }
    Ok((received.bytes, device))
}

/// How a server's connection ended.
#[derive(Debug)]
pub enum End {
    /// The file system was unmounted, and all is durable.
    Unmounted,
    /// The server died, or gave up. A successor that gets this goes on where it was, as long as someone holds it.
    Died(Inheritance),
    /// The server lives, but let go of the connection: it will connect again.
    Disconnected,
}

/// How a connection ended after which this was read from it.
pub(super) async fn ended(
    read: io::Result<()>,
    hello: &Hello,
    device: OwnedFd,
    process: OwnedFd,
) -> Result<End> {
    match read {
        Ok(()) => return Ok(End::Unmounted),
        Err(error) => {
            tracing::debug!(volume = %hello.volume.id, %error, "the image server is gone");
        }
    }
    // Its descriptors are closed a little before it is dead.
    let dead = tokio::task::spawn_blocking(move || {
        poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&DEATH))
    });
    match dead.await {
        Ok(Ok(1..)) => Ok(End::Died(Inheritance { device, negotiated: hello.negotiated })),
        Ok(Ok(0) | Err(Errno::INTR)) => Ok(End::Disconnected),
        Ok(Err(error)) => Err(Error::io("watch", "an image server")(error)),
        Err(_) => Err(Error::Internal("a wait for an image server panicked")),
    }
}
