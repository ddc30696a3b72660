//! `stats`: how much was allocated over the whole run, in which sizes, by what and where.

use super::facts::{Facts, total, view_text, write_run};
use super::figures::{Errors, Figures, is_false};
use super::names::{Location, location, place};
use super::text::{counted, duration, fitted, number, share, size};
use super::{Format, Report, ReportError, limited, write_json};
use crate::analysis::{Findings, LocationTotals, View, locations};
use serde::Serialize;
use std::io::{self, Write};

/// The widest bar of the histogram, in characters.
const BAR: u64 = 40;

/// The report. Its totals are of all allocations; its locations too, unless leaks or temporary
/// allocations are asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// How many locations; 0 for all.
    pub max_rows: usize,
}

#[derive(Serialize)]
struct Document<'a> {
    report: &'static str,
    run: Facts<'a>,
    #[serde(skip_serializing_if = "is_false")]
    estimated: bool,
    total_allocations: u64,
    total_bytes: u64,
    frees: u64,
    /// `None` if sampled: those of blocks that were not sampled are not seen.
    frees_from_before: Option<u64>,
    /// `None` if only the end could tell.
    unmaps: Option<u64>,
    failed_allocations: Option<u64>,
    distinct_stacks: usize,
    peak_bytes: u64,
    /// `null` for several processes: each had its own.
    peak_time_ns: Option<u64>,
    live_bytes_at_end: u64,
    live_blocks_at_end: u64,
    #[serde(flatten)]
    errors: Option<DocumentErrors>,
    size_histogram: Vec<Bin>,
    allocators: Vec<Allocator>,
    /// What the locations are of.
    locations_of: &'static str,
    top_locations_by_size: Vec<Row<'a>>,
    top_locations_by_count: Vec<Row<'a>>,
}

/// The errors of an estimated document's sums.
#[derive(Serialize)]
struct DocumentErrors {
    total_allocations_error_95: f64,
    total_bytes_error_95: u64,
    frees_error_95: f64,
    peak_bytes_error_95: u64,
    live_bytes_at_end_error_95: u64,
    live_blocks_at_end_error_95: f64,
}

#[derive(Serialize)]
struct Bin {
    min_bytes: u64,
    max_bytes: u64,
    count: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    count_error_95: Option<f64>,
}

#[derive(Serialize)]
struct Allocator {
    allocator: &'static str,
    count: u64,
    bytes: u64,
    #[serde(flatten)]
    errors: Option<Errors>,
}

#[derive(Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    location: Location<'a>,
    bytes: u64,
    count: u64,
    #[serde(flatten)]
    errors: Option<Errors>,
}

impl Report for Stats {
    fn write(&self, findings: &Findings, format: Format, out: &mut dyn Write) -> Result<(), ReportError> {
        let (mut by_size, whole) = match findings.view {
            View::HighWaterMark => {
                (findings.statistics.locations(&findings.stacks), findings.statistics.allocated)
            }
            View::Leaks | View::Temporary(_) => {
                (locations(&findings.sites, &findings.stacks), total(findings))
            }
        };
        by_size.sort_by(|a, b| b.totals.compare(&a.totals).then(a.frame.cmp(&b.frame)));
        let mut by_count = by_size.clone();
        by_count.sort_by_key(|row| std::cmp::Reverse((row.totals.count(), row.totals.bytes())));
        let (by_size, by_count) = (limited(&by_size, self.max_rows), limited(&by_count, self.max_rows));
        if format.json {
            write_json(&document(findings, by_size, by_count), out)
        } else {
            write_run(findings, out)?;
            write_totals(findings, out)?;
            write_histogram(findings, out)?;
            write_allocators(findings, out)?;
            let of = match findings.view {
                View::HighWaterMark => "Of all allocations".to_owned(),
                View::Leaks | View::Temporary(_) => view_text(findings),
            };
            let figures = Figures::of(findings);
            writeln!(out, "\n{of}: {}", figures.amount(&whole, "allocation"))?;
            writeln!(out, "\nTop locations by size")?;
            for row in by_size {
                let share = share(row.totals.bytes(), whole.bytes());
                write_location(findings, row, &figures.bytes(&row.totals), &share, format, out)?;
            }
            writeln!(out, "\nTop locations by number of allocations")?;
            for row in by_count {
                let share = share(row.totals.count(), whole.count());
                write_location(findings, row, &figures.count(&row.totals), &share, format, out)?;
            }
            Ok(())
        }
    }
}

