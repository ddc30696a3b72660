//! `heaptap attach` for more than one process: which they are, and what is told of them.

use super::attach::AttachArgs;
use super::attach_worker;
use super::view::to_stdout;
use crate::capture::{IndexEntry, NotRecorded, NotRecordedKind};
use crate::error::Error;
use crate::report::ReportError;
use crate::report::text::{counted, duration, escaped, fitted, size as bytes};
use crate::tree::TreeSummary;
use crate::tree::select::{by_cgroup, by_name};
use crate::tree::supervisor::{Task, TreeObserver, TreeOptions, record_tree};
use crate::tree::told::Ended;
use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;

/// Characters of a command line.
const COMMAND: usize = 60;
/// Processes of no interest that are told of one by one.
const TOLD_ONE_BY_ONE: usize = 10;

/// Which processes, where not one.
#[derive(Debug, clap::Args)]
pub struct SeveralArgs {
    /// Record the Python processes whose command line, as ps shows it, contains this text or matches this regular expression
    #[arg(long, value_name = "PATTERN")]
    name_match: Option<String>,
    /// Record the Python processes of this cgroup and those below it: a path as in /proc/PID/cgroup or in /sys/fs/cgroup
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,
    /// Record the process's descendants too: one capture each, in a folder
    #[arg(long)]
    children: bool,
    /// Record the children too that are born while recording, and the programs that are executed: one capture each, in a folder
    #[arg(long)]
    follow_forks: bool,
    /// Record so many processes at once; others wait for their turn
    #[arg(long, value_name = "N", default_value = "64", value_parser = clap::value_parser!(u32).range(1..=4096))]
    max_processes: u32,
}

/// What was asked for.
pub(super) struct Targets {
    pids: Vec<i32>,
    words: String,
    tree: bool,
}

impl SeveralArgs {
    /// Looks for the processes.
    pub(super) fn targets(&self, pid: Option<i32>) -> Result<Targets, Error> {
        let (pids, mut words) = match (pid, &self.name_match, &self.cgroup) {
            (Some(pid), ..) => (vec![pid], format!("process {pid}")),
            (_, Some(pattern), _) => (by_name(pattern)?, format!("processes named '{pattern}'")),
            (_, _, Some(path)) => (by_cgroup(path)?, format!("processes of cgroup {}", path.display())),
            // clap demands one of them.
            (None, None, None) => (Vec::new(), String::new()),
        };
        words.push_str(match (self.children, self.follow_forks) {
            (true, true) => ", their descendants and those born later",
            (true, false) => " and their descendants",
            (false, true) => " and descendants born later",
            (false, false) => "",
        });
        Ok(Targets { tree: self.children || self.follow_forks, pids, words })
    }
}

impl Targets {
    /// The one process to record into a file.
    pub(super) fn only(&self) -> Option<i32> {
        match self.pids[..] {
            [pid] if !self.tree => Some(pid),
            _ => None,
        }
    }
}

/// Records them all into a folder.
pub(super) fn run(args: &AttachArgs, targets: Targets) -> Result<(), Error> {
    let first = targets.pids.first().copied().unwrap_or_default();
    let folder = args.output.clone().unwrap_or_else(|| PathBuf::from(format!("heaptap-{first}")));
    let options = TreeOptions {
        roots: targets.pids,
        selected: targets.words,
        children: args.several.children,
        follow_forks: args.several.follow_forks,
        max_processes: args.several.max_processes as usize,
        folder,
        force: args.force,
        duration: args.duration,
    };
    let summary = record_tree(&options, &mut Console::default())?;
    to_stdout(|out, _| Ok(print_summary(&summary, &options, out).map_err(ReportError::from)?))?;
    match summary.failed {
        0 => Ok(()),
        failed => {
            let message =
                format!("{} of {} ended by an error", failed, counted(summary.recorded as u64, "recording"));
            Err(Error::RecordingFailed { message, capture: options.folder })
        }
    }
}

/// One line for each that happens to a process.
#[derive(Default)]
struct Console {
    of_no_interest: usize,
}

impl TreeObserver for Console {
    fn arguments(&self, task: &Task) -> Vec<OsString> {
        attach_worker::arguments(task)
    }

    fn recording(&mut self, entry: &IndexEntry, python: &str) {
        say(&format!("recording process {}: CPython {python}: {}", entry.pid, command(entry)));
    }

    fn ended(&mut self, entry: &IndexEntry, ended: &Ended) {
        let Ended { duration_ns, allocations, frees, drops, peak_live_bytes, live_bytes, file_bytes, .. } =
            *ended;
        say(&format!(
            "recorded process {} for {}; ended: {}; {}, {}, {}; peak {} live, {} not freed; {} ({})",
            entry.pid,
            duration(duration_ns),
            escaped(&ended.reason.text()),
            counted(allocations, "allocation"),
            counted(frees, "free"),
            counted(drops, "drop"),
            bytes(peak_live_bytes),
            bytes(live_bytes),
            entry.capture.as_deref().unwrap_or_default(),
            bytes(file_bytes)
        ));
        for why in &ended.left {
            say(&format!(
                "  something was left in process {0}, because {1}; `heaptap detach --pid {0}` removes it later",
                entry.pid,
                escaped(why)
            ));
        }
    }

    fn not_recorded(&mut self, entry: &IndexEntry, why: &NotRecorded) {
        if matches!(why.kind, NotRecordedKind::NotPython | NotRecordedKind::Ended) {
            self.of_no_interest += 1;
            if self.of_no_interest > TOLD_ONE_BY_ONE {
                return;
            }
        }
        say(&format!("not recorded: process {} ({}): {}", entry.pid, command(entry), escaped(&why.why)));
        if self.of_no_interest == TOLD_ONE_BY_ONE {
            say("others that run no Python, or end at once, are told of in index.json alone");
        }
    }
}

fn command(entry: &IndexEntry) -> String {
    fitted(&escaped(&entry.command()), COMMAND).into_owned()
}

/// That nobody reads it is no reason to end.
fn say(line: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn print_summary(summary: &TreeSummary, options: &TreeOptions, out: &mut dyn Write) -> io::Result<()> {
    let totals = &summary.totals;
    writeln!(
        out,
        "recorded {} in {}; ended: {}",
        counted(summary.recorded as u64, "program"),
        duration(summary.elapsed.as_nanos() as u64),
        escaped(&summary.ended)
    )?;
    writeln!(
        out,
        "  {}, {}, {}; {} in {} not freed by the end",
        counted(totals.allocations, "allocation"),
        counted(totals.frees, "free"),
        counted(totals.drops, "drop"),
        bytes(totals.live_bytes),
        counted(totals.live_blocks, "block")
    )?;
    if summary.not_recorded > 0 {
        writeln!(
            out,
            "  {} not recorded: index.json tells why",
            counted(summary.not_recorded as u64, "program")
        )?;
    }
    let folder = options.folder.to_string_lossy();
    writeln!(out, "wrote {} ({})", escaped(&folder), bytes(totals.file_bytes))
}
