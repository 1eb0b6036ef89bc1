use proptest::prelude::*;

use super::*;
use crate::sys::fiemap::flag::{ODD, SHARED, UNKNOWN, UNWRITTEN};

const END: u64 = 60;

fn map(extents: &[FiemapExtent]) -> ExtentMap {
    ExtentMap::of(0..END, extents.iter().copied())
}

fn extent(logical: u64, physical: u64, length: u64, flags: u32) -> FiemapExtent {
    let mut extent = FiemapExtent::default();
    (extent.logical, extent.physical) = (logical, physical);
    (extent.length, extent.flags) = (length, flags);
    extent
}

/// What a byte is, said naively.
fn byte(extents: &[FiemapExtent], at: u64) -> Place {
    let extent = extents.iter().find(|e| (e.logical..e.logical + e.length).contains(&at));
    match extent {
        None => Place::Zeros,
        Some(extent) if extent.flags & ODD != 0 => Place::Unknown,
        Some(extent) if extent.flags & UNWRITTEN != 0 => Place::Zeros,
        Some(extent) => Place::At(extent.physical + at - extent.logical),
    }
}

fn any_extents() -> impl Strategy<Value = Vec<FiemapExtent>> {
    let flags = prop_oneof![
        6 => Just(0),
        2 => Just(SHARED),
        1 => Just(UNWRITTEN),
        1 => Just(UNKNOWN),
        1 => Just(UNKNOWN | UNWRITTEN),
    ];
    prop::collection::vec((0_u64..4, 1_u64..9, 0_u64..3, flags), 0..12).prop_map(|choices| {
        let (mut at, mut extents) = (0, Vec::new());
        for (gap, length, shift, flags) in choices {
            at += gap;
            // Few places, so that two maps often agree.
            extents.push(extent(at, 1000 + at + 100 * shift, length, flags));
            at += length;
        }
        extents
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn differs_where_a_byte_does(a in any_extents(), b in any_extents()) {
        let found = differing(&map(&a), &map(&b));
        for at in 0..END {
            let differs = byte(&a, at) != byte(&b, at) || byte(&a, at) == Place::Unknown;
            prop_assert_eq!(found.iter().any(|range| range.contains(&at)), differs, "at {}", at);
        }
        prop_assert!(found.iter().all(|range| !range.is_empty() && range.end <= END));
        prop_assert!(found.windows(2).all(|pair| pair[0].end < pair[1].start));
    }
}

#[test]
fn an_answer_that_overlaps_itself_is_not_believed() {
    let torn = map(&[extent(0, 1000, 10, 0), extent(20, 1020, 10, 0), extent(25, 1025, 10, 0)]);
    let whole = map(&[extent(0, 1000, 40, 0)]);
    assert_eq!(differing(&torn, &whole), std::slice::from_ref(&(10..END)));
}

#[test]
fn maps_of_different_ranges_have_nothing_in_common() {
    let a = ExtentMap { range: 0..10, stretches: vec![] };
    let b = ExtentMap { range: 0..20, stretches: vec![] };
    assert_eq!(differing(&a, &b), std::slice::from_ref(&(0..20)));
    assert_eq!(differing(&a, &a), []);
}
