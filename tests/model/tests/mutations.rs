//! Each step of the protocol is needed: without it, some state is wrong.

#![expect(clippy::print_stdout, reason = "what was explored, for those who ask: --nocapture")]

use petra_model::configurations::{
    BORROWING, CHAIN, CHAIN_AND_GRAVES, COMPACTION, CONCURRENT, RETRY, UNDELETE,
};
use petra_model::{Config, Model, Mutation, Property, explore};

/// Explores a configuration in which a step is left out, or done wrong, until the property does not hold.
#[track_caller]
fn caught(mutation: Mutation, config: Config, property: Property) {
    let model = Model { config, mutation: Some(mutation) };
    let exploration = explore(model, &[property]);
    let Some(violation) = exploration.violation else {
        panic!(
            "{mutation:?} was not noticed in {} states of {:?}",
            exploration.states, config.name
        );
    };
    println!("{mutation:?}, after {} states: {violation:?}", exploration.states);
}

macro_rules! caught {
    ($($test:ident: $mutation:ident in $config:expr => $property:ident;)*) => {$(
        #[test]
        fn $test() {
            caught(Mutation::$mutation, $config, Property::$property);
        }
    )*};
}

/// One collector is enough.
const fn alone(config: Config) -> Config {
    Config { collectors: 1, ..config }
}

