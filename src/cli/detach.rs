//! `heaptap detach`: removes what a killed heaptap left in a process.

use super::parse::parse_pid;
use super::view::to_stdout;
use crate::error::Error;
use crate::inferior::error::TraceError;
use crate::inferior::memory::ProcessMemory;
use crate::inferior::{Inferior, facts, maps};
use crate::probe::lift::LeftBehind;
use crate::probe::region::REGION_LEN;
use crate::probe::stale::{self, Stale};
use crate::recorder::RecordError;
use crate::report::ReportError;
use crate::report::text::size as bytes;
use clap::Args;

/// Remove what a killed heaptap left in a process
#[derive(Debug, Args)]
#[command(after_help = "\
A heaptap that ends by itself leaves nothing. One that is killed (SIGKILL, the OOM killer) leaves its thunks \
mapped; the target's first allocation takes the breakpoints out. This verb removes the rest.

Examples:
  heaptap detach --pid 1234")]
pub struct DetachArgs {
    /// The process to clean
    #[arg(long, short, value_name = "PID", value_parser = parse_pid, allow_negative_numbers = true)]
    pub pid: i32,
}

/// Runs the verb.
pub fn run(args: &DetachArgs) -> Result<(), Error> {
    let pid = args.pid;
    let found = find(pid)?;
    let size = bytes((found.len() * REGION_LEN) as u64);
    let told = if found.is_empty() {
        format!("process {pid} holds nothing of heaptap's")
    } else {
        let left = clean(pid, &found)?;
        match left.why.first() {
            None => format!("removed {size} of thunks from process {pid}"),
            Some(why) => {
                let stays = bytes((left.regions.len() * REGION_LEN) as u64);
                format!("breakpoints are out of process {pid}; {stays} of thunks stay for now: {why}")
            }
        }
    };
    to_stdout(|out, _| Ok(writeln!(out, "{told}").map_err(ReportError::from)?))
}

fn find(pid: i32) -> Result<Vec<Stale>, RecordError> {
    facts::check_attachable(pid)?;
    Ok(stale::find_in(pid, &ProcessMemory::new(pid), &maps::mappings(pid)?))
}

fn clean(pid: i32, found: &[Stale]) -> Result<LeftBehind, RecordError> {
    let mut inferior = Inferior::seize(pid)?;
    let removed = inferior
        .stop_to_attach()
        .map_err(RecordError::from)
        .and_then(|()| Ok(stale::remove(&mut inferior, found)?));
    match (removed, inferior.detach()) {
        (Ok(left), Ok(()) | Err(TraceError::Gone { .. })) => Ok(left),
        (Ok(_), Err(error)) => Err(error.into()),
        (Err(error), _) => Err(error),
    }
}
