//! `petra diff`.

use petra_engine::diff::{VolumeDiff, diff};
use petra_engine::record::SnapshotRecord;
use petra_engine::{Item, Name, PetraUrl};
use serde::Serialize;

use crate::failure::{At, Failure};
use crate::lookup;
use crate::session::Session;
use crate::text::{Side, Table, bytes, count};

/// Options of `petra diff`.
#[derive(Debug, clap::Args)]
pub struct Diff {
    /// A snapshot, or a volume of one
    #[arg(value_name = "FROM_URL")]
    from: String,
    /// A snapshot of the same repository, or a volume of one
    #[arg(value_name = "TO_URL")]
    to: String,
}

#[derive(Serialize)]
struct Document<'a> {
    from: String,
    to: String,
    volumes: Vec<Volume<'a>>,
    /// Volumes without a counterpart.
    only_from: Vec<&'a Name>,
    only_to: Vec<&'a Name>,
}

#[derive(Serialize)]
struct Volume<'a> {
    name: &'a Name,
    from_len_bytes: u64,
    to_len_bytes: u64,
    #[serde(flatten)]
    diff: VolumeDiff,
}

impl Diff {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let (from_url, to_url) = (session.url(&self.from)?, session.url(&self.to)?);
        if from_url.resolved_repository()? != to_url.resolved_repository()? {
            return Err(Failure::fix("the snapshots are in different repositories").hint(
                "chunks are compared by name, which differ between repositories; restore both and \
                 use cmp",
            ));
        }
        let repository = session.open(&from_url).await?;
        let from = lookup::snapshot(&repository, &from_url).await?;
        let to = lookup::snapshot(&repository, &to_url).await?;
        let pairs = pairs((&from_url, &from), (&to_url, &to))?;

        let activity = session.activity("diff");
        let mut volumes = vec![];
        for (in_from, in_to) in pairs {
            let (old, new) =
                (lookup::volume(&from, in_from, &from_url)?, lookup::volume(&to, in_to, &to_url)?);
            volumes.push(Volume {
                name: in_to,
                from_len_bytes: old.len_bytes,
                to_len_bytes: new.len_bytes,
                diff: diff(&repository, old, new, &activity.context).await.at(&from_url)?,
            });
        }
        drop(activity);
        let whole = volume_of(&from_url).is_none() && volume_of(&to_url).is_none();
        let document = Document {
            from: from_url.to_string(),
            to: to_url.to_string(),
            volumes,
            only_from: if whole { missing(&from, &to) } else { vec![] },
            only_to: if whole { missing(&to, &from) } else { vec![] },
        };
        session.out.report(&document, || table(&document))?;
        for volume in &document.volumes {
            session.out.say(&format!(
                "{}: {} changed in {}",
                volume.name,
                bytes(volume.diff.changed_bytes),
                count(volume.diff.ranges.len(), "range")
            ));
        }
        Ok(())
    }
}

/// Which volumes to compare: those that the URLs name, or all that both snapshots have.
fn pairs<'a>(
    from: (&'a PetraUrl, &'a SnapshotRecord),
    to: (&'a PetraUrl, &'a SnapshotRecord),
) -> Result<Vec<(&'a Name, &'a Name)>, Failure> {
    let (only_from, only_to) = (volume_of(from.0), volume_of(to.0));
    if let Some(name) = only_from.or(only_to) {
        return Ok(vec![(only_from.unwrap_or(name), only_to.unwrap_or(name))]);
    }
    let common = |name: &&Name| to.1.volumes.iter().any(|volume| volume.name == **name);
    let names = from.1.volumes.iter().map(|volume| &volume.name).filter(common);
    let pairs: Vec<(&Name, &Name)> = names.map(|name| (name, name)).collect();
    if pairs.is_empty() {
        return Err(Failure::fix("the snapshots have no volume of the same name")
            .hint("name the volumes to compare in both URLs"));
    }
    Ok(pairs)
}

fn volume_of(url: &PetraUrl) -> Option<&Name> {
    match &url.item {
        Item::Snapshot { volume, .. } => volume.as_ref(),
        _ => None,
    }
}

fn missing<'a>(here: &'a SnapshotRecord, there: &SnapshotRecord) -> Vec<&'a Name> {
    let absent = |name: &&Name| there.volumes.iter().all(|volume| volume.name != **name);
    here.volumes.iter().map(|volume| &volume.name).filter(absent).collect()
}

fn table(document: &Document<'_>) -> String {
    use Side::{Left, Right};
    let mut table =
        Table::new(&[("VOLUME", Left), ("START", Right), ("END", Right), ("LENGTH", Right)]);
    for volume in &document.volumes {
        for range in &volume.diff.ranges {
            let (start, end) = (range.start, range.end);
            let length = bytes(end.saturating_sub(start));
            table.row([volume.name.to_string(), start.to_string(), end.to_string(), length]);
        }
    }
    for (names, what) in [(&document.only_from, "removed"), (&document.only_to, "added")] {
        for name in names {
            table.row([name.as_str(), "", "", what]);
        }
    }
    table.render()
}
