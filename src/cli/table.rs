//! `heaptap table`.

use super::view::{ViewArgs, print};
use crate::error::Error;
use crate::report::Table;

const EXAMPLES: &str = "\
Examples:
  heaptap table app.heaptap
  heaptap table --leaks --max-rows 0 app.heaptap
  heaptap table --json app.heaptap | jq '.allocations[] | select(.allocator == \"mmap\")'";

/// Memory per allocation site: the line that asked for it, on which thread, from which allocator.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    #[command(flatten)]
    view: ViewArgs,

    /// Show so many sites at most; 0 for all. [default: 40, all with --json]
    #[arg(long, value_name = "N")]
    max_rows: Option<usize>,

    /// Write one JSON document (docs/reports.md tells its fields).
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(super) fn run(self) -> Result<(), Error> {
        let max_rows = self.max_rows.unwrap_or(if self.json { 0 } else { 40 });
        print(&Table { max_rows }, &self.view.findings()?, self.json)
    }
}
