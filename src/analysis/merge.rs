//! [`Merge`]: what several captures say, as one: stacks and threads united by their names, or kept apart by process.
//!
//! One capture's findings are in memory at a time, beside the sums: memory is bounded by distinct stacks, sites and threads of
//! all, and by the number of captures. A sum of high-water marks is no high-water mark of the whole: each process had its own
//! at its own time. Names are compared as text; nothing is known of how captures belong together.

use super::replay::{Findings, Missing, Samples, View};
use super::site::sorted;
use super::statistics::Statistics;
use crate::capture::{
    CaptureError, CutShort, Damage, EndReason, Header, Site, StackId, StackUnion, ThreadName, Totals, Trailer,
};
use foldhash::fast::RandomState;
use std::collections::{BTreeSet, HashMap};
use std::path::Path;

/// Characters of a command line in the name of a process.
const PROCESS_COMMAND: usize = 120;

/// What is known of each capture that was merged.
#[derive(Clone, Debug, Default)]
pub struct Merged {
    /// One for each capture, in the order in which they were added.
    pub processes: Vec<MergedProcess>,
    /// Stacks and threads were kept apart by process.
    pub split: bool,
    /// What is shown of some, or of all, is a snapshot.
    pub of_snapshots: bool,
    /// Whose a thread is, by its id in the merged findings from 1 up: pid and thread id, where threads were kept apart.
    pub threads: Vec<(u32, u32)>,
    /// Processes of the same recording that were not recorded.
    pub not_recorded: u64,
}

/// One capture.
#[derive(Clone, Debug)]
pub struct MergedProcess {
    /// The process.
    pub pid: u32,
    /// Its arguments.
    pub command_line: Vec<String>,
    /// When its recording began: wall clock, nanoseconds since 1970 UTC.
    pub start_unix_ns: u64,
    /// How long it was recorded, in nanoseconds.
    pub duration_ns: u64,
    /// How that ended; `None` if the file was cut.
    pub end_reason: Option<EndReason>,
    /// Where the file was cut.
    pub cut: Option<CutShort>,
    /// What was lost in the file's middle.
    pub damage: Damage,
    /// What the view shows of it.
    pub shown: Totals,
}

/// What threads are taken for the same by.
#[derive(PartialEq, Eq, Hash)]
enum ThreadKey {
    Name(Box<str>),
    /// The capture's number, and the thread's id in it.
    Own(usize, u32),
}

/// See the module.
pub struct Merge {
    view: View,
    stacks: StackUnion,
    thread_ids: HashMap<ThreadKey, u32, RandomState>,
    sites: HashMap<Site, Totals, RandomState>,
    versions: BTreeSet<String>,
    merged: Merged,
    /// Everything that is a sum; `None` before the first capture.
    sums: Option<Sums>,
}

/// Fields of [`Findings`] that add up.
struct Sums {
    header: Header,
    statistics: Statistics,
    missing: Missing,
    samples: Samples,
    events: u64,
    frees: u64,
    freed: Totals,
    frees_from_before: u64,
    unmaps: u64,
    peak: Totals,
    live: Totals,
    failed_allocations: u64,
    native_stacks: u64,
    native_cut: u64,
    complete: bool,
}

impl Merge {
    /// Begins with no capture. `split` keeps stacks and threads apart by process.
    pub fn new(view: View, split: bool) -> Self {
        Self {
            view,
            stacks: StackUnion::default(),
            thread_ids: HashMap::default(),
            sites: HashMap::default(),
            versions: BTreeSet::new(),
            merged: Merged { split, ..Merged::default() },
            sums: None,
        }
    }

    /// Adds what the capture at `path` says. Fails only where there are more distinct names than 32 bits number.
    pub fn add(&mut self, path: &Path, findings: &Findings) -> Result<(), CaptureError> {
        let too_many = |what| CaptureError::TooMany { path: path.to_owned(), what };
        let root = match self.merged.split {
            true => self.stacks.root(&process_name(&findings.header)).map_err(too_many)?,
            false => StackId::EMPTY,
        };
        let map = self.stacks.add(&findings.stacks, root).map_err(too_many)?;
        let mut shown = Totals::default();
        for row in &findings.sites {
            shown.add(row.totals);
            let tid = self.thread(findings, row.site.tid);
            let site = Site { stack: map.get(row.site.stack), tid, ..row.site };
            self.sites.entry(site).or_default().add(row.totals);
        }
        let sums = self.sums.get_or_insert_with(|| Sums::of(&findings.header));
        sums.add(findings);
        sums.statistics.merge(&findings.statistics, |stack| map.get(stack));
        self.merged.of_snapshots |= findings.of_snapshot.is_some();
        let python = &findings.header.python;
        self.versions.insert(format!("{} ({})", python.version, python.flavour));
        self.merged.processes.push(MergedProcess {
            pid: findings.header.pid,
            command_line: findings.header.command_line.clone(),
            start_unix_ns: findings.header.start_unix_ns,
            duration_ns: findings.trailer.as_ref().map_or(findings.last_time_ns, |t| t.duration_ns),
            end_reason: findings.trailer.as_ref().map(|trailer| trailer.reason.clone()),
            cut: findings.cut.clone(),
            damage: findings.damage.clone(),
            shown,
        });
        Ok(())
    }

