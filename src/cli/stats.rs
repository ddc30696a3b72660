//! `heaptap stats`.

use super::view::{ViewArgs, print};
use crate::error::Error;
use crate::report::Stats;

const EXAMPLES: &str = "\
Examples:
  heaptap stats app.heaptap
  heaptap stats --top 20 app.heaptap
  heaptap stats --json app.heaptap | jq .peak_bytes";

/// Totals of the whole recording: sizes, allocators, where most was allocated, peak.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    #[command(flatten)]
    view: ViewArgs,

    /// Show the so many biggest locations; 0 for all.
    #[arg(long, value_name = "N", default_value_t = 5)]
    top: usize,

    /// Write one JSON document (docs/reports.md tells its fields).
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(super) fn run(self) -> Result<(), Error> {
        print(&Stats { max_rows: self.top }, &self.view.findings()?, self.json)
    }
}
