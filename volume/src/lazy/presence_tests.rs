//! The presence map against a naive model, with crashes at every step.

use std::sync::Arc;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

const FIRST_BOOT: BootId = BootId([1; 16]);

fn identity(blocks: u64) -> VolumeIdentity {
    VolumeIdentity { id: SnapshotId::from_parts(1, 1), len_bytes: blocks * BLOCK_BYTES }
}

/// A disk that loses what was not synced: any of it, or half of one write.
#[derive(Clone, Default)]
struct Disk(Arc<Mutex<DiskState>>);

#[derive(Default)]
struct DiskState {
    durable: Vec<u8>,
    /// What the machine would read.
    current: Vec<u8>,
    pending: Vec<(u64, Vec<u8>)>,
    /// Fails from this operation on.
    fails_after: Option<usize>,
}

impl DiskState {
    fn step(&mut self) -> io::Result<()> {
        match &mut self.fails_after {
            None => Ok(()),
            Some(0) => Err(io::Error::other("a fault of the test")),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }

    fn apply(bytes: &mut Vec<u8>, offset: u64, write: &[u8]) {
        let end = offset as usize + write.len();
        bytes.resize(bytes.len().max(end), 0);
        bytes[offset as usize..end].copy_from_slice(write);
    }
}

impl Medium for Disk {
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.0.lock().unwrap();
        buf.fill(0);
        let there = state.current.get(offset as usize..).unwrap_or_default();
        let len = there.len().min(buf.len());
        buf[..len].copy_from_slice(&there[..len]);
        Ok(())
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        state.step()?;
        DiskState::apply(&mut state.current, offset, bytes);
        state.pending.push((offset, bytes.to_vec()));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        state.step()?;
        for (offset, bytes) in std::mem::take(&mut state.pending) {
            DiskState::apply(&mut state.durable, offset, &bytes);
        }
        Ok(())
    }
}

impl Disk {
    fn create(identity: VolumeIdentity) -> Self {
        let disk = Self::default();
        disk.write(&identity.header(DURABLE_MAGIC, BootId::NONE), 0).unwrap();
        disk.sync().unwrap();
        disk
    }

    /// The power goes: each write that was not synced is lost, kept or torn, as `luck` says.
    fn cut(&self, luck: &[u8]) {
        let mut state = self.0.lock().unwrap();
        for (n, (offset, bytes)) in std::mem::take(&mut state.pending).into_iter().enumerate() {
            let kept = match luck.get(n % luck.len().max(1)).copied().unwrap_or_default() % 3 {
                0 => 0,
                1 => bytes.len(),
                // Sectors are whole.
                _ => bytes.len() / 2,
            };
            DiskState::apply(&mut state.durable, offset, &bytes[..kept]);
        }
        state.current = state.durable.clone();
        state.fails_after = None;
    }
}

/// For each block the number of the write that made it; 0 is what was never written.
type Blocks = Vec<u32>;

/// What a write leaves that was never acknowledged.
const HALF: u32 = u32::MAX;

struct Image {
    current: Blocks,
    durable: Blocks,
}

#[derive(Clone, Debug)]
enum Step {
    /// Writes, as the image server does: data, then bits.
    Write {
        start: u64,
        len: u64,
    },
    /// As a write whose process dies between data and bits.
    HalfWrite {
        start: u64,
    },
    Sync,
    /// The disk fails at this operation of a sync; `data` says whether the image's sync comes through.
    FailedSync {
        at: usize,
        data: bool,
    },
    /// The image server is killed and started again.
    Kill,
    /// The power goes, and the machine starts again.
    PowerCut {
        luck: Vec<u8>,
    },
    Close,
}

fn any_step(blocks: u64) -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..blocks, 1..40_000_u64).prop_map(|(start, len)| Step::Write { start, len }),
        6 => (0..blocks, 1..100_u64).prop_map(|(start, len)| Step::Write { start, len }),
        1 => (0..blocks).prop_map(|start| Step::HalfWrite { start }),
        4 => Just(Step::Sync),
        2 => (0..5_usize, any::<bool>()).prop_map(|(at, data)| Step::FailedSync { at, data }),
        1 => Just(Step::Kill),
        2 => prop::collection::vec(any::<u8>(), 1..6).prop_map(|luck| Step::PowerCut { luck }),
        1 => Just(Step::Close),
    ]
}