    /// All that was added, beside `not_recorded` processes of the same recording; `None` if nothing was.
    pub fn finish(self, not_recorded: u64) -> Option<Findings> {
        let sums = self.sums?;
        let merged = Merged { not_recorded, ..self.merged };
        let start = merged.processes.iter().map(|p| p.start_unix_ns).min().unwrap_or_default();
        let end = merged.processes.iter().map(|p| p.start_unix_ns.saturating_add(p.duration_ns)).max();
        let duration_ns = end.unwrap_or_default().saturating_sub(start);
        let mut header = sums.header;
        header.start_unix_ns = start;
        header.python.version = self.versions.into_iter().collect::<Vec<_>>().join(", ");
        let mut trailer = Trailer { duration_ns, ..Trailer::default() };
        trailer.counters.failed_allocations = sums.failed_allocations;
        (trailer.counters.native_stacks, trailer.counters.native_cut) = (sums.native_stacks, sums.native_cut);
        Some(Findings {
            header,
            trailer: sums.complete.then_some(trailer),
            cut: None,
            damage: Damage::default(),
            stacks: self.stacks.into_table(),
            view: self.view,
            sites: sorted(self.sites.into_iter()),
            statistics: sums.statistics,
            missing: sums.missing,
            samples: sums.samples,
            events: sums.events,
            frees: sums.frees,
            freed: sums.freed,
            frees_from_before: sums.frees_from_before,
            unmaps: sums.unmaps,
            peak: sums.peak,
            // Each had its own.
            peak_time_ns: 0,
            live: sums.live,
            last_time_ns: duration_ns,
            of_snapshot: None,
            merged: Some(merged),
        })
    }

    /// The merged id of a thread of the capture that is being added.
    fn thread(&mut self, findings: &Findings, tid: u32) -> u32 {
        let name = findings.stacks.thread(tid).cloned().unwrap_or_default();
        let number = self.merged.processes.len();
        let known_as = if name.python.is_empty() { &name.os } else { &name.python };
        let key = match self.merged.split {
            true => ThreadKey::Own(number, tid),
            false => ThreadKey::Name(known_as.as_str().into()),
        };
        let next = self.thread_ids.len() as u32 + 1;
        let id = *self.thread_ids.entry(key).or_insert(next);
        if id == next {
            // Kernels name threads by program or process: what unites them is Python's name.
            let os = if name.python.is_empty() || self.merged.split { name.os } else { String::new() };
            self.stacks.name_thread(id, ThreadName { os, python: name.python });
            if self.merged.split {
                self.merged.threads.push((findings.header.pid, tid));
            }
        }
        id
    }
}

/// `process PID COMMAND`, the outermost frame of a process's stacks where they are kept apart.
fn process_name(header: &Header) -> String {
    let command: String = header.command_line.join(" ").chars().take(PROCESS_COMMAND).collect();
    format!("process {} {command}", header.pid).trim_end().to_owned()
}

impl Sums {
    fn of(header: &Header) -> Self {
        Self {
            header: header.clone(),
            statistics: Statistics::default(),
            missing: Missing::default(),
            samples: Samples::default(),
            events: 0,
            frees: 0,
            freed: Totals::default(),
            frees_from_before: 0,
            unmaps: 0,
            peak: Totals::default(),
            live: Totals::default(),
            failed_allocations: 0,
            native_stacks: 0,
            native_cut: 0,
            complete: true,
        }
    }

    fn add(&mut self, findings: &Findings) {
        let other = &findings.header;
        // Where one is of samples the whole is an estimate; where one lacks CPython's allocators the whole does.
        self.header.sampling_mean_bytes = self.header.sampling_mean_bytes.max(other.sampling_mean_bytes);
        self.header.python_allocators &= other.python_allocators;
        self.header.aggregated |= other.aggregated;
        self.header.native |= other.native;
        self.missing.add(&findings.missing);
        self.samples.add(&findings.samples);
        self.events = self.events.saturating_add(findings.events);
        self.frees = self.frees.saturating_add(findings.frees);
        self.freed.add(findings.freed);
        self.frees_from_before = self.frees_from_before.saturating_add(findings.frees_from_before);
        self.unmaps = self.unmaps.saturating_add(findings.unmaps);
        self.peak.add(findings.peak);
        self.live.add(findings.live);
        let counters = findings.trailer.as_ref().map(|trailer| trailer.counters).unwrap_or_default();
        self.failed_allocations = self.failed_allocations.saturating_add(counters.failed_allocations);
        self.native_stacks = self.native_stacks.saturating_add(counters.native_stacks);
        self.native_cut = self.native_cut.saturating_add(counters.native_cut);
        self.complete &= findings.trailer.is_some();
    }
}

#[cfg(test)]
#[path = "merge_tests.rs"]
mod tests;
