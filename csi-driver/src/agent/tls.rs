//! Mutual TLS between the controller and the nodes.
//!
//! Both have a certificate of one private authority, which is trusted for nothing else. A certificate says by its DNS
//! name which side it is for: a node that was taken over can't give orders to the others. Addresses of nodes come and
//! go with their pods, so they are not in certificates.
//!
//! The files are read again every minute, so that renewed certificates are used without a restart.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::client::verify_server_name;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig, crypto};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

/// The DNS name in the certificate of a controller.
pub const CONTROLLER: &str = "controller.petra.internal";
/// The DNS name in the certificates of nodes.
pub const NODE: &str = "node.petra.internal";

/// The authority's certificates, in the directory.
const CA_FILE: &str = "ca.pem";
/// This side's certificate, and those between it and the authority's.
const CERTIFICATE_FILE: &str = "cert.pem";
/// Its private key.
const KEY_FILE: &str = "key.pem";

/// How long a connection may take to be made.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How old what was read from the files may be.
const FRESH: Duration = Duration::from_secs(60);
/// Longer files hold no certificates.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Why there is no connection, or none can be made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file can't be read.
    #[error("can't read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{} is not PEM of {what}", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
    },
    /// Certificate and key don't fit each other, or have algorithms that are not known.
    #[error("the certificates in {} can't be used: {detail}", directory.display())]
    Certificates {
        /// The directory.
        directory: PathBuf,
        /// What the TLS library says.
        detail: String,
    },
    /// The other side has a certificate that is not for this.
    #[error("the client's certificate is not for {CONTROLLER}")]
    NotController,
    /// The network, or the handshake.
    #[error("no connection")]
    Io(#[from] std::io::Error),
}

/// The certificates of one side.
#[derive(Clone, Debug)]
pub struct Tls(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    directory: PathBuf,
    read: Mutex<Read>,
}

/// What was in the files.
#[derive(Clone, Debug)]
struct Read {
    at: Instant,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Tls {
    /// Reads the certificates in a directory: `ca.pem`, `cert.pem` and `key.pem`.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, TlsError> {
        let directory = directory.into();
        let read = Mutex::new(read(&directory)?);
        Ok(Self(Arc::new(Inner { directory, read })))
    }

    /// Connects to a node.
    pub async fn connect(
        &self,
        host: &str,
        port: u16,
    ) -> Result<client::TlsStream<TcpStream>, TlsError> {
        let connector = TlsConnector::from(self.current().await.client);
        let connect = async {
            let stream = TcpStream::connect((host, port)).await?;
            stream.set_nodelay(true)?;
            let name = ServerName::try_from(NODE).map_err(std::io::Error::other)?;
            Ok(connector.connect(name, stream).await?)
        };
        timeout(CONNECT_LIMIT, connect)
            .await
            .unwrap_or_else(|_| Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into()))
    }

    /// Lets a controller in, and nobody else.
    pub async fn accept(
        &self,
        stream: TcpStream,
    ) -> Result<server::TlsStream<TcpStream>, TlsError> {
        let acceptor = TlsAcceptor::from(self.current().await.server);
        stream.set_nodelay(true)?;
        let stream = timeout(CONNECT_LIMIT, acceptor.accept(stream))
            .await
            .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))?;
        let (_, session) = stream.get_ref();
        let certificate = session.peer_certificates().and_then(|all| all.first());
        match certificate {
            Some(certificate) if is_for(certificate, CONTROLLER) => Ok(stream),
            _ => Err(TlsError::NotController),
        }
    }

    /// What the files say now; or said, when they can't be read.
    async fn current(&self) -> Read {
        let lock = || self.0.read.lock().unwrap_or_else(PoisonError::into_inner);
        let known = lock().clone();
        if known.at.elapsed() < FRESH {
            return known;
        }
        let directory = self.0.directory.clone();
        let fresh = match tokio::task::spawn_blocking(move || read(&directory)).await {
            Ok(Ok(fresh)) => fresh,
            Ok(Err(error)) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                tracing::warn!(%error, cause, "certificates stay as they were");
                Read { at: Instant::now(), ..known }
            }
            Err(_) => known,
        };
        *lock() = fresh.clone();
        fresh
    }
}

/// True for a certificate with this DNS name.
fn is_for(certificate: &CertificateDer<'_>, name: &'static str) -> bool {
    let Ok(name) = ServerName::try_from(name) else { return false };
    ParsedCertificate::try_from(certificate)
        .is_ok_and(|parsed| verify_server_name(&parsed, &name).is_ok())
}

/// Reads the files of a directory.
fn read(directory: &Path) -> Result<Read, TlsError> {
    let unusable = |error: &dyn std::fmt::Display| TlsError::Certificates {
        directory: directory.to_owned(),
        detail: error.to_string(),
    };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&directory.join(CA_FILE))? {
        roots.add(certificate).map_err(|error| unusable(&error))?;
    }
    let roots = Arc::new(roots);
    let chain = certificates(&directory.join(CERTIFICATE_FILE))?;
    let path = directory.join(KEY_FILE);
    let key = PrivateKeyDer::from_pem_slice(&bytes(&path)?)
        .map_err(|_| TlsError::Pem { path, what: "a private key" })?;

    let provider = Arc::new(crypto::aws_lc_rs::default_provider());
    let mut client = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| unusable(&error))?
        .with_root_certificates(roots.clone())
        .with_client_auth_cert(chain.clone(), key.clone_key())
        .map_err(|error| unusable(&error))?;
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
        .build()
        .map_err(|error| unusable(&error))?;
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| unusable(&error))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|error| unusable(&error))?;
    client.alpn_protocols = vec![b"h2".to_vec()];
    server.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Read { at: Instant::now(), client: Arc::new(client), server: Arc::new(server) })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let wrong = || TlsError::Pem { path: path.to_owned(), what: "certificates" };
    let found: Vec<_> = CertificateDer::pem_slice_iter(&bytes(path)?)
        .collect::<Result<_, _>>()
        .map_err(|_| wrong())?;
    if found.is_empty() { Err(wrong()) } else { Ok(found) }
}

fn bytes(path: &Path) -> Result<Vec<u8>, TlsError> {
    use std::io::Read;
    let mut bytes = vec![];
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_FILE_BYTES).read_to_end(&mut bytes))
        .map_err(|cause| TlsError::Read { path: path.to_owned(), cause })?;
    Ok(bytes)
}
