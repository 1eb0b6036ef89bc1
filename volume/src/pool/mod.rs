//! A pool: the directory on a reflink file system where a machine's live volumes are. docs/volumes.md has its layout.

mod capacity;
mod create;
mod init;
pub(crate) mod lock;
pub mod pins;
mod recover;
mod repositories;
pub mod state;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use petra_engine::Name;
use petra_engine::context::Host;

pub use capacity::{DEFAULT_OVERCOMMIT_PERCENT, Status};
pub use create::{
    Content, CreateRequest, LARGEST_SECTOR_BYTES, MAX_VOLUME_BYTES, MIN_VOLUME_BYTES,
    min_volume_bytes,
};
pub use init::{InitRequest, Initialised, Place};
pub use recover::{Recovered, Recovery};
pub use state::{BaseState, Filesystem, LazyState, PoolState, VolumeState, Wanted};

use crate::backend::{Backend, backend};
use crate::error::{Error, Result};
use crate::volume::Volume;
use lock::Lock;

/// How many names an error lists.
const KNOWN: usize = 50;

/// An open pool. Cheap to clone; any number of processes may have it open.
#[derive(Clone, Debug)]
pub struct Pool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    state: PoolState,
    backend: Box<dyn Backend>,
    host: Arc<dyn Host>,
}

impl Pool {
    /// Opens a pool. `host` gives time and ids to what is made in it.
    pub fn open(root: &Path, host: Arc<dyn Host>) -> Result<Self> {
        let root = match root.canonicalize() {
            Ok(root) => root,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(no_pool(root));
            }
            Err(error) => return Err(Error::io("open", root)(error)),
        };
        let path = root.join("pool.json");
        let Some(state) = state::read::<PoolState>(&path)? else { return Err(no_pool(&root)) };
        let backend = backend(state.backend);
        Ok(Self(Arc::new(Inner { root, state, backend, host })))
    }

    /// The pool's directory.
    pub fn root(&self) -> &Path {
        &self.0.root
    }

    /// What `pool.json` says.
    pub fn state(&self) -> &PoolState {
        &self.0.state
    }

    /// How images are made and copied here.
    pub fn backend(&self) -> &dyn Backend {
        self.0.backend.as_ref()
    }

    /// Time and ids.
    pub fn host(&self) -> &dyn Host {
        self.0.host.as_ref()
    }

    /// Where sockets and what need not outlive a reboot are: `/run/petra/POOL-ID`. Made when it is missing.
    pub fn run_directory(&self) -> Result<PathBuf> {
        let path = Path::new("/run/petra").join(self.0.state.id.to_string());
        std::fs::create_dir_all(&path).map_err(Error::io("create", &path))?;
        Ok(path)
    }

    /// Finds a volume.
    pub fn volume(&self, name: &Name) -> Result<Volume> {
        let volume = Volume::at(self.clone(), name.clone());
        let path = volume.directory();
        match path.metadata() {
            Ok(found) if found.is_dir() => return Ok(volume),
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("look at", path)(error));
            }
            _ => {}
        }
        let known = self.names()?.iter().take(KNOWN).map(ToString::to_string).collect();
        Err(Error::Unknown {
            what: "volume",
            name: name.to_string(),
            within: self.to_string(),
            known,
        })
    }

    /// All volumes, by name.
    pub fn volumes(&self) -> Result<Vec<Volume>> {
        Ok(self.names()?.into_iter().map(|name| Volume::at(self.clone(), name)).collect())
    }

    fn names(&self) -> Result<Vec<Name>> {
        let mut names = vec![];
        for name in entries(&self.volumes_directory())? {
            // What is not a name was not made by us; it is left alone.
            let name = name.into_string().ok().and_then(|name| Name::new("volume", name).ok());
            names.extend(name);
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Takes the lock of the list of volumes and of the accounting.
    pub(crate) fn lock_list(&self) -> Result<Lock> {
        Lock::acquire(&self.0.root.join("lock"), &self.to_string(), lock::WAIT)
    }

    /// A fresh path in the directory of what is being deleted.
    pub(crate) fn trash(&self) -> PathBuf {
        self.trash_directory().join(self.host().new_id().to_string())
    }

    pub(crate) fn volumes_directory(&self) -> PathBuf {
        self.0.root.join("volumes")
    }

    pub(crate) fn new_directory(&self) -> PathBuf {
        self.0.root.join("new")
    }

    pub(crate) fn trash_directory(&self) -> PathBuf {
        self.0.root.join("trash")
    }
}

impl fmt::Display for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pool {}", self.0.root.display())
    }
}

fn no_pool(root: &Path) -> Error {
    Error::Unknown {
        what: "pool",
        name: root.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        within: crate::sys::files::parent(root).display().to_string(),
        known: vec![],
    }
}

/// The names in a directory, in no order; none when it does not exist.
pub(crate) fn entries(directory: &Path) -> Result<Vec<std::ffi::OsString>> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
        entries => entries.map_err(Error::io("list", directory))?,
    };
    let names = entries.map(|entry| entry.map(|entry| entry.file_name()));
    names.collect::<std::io::Result<_>>().map_err(Error::io("list", directory))
}