fn document<'a>(
    findings: &'a Findings,
    by_size: &[LocationTotals],
    by_count: &[LocationTotals],
) -> Document<'a> {
    let figures = Figures::of(findings);
    let rows = |rows: &[LocationTotals]| -> Vec<Row<'a>> {
        let row = |row: &LocationTotals| Row {
            location: location(row.frame, &findings.stacks),
            bytes: row.totals.bytes(),
            count: row.totals.count(),
            errors: figures.errors(&row.totals),
        };
        rows.iter().map(row).collect()
    };
    let counters = findings.trailer.as_ref().map(|trailer| &trailer.counters);
    let bins = findings.statistics.size_histogram().into_iter();
    let allocators = findings.statistics.allocators().into_iter();
    Document {
        report: "stats",
        run: Facts::of(findings),
        estimated: figures.estimated,
        total_allocations: findings.statistics.allocated.count(),
        total_bytes: findings.statistics.allocated.bytes(),
        frees: findings.freed.count(),
        frees_from_before: (!figures.estimated && is_counted(findings)).then_some(findings.frees_from_before),
        unmaps: is_counted(findings).then_some(findings.unmaps),
        failed_allocations: counters.map(|c| c.failed_allocations).filter(|_| !figures.estimated),
        distinct_stacks: findings.statistics.distinct_stacks(),
        peak_bytes: findings.peak.bytes(),
        peak_time_ns: findings.merged.is_none().then_some(findings.peak_time_ns),
        live_bytes_at_end: findings.live.bytes(),
        live_blocks_at_end: findings.live.count(),
        errors: document_errors(findings),
        size_histogram: bins
            .map(|bin| Bin {
                min_bytes: bin.min_bytes,
                max_bytes: bin.max_bytes,
                count: bin.totals.count(),
                count_error_95: figures.count_error(&bin.totals),
            })
            .collect(),
        allocators: allocators
            .map(|row| Allocator {
                allocator: row.allocator.name(),
                count: row.totals.count(),
                bytes: row.totals.bytes(),
                errors: figures.errors(&row.totals),
            })
            .collect(),
        locations_of: match findings.view {
            View::HighWaterMark => "all_allocations",
            View::Leaks => "leaks",
            View::Temporary(_) => "temporary",
        },
        top_locations_by_size: rows(by_size),
        top_locations_by_count: rows(by_count),
    }
}

/// Without an event log it is the trailer that has the numbers of some events.
fn is_counted(findings: &Findings) -> bool {
    !findings.is_of_snapshots() || findings.trailer.is_some()
}

fn document_errors(findings: &Findings) -> Option<DocumentErrors> {
    let figures = Figures::of(findings);
    let (allocated, live) = (&findings.statistics.allocated, &findings.live);
    Some(DocumentErrors {
        total_allocations_error_95: figures.count_error(allocated)?,
        total_bytes_error_95: figures.bytes_error(allocated)?,
        frees_error_95: figures.count_error(&findings.freed)?,
        peak_bytes_error_95: figures.bytes_error(&findings.peak)?,
        live_bytes_at_end_error_95: figures.bytes_error(live)?,
        live_blocks_at_end_error_95: figures.count_error(live)?,
    })
}

fn write_totals(findings: &Findings, out: &mut dyn Write) -> io::Result<()> {
    let figures = Figures::of(findings);
    writeln!(out, "\nAllocated: {}", figures.amount(&findings.statistics.allocated, "allocation"))?;
    let freed = figures.counted(&findings.freed, "block");
    let unmaps = counted(findings.unmaps, "unmap");
    if !is_counted(findings) {
        writeln!(out, "Freed: {freed}")?;
    } else if figures.estimated {
        // Of blocks from before, and of calls that failed, a sampled capture knows nothing.
        writeln!(out, "Freed: {freed}, {unmaps}")?;
    } else {
        let before = number(findings.frees_from_before);
        writeln!(out, "Freed: {freed}, {before} from before the attach, {unmaps}")?;
        let failed = findings.trailer.as_ref().map_or(0, |trailer| trailer.counters.failed_allocations);
        if failed > 0 {
            writeln!(out, "Failed allocations: {}", number(failed))?;
        }
    }
    let peak = figures.bytes(&findings.peak);
    let of = if findings.is_of_snapshots() { ", the highest of the snapshots" } else { "" };
    match &findings.merged {
        None => writeln!(out, "Peak: {peak} live after {}{of}", duration(findings.peak_time_ns))?,
        Some(_) => writeln!(out, "Peak: {peak} live, the sum of what each process had at its own{of}")?,
    }
    let end = if findings.is_of_snapshots() { "At the last snapshot" } else { "At the end" };
    writeln!(
        out,
        "{end}: {} live in {}",
        figures.bytes(&findings.live),
        figures.counted(&findings.live, "block")
    )?;
    writeln!(out, "Distinct stacks: {}", number(findings.statistics.distinct_stacks() as u64))
}

fn write_histogram(findings: &Findings, out: &mut dyn Write) -> io::Result<()> {
    let bins = findings.statistics.size_histogram();
    let figures = Figures::of(findings);
    if findings.is_of_snapshots() {
        return writeln!(out, "\nSizes: not known without an event log (`attach --events`)");
    }
    let most = bins.iter().map(|bin| bin.totals.count()).max().unwrap_or(0).max(1);
    writeln!(out, "\nSizes")?;
    for bin in bins {
        let length = (u128::from(bin.totals.count()) * u128::from(BAR)).div_ceil(u128::from(most)) as usize;
        let bar = "▇".repeat(length);
        let (min, max, count) = (size(bin.min_bytes), size(bin.max_bytes), figures.count(&bin.totals));
        let line = format!("{min:>10} … {max:>10} {} {bar}", figures.right(&count, 12));
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

fn write_allocators(findings: &Findings, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "\nAllocators")?;
    let figures = Figures::of(findings);
    for row in findings.statistics.allocators() {
        let bytes = figures.right(&figures.bytes(&row.totals), 10);
        let count = figures.right(&figures.count(&row.totals), 14);
        let line = format!("{:>16} {bytes} {count}", row.allocator.name());
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

fn write_location(
    findings: &Findings,
    row: &LocationTotals,
    figure: &str,
    share: &str,
    format: Format,
    out: &mut dyn Write,
) -> io::Result<()> {
    let figures = Figures::of(findings);
    let used = figures.width(12) + 8;
    let width = format.width.map_or(usize::MAX, |width| width.saturating_sub(used).max(20));
    let place = place(row.frame, &findings.stacks);
    writeln!(out, "{} {share:>6} {}", figures.right(figure, 12), fitted(&place, width))
}