caught! {
    writer_without_pin: NoPin in alone(CONCURRENT) => PinnedIsReadable;
    writer_that_loses_its_witness: NoPin in alone(CONCURRENT) => KeptIsReadable;
    pin_not_acknowledged: PinUnacknowledged in alone(CONCURRENT) => KeptIsReadable;
    check_before_pin: CheckBeforePin in alone(CONCURRENT) => KeptIsReadable;
    no_check_after_pin: NoPurgeCheck in alone(CONCURRENT) => KeptIsReadable;
    existence_before_pin: ExistenceBeforePin in alone(CONCURRENT) => KeptIsReadable;
    reuse_from_pack_list: ReuseFromPackList in alone(CONCURRENT) => KeptIsReadable;
    reuse_of_undecided: ReuseUndecided in alone(CONCURRENT) => KeptIsReadable;
    commit_before_packs: CommitBeforePacks in alone(CONCURRENT) => KeptIsReadable;
    unpin_before_commit: UnpinBeforeCommit in alone(CONCURRENT) => KeptIsReadable;
    commit_overwrites: CommitOverwrites in alone(CONCURRENT) => KeptIsReadable;
    exists_is_loss: ExistsIsLoss in alone(CONCURRENT) => ReportsAreTrue;
    timeout_is_loss: TimeoutIsLoss in alone(CONCURRENT) => KeptIsReadable;
    retry_keeps_packs: RetryKeepsPacks in alone(RETRY) => KeptIsReadable;
    retry_keeps_names: RetryKeepsNames in alone(RETRY) => KeptIsReadable;
    resume_skips_check: ResumeSkipsCheck in alone(RETRY) => KeptIsReadable;
    resume_trusts_packs: ResumeTrustsPacks in alone(RETRY) => KeptIsReadable;
    resume_disowns_commit: ResumeDisownsCommit in alone(RETRY) => ReportsAreTrue;

    clone_without_pin: CloneNoPin in alone(CONCURRENT) => PinnedIsReadable;
    clone_without_check: CloneNoPurgeCheck in alone(CONCURRENT) => PinnedIsReadable;
    clone_checks_before_pin: CloneCheckBeforePin in alone(CONCURRENT) => PinnedIsReadable;
    clone_unpins_before_end: CloneUnpinsBeforeEnd in alone(CONCURRENT) => NothingLeaks;
    borrow_unchecked: BorrowUnchecked in alone(BORROWING) => KeptIsReadable;
    borrow_ended: BorrowEnded in alone(BORROWING) => KeptIsReadable;
    end_before_borrower: EndBeforeBorrower in alone(BORROWING) => KeptIsReadable;

    deletion_of_the_decision: DeleteDecision in alone(CONCURRENT) => KeptIsReadable;
    purge_beside_undelete: PurgeBesideUndelete in alone(UNDELETE) => KeptIsReadable;
    undelete_removes_mark: UndeleteRemovesMark in alone(UNDELETE) => KeptIsReadable;

    pins_before_marks: PinsBeforeMarks in alone(CONCURRENT) => KeptIsReadable;
    decisions_before_pins: DecisionsBeforePins in alone(CONCURRENT) => KeptIsReadable;
    ends_last: EndsLast in alone(BORROWING) => KeptIsReadable;
    pins_ignored: PinsIgnored in alone(CONCURRENT) => KeptIsReadable;
    ends_ignored: EndsIgnored in alone(CONCURRENT) => NothingLeaks;
    purges_ignored: PurgesIgnored in alone(CONCURRENT) => NothingLeaks;
    void_pins_hold: VoidPinsHold in alone(CONCURRENT) => NothingLeaks;
    undecided_packs_go: UndecidedPacksGo in alone(CONCURRENT) => KeptIsReadable;
    no_aborts: NoAborts in alone(CONCURRENT) => NothingLeaks;
    abort_deletes_packs: AbortDeletesPacks in alone(CONCURRENT) => KeptIsReadable;
    abort_removed: AbortRemoved in alone(CONCURRENT) => KeptIsReadable;
    pin_of_undecided_removed: PinOfUndecidedRemoved in alone(CONCURRENT) => KeptIsReadable;
    markers_instead_of_pins: MarkersInsteadOfPins in CONCURRENT => KeptIsReadable;
    purged_meanwhile_is_damage: PurgedMeanwhileIsDamage in CONCURRENT => NoFalseAlarm;
    purged_pinned_is_damage: PurgedPinnedIsDamage in alone(CONCURRENT) => NoFalseAlarm;
    purged_pinned_is_ignored: PurgedPinnedIsIgnored in CONCURRENT => KeptIsReadable;
    purged_pinned_is_ignored_beside_compaction: PurgedPinnedIsIgnored in COMPACTION => KeptIsReadable;

    maps_not_followed: MapsNotFollowed in alone(COMPACTION) => KeptIsReadable;
    no_start_over: NoStartOver in COMPACTION => KeptIsReadable;
    no_start_over_in_a_chain: NoStartOver in CHAIN => KeptIsReadable;
    one_copy_kept: OneCopyKept in CHAIN => KeptIsReadable;
    source_deleted_early: SourceDeletedEarly in alone(COMPACTION) => KeptIsReadable;
    map_before_copy: MapBeforeCopy in alone(COMPACTION) => KeptIsReadable;
    footer_compacted: FooterCompacted in alone(COMPACTION) => NobodyBlocks;
    some_copied: SomeCopied in alone(COMPACTION) => KeptIsReadable;
    reader_keeps_maps: ReaderKeepsMaps in alone(COMPACTION) => PinnedIsReadable;

    grave_after_removal: GraveAfterRemoval in UNDELETE => NoFalseAlarm;
    pinner_skips_graves: PinnerSkipsGraves in alone(UNDELETE) => PinnedIsReadable;
    pinner_reads_graves_first: PinnerReadsGravesFirst in alone(UNDELETE) => PinnedIsReadable;
    commit_skips_graves: CommitSkipsGraves in alone(UNDELETE) => ReportsAreTrue;
    undelete_skips_graves: UndeleteSkipsGraves in alone(UNDELETE) => ReportsAreTrue;
    collector_skips_graves: CollectorSkipsGraves in alone(UNDELETE) => NoFalseAlarm;
    collector_reads_graves_first: CollectorReadsGravesFirst in UNDELETE => NoFalseAlarm;
    collector_reads_graves_last: CollectorReadsGravesLast in UNDELETE => KeptIsReadable;
    pinned_graved: PinnedGraved in alone(UNDELETE) => PinnedIsReadable;
    chained_map_graved: ChainedMapGraved in alone(CHAIN_AND_GRAVES) => KeptIsReadable;
    live_map_graved: LiveMapGraved in alone(CHAIN_AND_GRAVES) => KeptIsReadable;
}

/// That it takes two collectors to break it shows that it is broken by what its test says.
#[test]
fn markers_are_sound_with_one_collector() {
    let model = Model {
        config: Config { clones: 0, ..alone(CONCURRENT) },
        mutation: Some(Mutation::MarkersInsteadOfPins),
    };
    assert!(explore(model, &[Property::KeptIsReadable]).violation.is_none());
}
