//! Checking that every snapshot can be restored.
//!
//! The structure check reads all small objects and manifests, and sees that every frame lies in a pack that is there
//! and long enough. With `read_data` it also goes through the motions of restoring every segment, writing nowhere, so
//! that each chunk is decompressed and hashed; with a sample, only those of some frames. Segments that snapshots
//! share are checked once.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use futures::{StreamExt, stream};
use serde::Serialize;

use crate::context::Context;
use crate::error::{Error, Result};
use crate::format::block::BlockRef;
use crate::format::frame::FrameLocation;
use crate::format::leaf::{Extent, Leaf};
use crate::format::node::Child;
use crate::format::pack::{self, TRAILER_BYTES};
use crate::id::{Digest, PackId, SnapshotId};
use crate::key::{self, Key};
use crate::listings::{self, Finding};
use crate::name::Name;
use crate::record::{SnapshotRecord, VolumeRecord};
use crate::relocation::Relocator;
use crate::repository::Repository;
use crate::restore::{ByteRange, Restore, join};
use crate::sample::Sample;
use crate::store::list_all;
use crate::survey::Survey;
use crate::target::{Nowhere, Sink};
use crate::tree::{self, SegmentLeaf};
use crate::url::Item;

/// How deep to look.
#[derive(Clone, Copy, Debug, Default)]
pub struct VerifyOptions {
    /// Read and verify data, not only the manifests.
    pub read_data: bool,
    /// Of the data, only this part.
    pub sample: Option<Sample>,
}

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Snapshots that were checked.
    pub snapshots: u64,
    /// Packs that they refer to.
    pub packs: u64,
    /// Bytes of data in them; what they share counts once for each segment that differs.
    pub data_bytes: u64,
    /// Bytes of data that were read and verified.
    pub checked_bytes: u64,
    /// Which part of the data was chosen, if not all of it.
    pub sample: Option<Sample>,
    /// Objects that are missing or damaged. Empty when all is well.
    pub problems: Vec<Problem>,
}

/// A missing or damaged object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The object.
    pub object: String,
    /// What was expected and what was found.
    pub detail: String,
    /// Whom it hits.
    pub affected: Vec<Affected>,
}

/// A volume that can't be restored whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Affected {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// Its experiment.
    pub experiment: Name,
    /// Its run.
    pub run: Name,
    /// The volume.
    pub volume: Name,
    /// Bytes of the volume.
    pub ranges: Vec<ByteRange>,
}

/// Checks the snapshots of `scope`. Damage of any object is in the report; other errors end the call.
pub async fn verify(
    repo: &Repository,
    scope: &Item,
    options: &VerifyOptions,
    ctx: &Context,
) -> Result<VerifyReport> {
    let only = match scope {
        Item::Snapshot { snapshot, .. } => Some(repo.find(snapshot).await?.id),
        _ => None,
    };
    let survey = Survey::read(repo, ctx).await?;
    // Only now: the packs of a snapshot are there before it is.
    let mut packs = HashMap::new();
    for entry in list_all(repo.store(), key::PACKS).await? {
        if let Some(pack) = key::parse_numbered(&entry.key, key::PACKS) {
            packs.insert(pack, entry.len);
        }
    }
    let mut check = Check {
        repo,
        options,
        ctx,
        packs,
        quarantined: repo.quarantined().await?,
        used: HashSet::new(),
        sound: HashSet::new(),
        broken: HashMap::new(),
        report: VerifyReport { sample: options.sample, ..VerifyReport::default() },
    };
    let within = |id| only.map_or_else(|| survey.is_within(id, scope), |only| only == id);
    check.small_objects(&survey, *scope == Item::Repository, within);
    let mut checked = Vec::new();
    for record in survey.committed().filter(|record| within(record.id)) {
        if survey.is_deleted(record.id) {
            continue;
        }
        checked.push(record.id);
        check.report.snapshots += 1;
        let known = check.report.problems.clone();
        for volume in &record.volumes {
            check.volume(record, volume).await?;
        }
        // A snapshot that was purged under way may have lost its data, which is no damage.
        if check.report.problems != known && repo.is_purged(record.id).await.unwrap_or(false) {
            check.report.problems = known;
            check.report.snapshots -= 1;
        }
    }
    if options.read_data {
        check.footers(&checked).await?;
    }
    check.report.packs = check.used.len() as u64;
    Ok(check.report)
}

/// A leaf, as several snapshots may share it.
type LeafKey = (Digest, PackId, u32);

