//! `heaptap diff`.

use super::pattern::FilterArgs;
use super::view::to_stdout;
use super::when::parse_when;
use crate::analysis::{DiffOptions, Grouping, Outline, When, diff};
use crate::error::Error;
use crate::report::{DiffFormat, DiffReport};
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  heaptap diff app.heaptap                             what grew since recording began
  heaptap diff --from 10:00 --to 11:30 app.heaptap     times of day in UTC
  heaptap diff --from first --to last --by function --cumulative app.heaptap
  heaptap diff --from +30m --exclude 'module=<stdlib>' app.heaptap
  heaptap diff before.heaptap after.heaptap --csv > growth.csv
  heaptap diff --json app.heaptap | jq '.rows[0]'";

/// What grew between two moments of a recording, or of two.
///
/// Captures may hold snapshots, or every event: then what was live at a moment is found by replaying them.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// The capture, as written by `heaptap attach`.
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
        if let Some(path) =
            [Some(&self.capture), self.other.as_ref()].into_iter().flatten().find(|p| p.is_dir())
        {
            return Err(Error::FolderOfProcesses { path: path.clone(), verb: "diff" });
        }
        let first = Outline::read(&self.capture)?;
        let second = self.other.as_deref().map(Outline::read).transpose()?;
        let new = second.as_ref().unwrap_or(&first);
        let old = second.as_ref().map(|_| &first);
        let usual = if old.is_some() { When::Last } else { When::Start };
        let from = first.find(self.from.unwrap_or(usual))?;
        let to = new.find(self.to)?;
        if old.is_none() && from.time_ns > to.time_ns {
            let seconds = |ns: u64| ns as f64 / 1e9;
            return Err(Error::MomentsReversed { from_s: seconds(from.time_ns), to_s: seconds(to.time_ns) });
        }
        let options = DiffOptions { grouping, cumulative: self.cumulative, filter: self.filter.filter() };
        let diff = diff(old.map(|old| (old, from)), from, (new, to), &options)?;
        let format = match (self.json, self.csv) {
            (true, _) => DiffFormat::Json,
            (_, true) => DiffFormat::Csv,
            _ => DiffFormat::Text,
        };
        let max_rows = self.max_rows.unwrap_or(if format == DiffFormat::Text { 40 } else { 0 });
        let report =
            DiffReport { diff: &diff, grouping, cumulative: self.cumulative, old, from, new, to, max_rows };
        to_stdout(|out, width| Ok(report.write(format, width, out)?))
    }
}
