//! `heaptap gauges`.

use super::view::to_stdout;
use crate::capture::CaptureReader;
use crate::error::Error;
use crate::report::{GaugesFormat, write_gauges};
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  heaptap gauges app.heaptap
  heaptap gauges --max-rows 0 app.heaptap | less
  heaptap gauges --csv app.heaptap > app.csv
  heaptap gauges --json app.heaptap | jq -r .verdict";

/// The process's memory over time, second by second, and what its growth is made of.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// The capture, as written by `heaptap attach`.
    #[arg(value_name = "CAPTURE")]
    capture: PathBuf,

    /// Show so many rows of the table at most, evenly over the time; 0 for all.
    #[arg(long, value_name = "N", default_value_t = 24, conflicts_with_all = ["json", "csv"])]
    max_rows: usize,

    /// Write one JSON document with every moment (docs/reports.md tells its fields).
    #[arg(long)]
    json: bool,

    /// Write every moment as a line of comma-separated values.
    #[arg(long, conflicts_with = "json")]
    csv: bool,
}

impl Args {
    pub(super) fn run(self) -> Result<(), Error> {
        if self.capture.is_dir() {
            return Err(Error::FolderOfProcesses { path: self.capture, verb: "gauges" });
        }
        let reader = CaptureReader::open(&self.capture)?;
        to_stdout(|out, width| {
            let format = match (self.json, self.csv) {
                (true, _) => GaugesFormat::Json,
                (_, true) => GaugesFormat::Csv,
                _ => GaugesFormat::Table(self.max_rows, width),
            };
            Ok(write_gauges(reader, format, out)?)
        })
    }
}
