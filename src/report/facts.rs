//! What one has to know to believe a report: of what run it is, how it was recorded, what is missing.
//!
//! Every report begins with it, as text or as the `run` object of its JSON.

use super::figures::{Figures, is_false};
use super::several::{Several, merged_warnings, write_several};
use super::text::{counted, duration, escaped, number, share, size, timestamp};
use crate::analysis::{Findings, OfSnapshot, Totals, View};
use crate::capture::{CutShort, Damage, EndReason, Header, LibcFacts, PythonFacts, Trailer};
use serde::Serialize;
use std::io::{self, Write};

/// The facts of a run for JSON.
#[derive(Serialize)]
pub struct Facts<'a> {
    heaptap_version: &'a str,
    /// `null` for several processes, as what else each has for itself.
    pid: Option<u32>,
    command_line: Option<&'a [String]>,
    python: &'a PythonFacts,
    libc: &'a LibcFacts,
    allocator_library: &'a str,
    start_unix_ns: u64,
    duration_ns: u64,
    end_reason: Option<&'a EndReason>,
    breakpoints: &'static str,
    python_allocators: bool,
    sampling_mean_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sampling: Option<Sampling>,
    #[serde(skip_serializing_if = "Option::is_none")]
    native: Option<Native>,
    /// False if the file has no trailer.
    complete: bool,
    cut_short: Option<Cut<'a>>,
    damaged_chunks: u64,
    dropped_events: u64,
    gaps: u64,
    gap_ns: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    tables_replaced_ns: Option<u64>,
    missed_frees: u64,
    missed_allocations: u64,
    warnings: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    merged: Option<Several<'a>>,
}

/// How samples were drawn, beside the interval asked for.
#[derive(Serialize)]
struct Sampling {
    seed: Option<u64>,
    max_cpu_percent: Option<f64>,
    samples: u64,
    /// `None` without an event log: which sample was drawn with which is not known.
    least_interval_bytes: Option<u64>,
    largest_interval_bytes: Option<u64>,
}

/// How native stacks were taken. Both are `None` where the file has no trailer.
#[derive(Serialize)]
struct Native {
    stacks: Option<u64>,
    cut_short: Option<u64>,
}

#[derive(Serialize)]
struct Cut<'a> {
    offset: u64,
    why: &'a str,
}

/// The part of a run that a view shows, for JSON.
#[derive(Serialize)]
pub(super) struct Shown {
    #[serde(skip_serializing_if = "is_false")]
    estimated: bool,
    view: &'static str,
    temporary_threshold: Option<u32>,
    total_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    total_bytes_error_95: Option<u64>,
    total_count: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    total_count_error_95: Option<f64>,
    peak_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_bytes_error_95: Option<u64>,
    /// `null` for several processes: each had its own.
    peak_time_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot: Option<ShownSnapshot>,
}

/// The snapshot that a view is of, for JSON.
#[derive(Serialize)]
struct ShownSnapshot {
    index: u32,
    reason: &'static str,
    time_ns: u64,
    unix_ns: u64,
    /// Snapshots in the capture.
    of: usize,
}

impl<'a> Facts<'a> {
    /// The facts of what was found.
    pub fn of(findings: &'a Findings) -> Self {
        let Findings { header, missing, merged, .. } = findings;
        Self {
            heaptap_version: &header.heaptap_version,
            pid: merged.is_none().then_some(header.pid),
            command_line: merged.is_none().then_some(&header.command_line[..]),
            python: &header.python,
            libc: &header.libc,
            allocator_library: &header.allocator_library,
            start_unix_ns: header.start_unix_ns,
            duration_ns: run_duration(findings),
            end_reason: findings.trailer.as_ref().filter(|_| merged.is_none()).map(|trailer| &trailer.reason),
            breakpoints: header.breakpoints.name(),
            python_allocators: header.python_allocators,
            sampling_mean_bytes: header.sampling_mean_bytes,
            sampling: Sampling::of(findings),
            native: Native::of(findings),
            complete: findings.trailer.is_some(),
            cut_short: findings.cut.as_ref().map(|cut| Cut { offset: cut.offset, why: &cut.why }),
            damaged_chunks: findings.damage.chunks,
            dropped_events: missing.dropped.saturating_add(missing.unlogged),
            gaps: missing.gaps,
            gap_ns: missing.gap_ns,
            tables_replaced_ns: Some(missing.tables_replaced_ns).filter(|ns| *ns > 0),
            missed_frees: missing.missed_frees,
            missed_allocations: missing.missed_allocations,
            warnings: warnings(findings),
            merged: merged.as_ref().map(|merged| Several::of(merged, Figures::of(findings))),
        }
    }
}

