//! Ways to break the protocol: each leaves out, swaps or weakens one step. A model that lets one pass is too weak.

/// One step of the protocol that is left out or done wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    // Writer.
    /// The writer puts no pin.
    NoPin,
    /// The writer does not wait for the pin's acknowledgement.
    PinUnacknowledged,
    /// The writer looks for Purge marks before it pins.
    CheckBeforePin,
    /// The writer pins, but looks for Purge marks no more.
    NoPurgeCheck,
    /// The writer looks whether the witness's packs exist, pins, and looks for nothing else.
    ExistenceBeforePin,
    /// The writer reuses what a LIST of packs shows. A late PUT can make a deleted pack show up.
    ReuseFromPackList,
    /// The writer reuses packs of sessions that are not decided.
    ReuseUndecided,
    /// The writer commits before its packs are acknowledged.
    CommitBeforePacks,
    /// The writer deletes its pin before it commits.
    UnpinBeforeCommit,
    /// The commit is an ordinary PUT.
    CommitOverwrites,
    /// The writer takes "exists" for a loss and does not ask whose it is.
    ExistsIsLoss,
    /// The writer takes no answer for a loss, deletes its pin and goes its way.
    TimeoutIsLoss,
    /// A writer that lost begins again, and does not store its packs again.
    RetryKeepsPacks,
    /// A writer that lost begins again, and stores its packs again under the old names. A DELETE can come late.
    RetryKeepsNames,
    /// A resumed writer takes its pin for checked.
    ResumeSkipsCheck,
    /// A resumed writer takes the packs for stored that were sent before it died.
    ResumeTrustsPacks,
    /// A resumed writer takes a commit with an earlier stamp for someone else's.
    ResumeDisownsCommit,

    // Clone.
    /// The clone puts no pin.
    CloneNoPin,
    /// The clone pins, but looks for no Purge mark.
    CloneNoPurgeCheck,
    /// The clone looks for a Purge mark before it pins.
    CloneCheckBeforePin,
    /// The clone deletes its pin before it puts its end.
    CloneUnpinsBeforeEnd,
    /// A session borrows a pin that its clone has not found valid.
    BorrowUnchecked,
    /// A clone ends before a session that borrowed its pin is decided.
    EndBeforeBorrower,
    /// A session borrows from a clone that ended.
    BorrowEnded,

    // Deleter.
    /// A snapshot is deleted by deleting its decision.
    DeleteDecision,
    /// Purge and Undelete have keys of their own.
    PurgeBesideUndelete,
    /// Undelete deletes the Delete mark.
    UndeleteRemovesMark,

    // Collector.
    /// Pins are listed before marks and ends.
    PinsBeforeMarks,
    /// Decisions are listed before pins.
    DecisionsBeforePins,
    /// Ends are listed last.
    EndsLast,
    /// Pins make no roots.
    PinsIgnored,
    /// Ends are not looked at.
    EndsIgnored,
    /// Purge marks are not looked at.
    PurgesIgnored,
    /// A decided session's pin makes roots.
    VoidPinsHold,
    /// Packs of undecided sessions may go.
    UndecidedPacksGo,
    /// Nobody aborts silent sessions.
    NoAborts,
    /// A collector deletes the packs of a session at once when it sends an Abort.
    AbortDeletesPacks,
    /// A collector deletes an Abort.
    AbortRemoved,
    /// A collector deletes the pin of a session that it takes for dead, without an Abort that won: what one of
    /// them removes, another one relied on.
    PinOfUndecidedRemoved,
    /// Collectors mark packs and look again instead of relying on pins; one removes the marker of another.
    MarkersInsteadOfPins,
    /// A root that is purged by now and has lost packs passes for damage.
    PurgedMeanwhileIsDamage,
    /// A purged root with a void pin that has lost packs passes for damage.
    PurgedPinnedIsDamage,
    /// A purged root with a pin that has lost packs is passed over, whatever became of the pin's owner. A part of
    /// it may be what a session refers to that was decided since.
    PurgedPinnedIsIgnored,

    // Compaction.
    /// Copies are no roots: live places are not followed through maps.
    MapsNotFollowed,
    /// A map whose source's session is undecided in view is taken as it is.
    NoStartOver,
    /// Of two copies of a place one is kept.
    OneCopyKept,
    /// The compactor deletes its source before it commits its map.
    SourceDeletedEarly,
    /// The compactor commits its map before the copy is acknowledged.
    MapBeforeCopy,
    /// The compactor copies what the pack's footer lists, without a look at what is live or decided.
    FooterCompacted,
    /// The compactor copies only some live chunks, and its map stands for the whole pack.
    SomeCopied,
    /// A reader keeps using the compactions it once listed.
    ReaderKeepsMaps,

    // Graves.
    /// Keys are deleted before their grave is there.
    GraveAfterRemoval,
    /// Pinners do not read graves.
    PinnerSkipsGraves,
    /// Pinners read graves before marks.
    PinnerReadsGravesFirst,
    /// Writers do not read graves after their commit.
    CommitSkipsGraves,
    /// Those who undelete do not read graves after their mark.
    UndeleteSkipsGraves,
    /// Collectors do not read graves.
    CollectorSkipsGraves,
    /// Collectors read graves first, and not again.
    CollectorReadsGravesFirst,
    /// Collectors read graves last, and not before: what was buried since may have been a root by its pin.
    CollectorReadsGravesLast,
    /// Snapshots that are purged and pinned go to a grave.
    PinnedGraved,
    /// A compaction goes to a grave when no snapshot refers to its source directly, be it through another map.
    ChainedMapGraved,
    /// A compaction goes to a grave as soon as its source is deleted.
    LiveMapGraved,
}
