//! The durable copy of a presence map: pairs of slots, of which a torn write spares one. `presence` has their layout.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::presence::{BootId, VolumeIdentity, array, word64};
use crate::error::{Error, Result};

/// Bytes of a header and of a slot.
pub(super) const SLOT: usize = 4096;
const SLOT_HEADER: usize = 24;
/// Words of bits in a slot.
pub(super) const WORDS: usize = (SLOT - SLOT_HEADER) / 8;
/// Slots that are read at once when a volume is opened.
pub(super) const SLOTS_AT_ONCE: usize = 256;

/// Where the durable copy is kept: a file, or a model of one.
pub trait Medium: Send + Sync {
    /// Fills `buf`; what is past the end are zeros.
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes. A crash before the next sync may undo it, or leave a part of it.
    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Makes all writes durable.
    fn sync(&self) -> io::Result<()>;
}

impl Medium for File {
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.read_at(rest, offset + done as u64) {
                Ok(0) => {
                    rest.fill(0);
                    break;
                }
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

/// The checksum of a slot: also over what it is, so that none is taken for another.
fn checksum(of: &VolumeIdentity, pair: u64, body: &[u8]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"petra presence 1\n").update(&of.id.to_bytes());
    hasher.update(&of.len_bytes.to_le_bytes()).update(&pair.to_le_bytes()).update(body);
    let mut sum = [0; 16];
    hasher.finalize_xof().fill(&mut sum);
    sum
}

/// Where the slots of a pair are: pair 0 is the boot, pair n + 1 the n-th page of bits.
pub(super) fn slot_offset(pair: usize, second: bool) -> u64 {
    (SLOT * (1 + 2 * pair + usize::from(second))) as u64
}

/// A slot's content.
enum Slot {
    /// Never written.
    Empty,
    Valid(u64, Vec<u64>),
    Bad,
}

/// The state of a pair of slots on the disk.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pair {
    /// 0 when nothing was ever written.
    sequence: u64,
    /// The slot that counts is the second.
    second: bool,
    /// The other one is neither valid nor empty.
    pub(super) torn: bool,
}

/// The durable copy.
pub(super) struct Durable<M> {
    pub(super) medium: M,
    pub(super) identity: VolumeIdentity,
    pub(super) pairs: Vec<Pair>,
}

impl<M: Medium> Durable<M> {
    fn parse(&self, pair: usize, bytes: &[u8]) -> Slot {
        let Some(sum) = array::<16>(bytes, 0) else { return Slot::Bad };
        if bytes.iter().all(|byte| *byte == 0) {
            return Slot::Empty;
        }
        let (Some(body), Some(sequence)) = (bytes.get(16..), word64(bytes, 16)) else {
            return Slot::Bad;
        };
        if sum != checksum(&self.identity, pair as u64, body) || sequence == 0 {
            return Slot::Bad;
        }
        let words = body.get(8..).unwrap_or_default().as_chunks::<8>().0;
        Slot::Valid(sequence, words.iter().map(|word| u64::from_le_bytes(*word)).collect())
    }

    /// Takes in both slots of a pair, and gives the words that count, if there are any.
    fn load(&mut self, pair: usize, slots: &[u8], path: &Path) -> Result<Option<Vec<u64>>> {
        let (first, second) = slots.split_at(slots.len() / 2);
        let (state, words) = match (self.parse(pair, first), self.parse(pair, second)) {
            (Slot::Empty, Slot::Empty) => (Pair::default(), None),
            (Slot::Valid(a, _), Slot::Valid(b, words)) if b > a => {
                (Pair { sequence: b, second: true, torn: false }, Some(words))
            }
            (Slot::Valid(sequence, words), other) => {
                let torn = matches!(other, Slot::Bad);
                (Pair { sequence, second: false, torn }, Some(words))
            }
            (other, Slot::Valid(sequence, words)) => {
                let torn = matches!(other, Slot::Bad);
                (Pair { sequence, second: true, torn }, Some(words))
            }
            // The very first write to this pair was torn; the next goes to the same slot.
            (Slot::Bad, Slot::Empty) | (Slot::Empty, Slot::Bad) => {
                (Pair { torn: true, ..Pair::default() }, None)
            }
            (Slot::Bad, Slot::Bad) => {
                let at = slot_offset(pair, false);
                let detail = format!(
                    "both copies of the page at {at} are unreadable; which blocks of the volume were written is lost"
                );
                return Err(Error::Damaged { path: path.to_owned(), detail });
            }
        };
        if let Some(place) = self.pairs.get_mut(pair) {
            *place = state;
        }
        Ok(words)
    }

    /// Writes the slot that does not count. It counts once the medium is synced; the caller notes that by
    /// [`written`](Self::written).
    pub(super) fn write(&self, pair: usize, words: impl Iterator<Item = u64>) -> io::Result<()> {
        let state = self.pairs.get(pair).copied().unwrap_or_default();
        let mut body = Vec::with_capacity(SLOT);
        body.extend_from_slice(&(state.sequence + 1).to_le_bytes());
        words.take(WORDS).for_each(|word| body.extend_from_slice(&word.to_le_bytes()));
        body.resize(SLOT - 16, 0);
        let mut slot = checksum(&self.identity, pair as u64, &body).to_vec();
        slot.extend_from_slice(&body);
        self.medium.write(&slot, slot_offset(pair, !state.second))
    }

    pub(super) fn written(&mut self, pair: usize) {
        if let Some(state) = self.pairs.get_mut(pair) {
            *state = Pair { sequence: state.sequence + 1, second: !state.second, torn: false };
        }
    }

    pub(super) fn write_boot(&mut self, boot: BootId) -> io::Result<()> {
        let (words, _) = boot.0.as_chunks::<8>();
        self.write(0, words.iter().map(|word| u64::from_le_bytes(*word)))?;
        self.medium.sync()?;
        self.written(0);
        Ok(())
    }
}

/// Reads all slots: the bits, and the boot in which the volume was opened last.
pub(super) fn read_slots<M: Medium>(
    durable: &mut Durable<M>,
    path: &Path,
) -> Result<(Vec<u64>, BootId)> {
    let mut bits = vec![0; durable.pairs.len().saturating_sub(1) * WORDS];
    let mut boot = BootId::NONE;
    let mut buf = vec![0; SLOT * SLOTS_AT_ONCE];
    let total = durable.pairs.len();
    for first in (0..total).step_by(SLOTS_AT_ONCE / 2) {
        let count = (total - first).min(SLOTS_AT_ONCE / 2);
        let place = buf.get_mut(..count * 2 * SLOT).unwrap_or_default();
        durable.medium.read(place, slot_offset(first, false)).map_err(Error::io("read", path))?;
        for (pair, slots) in (first..).zip(place.chunks_exact(2 * SLOT)) {
            let Some(words) = durable.load(pair, slots, path)? else { continue };
            match pair.checked_sub(1) {
                None => {
                    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
                    boot = array(&bytes, 0).map_or(BootId::NONE, BootId);
                }
                Some(page) => {
                    let place = bits.iter_mut().skip(page * WORDS).take(WORDS);
                    place.zip(words).for_each(|(place, word)| *place = word);
                }
            }
        }
    }
    bits.truncate(durable.identity.words());
    Ok((bits, boot))
}
