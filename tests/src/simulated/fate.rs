//! What becomes of requests.

use std::time::Duration;

use petra_engine::key::PACKS;

/// What chances are counted in.
const MYRIAD: u32 = 10_000;

/// How often things go wrong, in ten-thousandths of all requests.
#[derive(Clone, Copy, Debug)]
pub struct Faults {
    /// Requests that fail and do nothing.
    pub refused: u32,
    /// Writes that are done, but answered with an error.
    pub lost: u32,
    /// Writes that are answered with an error, and done later.
    pub late: u32,
    /// Writes that are done once more later.
    pub repeated: u32,
    /// Requests in which the process stands still for a long time, before or after they are done.
    pub stalled: u32,
    /// "Later" and "a long time" are at most this.
    pub horizon: Duration,
    /// A request takes at most about this long when all is well, and a listing at most twice as long again.
    pub latency: Duration,
    /// Packs take at most about this long on their way.
    pub upload: Duration,
}

impl Faults {
    /// Nothing goes wrong and nothing takes time.
    pub const NONE: Self = Self {
        refused: 0,
        lost: 0,
        late: 0,
        repeated: 0,
        stalled: 0,
        horizon: Duration::ZERO,
        latency: Duration::ZERO,
        upload: Duration::ZERO,
    };

    /// What becomes of a request.
    pub(super) fn fate(
        &self,
        rng: &mut fastrand::Rng,
        operation: &str,
        key: &str,
        is_write: bool,
    ) -> Fate {
        if self.latency.is_zero() {
            let none = Duration::ZERO;
            return Fate { there: none, back: none, kind: FateKind::Done, again: None };
        }
        let is_upload = operation == "put" && key.starts_with(PACKS);
        let most = if is_upload { self.upload } else { self.latency };
        let mut there = spread(rng, most);
        let mut back = spread(rng, self.latency / 4);
        if chance(rng, self.stalled) {
            let stalled = if rng.bool() { &mut there } else { &mut back };
            *stalled += spread(rng, self.horizon);
        }
        let kind = if chance(rng, self.refused) {
            FateKind::Refused
        } else if is_write && chance(rng, self.lost) {
            FateKind::Lost
        } else if is_write && chance(rng, self.late) {
            FateKind::Late(spread(rng, self.horizon))
        } else {
            FateKind::Done
        };
        let again = is_write && kind != FateKind::Refused && chance(rng, self.repeated);
        let again = again.then(|| spread(rng, self.horizon));
        Fate { there, back, kind, again }
    }
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fate {
    /// Until it is done.
    pub there: Duration,
    /// Until it is answered.
    pub back: Duration,
    pub kind: FateKind,
    /// After the answer it is done once more.
    pub again: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FateKind {
    Done,
    Refused,
    Lost,
    Late(Duration),
}

fn chance(rng: &mut fastrand::Rng, per_myriad: u32) -> bool {
    per_myriad > 0 && rng.u32(..MYRIAD) < per_myriad
}

/// A time between 1 ms and `most`: short ones are as likely as long ones, by orders of magnitude.
pub fn spread(rng: &mut fastrand::Rng, most: Duration) -> Duration {
    let most_ms = most.as_millis().max(1) as u64;
    let scale = most_ms >> rng.u32(..=most_ms.ilog2());
    Duration::from_millis(rng.u64(scale.div_ceil(2)..=scale).max(1))
}
