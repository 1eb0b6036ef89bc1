//! A way to a server that can be made slow.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Bytes that go through at once.
const STEP: usize = 16 << 10;

/// Passes on what comes to an address of this machine, as long as the test's process lives.
#[derive(Debug)]
pub struct SlowWay {
    address: SocketAddr,
    road: Arc<Road>,
}

/// What all connections share.
#[derive(Debug, Default)]
struct Road {
    bytes_per_s: AtomicU64,
    /// One after the other.
    turn: Mutex<()>,
}

impl SlowWay {
    /// A way to a server, as fast as it can be.
    pub fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("an address");
        let road = Arc::new(Road::default());
        std::thread::spawn({
            let road = road.clone();
            move || {
                for client in listener.incoming().map_while(Result::ok) {
                    let Ok(server) = TcpStream::connect(server) else { continue };
                    let (Ok(back), Ok(forth)) = (client.try_clone(), server.try_clone()) else {
                        continue;
                    };
                    let road = road.clone();
                    std::thread::spawn(move || pass(client, server, |_| {}));
                    std::thread::spawn(move || pass(forth, back, |len| road.wait(len)));
                }
            }
        });
        Self { address, road }
    }

    /// Where it begins.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on the server's answers come no faster than this, all together; at any speed for 0.
    pub fn limit(&self, bytes_per_s: u64) {
        self.road.bytes_per_s.store(bytes_per_s, Ordering::Relaxed);
    }
}

impl Road {
    fn wait(&self, len: usize) {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes_per_s = self.bytes_per_s.load(Ordering::Relaxed);
        if bytes_per_s > 0 {
            std::thread::sleep(Duration::from_secs_f64(len as f64 / bytes_per_s as f64));
        }
    }
}

/// Passes bytes on until one side has enough.
fn pass(mut from: TcpStream, mut to: TcpStream, wait: impl Fn(usize)) {
    let mut buffer = vec![0; STEP];
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        wait(len);
        let Some(bytes) = buffer.get(..len) else { break };
        if to.write_all(bytes).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}
