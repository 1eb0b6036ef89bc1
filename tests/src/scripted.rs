//! A server that gives the answers a test writes down: for failures that real servers rarely show.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};

use crate::s3::Access;

/// Gives its answers in turn, one for each connection, and then the last one for ever.
#[derive(Debug)]
pub struct ScriptedS3 {
    access: Access,
    requests: Arc<Mutex<Vec<String>>>,
}

/// An answer: what is sent, byte by byte, before the connection is closed.
pub fn answer(status: &str, headers: &[&str], body: &str) -> String {
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    let len = body.len();
    format!(
        "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {len}\r\n{headers}\r\n{body}"
    )
}

/// An S3 error.
pub fn error(status: &str, code: &str) -> String {
    let body = format!(
        "<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>Says the script.</Message></Error>"
    );
    answer(status, &["Content-Type: application/xml"], &body)
}

impl ScriptedS3 {
    /// Starts the server.
    pub fn start(answers: Vec<String>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("free port");
        let access = Access::to(listener.local_addr().expect("address"));
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        std::thread::spawn(move || {
            let mut answers = answers.into_iter();
            let mut next = answers.next().expect("an answer");
            for connection in listener.incoming().flatten() {
                // A client may hang up, or only open a connection to keep.
                let note =
                    |request| seen.lock().unwrap_or_else(PoisonError::into_inner).push(request);
                if serve(connection, &next, note).is_ok() {
                    next = answers.next().unwrap_or(next);
                }
            }
        });
        Self { access, requests }
    }

    /// How to reach it.
    pub fn access(&self) -> &Access {
        &self.access
    }

    /// The heads of the requests so far.
    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn serve(connection: TcpStream, answer: &str, note: impl FnOnce(String)) -> std::io::Result<()> {
    let mut reader = BufReader::new(connection);
    let (mut head, mut body_len) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        if line == "\r\n" {
            break;
        }
        let lower = line.to_ascii_lowercase();
        if let Some(len) = lower.strip_prefix("content-length:") {
            body_len = len.trim().parse().unwrap_or(0);
        }
        head.push_str(&line);
    }
    std::io::copy(&mut reader.by_ref().take(body_len), &mut std::io::sink())?;
    note(head);
    reader.get_mut().write_all(answer.as_bytes())
}