impl Sampling {
    fn of(findings: &Findings) -> Option<Self> {
        let Findings { header, samples, .. } = findings;
        header.sampling_mean_bytes.map(|_| Self {
            seed: header.sampling_seed,
            max_cpu_percent: header.max_cpu_percent,
            samples: samples.count,
            least_interval_bytes: (!findings.is_of_snapshots()).then_some(samples.least_interval),
            largest_interval_bytes: (!findings.is_of_snapshots()).then_some(samples.largest_interval),
        })
    }
}

impl Native {
    fn of(findings: &Findings) -> Option<Self> {
        let counters = findings.trailer.as_ref().map(|trailer| trailer.counters);
        let (stacks, cut_short) = (counters.map(|c| c.native_stacks), counters.map(|c| c.native_cut));
        findings.header.native.then_some(Self { stacks, cut_short })
    }
}

/// How native stacks were taken, in one line.
pub(super) fn native_text(findings: &Findings) -> Option<String> {
    match Native::of(findings)? {
        Native { stacks: Some(stacks), cut_short: Some(cut) } => {
            let (all, share) = (counted(stacks, "native stack"), share(cut, stacks));
            let why = if cut > 0 { ": some code does not tell who called it" } else { "" };
            Some(format!("{all}, {} ({share}) cut short{why}", number(cut)))
        }
        _ => Some("Native stacks were taken; how many is not known".to_owned()),
    }
}

impl Shown {
    pub(super) fn of(findings: &Findings) -> Self {
        let (figures, total) = (Figures::of(findings), total(findings));
        Self {
            estimated: figures.estimated,
            view: match findings.view {
                View::HighWaterMark => "high_water_mark",
                View::Leaks => "leaks",
                View::Temporary(_) => "temporary",
            },
            temporary_threshold: match findings.view {
                View::Temporary(threshold) => Some(threshold),
                View::HighWaterMark | View::Leaks => None,
            },
            total_bytes: total.bytes(),
            total_bytes_error_95: figures.bytes_error(&total),
            total_count: total.count(),
            total_count_error_95: figures.count_error(&total),
            peak_bytes: findings.peak.bytes(),
            peak_bytes_error_95: figures.bytes_error(&findings.peak),
            peak_time_ns: findings.merged.is_none().then_some(findings.peak_time_ns),
            snapshot: findings.of_snapshot.map(|OfSnapshot { shown, count }| ShownSnapshot {
                index: shown.head.index,
                reason: shown.head.reason.name(),
                time_ns: shown.head.time_ns,
                unix_ns: shown.head.unix_ns,
                of: count,
            }),
        }
    }
}

/// Everything the view shows.
pub(super) fn total(findings: &Findings) -> Totals {
    let mut total = Totals::default();
    for row in &findings.sites {
        total.add(row.totals);
    }
    total
}

