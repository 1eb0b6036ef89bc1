//! Whatever bytes and holes a volume has, it comes back.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use petra_engine::record::VolumeRecord;
use petra_engine::restore::{RestoreOptions, restore};
use petra_engine::snapshot::snapshot;
use petra_engine::source::{FileSource, Source};
use petra_engine::store::{LocalStore, MemoryStore, Store};
use petra_engine::target::FileTarget;
use petra_engine::{Repository, Result};
use petra_tests::lab::{check, context, init, name, request, request_of};
use petra_tests::volume::{Volume, noise, prose};
use proptest::collection::vec;
use proptest::prelude::*;

use super::runtime;

const SEGMENT: u64 = 64 << 20;

/// Where pieces of data go: anywhere, and around the borders of blocks and segments.
fn any_piece(len: u64) -> impl Strategy<Value = (u64, u8, u64, usize)> {
    let near = prop_oneof![
        Just(0_u64),
        Just(4096),
        Just(16384),
        Just(SEGMENT),
        Just(2 * SEGMENT),
        Just(len),
        0..=len
    ];
    let offset = (near, 0_u64..40_000).prop_map(move |(near, back)| near.saturating_sub(back));
    let size = prop_oneof![1_usize..300, 4096_usize..4098, 1_usize..200_000];
    (offset, any::<u8>(), 0_u64..4, size)
}

/// Noise, text, zeros and bytes of one kind, which may overlap, in volumes of telling lengths.
pub fn any_volume() -> impl Strategy<Value = Volume> {
    let len = prop_oneof![
        Just(0_u64),
        Just(1),
        Just(4095),
        Just(4096),
        Just(4097),
        Just(SEGMENT - 4096),
        Just(SEGMENT),
        Just(SEGMENT + 4096),
        Just(3 * SEGMENT),
        1_u64..400_000
    ];
    len.prop_flat_map(|len| (Just(len), vec(any_piece(len), 0..6))).prop_map(|(len, pieces)| {
        let mut volume = Volume::zeros(len);
        for (offset, kind, seed, size) in pieces {
            match kind % 4 {
                0 => volume.write(offset, &noise(seed, size)),
                1 => volume.write(offset, &prose(seed, size)),
                2 => volume.write(offset, &vec![kind; size]),
                _ => volume.zero(offset..offset + size as u64),
            }
        }
        volume
    })
}

/// Snapshots volumes from real files.
async fn from_files(
    repo: &Repository,
    dir: &Path,
    volumes: &[(&str, &Volume)],
) -> Result<Vec<VolumeRecord>> {
    let mut sources: Vec<(_, Arc<dyn Source>)> = Vec::new();
    for (text, volume) in volumes {
        let path = dir.join(format!("{text}.img"));
        volume.save(&path);
        sources.push((name(text), Arc::new(FileSource::open(&path)?)));
    }
    Ok(snapshot(repo, request_of("r", sources), &context()).await?.volumes)
}

async fn to_file(
    repo: &Repository,
    record: &VolumeRecord,
    target: FileTarget,
    in_place: bool,
) -> u64 {
    let options = RestoreOptions { in_place, ..RestoreOptions::default() };
    restore(repo, record, target, &options, &context()).await.unwrap().written_bytes
}

async fn comes_back(store: Arc<dyn Store>, volume: &Volume, other: &Volume) {
    let repo = init(store).await;
    let dir = tempfile::tempdir().unwrap();
    let records = from_files(&repo, dir.path(), &[("v", volume), ("w", other)]).await.unwrap();
    for (record, volume) in records.iter().zip([volume, other]) {
        check(&repo, record, volume).await.unwrap();
    }
    let (record, len) = (&records[0], volume.len());
    let path = dir.path().join("new");
    to_file(&repo, record, FileTarget::create(&path, len).unwrap(), false).await;
    assert_eq!(volume.difference(&path), None, "in a new file");
    let blocks = |path: &Path| path.metadata().unwrap().blocks();
    let source = dir.path().join("v.img");
    assert!(blocks(&path) <= blocks(&source) + 64, "{} blocks restored", blocks(&path));
    // Over another volume, and over what one byte was changed in.
    for in_place in [false, true] {
        other.save(&path);
        to_file(&repo, record, FileTarget::open_existing(&path, len).unwrap(), in_place).await;
        assert_eq!(volume.difference(&path), None, "over another, in place: {in_place}");
    }
    let written =
        to_file(&repo, record, FileTarget::open_existing(&path, len).unwrap(), true).await;
    assert_eq!(written, 0, "nothing differs");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn any_volume_comes_back_from_memory(volume in any_volume(), other in any_volume()) {
        runtime().block_on(comes_back(Arc::new(MemoryStore::new()), &volume, &other));
    }

    #[test]
    fn any_volume_comes_back_from_a_directory(volume in any_volume(), other in any_volume()) {
        let dir = tempfile::tempdir().unwrap();
        runtime().block_on(comes_back(Arc::new(LocalStore::new(dir.path())), &volume, &other));
    }
}

#[tokio::test]
async fn every_telling_length_comes_back() {
    let repo = init(Arc::new(MemoryStore::new())).await;
    for len in [0, 1, 4095, 4096, 4097, 16383, 16385, SEGMENT - 4096, SEGMENT + 4096, 3 * SEGMENT] {
        for at_end in [false, true] {
            let offset = if at_end { len.saturating_sub(5000) } else { 0 };
            let volume = Volume::zeros(len).with(offset, &noise(len, 5000));
            let taken = snapshot(&repo, request("r", &[("v", &volume)]), &context()).await.unwrap();
            assert_eq!(taken.volumes[0].len_bytes, len);
            check(&repo, &taken.volumes[0], &volume).await.unwrap();
        }
    }
}

#[tokio::test]
async fn data_across_segment_borders_comes_back() {
    let repo = init(Arc::new(MemoryStore::new())).await;
    let mut volume = Volume::zeros(3 * SEGMENT);
    for border in [SEGMENT, 2 * SEGMENT] {
        volume.write(border - 70_001, &noise(border, 140_002));
    }
    let taken = snapshot(&repo, request("r", &[("v", &volume)]), &context()).await.unwrap();
    check(&repo, &taken.volumes[0], &volume).await.unwrap();
}

#[tokio::test]
async fn zeros_take_no_room() {
    let repo = init(Arc::new(MemoryStore::new())).await;
    let volume = Volume::zeros(3 * SEGMENT + 7);
    let taken = snapshot(&repo, request("r", &[("v", &volume)]), &context()).await.unwrap();
    assert_eq!((taken.stats.stored_bytes, taken.stats.data_bytes), (0, 0));
    check(&repo, &taken.volumes[0], &volume).await.unwrap();
}

#[tokio::test]
async fn a_target_that_is_there_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, b"mine").unwrap();
    let error = FileTarget::create(&path, 10).unwrap_err().to_string();
    assert!(error.contains("it exists already"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
}
