//! `heaptap summary`.

use super::view::{ViewArgs, print};
use crate::error::Error;
use crate::report::{Summary, SummaryOrder};

const EXAMPLES: &str = "\
Examples:
  heaptap summary app.heaptap
  heaptap summary --leaks --sort own app.heaptap
  heaptap summary --json app.heaptap | jq '.functions[0]'";

/// Memory per function: its own, and with everything it called.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    #[command(flatten)]
    view: ViewArgs,

    /// What to order the functions by.
    #[arg(long, value_enum, default_value = "total")]
    sort: Sort,

    /// Show so many functions at most; 0 for all. [default: 40, all with --json]
    #[arg(long, value_name = "N")]
    max_rows: Option<usize>,

    /// Write one JSON document (docs/reports.md tells its fields).
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Sort {
    /// Bytes of the function and all it called
    Total,
    /// Bytes of the function itself
    Own,
    /// Allocations of the function itself
    Allocations,
}

impl Args {
    pub(super) fn run(self) -> Result<(), Error> {
        let order = match self.sort {
            Sort::Total => SummaryOrder::Total,
            Sort::Own => SummaryOrder::Own,
            Sort::Allocations => SummaryOrder::Allocations,
        };
        let max_rows = self.max_rows.unwrap_or(if self.json { 0 } else { 40 });
        print(&Summary { order, max_rows }, &self.view.findings()?, self.json)
    }
}
