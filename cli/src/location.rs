//! From what people type to a URL.

use std::path::Path;

use crate::failure::Failure;
use petra_engine::{Error, Item, PetraUrl, RepositoryUrl};

/// Reads a URL, a path (`./repo#iris/run-1`), or the part from `#` on of a URL of the default repository.
pub fn parse(text: &str, default: Option<&str>) -> Result<PetraUrl, Failure> {
    if text.starts_with('#') {
        let Some(default) = default else {
            return Err(Failure::fix(format!("'{text}' names no repository"))
                .hint("put one before the '#', or set --repository or PETRA_REPOSITORY"));
        };
        let repository = parse(default, None)?.repository;
        return Ok(PetraUrl { repository, item: item(text, text)? });
    }
    if !is_path(text) {
        return Ok(text.parse()?);
    }
    let (path, fragment) = match text.find('#') {
        Some(at) => text.split_at(at),
        None => (text, ""),
    };
    let path = std::path::absolute(Path::new(path)).map_err(|cause| Error::Io {
        action: "find",
        path: path.into(),
        cause,
    })?;
    Ok(PetraUrl { repository: RepositoryUrl::Directory(path), item: item(fragment, text)? })
}

fn is_path(text: &str) -> bool {
    let path = text.split('#').next().unwrap_or_default();
    !path.contains("://") && (path.contains('/') || path.starts_with('.'))
}

/// What `#...` names. The grammar is the engine's, and does not depend on what stands before the `#`. Errors show
/// what was typed.
fn item(fragment: &str, typed: &str) -> Result<Item, Failure> {
    match format!("file:///repository{fragment}").parse::<PetraUrl>() {
        Ok(url) => Ok(url.item),
        Err(Error::Url { reason, .. }) => Err(Error::Url { url: typed.to_owned(), reason }.into()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> String {
        match parse(text, Some("s3://bucket/prefix")) {
            Ok(url) => url.to_string(),
            Err(failure) => failure.message,
        }
    }

    #[test]
    fn paths_are_made_absolute() {
        let here = std::env::current_dir().unwrap();
        let here = here.display();
        assert_eq!(shown("/srv/repo"), "file:///srv/repo");
        assert_eq!(shown("/srv/my repo#iris/run 1"), "file:///srv/my%20repo#iris/run%201");
        assert_eq!(shown("./repo/#iris"), format!("file://{here}/repo/#iris"));
        assert_eq!(shown("."), format!("file://{here}"));
        assert_eq!(shown("/100%/{experiment}#e"), "file:///100%25/{experiment}#e");
    }

    #[test]
    fn fragments_belong_to_the_default_repository() {
        assert_eq!(shown("#iris/run-1/@latest"), "s3://bucket/prefix#iris/run-1/@latest");
        let failure = parse("#iris", None).unwrap_err();
        assert!(failure.hint.unwrap().contains("PETRA_REPOSITORY"));
    }

    #[test]
    fn words_are_no_paths() {
        assert!(shown("repo").contains("begins with neither"));
        assert!(shown("http://host/x").contains("begins with neither"));
        assert!(
            shown("./repo#a/b/c/d/e").starts_with("'./repo#a/b/c/d/e' is not a Petra URL: after")
        );
    }
}
