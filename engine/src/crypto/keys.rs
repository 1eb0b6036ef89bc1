//! A repository's keys, and everything that is done with them.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use zeroize::Zeroizing;

use super::aead::{self, Key256, Salt};
use crate::chunker::{Chunking, Cutter, Gear};
use crate::context::Host;
use crate::format::FormatError;
use crate::format::block::BlockKind;
use crate::format::envelope;
use crate::format::pack::PackKind;
use crate::hash;
use crate::id::{ChunkId, PackId};
use crate::key::Key;
use crate::name::Name;

/// The key that all others are derived from. It never changes, and is stored in slots only.
#[derive(Clone)]
pub struct DataKey(pub(super) Key256);

impl DataKey {
    /// A fresh key.
    pub fn generate(host: &dyn Host) -> Self {
        Self(random_256(host))
    }

    fn derive(&self, context: &str) -> Key256 {
        Zeroizing::new(blake3::derive_key(context, self.0.as_slice()))
    }
}

/// 256 random bits.
pub(super) fn random_256(host: &dyn Host) -> Key256 {
    let mut bytes = Zeroizing::new([0; 32]);
    for half in bytes.chunks_exact_mut(16) {
        half.copy_from_slice(&host.random().to_le_bytes());
    }
    bytes
}

/// The keys of an encrypted repository, or none. Cheap to clone.
#[derive(Clone, Default)]
pub struct Keys(Option<Arc<Derived>>);

struct Derived {
    data: DataKey,
    chunks: Key256,
    names: Key256,
    objects: Key256,
    packs: Key256,
    salts: Key256,
    gear: Arc<Gear>,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Keys(secret)" } else { "Keys(none)" })
    }
}

/// What a piece of a pack is: it can't be taken for anything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// A frame. Not bound to its place, so that it can be moved as it is: its chunks' ids say whether it is right.
    Frame,
    /// A manifest block. Not bound to its place either: its parent has the digest.
    Block(BlockKind),
    /// The footer of this pack.
    Footer(PackId, PackKind),
}

impl Piece {
    fn aad(self) -> Vec<u8> {
        match self {
            Self::Frame => b"petra frame 1\n".to_vec(),
            Self::Block(kind) => format!("petra block 1\n{}", kind as u8).into_bytes(),
            Self::Footer(pack, kind) => {
                format!("petra footer 1\n{pack} {}", kind as u8).into_bytes()
            }
        }
    }
}

impl Keys {
    /// The keys of a repository that is not encrypted.
    pub fn none() -> Self {
        Self(None)
    }

    /// Fresh keys that belong to no repository.
    pub fn generate(host: &dyn Host) -> Self {
        Self::of(DataKey::generate(host))
    }

    pub(crate) fn of(data: DataKey) -> Self {
        let gear = Arc::new(Gear::from_key(&data.derive("Petra 1: gear table")));
        Self(Some(Arc::new(Derived {
            chunks: data.derive("Petra 1: chunk ids"),
            names: data.derive("Petra 1: names in keys"),
            objects: data.derive("Petra 1: small objects"),
            packs: data.derive("Petra 1: packs"),
            salts: data.derive("Petra 1: salts"),
            gear,
            data,
        })))
    }

    /// True for an encrypted repository.
    pub fn is_some(&self) -> bool {
        self.0.is_some()
    }

    pub(super) fn data_key(&self) -> Option<&DataKey> {
        self.0.as_deref().map(|keys| &keys.data)
    }

    /// The name of a chunk.
    pub fn chunk_id(&self, bytes: &[u8]) -> ChunkId {
        ChunkId(hash::hash_one(self.chunk_key(), bytes))
    }

    /// The names of chunks, which take less time together.
    pub fn chunk_ids(&self, chunks: &[&[u8]]) -> impl Iterator<Item = ChunkId> {
        hash::hash_all(self.chunk_key(), chunks).into_iter().map(ChunkId)
    }

    fn chunk_key(&self) -> Option<&[u8; 32]> {
        Some(&self.0.as_deref()?.chunks)
    }

