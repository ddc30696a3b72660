//! `heaptap dump`.

use super::frames::FrameArgs;
use super::view::to_stdout;
use crate::capture::CaptureReader;
use crate::error::Error;
use crate::report::dump::{dump, not_freed};
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  heaptap dump app.heaptap | head -50
  heaptap dump --leaks app.heaptap
  heaptap dump --json app.heaptap | jq -c 'select(.record == \"allocation\" and .bytes > 1000000)'";

/// Every record of a capture, in order, as text or JSON lines.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// The capture, as written by `heaptap attach`.
    #[arg(value_name = "CAPTURE")]
    capture: PathBuf,

    /// Of allocations and frees, show only the allocations that were not freed by the end of the recording.
    #[arg(long)]
    leaks: bool,

    #[command(flatten)]
    frames: FrameArgs,

    /// Write one JSON object per line (docs/reports.md tells their fields).
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(super) fn run(self) -> Result<(), Error> {
        if self.capture.is_dir() {
            return Err(Error::FolderOfRecords { path: self.capture });
        }
        let only = if self.leaks { Some(not_freed(CaptureReader::open(&self.capture)?)?) } else { None };
        let reader = CaptureReader::open_with(&self.capture, &self.frames.read_options())?;
        to_stdout(|out, _| Ok(dump(reader, self.json, only.as_ref(), out)?))
    }
}
