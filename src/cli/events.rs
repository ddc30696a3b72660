//! What a recording tells of itself as events of the JSON log (`--log-format json`): one object each, its kind in `event`:
//! `recording`, `progress`, `ended`, and instead of these `refused` or `failed`. docs/running.md has the fields.

use super::log::EVENTS;
use crate::error::{Error, Exit};
use crate::recorder::examine::Examined;
use crate::recorder::record::{Progress, RecordOptions, Summary};
use tracing::{error, info};

/// The breakpoints are in.
pub(super) fn recording(examined: &Examined, how: &str, capture: &str) {
    info!(
        target: EVENTS,
        event = "recording",
        pid = examined.pid,
        python = %examined.python.version,
        libc = examined.libc_name(),
        breakpoints = examined.plan.entries.len() + examined.plan.words.len(),
        how,
        stopped = examined.stopped,
        capture,
    );
}

/// How far it is.
pub(super) fn progress(progress: &Progress, pid: i32) {
    info!(
        target: EVENTS,
        event = "progress",
        pid,
        elapsed_seconds = progress.elapsed.as_secs_f64(),
        events = progress.counters.events,
        drops = progress.counters.drops,
        live_bytes = progress.live_bytes,
        file_bytes = progress.file_bytes,
    );
}

/// It is over, for this reason; the capture is whole.
pub(super) fn ended(summary: &Summary, options: &RecordOptions) {
    let counters = &summary.counters;
    // The name that the capture's trailer has for it.
    let kind = serde_json::to_value(&summary.reason).ok();
    let kind = kind.as_ref().and_then(|reason| reason["kind"].as_str()).unwrap_or("unknown");
    info!(
        target: EVENTS,
        event = "ended",
        pid = options.pid,
        reason = summary.reason.text(),
        kind,
        capture = %options.output.display(),
        elapsed_seconds = summary.elapsed.as_secs_f64(),
        allocations = counters.allocations,
        frees = counters.frees,
        drops = counters.drops,
        peak_live_bytes = counters.peak_live_bytes,
        live_bytes = counters.live_bytes,
        live_blocks = counters.live_blocks,
        file_bytes = summary.file_bytes,
        left_in_target = summary.left.why.join("; "),
    );
}

/// Nothing was done, or it could not be done to its end.
pub(super) fn failed(error: &Error, causes: &[String]) {
    let exit = error.exit();
    // That it ended early was told, with the reason.
    if matches!(error, Error::RecordingFailed { .. }) {
        return;
    }
    let event = if exit == Exit::Refused { "refused" } else { "failed" };
    error!(
        target: EVENTS,
        event,
        reason = %error,
        causes = causes.join("; "),
        hint = error.hint().unwrap_or_default(),
        exit = exit as u8,
    );
}
