//! `heaptap leaks`.

use super::pattern::FilterArgs;
use super::view::to_stdout;
use crate::analysis::{Outline, leaks};
use crate::error::Error;
use crate::report::LeaksReport;
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  heaptap leaks app.heaptap
  heaptap leaks --exclude 'module=<stdlib>' app.heaptap
  heaptap leaks --json app.heaptap | jq '.sites[] | select(.verdict == \"leak\")'";

/// A verdict per allocation site: does it leak, warm up, work in batches, or is it stable?
///
/// From the snapshots of a capture, or from its events. docs/leaks.md tells how a verdict comes about, and after how many leaked
/// bytes it can be relied on.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// The capture, as written by `heaptap attach`.
    #[arg(value_name = "CAPTURE")]
    capture: PathBuf,

    #[command(flatten)]
    filter: FilterArgs,

    /// Show so many sites at most; 0 for all. [default: 20, all with --json]
    #[arg(long, value_name = "N")]
    max_rows: Option<usize>,

    /// Write one JSON document (docs/reports.md tells its fields).
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(super) fn run(self) -> Result<(), Error> {
        let outline = Outline::read(&self.capture)?;
        let leaks = leaks(&outline, self.filter.filter())?;
        let max_rows = self.max_rows.unwrap_or(if self.json { 0 } else { 20 });
        let report = LeaksReport { leaks: &leaks, outline: &outline, max_rows };
        to_stdout(|out, _| Ok(report.write(self.json, out)?))
    }
}