/// What the view shows, in words.
pub(super) fn view_text(findings: &Findings) -> String {
    if let Some(OfSnapshot { shown, count }) = &findings.of_snapshot {
        let at = timestamp(shown.head.unix_ns);
        let of = counted(*count as u64, "snapshot");
        return match findings.view {
            View::Leaks => {
                format!("Allocated while recording and live at the snapshot of {at}, the last of {of}")
            }
            _ => format!("Live at the snapshot of {at}, the highest of {of}"),
        };
    }
    match findings.view {
        View::HighWaterMark if findings.merged.is_some() && findings.is_of_snapshots() => {
            "Live at each process's own highest snapshot".to_owned()
        }
        View::Leaks if findings.merged.is_some() && findings.is_of_snapshots() => {
            "Allocated while recording and live at each process's last snapshot".to_owned()
        }
        View::HighWaterMark if findings.merged.is_some() => {
            "Live at each process's own high-water mark".to_owned()
        }
        View::HighWaterMark => {
            format!("Live at the high-water mark, {} after the start", duration(findings.peak_time_ns))
        }
        View::Leaks => "Allocated while recording and not freed by its end".to_owned(),
        View::Temporary(threshold) => {
            let sampled = findings.header.sampling_mean_bytes.is_some();
            let what = if sampled { "other recorded allocation" } else { "other allocation" };
            format!(
                "Temporary: freed before more than {} of the same thread",
                counted(threshold.into(), what)
            )
        }
    }
}

/// The lines that begin a text report about a view.
pub(super) fn write_view(findings: &Findings, out: &mut dyn Write) -> io::Result<()> {
    write_run(findings, out)?;
    let amount = Figures::of(findings).amount(&total(findings), "allocation");
    writeln!(out, "{}: {amount}", view_text(findings))?;
    if findings.view == View::Leaks && !findings.header.python_allocators {
        // mimalloc, which free-threaded builds have in pymalloc's place, maps one arena of 1 GiB as it starts.
        let what = if findings.header.python.flavour.contains("free-threaded") {
            "CPython's object allocator was not recorded, nor what it reserved before the attach"
        } else {
            "CPython's small-object allocator was not recorded, only the arenas it maps"
        };
        writeln!(out, "note: {what}; `attach --python-allocators` does")?;
    }
    writeln!(out)
}

/// The lines about the run itself.
pub(super) fn write_run(findings: &Findings, out: &mut dyn Write) -> io::Result<()> {
    if let Some(merged) = &findings.merged {
        return write_several(findings, merged, out);
    }
    write_header(&findings.header, out)?;
    let ended = match &findings.trailer {
        Some(Trailer { reason, .. }) => escaped(&reason.text()).into_owned(),
        None => "not known".to_owned(),
    };
    writeln!(out, "Recorded {}; ended: {ended}", duration(run_duration(findings)))?;
    if let Some(line) = sampling_text(findings) {
        writeln!(out, "{line}")?;
    }
    if let Some(line) = native_text(findings) {
        writeln!(out, "{line}")?;
    }
    if findings.header.aggregated && !findings.is_of_snapshots() {
        writeln!(out, "note: there is no snapshot in it")?;
    }
    for warning in warnings(findings) {
        writeln!(out, "warning: {warning}")?;
    }
    Ok(())
}

/// What makes the figures of a sampled capture what they are, in one line.
pub(super) fn sampling_text(findings: &Findings) -> Option<String> {
    let Findings { header, samples, missing, .. } = findings;
    let mean = header.sampling_mean_bytes?;
    let mut text = format!("Sampled at {} mean", size(mean));
    if samples.largest_interval > mean {
        let largest = size(samples.largest_interval);
        text.push_str(&format!(" (raised to {largest} at most, to spare the target)"));
    }
    let samples = counted(samples.count, "sample");
    text.push_str(&format!(", {samples}: figures are estimates, ± is their error at 95 %"));
    if missing.dropped > 0 {
        text.push_str(&format!("; {} dropped", counted(missing.dropped, "event")));
    }
    Some(text)
}

