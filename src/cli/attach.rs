//! `heaptap attach`: records a running process.

use super::attach_tree::{self, SeveralArgs};
use super::attach_worker::{self, WorkerArgs};
use super::parse::{parse_duration, parse_percent, parse_pid, parse_size};
use super::view::to_stdout;
use super::{events, log};
use crate::capture::{Counters, Keep};
use crate::error::Error;
use crate::recorder::examine::Examined;
use crate::recorder::plant::JumpOptions;
use crate::recorder::record::{Observer, Progress, RecordOptions, Summary, record};
use crate::recorder::snapshots::SnapshotOptions;
use crate::report::ReportError;
use crate::report::text::{counted, duration, escaped as printable, number as count, size as bytes};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Where nobody watches a terminal, a line of progress this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Record where a running process allocates memory
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  Record for half a minute, then look at what was live at the peak:
    heaptap attach --pid 1234 --duration 30s -o server.heaptap
    heaptap summary server.heaptap
  Record until Ctrl-C, with every object that CPython's own allocators hand out:
    heaptap attach --pid 1234 --python-allocators
  Record every single allocation and free of ten seconds:
    heaptap attach --pid 1234 --exact --duration 10s
  Watch a server for days: a snapshot of what is live each minute, in a file that stays below 200 MiB:
    heaptap attach --pid 1234 --snapshot-every 60s -o server.heaptap
    heaptap snapshot --pid 1234     (one more, now)
  Record a server with its workers, those that it starts later too; one report over all:
    heaptap attach --pid 1234 --children --follow-forks -o shop/
    heaptap tree --leaks shop/
  Record whatever is called so:
    heaptap attach --name-match 'gunicorn: worker' --duration 1m
  Can it be attached to? (writes nothing into it)
    heaptap doctor --pid 1234

By default one allocation is sampled in 512 KiB on average, which costs the target next to nothing; reports \
show estimates with their error. --exact records every allocation and every free. The target goes on \
undisturbed afterwards, also when heaptap is killed.")]
#[command(group(clap::ArgGroup::new("target").required(true).args(["pid", "name_match", "cgroup"])))]
pub struct AttachArgs {
    /// The process to record
    #[arg(long, short, value_name = "PID", value_parser = parse_pid, allow_negative_numbers = true)]
    pub pid: Option<i32>,
    #[command(flatten)]
    pub several: SeveralArgs,
    /// The capture to write [default: heaptap-PID.heaptap]; of several processes, the folder [default: heaptap-PID]
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Stop after this time, such as 30s, 5m or 1h (default: until Ctrl-C or the target's end)
    #[arg(long, short, value_name = "TIME", value_parser = parse_duration)]
    pub duration: Option<Duration>,
    /// Write over an existing capture, or into a folder that has something in it
    #[arg(long, short)]
    pub force: bool,
    /// Record CPython's object, mem and raw allocators too, not only those of libc
    #[arg(long)]
    pub python_allocators: bool,
    /// Record the frames of C, C++ and Rust too, not only Python's
    #[arg(long)]
    pub native: bool,
    /// Write the names of native frames into the capture at the end, so that reports need no binaries
    #[arg(long, value_name = "BOOL", default_value_t = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[arg(action = clap::ArgAction::Set)]
    pub bundle_symbols: bool,
    /// Record every allocation and free, not a sample
    #[arg(long)]
    pub exact: bool,
    /// Bytes between samples, on average
    #[arg(long, value_name = "SIZE", default_value = "512KiB", value_parser = parse_size)]
    #[arg(conflicts_with = "exact")]
    pub sample: u64,
    /// Seed of the sampling: the same seed samples the same allocations of the same thread [default: random]
    #[arg(long, value_name = "NUMBER", conflicts_with = "exact")]
    pub seed: Option<u64>,
    /// Sample less when recording takes more of a processor's time in the target than this
    #[arg(long, value_name = "PERCENT", default_value = "2", value_parser = parse_percent)]
    #[arg(conflicts_with = "exact")]
    pub max_cpu: f64,
    /// How long one event may wait for heaptap to keep up before it is dropped and counted (with --exact)
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = parse_duration)]
    pub max_wait: Duration,
    /// The kind of breakpoint
    #[arg(long, value_name = "KIND", default_value = "jump")]
    pub breakpoints: Kind,
    /// With --breakpoints trap: record even where the target uses SIGTRAP itself; it dies should heaptap be killed
    #[arg(long)]
    pub unsafe_trap: bool,
    #[command(flatten)]
    snapshots: SnapshotArgs,
    /// Print no progress
    #[arg(long, short)]
    pub quiet: bool,
    #[command(flatten)]
    worker: WorkerArgs,
}