    /// The function that finds cuts. With a key nobody else knows where they are.
    pub fn cutter(&self, chunking: Chunking) -> Cutter {
        match &self.0 {
            None => chunking.cutter(),
            Some(keys) => chunking.cutter().with_gear(keys.gear.clone()),
        }
    }

    /// Encrypts a piece of a pack in place, after which it is [`OVERHEAD_BYTES`](super::OVERHEAD_BYTES) longer.
    pub fn seal(&self, piece: Piece, bytes: &mut Vec<u8>, host: &dyn Host) {
        if let Some(keys) = &self.0 {
            aead::seal(&keys.packs, host.random().to_le_bytes(), &piece.aad(), bytes);
        }
    }

    /// The same for a footer. There is one for each pack, so its salt follows from it.
    pub fn seal_footer(&self, pack: PackId, kind: PackKind, footer: &mut Vec<u8>) {
        if let Some(keys) = &self.0 {
            let aad = Piece::Footer(pack, kind).aad();
            aead::seal(&keys.packs, keys.salt_of(&aad, footer), &aad, footer);
        }
    }

    /// Decrypts a piece of a pack, into `scratch` if there is anything to decrypt.
    pub fn open<'a>(
        &self,
        piece: Piece,
        stored: &'a [u8],
        scratch: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], FormatError> {
        let Some(keys) = &self.0 else { return Ok(stored) };
        aead::open(&keys.packs, &piece.aad(), stored, scratch)?;
        Ok(scratch)
    }

    /// Wraps the JSON of a small object that will be stored under `key`.
    pub fn seal_object(&self, kind: &str, key: &Key, mut json: Vec<u8>) -> Bytes {
        let Some(keys) = &self.0 else { return envelope::seal_json(kind, key, &json) };
        let mut object = envelope::sealed_header(kind).into_bytes();
        let aad = object_aad(&object, key);
        // No two objects are equal but repeated attempts to write one: most have stamps, all are bound to their key.
        aead::seal(&keys.objects, keys.salt_of(&aad, &json), &aad, &mut json);
        object.append(&mut json);
        object.into()
    }

    /// Checks and unwraps a small object that is stored under `key`; gives its JSON.
    pub fn open_object<'a>(
        &self,
        kind: &str,
        key: &Key,
        object: &'a [u8],
    ) -> Result<Cow<'a, [u8]>, FormatError> {
        let Some(keys) = &self.0 else {
            return envelope::open_json(kind, key, object).map(Cow::Borrowed);
        };
        let (header, sealed) = envelope::open_sealed(kind, object)?;
        let mut json = Vec::new();
        aead::open(&keys.objects, &object_aad(header, key), sealed, &mut json)?;
        Ok(Cow::Owned(json))
    }

    /// An experiment's part of a key.
    pub fn experiment_component(&self, experiment: &Name) -> String {
        self.component(experiment, || experiment.to_string())
    }

    /// A run's part of a key. Equal names in two experiments can't be seen to be equal.
    pub fn run_component(&self, experiment: &Name, run: &Name) -> String {
        self.component(run, || format!("{experiment}/{run}"))
    }

    fn component(&self, name: &Name, text: impl FnOnce() -> String) -> String {
        match &self.0 {
            None => name.key_component(),
            Some(keys) => {
                let hash = blake3::keyed_hash(&keys.names, text().as_bytes()).to_hex();
                // Like a name that is too long: the catalogue's entry has it in full.
                format!("~{}", hash.as_str().get(..32).unwrap_or_default())
            }
        }
    }
}

impl Derived {
    /// A salt that no other message has.
    fn salt_of(&self, aad: &[u8], message: &[u8]) -> Salt {
        let mut hasher = blake3::Hasher::new_keyed(&self.salts);
        hasher.update(&(aad.len() as u64).to_le_bytes()).update(aad).update(message);
        let mut salt = Salt::default();
        hasher.finalize_xof().fill(&mut salt);
        salt
    }
}

fn object_aad(header: &[u8], key: &Key) -> Vec<u8> {
    [header, key.as_str().as_bytes()].concat()
}
