//! Snapshots of volumes of a pool: one point in time of one or more of them, and its way to a repository.
//!
//! ```text
//! ahead    beside it: read what they will be compared with
//! take     lock -> begin copies -> hook -> sync, freeze -> finish copies -> thaw -> hook -> note the upload -> keep copies
//! upload   open copies, with the copies before them -> engine -> commit -> copies become bases -> forget the upload
//! ```
//!
//! The application waits between freeze and thaw only. An upload is noted in the pool before its copies are kept, so
//! that it goes on after a crash, and no copy is left that nobody knows of:
//!
//! | crash | what is there | what happens |
//! |---|---|---|
//! | before the upload is noted | copies that no volume names | recovery deletes them |
//! | before all copies are kept | an upload that is not ready | [`discard_unfinished`] deletes its copies, and it |
//! | while uploading | an upload with the ids of its sessions | the next one ends them first: a snapshot that was committed counts |
//! | after nobody wants it ([`discard`]) | an upload with a note that says so | the next one gives it up |
//! | before all copies are bases | an upload that is committed | the next one does the rest |

mod ahead;
mod hook;
mod resolve;
mod state;
mod take;
mod upload;

pub use ahead::read_ahead;
pub use hook::Hook;
pub use resolve::{MAX_ATTEMPTS, resolve};
pub use state::{Target, UploadState, UploadVolume, upload_state};
pub(crate) use take::SETTLE;
pub use take::{GroupRequest, Taken, take};
pub use upload::{
    Upload, discard, discard_unfinished, is_being_done, pending, sector_bytes_of, upload_of,
};