/// The whole machine.
struct Machine {
    dir: TempDir,
    identity: VolumeIdentity,
    boot: BootId,
    disk: Disk,
    image: Image,
    presence: Option<Presence<Disk>>,
    /// What was acknowledged, and of that what was flushed.
    acknowledged: Blocks,
    flushed: Blocks,
    writes: u32,
}

impl Machine {
    fn new(blocks: u64) -> Self {
        let identity = identity(blocks);
        let none = vec![0; blocks as usize];
        let mut machine = Self {
            dir: tempfile::tempdir().unwrap(),
            identity,
            boot: FIRST_BOOT,
            disk: Disk::create(identity),
            image: Image { current: none.clone(), durable: none.clone() },
            presence: None,
            acknowledged: none.clone(),
            flushed: none,
            writes: 0,
        };
        machine.open();
        machine
    }

    fn open(&mut self) {
        let working = self.dir.path().join("working");
        let path = Path::new("durable");
        let opened =
            Presence::load(self.disk.clone(), path, &working, self.identity, self.boot).unwrap();
        self.presence = Some(opened);
    }

    fn presence(&self) -> &Presence<Disk> {
        self.presence.as_ref().unwrap()
    }

    fn sync(&mut self, data_comes_through: bool) {
        let acknowledged = self.acknowledged.clone();
        let image = &mut self.image;
        let presence = self.presence.as_ref().unwrap();
        let synced = presence.sync(
            || {
                if data_comes_through {
                    image.durable.clone_from(&image.current);
                    Ok(())
                } else {
                    Err(io::Error::other("a fault of the test"))
                }
            },
            Path::new("image"),
        );
        if synced.is_ok() {
            self.flushed = acknowledged;
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Write { start, len } => {
                self.writes += 1;
                let blocks = start..(start + len).min(self.identity.blocks());
                for list in [&mut self.image.current, &mut self.acknowledged] {
                    list[blocks.start as usize..blocks.end as usize].fill(self.writes);
                }
                self.presence().set(blocks);
            }
            Step::HalfWrite { start } => {
                // Only where nothing was: over a block that is there this would be a write.
                if self.presence().first_absent(start..start + 1).is_some() {
                    self.image.current[start as usize] = HALF;
                }
                self.kill();
            }
            Step::Sync => self.sync(true),
            Step::FailedSync { at, data } => {
                self.disk.0.lock().unwrap().fails_after = Some(at);
                self.sync(data);
                self.disk.0.lock().unwrap().fails_after = None;
            }
            Step::Kill => self.kill(),
            Step::PowerCut { luck } => {
                self.presence = None;
                self.disk.cut(&luck);
                // Of the image too anything may be on the disk that was written since.
                for (block, write) in self.image.current.iter().enumerate() {
                    if luck[block % luck.len()] % 2 == 0 {
                        self.image.durable[block] = *write;
                    }
                }
                self.image.current.clone_from(&self.image.durable);
                self.boot = BootId([self.boot.0[0] + 1; 16]);
                self.open();
                self.check(false);
                // What the machine remembers is what is there now.
                let there = self.there();
                let kept = self.image.current.iter().zip(there);
                self.acknowledged =
                    kept.map(|(write, there)| if there { *write } else { 0 }).collect();
                self.flushed.clone_from(&self.acknowledged);
            }
            Step::Close => {
                self.sync(true);
                let closed = self.presence.take().unwrap().close(|| Ok(()), Path::new("image"));
                closed.unwrap();
                assert!(!self.dir.path().join("working").exists());
                self.open();
            }
        }
    }

    fn kill(&mut self) {
        self.presence = None;
        self.open();
        self.check(true);
    }

    /// Nothing that was promised is lost, and nothing counts as there that is not.
    fn check(&self, all: bool) {
        let promised = if all { &self.acknowledged } else { &self.flushed };
        let there = self.there();
        for (block, (promised, found)) in promised.iter().zip(&self.image.current).enumerate() {
            if *promised > 0 {
                assert!(there[block], "block {block} is lost");
                assert!(found >= promised, "block {block} has write {found}, not {promised}");
            }
            assert!(
                !there[block] || (*found != 0 && *found != HALF),
                "block {block} is not there, but counts"
            );
        }
        let count = there.iter().filter(|there| **there).count() as u64;
        assert_eq!(count, self.presence().present_blocks());
    }