/// The lines that are known before the first record is read.
pub(super) fn write_header(header: &Header, out: &mut dyn Write) -> io::Result<()> {
    let known = |text: &str| if text.is_empty() { "unknown".to_owned() } else { escaped(text).into_owned() };
    writeln!(
        out,
        "Python {} ({}), pid {}: {}",
        known(&header.python.version),
        known(&header.python.flavour),
        header.pid,
        known(&header.command_line.join(" "))
    )?;
    write_how(header, out)
}

/// When and how was recorded.
pub(super) fn write_how(header: &Header, out: &mut dyn Write) -> io::Result<()> {
    let what = match header.sampling_mean_bytes {
        None if header.python_allocators => {
            "every malloc and mmap, and every allocation of CPython's own".to_owned()
        }
        None => "every malloc and mmap".to_owned(),
        Some(mean) => {
            let own = if header.python_allocators { ", CPython's own included" } else { "" };
            format!("every mmap, and a sample of one allocation per {} on average{own}", size(mean))
        }
    };
    writeln!(
        out,
        "Started {} with {} breakpoints: {what}",
        timestamp(header.start_unix_ns),
        header.breakpoints.name()
    )
}

/// How long was recorded: as the trailer says, else up to the last record.
pub(super) fn run_duration(findings: &Findings) -> u64 {
    findings.trailer.as_ref().map_or(findings.last_time_ns, |trailer| trailer.duration_ns)
}

/// What is missing, in sentences. Empty if nothing is.
pub(super) fn warnings(findings: &Findings) -> Vec<String> {
    let missing = &findings.missing;
    let mut warnings = file_warnings(findings.cut.as_ref(), &findings.damage);
    warnings.extend(findings.merged.iter().flat_map(merged_warnings));
    if missing.dropped > 0 {
        warnings.push(format!("{} were dropped while recording", counted(missing.dropped, "event")));
    }
    if missing.unlogged > 0 {
        let events = counted(missing.unlogged, "event");
        let rest = if matches!(findings.view, View::Temporary(_)) {
            "they are missing"
        } else {
            "figures are of snapshots"
        };
        warnings.push(format!("the event log was full: {events} are not in it, {rest}"));
    }
    if missing.gaps > 0 {
        let gaps = counted(missing.gaps, "gap");
        warnings.push(format!("nothing was recorded in {gaps} of {} together", duration(missing.gap_ns)));
    }
    if missing.tables_replaced_ns > 0 {
        warnings.push(format!(
            "the program replaced CPython's allocator tables: in the last {} objects were neither seen to come nor to go",
            duration(missing.tables_replaced_ns)
        ));
    }
    if missing.missed_frees > 0 {
        warnings.push(format!(
            "{} were missed (their addresses were given out again)",
            counted(missing.missed_frees, "free")
        ));
    }
    if missing.missed_allocations > 0 {
        let count = number(missing.missed_allocations);
        warnings.push(format!("the allocations of {count} freed blocks are missing"));
    }
    let incomplete = !warnings.is_empty();
    if incomplete && findings.view == View::Leaks {
        warnings.push("so some of what is shown as not freed may have been".to_owned());
    }
    warnings
}

/// Whether a file that the findings are from is not whole.
pub(super) fn is_cut_or_damaged(findings: &Findings) -> bool {
    let of_merged = findings.merged.iter().flat_map(|merged| &merged.processes);
    let mut files = of_merged.map(|p| (&p.cut, &p.damage)).chain([(&findings.cut, &findings.damage)]);
    files.any(|(cut, damage)| cut.is_some() || damage.chunks > 0)
}

/// What is wrong with the file itself.
pub(super) fn file_warnings(cut: Option<&CutShort>, damage: &Damage) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Some(CutShort { offset, why }) = cut {
        warnings.push(format!("the file is cut short at byte {}: {why}", number(*offset)));
    }
    if let Some(CutShort { offset, why }) = &damage.first {
        let chunks = counted(damage.chunks, "damaged chunk");
        warnings.push(format!("{chunks} could not be read, the first at byte {}: {why}", number(*offset)));
    }
    warnings
}
