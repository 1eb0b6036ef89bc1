//! What a volume holds, and whether it can be used.
//!
//! A volume whose device does not answer keeps whoever asks it waiting, and can't be called back. So the asking is done
//! aside, once for each volume, and after a while the answer is that there is none.

use std::path::PathBuf;
use std::time::Duration;

use petra_volume::{Space, Volume, binds};
use tokio::time::{Instant, sleep, timeout_at};
use tonic::Status;

use super::{Named, Node, blocking};
use crate::failure::of_volume;
use crate::locks::Operation;
use crate::proto::csi::volume_usage::Unit;
use crate::proto::csi::{NodeGetVolumeStatsResponse, VolumeCondition, VolumeUsage};

/// How long a volume may take to answer.
const PATIENCE: Duration = Duration::from_secs(8);
/// How often is looked whether an earlier look has ended.
const STEP: Duration = Duration::from_millis(20);

/// What is known without asking the volume itself.
struct Known {
    volume: Volume,
    at: PathBuf,
    size_bytes: u64,
    is_device: bool,
}

/// What the volume answered.
struct Answer {
    space: Option<Space>,
    trouble: Option<String>,
}

impl Node {
    pub(super) async fn stats(
        &self,
        named: Named,
        at: PathBuf,
    ) -> Result<NodeGetVolumeStatsResponse, Status> {
        let (id, pool) = (named.id.clone(), self.0.pool.clone());
        let known = blocking(move || find(named.find(&pool)?, at)).await?;
        let size_bytes = known.size_bytes;
        let answer = self.ask(known, &id).await?;
        let usage = match answer.space {
            Some(space) => usage(&space),
            // Of a device, and of a file system that does not answer, no more is known than its size.
            None => vec![VolumeUsage { available: 0, used: 0, ..bytes(size_bytes, 0) }],
        };
        let condition = VolumeCondition {
            abnormal: answer.trouble.is_some(),
            message: answer.trouble.unwrap_or_else(|| "it works".to_owned()),
        };
        Ok(NodeGetVolumeStatsResponse { usage, volume_condition: Some(condition) })
    }

    /// Asks a volume that may never answer.
    async fn ask(&self, known: Known, id: &str) -> Result<Answer, Status> {
        let silent = || Answer {
            space: None,
            trouble: Some(format!("it did not answer for {} seconds", PATIENCE.as_secs())),
        };
        let deadline = Instant::now() + PATIENCE;
        let Some(look) = self.look(id, deadline).await else { return Ok(silent()) };
        let asked = blocking(move || {
            let answer = ask(&known);
            drop(look);
            answer
        });
        timeout_at(deadline, asked).await.unwrap_or_else(|_| Ok(silent()))
    }

    /// Waits until nobody else looks at a volume; None where that takes too long.
    async fn look(&self, id: &str, deadline: Instant) -> Option<Operation> {
        loop {
            match self.0.looks.begin([id]) {
                Ok(look) => return Some(look),
                Err(_) if Instant::now() < deadline => sleep(STEP).await,
                Err(_) => return None,
            }
        }
    }
}

fn find(volume: Volume, at: PathBuf) -> Result<Known, Status> {
    let at = binds::resolve(&at).map_err(of_volume)?.unwrap_or(at);
    let places = volume.places().map_err(of_volume)?;
    let Some(place) = places.iter().rfind(|place| place.at == at) else {
        return Err(Status::not_found(format!("{volume} is not at {}", at.display())));
    };
    let (size_bytes, is_device) = (volume.state().map_err(of_volume)?.size_bytes, place.is_device);
    Ok(Known { volume, at, size_bytes, is_device })
}

fn ask(known: &Known) -> Result<Answer, Status> {
    let trouble = known.volume.trouble().map_err(of_volume)?;
    if known.is_device {
        return Ok(Answer { space: None, trouble });
    }
    match Space::of(&known.at) {
        Ok(space) => Ok(Answer { space: Some(space), trouble }),
        Err(error) => {
            let text = format!("its file system does not answer: {error}");
            Ok(Answer { space: None, trouble: trouble.or(Some(text)) })
        }
    }
}

/// The usage of a file system.
fn usage(space: &Space) -> Vec<VolumeUsage> {
    let mut usage = vec![bytes(space.total_bytes, space.free_bytes)];
    // btrfs has as many as fit.
    if space.inodes > 0 {
        usage.push(counted(space.inodes, space.free_inodes, Unit::Inodes));
    }
    usage
}

fn bytes(total: u64, available: u64) -> VolumeUsage {
    counted(total, available, Unit::Bytes)
}

fn counted(total: u64, available: u64, unit: Unit) -> VolumeUsage {
    let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    VolumeUsage {
        total: number(total),
        available: number(available),
        used: number(total.saturating_sub(available)),
        unit: unit.into(),
    }
}
