//! What people see while the engine works: a bar on a terminal, a line now and then in a log.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use petra_engine::Context;
use petra_engine::progress::{Event, Progress};

use crate::output::Output;
use crate::text::{bytes, duration_ms, ratio};

// Two lines, so that a terminal of 80 columns has room for the bar.
const BAR: &str = "{prefix} {wide_bar:.green/dim} {binary_bytes}/{binary_total_bytes}  \
                   {binary_bytes_per_sec}  {eta} left\n  {msg}";
const SPINNER: &str = "{prefix} {spinner} {binary_bytes}  {elapsed}\n  {msg}";
const FRAME: Duration = Duration::from_millis(100);
const LINE: Duration = Duration::from_secs(5);

/// Sums of the events so far. Events come from many threads, so nothing is drawn when they arrive.
#[derive(Debug, Default)]
struct Counts {
    planned: AtomicU64,
    processed: AtomicU64,
    new: AtomicU64,
    stored: AtomicU64,
    fetched: AtomicU64,
    freed: AtomicU64,
}

impl Counts {
    /// What moved besides the volume's bytes.
    fn detail(&self) -> String {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let (new, stored, fetched, freed) =
            (get(&self.new), get(&self.stored), get(&self.fetched), get(&self.freed));
        let mut parts = vec![];
        if new > 0 {
            parts.push(format!("new {}", bytes(new)));
        }
        if stored > 0 {
            parts.push(format!("stored {} ({})", bytes(stored), ratio(new, stored)));
        }
        if fetched > 0 {
            parts.push(format!("fetched {}", bytes(fetched)));
        }
        if freed > 0 {
            parts.push(format!("freed {}", bytes(freed)));
        }
        parts.join(", ")
    }

    /// The state as a line of a log.
    fn line(&self, label: &str, elapsed: Duration) -> String {
        let processed = self.processed.load(Ordering::Relaxed);
        let planned = self.planned.load(Ordering::Relaxed);
        let mut line = format!("{label}: {}", bytes(processed));
        if planned > 0 {
            line += &format!(" of {}", bytes(planned));
        }
        let ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX).max(1);
        let per_second = processed.saturating_mul(1000) / ms;
        line += &format!(", {}/s", bytes(per_second));
        let detail = self.detail();
        if !detail.is_empty() {
            line += &format!(", {detail}");
        }
        if let Some(left) = planned.saturating_sub(processed).checked_div(per_second)
            && planned > 0
        {
            line += &format!(", {} left", duration_ms(left.saturating_mul(1000)));
        }
        line
    }
}

/// Receives the engine's events.
#[derive(Debug)]
struct Meter {
    counts: Arc<Counts>,
    out: Output,
    bar: Option<ProgressBar>,
}

impl Progress for Meter {
    fn event(&self, event: Event<'_>) {
        let counts = &self.counts;
        let (count, by) = match event {
            Event::Planned { bytes } => (&counts.planned, bytes),
            Event::Processed { bytes } => (&counts.processed, bytes),
            Event::New { bytes } => (&counts.new, bytes),
            Event::Stored { bytes } => (&counts.stored, bytes),
            Event::Fetched { bytes } => (&counts.fetched, bytes),
            Event::Freed { bytes } => (&counts.freed, bytes),
            Event::Warning { text } => {
                match &self.bar {
                    Some(bar) => bar.suspend(|| self.out.warn(text)),
                    None => self.out.warn(text),
                }
                return;
            }
            _ => return,
        };
        count.fetch_add(by, Ordering::Relaxed);
    }
}

/// An operation that is going on. Dropping it takes its bar away.
#[derive(Debug)]
pub struct Activity {
    /// For the engine.
    pub context: Context,
    ticker: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Activity {
    /// Shows the progress of what gets this context.
    pub fn begin(label: &'static str, out: Output, mut context: Context, may_draw: bool) -> Self {
        let counts = Arc::new(Counts::default());
        let draws = may_draw && !out.is_silent() && std::io::stderr().is_terminal();
        let bar = draws.then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.set_style(style(SPINNER));
            bar.set_prefix(label);
            bar
        });
        context.progress = Arc::new(Meter { counts: counts.clone(), out, bar: bar.clone() });
        let ticker = (!out.is_silent()).then(|| {
            let (stop, stopped) = channel();
            let begun = Instant::now();
            let pause = if bar.is_some() { FRAME } else { LINE };
            let thread = std::thread::spawn(move || {
                while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                    match &bar {
                        Some(bar) => draw(bar, &counts),
                        None => out.say(&counts.line(label, begun.elapsed())),
                    }
                }
                if let Some(bar) = &bar {
                    bar.finish_and_clear();
                }
            });
            (stop, thread)
        });
        Self { context, ticker }
    }
}

impl Drop for Activity {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.ticker.take() {
            drop(stop);
            // Waits for the bar to be gone, so that what is said next stands on a line of its own.
            let _ = thread.join();
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    // The templates are constants and a test draws with them.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn draw(bar: &ProgressBar, counts: &Counts) {
    let planned = counts.planned.load(Ordering::Relaxed);
    if planned > 0 {
        if bar.length().is_none() {
            bar.set_style(style(BAR));
        }
        bar.set_length(planned);
    }
    bar.set_message(counts.detail());
    bar.set_position(counts.processed.load(Ordering::Relaxed));
    bar.tick();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_valid() {
        for template in [BAR, SPINNER] {
            ProgressStyle::with_template(template).unwrap();
        }
    }

    #[test]
    fn a_line_tells_rate_ratio_and_time_left() {
        let counts = Arc::new(Counts::default());
        let meter = Meter { counts: counts.clone(), out: Output::new(false, true), bar: None };
        meter.event(Event::Planned { bytes: 4 << 30 });
        meter.event(Event::Processed { bytes: 1 << 30 });
        meter.event(Event::New { bytes: 512 << 20 });
        meter.event(Event::Stored { bytes: 256 << 20 });
        assert_eq!(
            counts.line("snapshot", Duration::from_secs(4)),
            "snapshot: 1.0 GiB of 4.0 GiB, 256.0 MiB/s, new 512.0 MiB, stored 256.0 MiB (2.0x), 12 s left"
        );
    }

    #[test]
    fn nothing_is_divided_by_nothing() {
        let counts = Counts::default();
        assert_eq!(counts.line("gc", Duration::ZERO), "gc: 0 B, 0 B/s");
        counts.freed.store(1024, Ordering::Relaxed);
        assert_eq!(counts.line("gc", Duration::ZERO), "gc: 0 B, 0 B/s, freed 1.0 KiB");
    }
}
