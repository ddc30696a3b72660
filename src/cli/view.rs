//! What the report verbs share: the capture, the view, where the output goes.

use super::frames::FrameArgs;
use crate::analysis::{Findings, Merge, View, analyse};
use crate::capture::{CaptureReader, Index};
use crate::error::Error;
use crate::report::{Format, Report, ReportError};
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::PathBuf;

/// The capture and which of its allocations to show.
#[derive(clap::Args)]
pub(super) struct ViewArgs {
    /// The capture, or the folder of captures, as written by `heaptap attach`.
    #[arg(value_name = "CAPTURE")]
    pub(super) capture: PathBuf,

    /// Show what was not freed by the end of the recording, not what was live at the high-water mark.
    #[arg(long)]
    pub(super) leaks: bool,

    /// Show what was freed before its thread had made more than N other allocations.
    #[arg(long, value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "1",
          conflicts_with = "leaks", value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    pub(super) temporary: Option<u32>,

    /// Of a folder: keep the processes apart, not only their stacks.
    #[arg(long)]
    pub(super) split_processes: bool,

    #[command(flatten)]
    pub(super) frames: FrameArgs,
}

impl ViewArgs {
    pub(super) fn view(&self) -> View {
        match self.temporary {
            Some(threshold) => View::Temporary(threshold),
            None if self.leaks => View::Leaks,
            None => View::HighWaterMark,
        }
    }

    pub(super) fn findings(&self) -> Result<Findings, Error> {
        if self.capture.is_dir() {
            return self.merged(&Index::read(&self.capture)?);
        }
        if self.split_processes {
            return Err(Error::NotAFolder { path: self.capture.clone() });
        }
        let reader = CaptureReader::open_with(&self.capture, &self.frames.read_options())?;
        Ok(analyse(reader, self.view())?)
    }

    /// All captures of a folder. One that can't be read is as good as not recorded; it is told, and left out.
    fn merged(&self, index: &Index) -> Result<Findings, Error> {
        let mut merge = Merge::new(self.view(), self.split_processes);
        let (mut not_recorded, options) = (index.not_recorded(), self.frames.read_options());
        for (path, _) in index.captures(&self.capture) {
            let findings =
                CaptureReader::open_with(&path, &options).and_then(|reader| analyse(reader, self.view()));
            match findings {
                Ok(findings) => merge.add(&path, &findings)?,
                Err(error) => {
                    tracing::warn!("{error}; it is left out");
                    not_recorded += 1;
                }
            }
        }
        merge.finish(not_recorded).ok_or_else(|| Error::EmptyFolder { path: self.capture.clone() })
    }
}

/// Writes a report to stdout.
pub(super) fn print(report: &impl Report, findings: &Findings, json: bool) -> Result<(), Error> {
    to_stdout(|out, width| Ok(report.write(findings, Format { json, width }, out)?))
}

/// Gives `write` stdout, buffered, and the terminal's width if it is one.
pub(super) fn to_stdout(
    write: impl FnOnce(&mut dyn Write, Option<usize>) -> Result<(), Error>,
) -> Result<(), Error> {
    let stdout = io::stdout().lock();
    let width = stdout
        .is_terminal()
        .then(|| terminal_size::terminal_size_of(&stdout))
        .flatten()
        .map(|(width, _)| usize::from(width.0));
    let mut out = BufWriter::new(stdout);
    write(&mut out, width)?;
    out.flush().map_err(|error| Error::from(ReportError::from(error)))
}
