//! `heaptap tree`.

use super::view::{ViewArgs, print};
use crate::error::Error;
use crate::report::Tree;

const EXAMPLES: &str = "\
Examples:
  heaptap tree app.heaptap
  heaptap tree --leaks --max-stacks 30 --all-frames app.heaptap
  heaptap tree --json app.heaptap | jq '.nodes | length'";

/// Callers and callees of the stacks that have most memory.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    #[command(flatten)]
    view: ViewArgs,

    /// Show the so many biggest stacks; 0 for all. [default: 10, all with --json]
    #[arg(long, value_name = "N")]
    max_stacks: Option<usize>,

    /// Leave out no frames of long runs that only call the next.
    #[arg(long)]
    all_frames: bool,

    /// Write one JSON document (docs/reports.md tells its fields).
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(super) fn run(self) -> Result<(), Error> {
        let max_stacks = self.max_stacks.unwrap_or(if self.json { 0 } else { 10 });
        print(&Tree { max_stacks, all_frames: self.all_frames }, &self.view.findings()?, self.json)
    }
}