/// Damage below one leaf: the object, the detail, and ranges within the segment.
type Broken = (String, String, Vec<Range<u64>>);

struct Check<'a> {
    repo: &'a Repository,
    options: &'a VerifyOptions,
    ctx: &'a Context,
    /// All packs and their lengths.
    packs: HashMap<PackId, u64>,
    /// Those that a repair has set aside: what it healed of them is looked for in the copies.
    quarantined: HashSet<PackId>,
    used: HashSet<PackId>,
    sound: HashSet<LeafKey>,
    broken: HashMap<LeafKey, Vec<Broken>>,
    report: VerifyReport,
}

impl Check<'_> {
    /// Notes what can't be read, and committed snapshots that the catalogue does not lead to.
    fn small_objects(
        &mut self,
        survey: &Survey,
        is_whole: bool,
        within: impl Fn(SnapshotId) -> bool,
    ) {
        let mut note = |error: &Error| {
            let (object, detail) = describe(error);
            self.report.problems.push(Problem { object, detail, affected: vec![] });
        };
        for (id, decision) in &survey.decisions {
            if let (Err(error), true) = (decision, within(*id)) {
                note(error);
            }
        }
        for (id, (_, state)) in &survey.marks {
            if let (Err(error), true) = (state, within(*id)) {
                note(error);
            }
        }
        for (.., pin) in survey.pins.iter().filter(|_| is_whole) {
            if let Err(error) = pin {
                note(error);
            }
        }
        for finding in listings::findings(survey) {
            if let Finding::Lost { record, key, detail } = finding
                && within(record.id)
            {
                let object = key.to_string();
                self.report.problems.push(Problem { object, detail, affected: vec![] });
            }
        }
    }

    async fn volume(&mut self, record: &SnapshotRecord, volume: &VolumeRecord) -> Result<()> {
        let sink: Arc<dyn Sink> = Arc::new(Nowhere);
        let mut walk = Restore::begin(self.repo, volume, sink, true, self.ctx).await?;
        if let Some(root) = volume.root {
            self.used.extend(self.places(root.into()).await?);
        }
        // Damage above the leaves; what comes later is below one of them.
        for damage in walk.take_damage() {
            let ranges = damage.ranges.iter().map(|r| r.start..r.end).collect();
            self.problem(record, volume, damage.object, damage.detail, ranges);
        }
        for batch in walk.batches() {
            let mut keys = HashMap::new();
            let mut fresh = Vec::new();
            for (segment, child) in batch {
                let Child::Block { block, .. } = child else { continue };
                let key = (block.digest, block.pack, block.offset);
                keys.insert(segment, key);
                self.used.extend(self.places(block).await?);
                if !self.sound.contains(&key) && !self.broken.contains_key(&key) {
                    fresh.push((segment, child));
                }
            }
            let checked: Vec<usize> = fresh.iter().map(|(segment, _)| *segment).collect();
            let mut leaves = Vec::with_capacity(fresh.len());
            for (segment, leaf) in walk.leaves(fresh).await? {
                if let Ok(Some(leaf)) = &leaf {
                    self.report.data_bytes += leaf.data_bytes();
                }
                let leaf = self.relocate(leaf).await?;
                let (mut leaf, broken) = self.structure(leaf);
                if let Some(key) = keys.get(&segment).filter(|_| !broken.is_empty()) {
                    self.broken.insert(*key, broken);
                }
                if let (Some(sample), Ok(Some(leaf))) = (self.options.sample, &mut leaf) {
                    keep_frames(leaf, |frame| sample.has(frame.pack, frame.offset));
                }
                if self.options.read_data {
                    leaves.push((segment, leaf));
                }
            }
            walk.write(leaves).await?;
            for damage in walk.take_damage() {
                self.note_damage(volume, &keys, damage);
            }
            self.sound.extend(
                checked
                    .iter()
                    .filter_map(|n| keys.get(n))
                    .filter(|key| !self.broken.contains_key(*key)),
            );
            for (segment, key) in keys {
                let start = tree::segment_range(volume.len_bytes, segment).start;
                for (object, detail, ranges) in self.broken.get(&key).cloned().unwrap_or_default() {
                    let ranges =
                        ranges.into_iter().map(|r| start + r.start..start + r.end).collect();
                    self.problem(record, volume, object, detail, ranges);
                }
            }
        }
        let report = walk.finish()?;
        self.report.checked_bytes += report.written_bytes;
        Ok(())
    }

    /// The packs that hold a block: its own, or those that compactions copied it to.
    async fn places(&self, block: BlockRef) -> Result<BTreeSet<PackId>> {
        let is_there = |pack| self.is_sound(pack);
        let mut now = Relocator { repo: self.repo, is_there: &is_there, packs: BTreeSet::new() };
        // Reading it says what is wrong, if anything is.
        match now.block(block).await {
            Err(error) if !error.is_damage() => return Err(error),
            _ => {}
        }
        now.packs.retain(|pack| self.packs.contains_key(pack));
        Ok(now.packs)
    }

    /// A leaf with its chunks where they are now.
    async fn relocate(&mut self, leaf: SegmentLeaf) -> Result<SegmentLeaf> {
        let Ok(Some(leaf)) = leaf else { return Ok(leaf) };
        let is_there = |pack| self.is_sound(pack);
        let mut now = Relocator { repo: self.repo, is_there: &is_there, packs: BTreeSet::new() };
        let leaf = match now.leaf(leaf).await {
            Err(error) if !error.is_damage() => return Err(error),
            leaf => leaf.map(Some),
        };
        now.packs.retain(|pack| self.packs.contains_key(pack));
        self.used.extend(now.packs);
        Ok(leaf)
    }

    /// True for packs that are there and not set aside.
    fn is_sound(&self, pack: PackId) -> bool {
        self.packs.contains_key(&pack) && !self.quarantined.contains(&pack)
    }

    /// Checks the footers of all packs that are used. No snapshot needs them, but they tell of damage. That of packs
    /// that a repair has set aside is known.
    async fn footers(&mut self, snapshots: &[SnapshotId]) -> Result<()> {
        let mut used: Vec<PackId> = self.used.difference(&self.quarantined).copied().collect();
        used.sort();
        let this = &*self;
        let chosen = |pack| self.options.sample.is_none_or(|sample| sample.has(pack, 0));
        let read = used.into_iter().filter(|pack| chosen(*pack)).filter_map(|pack| {
            let len = *this.packs.get(&pack)?;
            Some(async move { (pack, this.footer(pack, len).await) })
        });
        let requests = self.ctx.limits.requests.max(1);
        let read: Vec<_> = stream::iter(read).buffer_unordered(requests).collect().await;
        for (pack, result) in read {
            match result {
                Ok(()) => {}
                Err(error) if error.is_damage() => {
                    if matches!(error, Error::Missing { .. })
                        && self.was_collected(pack, snapshots).await?
                    {
                        continue;
                    }
                    let (_, detail) = describe(&error);
                    let object = Key::pack(pack).to_string();
                    self.report.problems.push(Problem { object, detail, affected: vec![] });
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// True when a pack that was there may be gone for a good reason: it was compacted, or a snapshot was purged.
    async fn was_collected(&self, pack: PackId, snapshots: &[SnapshotId]) -> Result<bool> {
        if !self.repo.relocations(pack, |_| false).await?.is_empty() {
            return Ok(true);
        }
        for snapshot in snapshots {
            if self.repo.is_purged(*snapshot).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn footer(&self, pack: PackId, len: u64) -> Result<()> {
        self.ctx.check()?;
        let key = Key::pack(pack);
        let read = async |range| match self.repo.store().get_range(&key, range).await {
            Err(error) if error.is_not_found() => Err(Error::Missing {
                object: key.to_string(),
                needed_by: "a committed snapshot".to_owned(),
            }),
            read => Ok(read?),
        };
        let header = read(0..pack::HEADER_BYTES as u64).await?;
        let trailer = read(len.saturating_sub(TRAILER_BYTES as u64)..len).await?;
        let (footer_len, _) = pack::read_trailer(&trailer).map_err(|error| error.of(&key))?;
        let tail_at = len.saturating_sub((footer_len + TRAILER_BYTES) as u64);
        let tail = read(tail_at..len).await?;
        pack::read_footer(pack, self.repo.keys(), &header, &tail, len)
            .map_err(|error| error.of(&key))?;
        Ok(())
    }

    /// Checks that the frames of a leaf lie within packs that are there. Gives the leaf without the chunks that do not.
    fn structure(&mut self, leaf: SegmentLeaf) -> (SegmentLeaf, Vec<Broken>) {
        let mut broken: Vec<Broken> = Vec::new();
        let mut leaf = match leaf {
            Ok(Some(leaf)) => leaf,
            Ok(None) => return (Ok(None), broken),
            Err(error) => {
                let whole = 0..crate::format::SEGMENT_BYTES;
                let (object, detail) = describe(&error);
                return (Ok(None), vec![(object, detail, vec![whole])]);
            }
        };
        self.used.extend(leaf.frames.iter().map(|frame| frame.pack));
        let bad: HashMap<u32, String> = (0..)
            .zip(&leaf.frames)
            .filter_map(|(n, frame)| Some((n, misplaced(&self.packs, frame)?)))
            .collect();
        if bad.is_empty() {
            return (Ok(Some(leaf)), broken);
        }
        let mut missing = Vec::new();
        for (at, chunk) in leaf.chunks() {
            if let (Some(why), Some(frame)) =
                (bad.get(&chunk.frame), leaf.frames.get(chunk.frame as usize))
            {
                let object = Key::pack(frame.pack).to_string();
                missing.push((object, why.clone(), at..at + u64::from(chunk.len)));
            }
        }
        for (object, detail, range) in missing {
            match broken.iter_mut().find(|b| b.0 == object && b.1 == detail) {
                Some(known) => known.2.push(range),
                None => broken.push((object, detail, vec![range])),
            }
        }
        let packs = &self.packs;
        keep_frames(&mut leaf, |frame| misplaced(packs, frame).is_none());
        (Ok(Some(leaf)), broken)
    }

    /// Sorts damage that reading found by the leaves that it is below.
    fn note_damage(
        &mut self,
        volume: &VolumeRecord,
        keys: &HashMap<usize, LeafKey>,
        damage: crate::restore::Damage,
    ) {
        for (segment, key) in keys {
            let span = tree::segment_range(volume.len_bytes, *segment);
            let within = |r: &ByteRange| {
                let (start, end) = (r.start.max(span.start), r.end.min(span.end));
                (start < end).then(|| start - span.start..end - span.start)
            };
            let ranges: Vec<Range<u64>> = damage.ranges.iter().filter_map(within).collect();
            if !ranges.is_empty() {
                let broken = self.broken.entry(*key).or_default();
                broken.push((damage.object.clone(), damage.detail.clone(), ranges));
            }
        }
    }

    fn problem(
        &mut self,
        record: &SnapshotRecord,
        volume: &VolumeRecord,
        object: String,
        detail: String,
        ranges: Vec<Range<u64>>,
    ) {
        let problems = &mut self.report.problems;
        let at = problems.iter().position(|p| p.object == object && p.detail == detail);
        let at = at.unwrap_or_else(|| {
            problems.push(Problem { object, detail, affected: vec![] });
            problems.len() - 1
        });
        let Some(problem) = problems.get_mut(at) else { return };
        let clamp = |range: Range<u64>| range.start..range.end.min(volume.len_bytes);
        let mut ranges: Vec<Range<u64>> = ranges.into_iter().map(clamp).collect();
        let known = problem
            .affected
            .iter_mut()
            .find(|affected| affected.snapshot == record.id && affected.volume == volume.name);
        match known {
            Some(known) => {
                ranges.extend(known.ranges.iter().map(|r| r.start..r.end));
                known.ranges = join(ranges);
            }
            None => problem.affected.push(Affected {
                snapshot: record.id,
                experiment: record.experiment.clone(),
                run: record.run.clone(),
                volume: volume.name.clone(),
                ranges: join(ranges),
            }),
        }
    }
}

/// The object that an error is about, and what is wrong with it.
pub(crate) fn describe(error: &Error) -> (String, String) {
    match error {
        Error::Missing { object, .. } => (object.clone(), "it is missing".to_owned()),
        Error::Damaged { object, detail } => (object.clone(), detail.clone()),
        Error::Version { object, .. } => (object.clone(), error.to_string()),
        other => ("manifest".to_owned(), other.to_string()),
    }
}

/// Why a frame can't be where its leaf says.
fn misplaced(packs: &HashMap<PackId, u64>, frame: &FrameLocation) -> Option<String> {
    let end = u64::from(frame.offset) + u64::from(frame.stored_len);
    match packs.get(&frame.pack) {
        None => Some("it is missing".to_owned()),
        Some(len) if end + TRAILER_BYTES as u64 > *len => {
            Some(format!("it has {len} bytes, and a frame ends at {end}"))
        }
        Some(_) => None,
    }
}

/// Takes chunks of all other frames for zeros.
fn keep_frames(leaf: &mut Leaf, keep: impl Fn(&FrameLocation) -> bool) {
    let kept: Vec<bool> = leaf.frames.iter().map(keep).collect();
    for extent in &mut leaf.extents {
        if let Extent::Chunk(chunk) = extent
            && kept.get(chunk.frame as usize) != Some(&true)
        {
            *extent = Extent::Zero { len: chunk.len };
        }
    }
}
