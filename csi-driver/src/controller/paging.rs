//! Lists in pages. A token is the last entry's id, so that it stays good whatever is made and deleted meanwhile.

use tonic::Status;

/// A page of what is listed, with the token of the next one: empty after the last.
pub(super) fn page<T>(
    mut all: Vec<(String, T)>,
    max_entries: i32,
    token: &str,
    is_id: impl Fn(&str) -> bool,
) -> Result<(Vec<T>, String), Status> {
    let max = usize::try_from(max_entries)
        .map_err(|_| Status::invalid_argument("max_entries is negative"))?;
    if !token.is_empty() && !is_id(token) {
        return Err(Status::aborted(
            "the starting token is none of this driver: list from the beginning",
        ));
    }
    all.retain(|(id, _)| id.as_str() > token || token.is_empty());
    all.sort_by(|(a, _), (b, _)| a.cmp(b));
    let mut next = String::new();
    if max > 0 && all.len() > max {
        all.truncate(max);
        next = all.last().map(|(id, _)| id.clone()).unwrap_or_default();
    }
    Ok((all.into_iter().map(|(_, entry)| entry).collect(), next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_hold_everything_once_while_entries_come_and_go() {
        let all = |ids: &[&'static str]| ids.iter().map(|id| ((*id).to_owned(), *id)).collect();
        let is_id = |text: &str| text != "?";
        let (first, token) = page(all(&["c", "a", "b"]), 2, "", is_id).unwrap();
        assert_eq!((first, token.as_str()), (vec!["a", "b"], "b"));
        let (second, end) = page(all(&["d", "a", "c"]), 2, &token, is_id).unwrap();
        assert_eq!((second, end.as_str()), (vec!["c", "d"], ""));
        let (everything, end) = page(all(&["b", "a"]), 0, "", is_id).unwrap();
        assert_eq!((everything, end.as_str()), (vec!["a", "b"], ""));
        let refused = page(all(&["a"]), 1, "?", is_id).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Aborted);
    }
}