    fn there(&self) -> Vec<bool> {
        let presence = self.presence();
        let mut there = vec![true; presence.blocks() as usize];
        let mut at = 0;
        while let Some(run) = presence.absent_run(at..presence.blocks()) {
            there[run.start as usize..run.end as usize].fill(false);
            at = run.end;
        }
        there
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn nothing_promised_is_lost_and_nothing_made_up(
        steps in prop::collection::vec(any_step(70_000), 1..40)
    ) {
        let mut machine = Machine::new(70_000);
        for step in steps {
            machine.step(step);
        }
        machine.kill();
        machine.step(Step::PowerCut { luck: vec![0, 1, 2] });
    }

    #[test]
    fn runs_are_those_of_a_naive_map(
        sets in prop::collection::vec((0..500_u64, 1..100_u64), 0..10),
        from in 0..500_u64, len in 0..500_u64
    ) {
        let machine = Machine::new(500);
        let mut naive = vec![false; 500];
        for (start, len) in sets {
            machine.presence().set(start..start + len);
            naive.iter_mut().skip(start as usize).take(len as usize).for_each(|bit| *bit = true);
        }
        let end = (from + len).min(500);
        let start = (from..end).find(|block| !naive[*block as usize]);
        let expected = start.map(|start| {
            start..(start..end).find(|block| naive[*block as usize]).unwrap_or(end)
        });
        prop_assert_eq!(machine.presence().absent_run(from..from + len), expected);
        let count = naive.iter().filter(|bit| **bit).count() as u64;
        prop_assert_eq!(machine.presence().present_blocks(), count);
        prop_assert_eq!(machine.presence().is_complete(), count == 500);
    }

    #[test]
    fn damage_is_an_error_or_harmless(at in 0..10 * SLOT, byte: u8, words: [u8; 4]) {
        let mut machine = Machine::new(100_000);
        for n in 0..3 {
            machine.step(Step::Write { start: n * 20_000, len: 5000 + u64::from(words[0]) });
            machine.step(Step::Sync);
        }
        // As after a power cut: then a slot may be torn.
        let known = machine.presence().present_blocks();
        machine.presence = None;
        machine.disk.0.lock().unwrap().current.resize(10 * SLOT, 0);
        machine.disk.0.lock().unwrap().current[at] = byte;
        let working = machine.dir.path().join("working");
        let boot = BootId([9; 16]);
        let path = Path::new("durable");
        match Presence::load(machine.disk.clone(), path, &working, machine.identity, boot) {
            Ok(opened) => prop_assert!(opened.present_blocks() <= known),
            Err(error) => prop_assert!(
                matches!(error, Error::Damaged { .. } | Error::Version { .. }), "{}", error
            ),
        }
    }
}

/// The slots of a sync that was cut short could be read, but were not on the disk; the next sync took them for durable.
#[test]
fn what_a_killed_sync_left_is_not_taken_for_durable() {
    let mut machine = Machine::new(1000);
    machine.step(Step::Write { start: 0, len: 9 });
    machine.step(Step::FailedSync { at: 1, data: true });
    machine.step(Step::Kill);
    machine.step(Step::Sync);
    machine.step(Step::PowerCut { luck: vec![0] });
}

/// Files of a real volume, and what opening them answers.
struct Files {
    dir: TempDir,
    identity: VolumeIdentity,
}

impl Files {
    fn new() -> Self {
        let files = Self { dir: tempfile::tempdir().unwrap(), identity: identity(100_000) };
        Presence::create(&files.path(), files.identity, files.identity.len_bytes).unwrap();
        files
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("presence")
    }

    fn working(&self) -> PathBuf {
        self.dir.path().join("working")
    }

    fn open_as(&self, identity: VolumeIdentity, boot: BootId) -> Result<Presence> {
        Presence::open(&self.path(), &self.working(), identity, boot)
    }

    fn open(&self) -> Result<Presence> {
        self.open_as(self.identity, FIRST_BOOT)
    }

