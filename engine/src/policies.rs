//! The policies that a repository holds: one for all experiments, and others for some.
//!
//! Each change is a new object, `policies/N`, and the highest number holds. Two who change them at the same time
//! compete for one number; the loser reads the winner's and changes that.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::key::{self, Key};
use crate::name::Name;
use crate::publish::{Published, publish};
use crate::record::{Stamp, kind};
use crate::repository::{Repository, stamp, timestamp};
use crate::retention::Policy;
use crate::store::list_all;

/// Someone else may be faster this often.
const ATTEMPTS: usize = 10;

static STANDARD: LazyLock<Policy> = LazyLock::new(Policy::standard);

/// What was stored, if anything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Policies {
    /// For experiments that have none of their own; [`Policy::standard`] without it.
    pub default: Option<Policy>,
    /// Of these experiments.
    pub experiments: BTreeMap<Name, Policy>,
    /// When the last change was made, by its author's clock.
    pub changed: Option<Timestamp>,
}

/// The object `policies/N`.
#[derive(Debug, Serialize, Deserialize)]
// What is not known could be about keeping something: it must not be passed over.
#[serde(deny_unknown_fields)]
struct Stored {
    stamp: Stamp,
    at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    default: Option<Policy>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    experiments: BTreeMap<Name, Policy>,
}

impl Policies {
    /// The policy that holds for an experiment.
    pub fn of(&self, experiment: &Name) -> &Policy {
        self.experiments.get(experiment).unwrap_or_else(|| self.for_others())
    }

    /// The policy that holds for experiments without one of their own.
    pub fn for_others(&self) -> &Policy {
        self.default.as_ref().unwrap_or(&STANDARD)
    }
}

impl Repository {
    /// The policies that hold now.
    pub async fn policies(&self) -> Result<Policies> {
        Ok(self.last_policies().await?.1)
    }

    /// Sets the policy of an experiment, or the one for all others; None takes it back. Gives what holds then.
    pub async fn set_policy(
        &self,
        experiment: Option<&Name>,
        policy: Option<Policy>,
        ctx: &Context,
    ) -> Result<Policies> {
        for _ in 0..ATTEMPTS {
            ctx.check()?;
            let ((n, mut policies), ()) =
                futures::try_join!(self.last_policies(), self.ready_to_write(ctx))?;
            match (experiment, policy.clone()) {
                (None, policy) => policies.default = policy,
                (Some(experiment), Some(policy)) => {
                    policies.experiments.insert(experiment.clone(), policy);
                }
                (Some(experiment), None) => {
                    policies.experiments.remove(experiment);
                }
            }
            let at = timestamp(ctx);
            policies.changed = Some(at);
            let Policies { default, experiments, .. } = policies.clone();
            let stored = Stored { stamp: stamp(ctx), at, default, experiments };
            let key = Key::policies(n.saturating_add(1));
            let body = self.seal(kind::POLICIES, &key, &stored)?;
            if publish(self.store(), &key, body).await? == Published::Ours {
                return Ok(policies);
            }
        }
        Err(Error::Request("others are changing the policies all the time; try again".to_owned()))
    }

    /// The last policies and their number; 0 where there are none.
    async fn last_policies(&self) -> Result<(u32, Policies)> {
        let listed = list_all(self.store(), key::POLICIES).await?;
        let last = listed.iter().filter_map(|entry| key::parse_policies(&entry.key)).max();
        let Some(n) = last else { return Ok((0, Policies::default())) };
        let key = Key::policies(n);
        let stored: Stored = self.unseal(kind::POLICIES, &key, &self.store().get(&key).await?)?;
        let Stored { at, default, experiments, .. } = stored;
        Ok((n, Policies { default, experiments, changed: Some(at) }))
    }
}
