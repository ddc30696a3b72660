//! What reports say of several captures that were merged: which, how each ended, and what is wrong with any.

use super::facts::{file_warnings, native_text, run_duration, sampling_text, warnings, write_how};
use super::figures::{Errors, Figures};
use super::text::{counted, duration, escaped, fitted, number};
use crate::analysis::{Findings, Merged, MergedProcess};
use crate::capture::EndReason;
use serde::Serialize;
use std::io::{self, Write};

/// Processes that a text report lists, those with most first.
const LISTED: usize = 20;
/// Characters of a command line in the list.
const COMMAND: usize = 60;
/// Captures whose faults are told one by one.
const FAULTY: usize = 5;

/// For JSON.
#[derive(Serialize)]
pub(super) struct Several<'a> {
    split_processes: bool,
    not_recorded: u64,
    captures: Vec<Capture<'a>>,
}

#[derive(Serialize)]
struct Capture<'a> {
    pid: u32,
    command_line: &'a [String],
    start_unix_ns: u64,
    duration_ns: u64,
    end_reason: Option<&'a EndReason>,
    /// What the report's view shows of it.
    bytes: u64,
    count: u64,
    #[serde(flatten)]
    errors: Option<Errors>,
}

impl<'a> Several<'a> {
    pub(super) fn of(merged: &'a Merged, figures: Figures) -> Self {
        let capture = |process: &'a MergedProcess| Capture {
            pid: process.pid,
            command_line: &process.command_line,
            start_unix_ns: process.start_unix_ns,
            duration_ns: process.duration_ns,
            end_reason: process.end_reason.as_ref(),
            bytes: process.shown.bytes(),
            count: process.shown.count(),
            errors: figures.errors(&process.shown),
        };
        Self {
            split_processes: merged.split,
            not_recorded: merged.not_recorded,
            captures: merged.processes.iter().map(capture).collect(),
        }
    }
}

/// The lines about the run itself, in place of those about one process.
pub(super) fn write_several(findings: &Findings, merged: &Merged, out: &mut dyn Write) -> io::Result<()> {
    let captures = counted(merged.processes.len() as u64, "capture");
    writeln!(out, "Python {}, {captures} together", escaped(&findings.header.python.version))?;
    write_how(&findings.header, out)?;
    let others = match merged.not_recorded {
        0 => String::new(),
        count => format!("; {} not recorded (index.json tells why)", counted(count, "program")),
    };
    writeln!(
        out,
        "Recorded {} from the first beginning to the last end{others}",
        duration(run_duration(findings))
    )?;
    if let Some(line) = sampling_text(findings) {
        writeln!(out, "{line}")?;
    }
    if let Some(line) = native_text(findings) {
        writeln!(out, "{line}")?;
    }
    for warning in warnings(findings) {
        writeln!(out, "warning: {warning}")?;
    }
    let mut processes: Vec<&MergedProcess> = merged.processes.iter().collect();
    processes.sort_by(|a, b| b.shown.compare(&a.shown).then(a.pid.cmp(&b.pid)));
    let figures = Figures::of(findings);
    for process in processes.iter().take(LISTED) {
        let ended = process.end_reason.as_ref().map_or("not known".to_owned(), EndReason::text);
        writeln!(
            out,
            "{}  process {}, {}; ended: {}: {}",
            figures.right(&figures.bytes(&process.shown), 10),
            process.pid,
            duration(process.duration_ns),
            escaped(&ended),
            fitted(&escaped(&process.command_line.join(" ")), COMMAND)
        )?;
    }
    if processes.len() > LISTED {
        writeln!(out, "… and {} more (--json has all)", number((processes.len() - LISTED) as u64))?;
    }
    Ok(())
}

/// What is wrong with the captures.
pub(super) fn merged_warnings(merged: &Merged) -> Vec<String> {
    let mut told = Vec::new();
    let mut faulty = 0;
    for process in &merged.processes {
        let faults = file_warnings(process.cut.as_ref(), &process.damage);
        faulty += usize::from(!faults.is_empty());
        if faulty <= FAULTY {
            told.extend(faults.into_iter().map(|fault| format!("process {}: {fault}", process.pid)));
        }
    }
    if faulty > FAULTY {
        told.push(format!("{} more are cut or damaged", counted((faulty - FAULTY) as u64, "capture")));
    }
    told
}