/// Any of these makes a capture of snapshots: what was live at some moments, not every event.
#[derive(Debug, Args)]
#[command(
    next_help_heading = "Snapshots (any of these records what is live at some moments in place of every event)"
)]
struct SnapshotArgs {
    /// Take a snapshot of what is live this often; others at the start, at the end, on SIGUSR1 and by `heaptap snapshot`
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    snapshot_every: Option<Duration>,
    /// Keep so many snapshots: of each older hour fewer [default: 100]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(3..=100_000))]
    keep: Option<u32>,
    /// Keep the capture below this size: by fewer snapshots, then by summing up small sites [default: 200MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_file_size)]
    max_file: Option<u64>,
    /// Take a snapshot when more is live than at any before (by 5 %, and 10 s after the last such)
    #[arg(long)]
    at_peak: bool,
    /// Take a snapshot when the target's resident set grows beyond this
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    at_rss: Option<u64>,
    /// Log every recorded event beside the snapshots, while there is room
    #[arg(long)]
    events: bool,
}

impl SnapshotArgs {
    fn options(&self) -> Option<SnapshotOptions> {
        let Self { snapshot_every, keep, max_file, at_peak, at_rss, events } = *self;
        let is_asked = snapshot_every.is_some() || keep.is_some() || max_file.is_some() || at_rss.is_some();
        (is_asked || at_peak || events).then(|| SnapshotOptions {
            every: snapshot_every,
            keep: Keep { snapshots: keep.unwrap_or(100) as usize, max_bytes: max_file.unwrap_or(200 << 20) },
            at_peak,
            at_rss,
            events,
        })
    }
}

/// Below this not even header and three snapshots of any use would fit.
fn parse_file_size(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        size if size < 4 << 20 => Err("a capture with snapshots takes 4MiB at least".into()),
        size => Ok(size),
    }
}

/// Kinds of breakpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// A jump to an agent in the target, which records without stopping it
    Jump,
    /// An int3 and a stop of the thread at every call: always exact, 20 to 150 µs each
    Trap,
}

impl From<Kind> for crate::recorder::examine::Kind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Jump => Self::Jump,
            Kind::Trap => Self::Trap,
        }
    }
}

impl AttachArgs {
    fn jump(&self) -> Option<JumpOptions> {
        (self.breakpoints == Kind::Jump).then(|| JumpOptions {
            exact: self.exact,
            sample: self.sample,
            seed: self.seed.unwrap_or_else(random_seed),
            max_wait: self.max_wait,
            max_cpu: (!self.exact).then_some(self.max_cpu),
        })
    }
}

/// Different at each run: nothing secret hangs on it.
pub(super) fn random_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id())
}

impl AttachArgs {
    /// How to record one process.
    pub(super) fn options(&self, pid: i32, output: PathBuf, duration: Option<Duration>) -> RecordOptions {
        RecordOptions {
            pid,
            output,
            force: self.force,
            duration,
            python_allocators: self.python_allocators,
            native: self.native,
            bundle_symbols: self.bundle_symbols,
            unsafe_trap: self.unsafe_trap,
            jump: self.jump(),
            snapshots: self.snapshots.options(),
        }
    }
}

/// Runs the verb.
pub fn run(args: &AttachArgs) -> Result<(), Error> {
    if let Some(task) = args.worker.task() {
        return attach_worker::run(args, &task);
    }
    let targets = args.several.targets(args.pid)?;
    match targets.only() {
        Some(pid) => record_one(args, pid),
        None => attach_tree::run(args, targets),
    }
}

fn record_one(args: &AttachArgs, pid: i32) -> Result<(), Error> {
    let output = args.output.clone().unwrap_or_else(|| PathBuf::from(format!("heaptap-{pid}.heaptap")));
    let options = args.options(pid, output, args.duration);
    let mut console = Console::new(&options, args.quiet);
    let summary = record(&options, &mut console)?;
    console.finish();
    if log::is_json() {
        events::ended(&summary, &options);
    } else {
        // The capture is written. Where nobody listens any more (a terminal that has gone) there is nobody to complain to.
        let told = to_stdout(|out, _| Ok(print_summary(&summary, &options, out).map_err(ReportError::from)?));
        if let Err(error) = told
            && !error.is_broken_pipe()
        {
            tracing::warn!("the summary of the recording could not be printed: {error}");
        }
    }
    match summary.failed {
        Some(message) => Err(Error::RecordingFailed { message, capture: options.output }),
        None => Ok(()),
    }
}

/// Tells the user how it goes: a line that is drawn anew on a terminal, now and then a line elsewhere.
pub(super) struct Console {
    bar: ProgressBar,
    line_due: Option<Instant>,
    /// Which breakpoints, and whether all events are recorded.
    how: String,
    target: String,
    pid: i32,
}

