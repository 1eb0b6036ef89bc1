//! Which ways to use a volume there are.

use petra_volume::pool::Filesystem;
use tonic::Status;

use crate::proto::csi::VolumeCapability;
use crate::proto::csi::volume_capability::AccessType;
use crate::proto::csi::volume_capability::access_mode::Mode;

/// What a volume is made with when nobody says.
pub const DEFAULT_FILESYSTEM: Filesystem = Filesystem::Ext4;

/// How a volume is to be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// A file system with mount flags, or `Raw` for a block device.
    pub filesystem: Filesystem,
    /// Flags of mount(8).
    pub mount_flags: Vec<String>,
    /// How many may use it, and for what.
    pub mode: Mode,
    /// The file system was named, rather than chosen here.
    pub named: bool,
}

impl Usage {
    /// Checks a capability. `INVALID_ARGUMENT` where it is incomplete or asks for what there is not.
    pub fn of(capability: Option<&VolumeCapability>) -> Result<Self, Status> {
        let invalid = |text: String| Err(Status::invalid_argument(text));
        let Some(capability) = capability else {
            return invalid("the volume capability is missing".to_owned());
        };
        let Some(mode) = &capability.access_mode else {
            return invalid("the volume capability has no access mode".to_owned());
        };
        let mode = mode.mode();
        match mode {
            Mode::Unknown => return invalid("the access mode is unknown".to_owned()),
            Mode::MultiNodeSingleWriter | Mode::MultiNodeMultiWriter => {
                return invalid(format!(
                    "{} is not possible: a volume is written on one node; many nodes can read a snapshot \
                     (MULTI_NODE_READER_ONLY)",
                    mode.as_str_name()
                ));
            }
            _ => {}
        }
        match &capability.access_type {
            None => invalid("the volume capability has no access type".to_owned()),
            Some(AccessType::Block(_)) => {
                Ok(Self { filesystem: Filesystem::Raw, mount_flags: vec![], mode, named: true })
            }
            Some(AccessType::Mount(mount)) => {
                let filesystem = match mount.fs_type.as_str() {
                    "" => DEFAULT_FILESYSTEM,
                    text => match text.parse() {
                        Ok(Filesystem::Raw) | Err(_) => {
                            return invalid(format!(
                                "the file system {text:?} is not one of ext4, xfs, btrfs"
                            ));
                        }
                        Ok(filesystem) => filesystem,
                    },
                };
                Ok(Self {
                    filesystem,
                    mount_flags: mount.mount_flags.clone(),
                    mode,
                    named: !mount.fs_type.is_empty(),
                })
            }
        }
    }

    /// Checks the capabilities of one volume, which must agree in what they need.
    pub fn of_all(capabilities: &[VolumeCapability]) -> Result<Vec<Self>, Status> {
        if capabilities.is_empty() {
            return Err(Status::invalid_argument("there are no volume capabilities"));
        }
        capabilities.iter().map(|capability| Self::of(Some(capability))).collect()
    }

    /// True for a block device.
    pub fn is_block(&self) -> bool {
        self.filesystem == Filesystem::Raw
    }

    /// True where nobody may write.
    pub fn is_read_only(&self) -> bool {
        matches!(self.mode, Mode::SingleNodeReaderOnly | Mode::MultiNodeReaderOnly)
    }
}
