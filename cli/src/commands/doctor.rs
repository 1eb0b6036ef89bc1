//! `petra doctor`.

use std::path::PathBuf;
use std::sync::Arc;

use petra_engine::context::SystemHost;
use petra_volume::Pool;
use petra_volume::doctor::{Finding, Health, examine};
use serde::Serialize;

use crate::failure::Failure;
use crate::session::Session;
use crate::text::{Side, Table, count};

/// Options of `petra doctor`.
#[derive(Debug, clap::Args)]
pub struct Doctor {
    /// A pool to try out as well
    #[arg(value_name = "POOL", env = "PETRA_POOL")]
    pool: Option<PathBuf>,
}

#[derive(Serialize)]
struct Document {
    findings: Vec<Finding>,
}

impl Doctor {
    pub fn run(self, session: &Session) -> Result<(), Failure> {
        let open = |pool: PathBuf| Pool::open(&pool, Arc::new(SystemHost));
        let pool = self.pool.map(open).transpose()?;
        let document = Document { findings: examine(pool.as_ref(), &SystemHost) };
        session.out.report(&document, || {
            let columns = [("WHAT", Side::Left), ("STATE", Side::Left), ("DETAIL", Side::Left)];
            let mut table = Table::new(&columns);
            for finding in &document.findings {
                let state = match finding.health {
                    Health::Ok => "ok",
                    Health::Lacking => "lacking",
                    Health::Missing => "MISSING",
                };
                table.row([finding.name, state, &finding.detail]);
            }
            table.render()
        })?;
        let missing = document.findings.iter().filter(|f| f.health == Health::Missing).count();
        if missing > 0 {
            let what = format!("volumes do not work here: {} missing", count(missing, "thing"));
            return Err(Failure::fix(what));
        }
        Ok(())
    }
}