impl Console {
    pub(super) fn new(options: &RecordOptions, quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal() && !log::is_json();
        let bar = if quiet || !terminal { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
        if let Ok(style) = ProgressStyle::with_template("{msg}") {
            bar.set_style(style);
        }
        let line_due = (!quiet && !terminal).then(|| Instant::now() + LINE_EVERY);
        let mut how = match &options.jump {
            None => "trap breakpoints".into(),
            Some(jump) if jump.exact => "jump breakpoints, every event".into(),
            Some(jump) => format!("jump breakpoints, one sample in {}", bytes(jump.sample)),
        };
        if options.native {
            how.push_str(", native stacks");
        }
        let target = printable(&options.output.to_string_lossy()).into_owned();
        Self { bar, line_due, how, target, pid: options.pid }
    }

    /// Takes the line of progress away.
    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Observer for Console {
    fn recording(&mut self, examined: &Examined) {
        if log::is_json() {
            return events::recording(examined, &self.how, &self.target);
        }
        let breakpoints = examined.plan.entries.len() + examined.plan.words.len();
        // Scripts wait for this line. One that has closed the pipe wants the capture all the same, and the
        // target holds our breakpoints now: that nobody listens is no reason to end.
        let mut out = io::stdout().lock();
        let _ = writeln!(
            out,
            "recording process {}: CPython {}, {}, {breakpoints} {}, into {}",
            examined.pid,
            examined.python.version,
            examined.libc_name(),
            self.how,
            self.target
        )
        .and_then(|()| out.flush());
        if examined.stopped {
            let pid = examined.pid;
            let _ = writeln!(
                io::stderr(),
                "process {pid} is stopped: it allocates nothing until `kill -CONT {pid}`"
            );
        }
    }

    fn progress(&mut self, progress: Progress) {
        let line = || {
            format!(
                "{}  {} events  {} live  {} written  {} dropped",
                duration(progress.elapsed.as_nanos() as u64),
                count(progress.counters.events),
                bytes(progress.live_bytes),
                bytes(progress.file_bytes),
                count(progress.counters.drops)
            )
        };
        if !self.bar.is_hidden() {
            self.bar.set_message(line());
            self.bar.tick();
        }
        if self.line_due.is_some_and(|due| Instant::now() >= due) {
            if log::is_json() {
                events::progress(&progress, self.pid);
            } else {
                let _ = writeln!(io::stderr(), "{}", line());
            }
            self.line_due = Some(Instant::now() + LINE_EVERY);
        }
    }
}

fn print_summary(summary: &Summary, options: &RecordOptions, out: &mut dyn Write) -> io::Result<()> {
    let c = &summary.counters;
    writeln!(out, "recorded process {} for {}", options.pid, duration(summary.elapsed.as_nanos() as u64))?;
    writeln!(out, "  {}", counts(c))?;
    writeln!(
        out,
        "  peak {} live; {} in {} not freed by the end",
        bytes(c.peak_live_bytes),
        bytes(c.live_bytes),
        counted(c.live_blocks, "block")
    )?;
    if let Some((taken, kept)) = summary.snapshots {
        writeln!(out, "  {}, {} of them kept", counted(u64::from(taken), "snapshot"), count(kept as u64))?;
    }
    if options.native {
        let (stacks, cut) = (counted(c.native_stacks, "native stack"), count(c.native_cut));
        writeln!(out, "  {stacks}, {cut} of them cut short")?;
    }
    // 0 is what nobody could measure.
    let extra = match c.target_extra_bytes {
        0 => String::new(),
        extra => format!("; the target had {} more", bytes(extra)),
    };
    writeln!(out, "  heaptap had at most {} resident{extra}", bytes(c.controller_peak_bytes))?;
    if summary.unreadable_stacks > 0 {
        let stacks = counted(summary.unreadable_stacks, "Python stack");
        writeln!(out, "  {stacks} could not be read: shown as none")?;
    }
    if summary.tally.missed_frees > 0 {
        writeln!(out, "  {} not seen", counted(summary.tally.missed_frees, "free"))?;
    }
    for why in &summary.left.why {
        writeln!(out, "  left in the target: {} of thunks, because {why}", bytes(thunk_bytes(summary)))?;
    }
    if !summary.left.why.is_empty() {
        writeln!(out, "  they do nothing; `heaptap detach --pid {}` removes them later", options.pid)?;
    }
    let path = options.output.to_string_lossy();
    writeln!(
        out,
        "wrote {} ({}); ended: {}",
        printable(&path),
        bytes(summary.file_bytes),
        printable(&summary.reason.text())
    )
}

/// What was recorded. Samples are not all there was, nor are the frees that are seen with them.
fn counts(c: &Counters) -> String {
    let drops = counted(c.drops, "drop");
    if c.samples == 0 {
        let (given, back) = (counted(c.allocations, "allocation"), counted(c.frees, "free"));
        return format!(
            "{given}, {back}, {} of blocks from before, {drops}",
            counted(c.frees_from_before, "free")
        );
    }
    let mappings = counted(c.allocations.saturating_sub(c.samples), "mapping");
    format!(
        "{} and {mappings}, {} of samples, {drops}",
        counted(c.samples, "sample"),
        counted(c.frees, "free")
    )
}

fn thunk_bytes(summary: &Summary) -> u64 {
    (summary.left.regions.len() * crate::probe::region::REGION_LEN) as u64
}
