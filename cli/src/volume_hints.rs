//! What to do next about each error of pools and volumes.

use std::io;

use petra_volume::Error;

use crate::hints::{local, nearest};
use crate::text::quoted;

/// The next step after an error, where there is one.
pub fn hint(error: &Error) -> Option<String> {
    Some(match error {
        Error::Unknown { what: "pool", .. } => {
            "if it is there, its file system is not mounted; petra pool init DIR, or petra pool init \
             FILE.img --size 20G, makes one"
                .to_owned()
        }
        Error::Unknown { name, known, .. } => match nearest(name, known).first() {
            Some(near) => format!("did you mean {near:?}? petra volume ls lists all"),
            None => "petra volume ls lists what is there".to_owned(),
        },
        Error::Exists { what: "pool", .. } => {
            "use it as it is: petra pool status --pool DIR".to_owned()
        }
        Error::Exists { .. } => "choose another name".to_owned(),
        Error::InUse { by, .. } if by.starts_with("it holds") => {
            "give an empty device; if nothing on this one is needed, blkdiscard --zeroout --force \
             DEVICE erases it"
                .to_owned()
        }
        Error::InUse { by, .. } if by.contains("not uploaded") => {
            "wait for the uploads, or give them up with --force".to_owned()
        }
        Error::InUse { by, .. } if by.starts_with("attached") => {
            "first: petra volume unmount NAME, or petra volume detach NAME".to_owned()
        }
        Error::InUse { by, .. } => match by.strip_prefix("mounted at ") {
            Some(at) => format!("first: umount {}", quoted(at)),
            None => "fuser -vm and lsof show who uses it".to_owned(),
        },
        Error::Busy { .. } => "wait until it is done, and try again".to_owned(),
        Error::Hydrating { .. } => {
            "its data comes while it is attached: petra volume attach NAME, and petra volume info NAME \
             tells when all is here"
                .to_owned()
        }
        Error::NoRoom { .. } => {
            "delete volumes or snapshots' copies, make the pool's file system larger, or see petra \
             pool status"
                .to_owned()
        }
        Error::MissingTool { package, .. } => format!("apt install {package}"),
        Error::Version { .. } => {
            "a newer Petra wrote it: use that version or a later one".to_owned()
        }
        Error::Damaged { .. } => {
            "the data beside it is untouched: bring the file back, or restore a snapshot".to_owned()
        }
        Error::Unsupported { .. } => "petra doctor shows what this machine can do".to_owned(),
        Error::Thawed { .. } => "take the snapshot again".to_owned(),
        Error::Io { cause, .. } if cause.kind() == io::ErrorKind::PermissionDenied => {
            "pools and volumes need root".to_owned()
        }
        Error::Io { cause, .. } => return local(cause),
        Error::Internal(_) => {
            "this is a defect of Petra: please report it with the output of the same command and \
             -vv"
            .to_owned()
        }
        _ => return None,
    })
}
