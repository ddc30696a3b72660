//! `dump`: snapshots and gauges, which are of a moment and not of a call.

use crate::capture::{AGE_LIMITS, Age, Gauges, SiteState, Snapshot, Totals};
use serde_json::{Map, Value, json};

/// A snapshot in lines: what it is, then one for each site.
pub(super) fn snapshot_text(snapshot: &Snapshot) -> String {
    let head = &snapshot.head;
    let live = snapshot.live();
    let mut text = format!(
        "snapshot {} by {} at {}: {} sites, {} bytes in {} blocks",
        head.index,
        head.reason.name(),
        seconds(head.time_ns),
        snapshot.rows.len(),
        live.bytes(),
        live.count()
    );
    for row in &snapshot.rows {
        text.push_str(&format!(
            "\n  {} tid {} stack {} live {} in {} allocated {} in {} freed {} in {}",
            row.allocator.name(),
            row.tid,
            row.stack.0,
            row.live.bytes(),
            row.live.count(),
            row.allocated.bytes(),
            row.allocated.count(),
            row.freed.bytes(),
            row.freed.count()
        ));
    }
    text
}

/// A snapshot as one object.
pub(super) fn snapshot_json(snapshot: &Snapshot) -> Value {
    let head = &snapshot.head;
    json!({
        "record": "snapshot", "index": head.index, "reason": head.reason.name(), "ns": head.time_ns,
        "unix_ns": head.unix_ns, "age_limits_s": AGE_LIMITS,
        "sites": snapshot.rows.iter().map(row_json).collect::<Vec<_>>(),
    })
}

fn row_json(row: &SiteState) -> Value {
    let ages: Vec<_> = row.ages.iter().map(|Age { bytes, blocks }| json!([bytes, blocks])).collect();
    json!({
        "allocator": row.allocator.name(), "tid": row.tid, "stack": row.stack.0,
        "live": sum_json(&row.live), "allocated": sum_json(&row.allocated), "freed": sum_json(&row.freed),
        "ages": ages,
    })
}

fn sum_json(totals: &Totals) -> Value {
    let mut sum = json!({ "bytes": totals.bytes(), "count": totals.count() });
    if totals.samples() > 0 {
        sum["samples"] = totals.samples().into();
        sum["bytes_error_95"] = (totals.bytes_error().round() as u64).into();
        sum["count_error_95"] = ((totals.count_error() * 10.0).round() / 10.0).into();
    }
    sum
}

/// Gauges of some moments, a line each.
pub(super) fn gauges_text(gauges: &[Gauges]) -> String {
    let lines = gauges.iter().map(|moment| {
        let known = Gauges::NAMES.iter().zip(moment.values());
        let values = known.filter_map(|(name, value)| value.map(|value| format!(" {name} {value}")));
        format!("gauges at {}{}", seconds(moment.time_ns), values.collect::<String>())
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Gauges of one moment as one object; unknown ones are left out.
pub(super) fn gauges_json(moment: &Gauges) -> Value {
    let mut object = Map::new();
    object.insert("record".into(), "gauges".into());
    object.insert("ns".into(), moment.time_ns.into());
    for (name, value) in Gauges::NAMES.iter().zip(moment.values()) {
        if let Some(value) = value {
            object.insert((*name).into(), value.into());
        }
    }
    object.into()
}

fn seconds(ns: u64) -> String {
    format!("{}.{:09}", ns / 1_000_000_000, ns % 1_000_000_000)
}
