//! The Unix socket on which the CSI services are served.

use std::future::Future;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::service::Routes;
use tonic::transport::Server;

use crate::shutdown::serve_until;
use crate::telemetry::Observe;

/// Why a socket can't be served on.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// No path of a socket.
    #[error("{0:?} is not unix:///PATH")]
    Endpoint(String),
    /// Somebody else serves on it.
    #[error("{} is in use by another process", .0.display())]
    Live(PathBuf),
    /// Something else has the name.
    #[error("{} is there and is no socket", .0.display())]
    NoSocket(PathBuf),
    /// The kernel refused.
    #[error("can't {operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        cause: io::Error,
    },
    /// The server failed.
    #[error("the server ended")]
    Serve(#[from] tonic::transport::Error),
}

/// The path in an endpoint: `unix:///PATH` or `unix:PATH`.
pub fn path(endpoint: &str) -> Result<PathBuf, SocketError> {
    let wrong = || SocketError::Endpoint(endpoint.to_owned());
    let rest = endpoint.strip_prefix("unix:").ok_or_else(wrong)?;
    let path = match rest.strip_prefix("//") {
        // What would follow two slashes is a host.
        Some(path) if !path.starts_with('/') => return Err(wrong()),
        Some(path) => path,
        None => rest,
    };
    if path.is_empty() || path.ends_with('/') { Err(wrong()) } else { Ok(PathBuf::from(path)) }
}

/// Serves calls on a socket until `shutdown`, then ends those under way and removes the socket.
pub async fn serve(
    endpoint: &str,
    routes: Routes,
    observe: Observe,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), SocketError> {
    let path = path(endpoint)?;
    let listener = listen(&path).await?;
    tracing::info!(socket = %path.display(), "calls are served");
    let server = Server::builder().layer(observe).add_routes(routes);
    let incoming = UnixListenerStream::new(listener);
    let served =
        serve_until(shutdown, |end| server.serve_with_incoming_shutdown(incoming, end)).await;
    // A name that is left leads nowhere, and the next start removes it.
    let _ = std::fs::remove_file(&path);
    Ok(served?)
}

/// Binds a socket. One that a dead process left is replaced.
async fn listen(path: &Path) -> Result<UnixListener, SocketError> {
    let failed = |operation| move |cause| SocketError::Io { operation, path: path.into(), cause };
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(SocketError::NoSocket(path.to_owned()));
        }
        Ok(_) => match UnixStream::connect(path).await {
            Ok(_) => return Err(SocketError::Live(path.to_owned())),
            Err(_) => std::fs::remove_file(path).map_err(failed("remove"))?,
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(cause) => return Err(failed("look at")(cause)),
    }
    let listener = UnixListener::bind(path).map_err(failed("listen on"))?;
    // Whoever can talk to it has all volumes.
    let only_owner = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(path, only_owner).map_err(failed("protect"))?;
    Ok(listener)
}
