//! `stats`: how much was allocated over the whole run, in which sizes, by what and where.

use super::facts::{Facts, total, view_text, write_run};
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
    total_allocations: u64,
    total_bytes: u64,
    frees: u64,
    frees_from_before: u64,
    unmaps: u64,
    failed_allocations: Option<u64>,
    distinct_stacks: usize,
    peak_bytes: u64,
    peak_time_ns: u64,
    live_bytes_at_end: u64,
    live_blocks_at_end: u64,
    size_histogram: Vec<Bin>,
    allocators: Vec<Allocator>,
    /// What the locations are of.
    locations_of: &'static str,
    top_locations_by_size: Vec<Row<'a>>,
    top_locations_by_count: Vec<Row<'a>>,
}

#[derive(Serialize)]
struct Bin {
    min_bytes: u64,
    max_bytes: u64,
    count: u64,
}

#[derive(Serialize)]
struct Allocator {
    allocator: &'static str,
    count: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    location: Location<'a>,
    bytes: u64,
    count: u64,
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
        by_size.sort_by(|a, b| b.totals.cmp(&a.totals).then(a.frame.cmp(&b.frame)));
        let mut by_count = by_size.clone();
        by_count.sort_by_key(|row| std::cmp::Reverse((row.totals.count, row.totals.bytes)));
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
            writeln!(out, "\n{of}: {} in {}", size(whole.bytes), counted(whole.count, "allocation"))?;
            writeln!(out, "\nTop locations by size")?;
            for row in by_size {
                let share = share(row.totals.bytes, whole.bytes);
                write_location(findings, row, &size(row.totals.bytes), &share, format, out)?;
            }
            writeln!(out, "\nTop locations by number of allocations")?;
            for row in by_count {
                let share = share(row.totals.count, whole.count);
                write_location(findings, row, &number(row.totals.count), &share, format, out)?;
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
    let rows = |rows: &[LocationTotals]| -> Vec<Row<'a>> {
        let row = |row: &LocationTotals| Row {
            location: location(row.frame, &findings.stacks),
            bytes: row.totals.bytes,
            count: row.totals.count,
        };
        rows.iter().map(row).collect()
    };
    let bins = findings.statistics.size_histogram().into_iter();
    let allocators = findings.statistics.allocators().into_iter();
    Document {
        report: "stats",
        run: Facts::of(findings),
        total_allocations: findings.statistics.allocated.count,
        total_bytes: findings.statistics.allocated.bytes,
        frees: findings.frees,
        frees_from_before: findings.frees_from_before,
        unmaps: findings.unmaps,
        failed_allocations: findings.trailer.as_ref().map(|trailer| trailer.counters.failed_allocations),
        distinct_stacks: findings.statistics.distinct_stacks(),
        peak_bytes: findings.peak_bytes,
        peak_time_ns: findings.peak_time_ns,
        live_bytes_at_end: findings.live.bytes,
        live_blocks_at_end: findings.live.count,
        size_histogram: bins
            .map(|bin| Bin { min_bytes: bin.min_bytes, max_bytes: bin.max_bytes, count: bin.count })
            .collect(),
        allocators: allocators
            .map(|row| Allocator {
                allocator: row.allocator.name(),
                count: row.totals.count,
                bytes: row.totals.bytes,
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

fn write_totals(findings: &Findings, out: &mut dyn Write) -> io::Result<()> {
    let allocated = findings.statistics.allocated;
    writeln!(out, "\nAllocated: {} in {}", size(allocated.bytes), counted(allocated.count, "allocation"))?;
    writeln!(
        out,
        "Freed: {}, {} from before the attach, {}",
        counted(findings.frees, "block"),
        number(findings.frees_from_before),
        counted(findings.unmaps, "unmap")
    )?;
    if let Some(trailer) = findings.trailer.as_ref().filter(|trailer| trailer.counters.failed_allocations > 0)
    {
        writeln!(out, "Failed allocations: {}", number(trailer.counters.failed_allocations))?;
    }
    writeln!(out, "Peak: {} live after {}", size(findings.peak_bytes), duration(findings.peak_time_ns))?;
    let live = findings.live;
    writeln!(out, "At the end: {} live in {}", size(live.bytes), counted(live.count, "block"))?;
    writeln!(out, "Distinct stacks: {}", number(findings.statistics.distinct_stacks() as u64))
}

fn write_histogram(findings: &Findings, out: &mut dyn Write) -> io::Result<()> {
    let bins = findings.statistics.size_histogram();
    let most = bins.iter().map(|bin| bin.count).max().unwrap_or(0).max(1);
    writeln!(out, "\nSizes")?;
    for bin in bins {
        let length = (u128::from(bin.count) * u128::from(BAR)).div_ceil(u128::from(most)) as usize;
        let bar = "▇".repeat(length);
        let (min, max, count) = (size(bin.min_bytes), size(bin.max_bytes), number(bin.count));
        let line = format!("{min:>10} … {max:>10} {count:>12} {bar}");
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

fn write_allocators(findings: &Findings, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "\nAllocators")?;
    for row in findings.statistics.allocators() {
        let (bytes, count) = (size(row.totals.bytes), number(row.totals.count));
        writeln!(out, "{:>16} {bytes:>10} {count:>14}", row.allocator.name())?;
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
    let width = format.width.map_or(usize::MAX, |width| width.saturating_sub(20).max(20));
    writeln!(out, "{figure:>12} {share:>6} {}", fitted(&place(row.frame, &findings.stacks), width))
}
