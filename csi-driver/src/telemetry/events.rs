//! What people should know of: lines of the log that can be found by their target, `event`.

/// The target of events in the log.
pub const TARGET: &str = "event";

/// How much an event matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// Things go as they should.
    Normal,
    /// Somebody should look.
    Warning,
}

/// Tells people of something. `reason` is one word that never changes, such as `UploadFailed`; `object` is a volume's or
/// snapshot's id, `note` a sentence.
pub fn event(severity: Severity, reason: &'static str, object: &str, note: &str) {
    match severity {
        Severity::Normal => tracing::info!(target: TARGET, reason, object, "{note}"),
        Severity::Warning => tracing::warn!(target: TARGET, reason, object, "{note}"),
    }
}
