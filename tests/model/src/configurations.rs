//! The configurations that are explored.

use crate::model::{Config, Deleting, Role};
use crate::property::Goal;
use crate::sets::Ids;

const FIRST: Ids = Ids::one(0);
const FIRST_TWO: Ids = Ids(0b11);

/// One snapshot and nobody else.
const NOBODY: Config = Config {
    name: "nobody",
    roles: [Role::Snapshot, Role::Unused, Role::Unused, Role::Unused, Role::Unused],
    clones: 0,
    collectors: 0,
    deleting: Deleting::Purge,
    second_chunk: false,
    resolving: false,
    resuming: false,
    borrowing: false,
    graves: false,
    goals: &[],
};

/// Two writers, one of which may build on the other, two collectors, a deleter and a clone.
pub const CONCURRENT: Config = Config {
    name: "2 writers, 2 collectors, deleter, clone",
    roles: [
        Role::Snapshot,
        Role::Writer(FIRST),
        Role::Writer(FIRST_TWO),
        Role::Unused,
        Role::Unused,
    ],
    clones: 1,
    collectors: 2,
    goals: &[Goal::ReuseOutlivesItsWitness, Goal::PurgedIsRead],
    ..NOBODY
};

/// One more clone, and one collector.
pub const CLONES: Config = Config {
    name: "2 writers, collector, deleter, 2 clones",
    clones: 2,
    collectors: 1,
    ..CONCURRENT
};

/// A writer that is resumed after it died, and begins again after an Abort.
pub const RETRY: Config = Config {
    name: "writer with resumption and a second attempt, 2 collectors, deleter, clone",
    roles: [Role::Snapshot, Role::Writer(FIRST), Role::Retry(1, FIRST), Role::Unused, Role::Unused],
    clones: 1,
    collectors: 2,
    resuming: true,
    goals: &[Goal::RetryCommits, Goal::EarlierCommitFound, Goal::PurgedIsRead],
    ..NOBODY
};

/// One compactor.
pub const COMPACTION: Config = Config {
    name: "compactor, writer, 2 collectors, deleter, clone",
    roles: [Role::Snapshot, Role::Writer(FIRST), Role::Compactor, Role::Unused, Role::Unused],
    clones: 1,
    collectors: 2,
    second_chunk: true,
    resolving: true,
    goals: &[Goal::CopyIsRead, Goal::PurgedIsRead],
    ..NOBODY
};

/// Two compactors that race for one pack, or compact one another's copies.
pub const CHAIN: Config = Config {
    name: "2 compactors, writer, 2 collectors, deleter",
    roles: [Role::Snapshot, Role::Writer(FIRST), Role::Compactor, Role::Compactor, Role::Unused],
    clones: 0,
    collectors: 2,
    second_chunk: true,
    resolving: true,
    goals: &[Goal::CopyIsRead, Goal::CopyOfCopyIsRead, Goal::RacingCopies],
    ..NOBODY
};

/// Undelete beside graves.
pub const UNDELETE: Config = Config {
    name: "undelete and graves: writer, 2 collectors, deleter, clone",
    roles: [Role::Snapshot, Role::Writer(FIRST), Role::Unused, Role::Unused, Role::Unused],
    clones: 1,
    collectors: 2,
    deleting: Deleting::Undelete(2),
    graves: true,
    goals: &[Goal::UndeletedTwice, Goal::SnapshotBuried, Goal::AbortReplaced, Goal::PurgedIsRead],
    ..NOBODY
};

/// A session that borrows a clone's pin, beside a compactor.
pub const BORROWING: Config = Config {
    name: "borrowing and compaction: writer, compactor, 2 collectors, deleter, clone",
    borrowing: true,
    goals: &[Goal::BorrowedCommits, Goal::CopyIsRead, Goal::PurgedIsRead],
    ..COMPACTION
};

/// Compactions of compactions, beside graves.
pub const CHAIN_AND_GRAVES: Config = Config {
    name: "chained compaction and graves: 2 compactors, 2 collectors, deleter",
    roles: [Role::Snapshot, Role::Compactor, Role::Compactor, Role::Unused, Role::Unused],
    graves: true,
    goals: &[
        Goal::CopyOfCopyIsRead,
        Goal::RacingCopies,
        Goal::CompactionBuried,
        Goal::SnapshotBuried,
    ],
    ..CHAIN
};

/// A clone that reads through chains.
pub const CHAIN_AND_CLONE: Config = Config {
    name: "2 compactors, writer, collector, deleter, clone",
    clones: 1,
    collectors: 1,
    ..CHAIN
};

/// Two writers beside graves.
pub const UNDELETE_WRITERS: Config = Config {
    name: "undelete and graves: 2 writers, collector, deleter, clone",
    roles: CONCURRENT.roles,
    collectors: 1,
    ..UNDELETE
};

/// A writer beside chains and graves.
pub const CHAIN_AND_GRAVES_WRITER: Config = Config {
    name: "chained compaction and graves: 2 compactors, writer, collector, deleter",
    roles: CHAIN.roles,
    collectors: 1,
    ..CHAIN_AND_GRAVES
};

/// All that take too long for every test run.
pub const LARGE: [Config; 3] = [CHAIN_AND_CLONE, UNDELETE_WRITERS, CHAIN_AND_GRAVES_WRITER];
