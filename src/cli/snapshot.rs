//! `heaptap snapshot`: asks the heaptap that records a process to write down what is live now.

use super::parse::parse_pid;
use super::view::to_stdout;
use crate::error::Error;
use crate::recorder::control;
use crate::report::ReportError;
use crate::report::text::{escaped, size, timestamp};

const EXAMPLES: &str = "\
Examples:
  heaptap attach --pid 1234 --snapshot-every 60s -o app.heaptap &
  heaptap snapshot --pid 1234                one more, now
  heaptap summary --leaks app.heaptap        what the last snapshot has, also while it goes on";

/// Take a snapshot now, by the `heaptap attach` that records a process with snapshots
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// The process that is recorded
    #[arg(long, short, value_name = "PID", value_parser = parse_pid, allow_negative_numbers = true)]
    pid: i32,
}

/// Runs the verb: returns once the snapshot is written.
pub(super) fn run(args: &Args) -> Result<(), Error> {
    let taken = control::ask(args.pid)?;
    let file = taken.file.to_string_lossy();
    let line = format!(
        "snapshot {} of process {} at {}: {} live, written to {}",
        taken.index,
        args.pid,
        timestamp(taken.unix_ns),
        size(taken.live_bytes),
        escaped(&file)
    );
    to_stdout(|out, _| Ok(writeln!(out, "{line}").map_err(ReportError::from)?))
}
