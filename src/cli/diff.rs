//! `heaptap diff`.

use super::frames::FrameArgs;
use super::pattern::FilterArgs;
use super::view::to_stdout;
use super::when::parse_when;
use crate::analysis::{Diff, DiffOptions, Family, Grouping, Moment, Outline, When, diff};
use crate::capture::{CaptureError, Index, ReadOptions};
use crate::error::Error;
use crate::report::{DiffFormat, DiffReport};
use std::path::{Path, PathBuf};

const EXAMPLES: &str = "\
Examples:
  heaptap diff app.heaptap                             what grew since recording began
  heaptap diff --from 10:00 --to 11:30 app.heaptap     times of day in UTC
  heaptap diff --from first --to last --by function --cumulative app.heaptap
  heaptap diff --from +30m --exclude 'module=<stdlib>' app.heaptap
  heaptap diff --from 10:00 --to 11:30 shop/           all workers together
  heaptap diff before.heaptap after.heaptap --csv > growth.csv
  heaptap diff --json app.heaptap | jq '.rows[0]'";

/// What grew between two moments of a recording, or of two.
///
/// Captures may hold snapshots, or every event: then what was live at a moment is found by replaying them.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// The capture, or the folder of captures, as written by `heaptap attach`.
    #[arg(value_name = "CAPTURE")]
    capture: PathBuf,

    /// Another one to compare it with: what grew from CAPTURE to OTHER, by the names of the code.
    #[arg(value_name = "OTHER")]
    other: Option<PathBuf>,

    /// The first moment: start, first, last, a snapshot's number, +30m, -5m, 10:00 or 2026-11-21T10:00:00Z (UTC).
    /// [default: start; of two captures the end of the first]
    #[arg(long, value_name = "WHEN", value_parser = parse_when, allow_hyphen_values = true)]
    from: Option<When>,

    /// The second moment.
    #[arg(long, value_name = "WHEN", value_parser = parse_when, allow_hyphen_values = true, default_value = "last")]
    to: When,

    /// What a row is.
    #[arg(long, value_enum, default_value = "lineno")]
    by: By,

    /// Count an allocation for every frame of its stack, not only for the innermost.
    #[arg(long)]
    cumulative: bool,

    #[command(flatten)]
    filter: FilterArgs,

    #[command(flatten)]
    frames: FrameArgs,

    /// Show so many rows at most; 0 for all. [default: 40, all with --json or --csv]
    #[arg(long, value_name = "N")]
    max_rows: Option<usize>,

    /// Write one JSON document (docs/reports.md tells its fields).
    #[arg(long, conflicts_with = "csv")]
    json: bool,

    /// Write comma-separated values, with a heading.
    #[arg(long)]
    csv: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum By {
    /// The line that allocated
    Lineno,
    /// Its file
    Filename,
    /// Its function
    Function,
    /// The whole stack
    Traceback,
    /// The installed package, the standard library or the application
    Module,
    /// The function that gave the memory
    Allocator,
    /// The thread's name
    Thread,
}

impl From<By> for Grouping {
    fn from(by: By) -> Self {
        match by {
            By::Lineno => Self::Lineno,
            By::Filename => Self::Filename,
            By::Function => Self::Function,
            By::Traceback => Self::Traceback,
            By::Module => Self::Module,
            By::Allocator => Self::Allocator,
            By::Thread => Self::Thread,
        }
    }
}

impl Args {
    pub(super) fn run(self) -> Result<(), Error> {
        let grouping = Grouping::from(self.by);
        if self.cumulative && !grouping.is_by_frame() {
            return Err(Error::Usage("--cumulative goes with --by lineno, filename, function or module"));
        }
        if self.capture.is_dir() || self.other.as_ref().is_some_and(|other| other.is_dir()) {
            return self.of_families(grouping);
        }
        let read_options = self.frames.read_options();
        let read = |path: &Path| Outline::read(path, &read_options);
        let first = read(&self.capture)?;
        let second = self.other.as_deref().map(read).transpose()?;
        let new = second.as_ref().unwrap_or(&first);
        let old = second.as_ref().map(|_| &first);
        let (from, to) = self.moments(old, new)?;
        let diff = diff(old.map(|old| (old, from)), from, (new, to), &self.options(grouping))?;
        self.print(&diff, grouping, (old, from), (new, to))
    }

    /// Folders of captures, each of whose processes counts as it was at the moment; a capture beside a folder is a family of one.
    fn of_families(&self, grouping: Grouping) -> Result<(), Error> {
        let read_options = self.frames.read_options();
        let read = |path: &Path| family(path, &read_options);
        let first = read(&self.capture)?;
        let second = self.other.as_deref().map(read).transpose()?;
        let new = second.as_ref().unwrap_or(&first);
        let old = second.as_ref().map(|_| &first);
        let (from, to) = self.moments(old.map(Family::whole), new.whole())?;
        let diff = new.diff(old, from, to, &self.options(grouping))?;
        self.print(&diff, grouping, (old.map(Family::whole), from), (new.whole(), to))
    }

    /// From when to when. `old` is another recording than `new`, if there is one.
    fn moments(&self, old: Option<&Outline>, new: &Outline) -> Result<(Moment, Moment), Error> {
        let usual = if old.is_some() { When::Last } else { When::Start };
        let from = old.unwrap_or(new).find(self.from.unwrap_or(usual))?;
        let to = new.find(self.to)?;
        in_order(old.is_some(), from, to)?;
        Ok((from, to))
    }

    fn options(&self, grouping: Grouping) -> DiffOptions {
        DiffOptions { grouping, cumulative: self.cumulative, filter: self.filter.filter() }
    }

    fn print(
        &self,
        diff: &Diff,
        grouping: Grouping,
        (old, from): (Option<&Outline>, Moment),
        (new, to): (&Outline, Moment),
    ) -> Result<(), Error> {
        let format = match (self.json, self.csv) {
            (true, _) => DiffFormat::Json,
            (_, true) => DiffFormat::Csv,
            _ => DiffFormat::Text,
        };
        let max_rows = self.max_rows.unwrap_or(if format == DiffFormat::Text { 40 } else { 0 });
        let cumulative = self.cumulative;
        let report = DiffReport { diff, grouping, cumulative, old, from, new, to, max_rows };
        to_stdout(|out, width| Ok(report.write(format, width, out)?))
    }
}

/// Of one recording, the second moment is not before the first.
fn in_order(are_two: bool, from: Moment, to: Moment) -> Result<(), Error> {
    if are_two || from.time_ns <= to.time_ns {
        return Ok(());
    }
    let seconds = |ns: u64| ns as f64 / 1e9;
    Err(Error::MomentsReversed { from_s: seconds(from.time_ns), to_s: seconds(to.time_ns) })
}

/// The captures of a folder, or one.
fn family(path: &Path, options: &ReadOptions) -> Result<Family, Error> {
    let left_out = |error: CaptureError| tracing::warn!("{error}; it is left out");
    let family = if path.is_dir() {
        let index = Index::read(path)?;
        let captures: Vec<PathBuf> = index.captures(path).map(|(capture, _)| capture).collect();
        Family::read((path, options), captures.into_iter(), index.not_recorded(), left_out)?
    } else {
        // That it can't be read is no reason to leave it out.
        Outline::read(path, options)?;
        Family::read((path, options), std::iter::once(path.to_owned()), 0, left_out)?
    };
    family.ok_or_else(|| Error::EmptyFolder { path: path.to_owned() })
}
