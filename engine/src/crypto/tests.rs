use proptest::prelude::*;
use zeroize::Zeroizing;

use super::aead;
use super::slot::Slot;
use super::*;
use crate::context::{Host, SystemHost};
use crate::error::Error;
use crate::format::FormatError;
use crate::format::block::BlockKind;
use crate::format::envelope;
use crate::format::pack::{PackBuilder, PackKind, read_whole};
use crate::id::{Digest, PackId, SnapshotId};
use crate::key::Key;
use crate::name::Name;
use crate::record::kind;

const CHEAP: Cost = Cost { memory_kib: 64, passes: 1, lanes: 1 };

fn data_key() -> DataKey {
    let mut bytes = [0; 32];
    bytes.iter_mut().zip(0..).for_each(|(byte, n)| *byte = n);
    DataKey(Zeroizing::new(bytes))
}

fn keys() -> Keys {
    Keys::of(data_key())
}

fn other_keys() -> Keys {
    Keys::of(DataKey::generate(&SystemHost))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn key(text: &str) -> Key {
    Key::from_listing(text.to_owned())
}

fn name(text: &str) -> Name {
    Name::new("test", text).unwrap()
}

fn passphrase(text: &str) -> Secret {
    Secret::passphrase(text.as_bytes().to_vec()).unwrap()
}

fn key_file(byte: u8) -> Secret {
    Secret::key_file(vec![byte; 32]).unwrap()
}

/// What other implementations must arrive at, too. A change here makes every encrypted repository unreadable.
#[test]
fn golden_vectors() {
    let keys = keys();
    let mut message = b"petra".to_vec();
    aead::seal(&Zeroizing::new([1; 32]), [2; 16], b"aad", &mut message);
    let object = keys.seal_object(kind::MARK, &key("marks/x"), b"{}\n".to_vec());
    let mut footer = b"footer".to_vec();
    keys.seal_footer(pack(), PackKind::Data, &mut footer);
    let source =
        Source::Passphrase { kdf: Kdf::Argon2id(CHEAP), salt: "0123456789abcdef".to_owned() };
    let from_passphrase = passphrase("correct horse").wrapping_key(&source).unwrap().unwrap();
    let from_file = key_file(7).wrapping_key(&Source::KeyFile).unwrap().unwrap();
    let vectors = [
        ("chunk id", keys.chunk_id(b"petra").to_string()),
        ("experiment", keys.experiment_component(&name("iris"))),
        ("run", keys.run_component(&name("iris"), &name("run 1"))),
        ("sealed", hex(&message)),
        ("object", hex(object.strip_prefix(b"petra mark 1 aes-256-gcm\n").unwrap())),
        ("footer", hex(&footer)),
        ("passphrase", hex(from_passphrase.as_slice())),
        ("key file", hex(from_file.as_slice())),
    ];
    assert_eq!(vectors.map(|(what, found)| format!("{what} {found}")), GOLDEN);
}

const GOLDEN: [&str; 8] = [
    "chunk id 075fdb1468be263868bf8e28073ba98d60e9797e5d9f93db66a6daf29390858b",
    "experiment ~d172a94004d4d5b79879240bb7a632a7",
    "run ~5226658155330e608231d786dc098c44",
    "sealed c5f153d3ffebe200d85f3d96db9521f72e0dfe4aca02020202020202020202020202020202",
    "object 6e90c10b7e2f94c6f11cc23fe41fc3177a4e4e86f954113faa70635262668d08e1a88b",
    "footer b9559c81e3233410948e839b8e22fefdd293ae3200d78fffe9c4b1374f79673b19b8bc7e0cb8",
    "passphrase 32364fd7ed54f4951b0d6bc3bed2f212c66235738a114c5f8ba3b6a1ee3abb10",
    "key file 7ce7bdb024e985bad10d8197e6fc2a86ad01265c35f0846289d8ed7b05402894",
];

fn pack() -> PackId {
    PackId { session: SnapshotId::from_parts(1, 2), number: 3 }
}

/// The example of docs/format.md, made by another implementation of that page.
#[test]
fn a_slot_from_elsewhere_opens() {
    let at = key("keys/01M8149T0K2B4C6D8E0F1G3H5J");
    let slot: Slot = envelope::unseal(kind::KEY, &at, EXAMPLE.as_bytes()).unwrap();
    let data = slot.unwrap(&at, &passphrase("correct horse battery staple")).unwrap();
    assert!(data.is_some_and(|data| data.0 == data_key().0));
}

const EXAMPLE: &str = r#"petra key 1 d284c35aa69063ee913b0c9efbde9194021b7653a8b82cb9716c909ca96d8082
{
  "created": "2026-11-22T08:00:00Z",
  "label": "anna",
  "config": "e76b9b315c95233484abd0dbbba348e15816aac25e7028b9bdce7d3e2c2f8bb6",
  "source": {
    "kind": "passphrase",
    "kdf": {
      "algorithm": "argon2id",
      "memory_kib": 65536,
      "passes": 3,
      "lanes": 1
    },
    "salt": "6c2f0c1c6be1d7c9a5f0e4b83d92a71e"
  },
  "wrapped": "977825e46be0d94d0418d5a6b74dcd41f1d356bbf9f43097f67a4ad80f34630a05b8bab4701ee39fab747c22937900c1101112131415161718191a1b1c1d1e1f"
}
"#;

#[test]
fn a_plain_repository_is_left_alone() {
    let keys = Keys::none();
    let mut bytes = b"frame".to_vec();
    keys.seal(Piece::Frame, &mut bytes, &SystemHost);
    assert_eq!(bytes, b"frame");
    assert_eq!(keys.open(Piece::Frame, &bytes, &mut Vec::new()).unwrap(), b"frame");
    assert_eq!(keys.chunk_id(b"x"), crate::ChunkId::of(b"x"));
    assert_eq!(keys.experiment_component(&name("a b")), "a%20b");
    let object = keys.seal_object(kind::PIN, &key("pins/x"), b"[1]".to_vec());
    assert!(envelope::unseal::<Vec<u8>>(kind::PIN, &key("pins/x"), &object).is_ok());
}

#[test]
fn nothing_is_taken_for_something_else() {
    let keys = keys();
    let pieces = [
        Piece::Frame,
        Piece::Block(BlockKind::Leaf),
        Piece::Block(BlockKind::Node),
        Piece::Block(BlockKind::Relocation),
        Piece::Footer(pack(), PackKind::Data),
        Piece::Footer(pack(), PackKind::Manifest),
        Piece::Footer(PackId { number: 4, ..pack() }, PackKind::Data),
    ];
    for sealed_as in pieces {
        let mut bytes = b"some bytes".to_vec();
        keys.seal(sealed_as, &mut bytes, &SystemHost);
        for opened_as in pieces {
            let mut scratch = Vec::new();
            let opened = keys.open(opened_as, &bytes, &mut scratch);
            assert_eq!(opened.is_ok(), sealed_as == opened_as, "{sealed_as:?} as {opened_as:?}");
        }
        assert!(other_keys().open(sealed_as, &bytes, &mut Vec::new()).is_err());
    }
    let [a, b] = ["snaps/a", "snaps/b"].map(key);
    let object = keys.seal_object(kind::DECISION, &a, b"{}".to_vec());
    assert_eq!(&*keys.open_object(kind::DECISION, &a, &object).unwrap(), b"{}");
    assert_eq!(keys.open_object(kind::DECISION, &b, &object), Err(FormatError::Forged));
    assert!(keys.open_object(kind::PIN, &a, &object).is_err());
    assert!(other_keys().open_object(kind::DECISION, &a, &object).is_err());
    // Not even with the first line of another kind.
    let text = [b"petra pin 1 aes-256-gcm\n", &object[29..]].concat();
    assert_eq!(keys.open_object(kind::PIN, &a, &text), Err(FormatError::Forged));
}

#[test]
fn plain_and_sealed_objects_do_not_mix() {
    let at = key("snaps/a");
    let plain = Keys::none().seal_object(kind::DECISION, &at, b"{}".to_vec());
    let error = keys().open_object(kind::DECISION, &at, &plain).unwrap_err();
    assert!(error.to_string().contains("not encrypted"), "{error}");
    let sealed = keys().seal_object(kind::DECISION, &at, b"{}".to_vec());
    let error = Keys::none().open_object(kind::DECISION, &at, &sealed).unwrap_err();
    assert!(error.to_string().contains("encrypted"), "{error}");
}

#[test]
fn every_changed_bit_of_a_small_object_is_noticed() {
    let at = key("marks/x/000001");
    let object = keys().seal_object(kind::MARK, &at, b"{\"mark\": \"delete\"}\n".to_vec());
    for place in 0..object.len() {
        for bit in 0..8 {
            let mut changed = object.to_vec();
            changed[place] ^= 1_u8 << bit;
            assert!(keys().open_object(kind::MARK, &at, &changed).is_err(), "byte {place}");
        }
        assert!(keys().open_object(kind::MARK, &at, &object[..place]).is_err());
    }
}

#[test]
fn every_changed_byte_of_a_footer_is_noticed() {
    let mut builder = PackBuilder::new(pack(), PackKind::Manifest, &keys());
    builder.add_block(BlockKind::Leaf, b"a sealed leaf");
    let (_, bytes) = builder.finish();
    assert!(read_whole(pack(), &keys(), &bytes).is_ok());
    assert!(read_whole(pack(), &other_keys(), &bytes).is_err());
    assert!(read_whole(pack(), &Keys::none(), &bytes).is_err());
    assert!(read_whole(PackId { number: 9, ..pack() }, &keys(), &bytes).is_err());
    for place in (0..16).chain(29..bytes.len()) {
        let mut changed = bytes.to_vec();
        changed[place] ^= 1;
        assert!(read_whole(pack(), &keys(), &changed).is_err(), "byte {place}");
    }
}

#[test]
fn equal_pieces_look_different_and_equal_objects_the_same() {
    let (mut a, mut b) = (b"piece".to_vec(), b"piece".to_vec());
    keys().seal(Piece::Frame, &mut a, &SystemHost);
    keys().seal(Piece::Frame, &mut b, &SystemHost);
    assert_ne!(a, b);
    // So that a repeated request is the same request.
    let seal = |at: &str| keys().seal_object(kind::PIN, &key(at), b"{}".to_vec());
    assert_eq!(seal("pins/a"), seal("pins/a"));
    assert_ne!(seal("pins/a"), seal("pins/b"));
}

#[test]
fn names_do_not_show() {
    let (iris, run) = (name("iris"), name("run-1"));
    let shown = keys().run_component(&iris, &run);
    assert!(shown.starts_with('~') && shown.len() == 33, "{shown}");
    assert_ne!(shown, keys().run_component(&name("other"), &run));
    assert_ne!(shown, other_keys().run_component(&iris, &run));
    assert_eq!(Name::from_key_component("run", &shown), None);
}

fn slot_for(new: &NewKey) -> (Key, Slot) {
    let key = Key::slot(SnapshotHost.new_id());
    let config = Digest([9; 32]);
    let created = jiff::Timestamp::UNIX_EPOCH;
    let slot = Slot::wrap(&key, config, &data_key(), new, created, &SystemHost).unwrap();
    (key, slot)
}

#[derive(Debug)]
struct SnapshotHost;

impl Host for SnapshotHost {
    fn unix_ms(&self) -> u64 {
        1
    }

    fn random(&self) -> u128 {
        SystemHost.random()
    }
}

fn new_key(secret: &Secret) -> NewKey {
    let label = Some(name("anna"));
    NewKey { secret: secret.clone(), label, cost: CHEAP }
}

#[test]
fn slots_open_for_their_secret_only() {
    let secrets = [passphrase("one"), passphrase("two"), key_file(1), key_file(2)];
    for (n, mine) in secrets.iter().enumerate() {
        let (key, slot) = slot_for(&new_key(mine));
        for (m, secret) in secrets.iter().enumerate() {
            let data = slot.unwrap(&key, secret).unwrap();
            assert_eq!(data.is_some(), n == m);
            assert!(data.is_none_or(|data| data.0 == data_key().0));
        }
        // Neither from another place.
        assert!(slot.unwrap(&Key::slot(SystemHost.new_id()), mine).unwrap().is_none());
    }
}

/// Sealed again, so that the change is not found by the checksum of the envelope, which anyone can make.
#[test]
fn nothing_in_a_slot_can_be_changed() {
    let mine = passphrase("mine");
    let (key, slot) = slot_for(&new_key(&mine));
    let object = envelope::seal(kind::KEY, &key, &slot).unwrap();
    assert_eq!(envelope::unseal::<Slot>(kind::KEY, &key, &object).unwrap(), slot);
    let json = envelope::open_json(kind::KEY, &key, &object).unwrap();
    let mut refused = 0;
    for place in 0..json.len() {
        let mut changed = json.to_vec();
        changed[place] ^= 1;
        let sealed = envelope::seal_json(kind::KEY, &key, &changed);
        let Ok(read) = envelope::unseal::<Slot>(kind::KEY, &key, &sealed) else { continue };
        let same_wrapped_digits = read == slot;
        let opened = read.unwrap(&key, &mine);
        assert!(same_wrapped_digits || !matches!(opened, Ok(Some(_))), "byte {place}");
        refused += u32::from(!same_wrapped_digits);
    }
    assert!(refused > 200, "{refused}");
    for len in 0..json.len() - 1 {
        let sealed = envelope::seal_json(kind::KEY, &key, &json[..len]);
        assert!(envelope::unseal::<Slot>(kind::KEY, &key, &sealed).is_err(), "{len} bytes");
    }
}

#[test]
fn wrapped_keys_of_another_length_are_damage() {
    let mine = key_file(1);
    let (key, slot) = slot_for(&new_key(&mine));
    let json = serde_json::to_string(&slot).unwrap();
    let at = json.find("\"wrapped\":\"").unwrap() + 11;
    for digits in ["", "00", &"0".repeat(126), &"0".repeat(130), &"+1".repeat(64), &"ж".repeat(64)]
    {
        let text = format!("{}{digits}\"}}", &json[..at]);
        let slot: Slot = serde_json::from_str(&text).unwrap();
        let error = slot.unwrap(&key, &mine).err().unwrap();
        assert!(matches!(error, Error::Damaged { .. }), "{error}");
    }
}

#[test]
fn absurd_parameters_are_refused_before_they_are_used() {
    for (memory_kib, passes, lanes) in [
        (u32::MAX, 1, 1),
        (2 << 20, 1, 1),
        (64, u32::MAX, 1),
        (1 << 20, 5, 1),
        (64, 1, u32::MAX),
        (64, 1, 17),
        (64, 1, 9),
        (0, 1, 1),
        (64, 0, 1),
        (64, 1, 0),
    ] {
        let cost = Cost { memory_kib, passes, lanes };
        assert!(cost.validate().is_err(), "{cost:?}");
        let secret = passphrase("mine");
        let source =
            Source::Passphrase { kdf: Kdf::Argon2id(cost), salt: "0123456789abcdef".to_owned() };
        assert!(secret.wrapping_key(&source).is_err());
    }
    assert_eq!(Cost::default().validate(), Ok(Cost::default()));
    // A salt that argon2 does not take is damage, too.
    let source = Source::Passphrase { kdf: Kdf::Argon2id(CHEAP), salt: "short".to_owned() };
    assert!(passphrase("mine").wrapping_key(&source).is_err());
}

#[test]
fn secrets_are_taken_without_line_ends_and_not_when_they_are_none() {
    let (a, b) = (passphrase("a b"), passphrase("a b\r\n"));
    let (key, slot) = slot_for(&new_key(&a));
    assert!(slot.unwrap(&key, &b).unwrap().is_some());
    assert!(slot.unwrap(&key, &passphrase("a b ")).unwrap().is_none());
    assert!(Secret::passphrase(b"\n".to_vec()).is_err());
    assert!(Secret::key_file(vec![1; 31]).is_err());
    assert!(Secret::key_file([vec![1; 31], vec![b'\n']].concat()).is_err());
    assert!(Secret::key_file(vec![1; 1 << 20]).is_err());
    let line = Secret::generate(&SystemHost);
    assert_eq!(line.len(), 65);
    assert!(Secret::key_file(line.as_bytes().to_vec()).is_ok());
}

#[test]
fn secrets_do_not_show() {
    let secret = passphrase("hunter2");
    let text = format!("{secret:?} {:?} {:?}", new_key(&secret), keys());
    assert!(!text.contains("hunter2") && !text.contains("68, 75"), "{text}");
    assert!(!text.contains("0, 1, 2"), "{text}");
}

proptest! {
    #[test]
    fn pieces_round_trip(bytes: Vec<u8>) {
        let mut sealed = bytes.clone();
        keys().seal(Piece::Frame, &mut sealed, &SystemHost);
        prop_assert_eq!(sealed.len(), bytes.len() + OVERHEAD_BYTES);
        let mut scratch = vec![1; 5];
        prop_assert_eq!(keys().open(Piece::Frame, &sealed, &mut scratch).unwrap(), &bytes);
    }

    #[test]
    fn changed_and_foreign_pieces_are_refused(
        bytes: Vec<u8>, at: prop::sample::Index, bit in 0..8, foreign: Vec<u8>, less in 1_usize..80,
    ) {
        let mut sealed = bytes.clone();
        keys().seal(Piece::Frame, &mut sealed, &SystemHost);
        let mut changed = sealed.clone();
        changed[at.index(sealed.len())] ^= 1_u8 << bit;
        for wrong in [&changed, &foreign, &sealed[..sealed.len().saturating_sub(less)].to_vec()] {
            prop_assert!(keys().open(Piece::Frame, wrong, &mut Vec::new()).is_err());
        }
    }

    #[test]
    fn accepted_parameters_are_bounded(memory_kib: u32, passes: u32, lanes in 0_u32..32, shift in 0..32) {
        let cost = Cost { memory_kib: memory_kib >> shift, passes: passes >> (31 - shift), lanes };
        if cost.validate().is_ok() {
            prop_assert!(cost.memory_kib <= 1 << 20);
            prop_assert!(u64::from(cost.memory_kib) * u64::from(cost.passes) <= 4 << 20);
        }
    }
}