    fn change(&self, at: u64, bytes: &[u8]) {
        let file = OpenOptions::new().write(true).open(self.path()).unwrap();
        file.write_all_at(bytes, at).unwrap();
    }
}

fn damage_of<T: std::fmt::Debug>(result: Result<T>) -> String {
    match result.unwrap_err() {
        Error::Damaged { detail, .. } => detail,
        error => panic!("{error}"),
    }
}

#[test]
fn a_map_is_opened_by_one_process_at_a_time() {
    let files = Files::new();
    let first = files.open().unwrap();
    assert!(matches!(files.open(), Err(Error::Busy { .. })));
    first.set(5..10);
    drop(first);
    assert_eq!(files.open().unwrap().present_blocks(), 5);
    let again = Presence::create(&files.path(), files.identity, 0);
    assert!(matches!(again, Err(Error::Exists { .. })));
}

#[test]
fn foreign_files_are_refused() {
    let files = Files::new();
    let other = VolumeIdentity { id: SnapshotId::from_parts(2, 2), ..files.identity };
    assert!(damage_of(files.open_as(other, FIRST_BOOT)).contains("belongs to volume"));
    let longer = VolumeIdentity { len_bytes: files.identity.len_bytes * 2, ..files.identity };
    assert!(damage_of(files.open_as(longer, FIRST_BOOT)).contains("belongs to volume"));

    files.change(8, &2_u32.to_le_bytes());
    assert!(matches!(files.open(), Err(Error::Version { found: 2, .. })));
    files.change(0, b"something");
    assert!(damage_of(files.open()).contains("no presence map"));
    std::fs::write(files.path(), b"short").unwrap();
    assert!(damage_of(files.open()).contains("no presence map"));
}

#[test]
fn a_lost_working_copy_is_noticed_until_the_machine_is_restarted() {
    let files = Files::new();
    let presence = files.open().unwrap();
    presence.set(0..7);
    drop(presence);
    std::fs::remove_file(files.working()).unwrap();
    assert!(damage_of(files.open()).contains("may be lost"));
    let after = files.open_as(files.identity, BootId([2; 16])).unwrap();
    assert_eq!(after.present_blocks(), 0, "nothing was flushed");
}

#[test]
fn a_damaged_page_of_a_closed_volume_is_no_torn_write() {
    let files = Files::new();
    let presence = files.open().unwrap();
    presence.set(0..7);
    presence.close(|| Ok(()), Path::new("image")).unwrap();
    drop(presence);
    // The first write to a pair goes to its second slot.
    files.change(slot_offset(1, true) + 100, b"x");
    assert!(damage_of(files.open()).contains("no torn write"));
}

#[test]
fn both_slots_damaged_is_an_error() {
    let files = Files::new();
    let presence = files.open().unwrap();
    for n in 0..2 {
        presence.set(n..n + 1);
        presence.sync(|| Ok(()), Path::new("image")).unwrap();
    }
    drop(presence);
    for second in [false, true] {
        files.change(slot_offset(1, second) + 100, b"x");
    }
    assert!(damage_of(files.open()).contains("both copies"));
}

/// A volume that is larger than its source: what lies beyond is there, also after a restart of the machine.
#[test]
fn what_lies_beyond_the_source_is_there() {
    let page = 64 * WORDS as u64;
    for (source, blocks) in
        [(0, 10), (10, 10), (9, 10), (63, 65), (64, 129), (100, page), (page - 1, 3 * page + 7)]
    {
        let dir = tempfile::tempdir().unwrap();
        let (path, working) = (dir.path().join("presence"), dir.path().join("working"));
        let identity = identity(blocks);
        // Its last block is cut short.
        let source_bytes = (source * BLOCK_BYTES).saturating_sub(512);
        Presence::create(&path, identity, source_bytes).unwrap();
        for boot in [FIRST_BOOT, BootId([2; 16])] {
            let presence = Presence::open(&path, &working, identity, boot).unwrap();
            assert_eq!(presence.present_blocks(), blocks - source, "{source} of {blocks}");
            let absent = Some(0..source).filter(|range| !range.is_empty());
            assert_eq!(presence.absent_run(0..blocks), absent);
            assert_eq!(presence.is_complete(), source == 0);
        }
    }
}
