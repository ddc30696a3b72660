//! `heaptap leaks`.

use super::frames::FrameArgs;
use super::pattern::FilterArgs;
use super::view::to_stdout;
use crate::analysis::{Outline, leaks};
use crate::capture::Index;
use crate::error::Error;
use crate::report::{LeaksOfFolder, LeaksReport};
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  heaptap leaks app.heaptap
  heaptap leaks shop/                                  every worker, and what they have in common
  heaptap leaks --exclude 'module=<stdlib>' app.heaptap
  heaptap leaks --json app.heaptap | jq '.[] | select(.verdict == \"leak\")'";

/// A verdict per allocation site: does it leak, warm up, work in batches, or is it stable?
///
/// From the snapshots of a capture, or from its events. docs/leaks.md tells how a verdict comes about, and after how many leaked
/// bytes it can be relied on.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// The capture, as written by `heaptap attach`, or the folder of captures: then each process is judged by itself.
    #[arg(value_name = "CAPTURE")]
    capture: PathBuf,

    #[command(flatten)]
    filter: FilterArgs,

    #[command(flatten)]
    frames: FrameArgs,

    /// Show so many sites at most; 0 for all. [default: 20, of a folder 5 for each process, all with --json]
    #[arg(long, value_name = "N")]
    max_rows: Option<usize>,

    /// Write a JSON list of the sites (docs/reports.md tells their fields).
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(super) fn run(self) -> Result<(), Error> {
        if self.capture.is_dir() {
            return self.of_folder(&Index::read(&self.capture)?);
        }
        let outline = Outline::read(&self.capture, &self.frames.read_options())?;
        let leaks = leaks(&outline, self.filter.filter())?;
        let report = LeaksReport { leaks: &leaks, outline: &outline, max_rows: self.most_rows(20) };
        to_stdout(|out, _| Ok(report.write(self.json, out)?))
    }

    fn most_rows(&self, usual: usize) -> usize {
        self.max_rows.unwrap_or(if self.json { 0 } else { usual })
    }

    /// One capture after the other. One that can't be read is told, and left out.
    fn of_folder(&self, index: &Index) -> Result<(), Error> {
        to_stdout(|out, _| {
            let options = self.frames.read_options();
            let mut all = LeaksOfFolder::begin(self.json, out)?;
            for (path, _) in index.captures(&self.capture) {
                let judged = Outline::read(&path, &options)
                    .and_then(|outline| leaks(&outline, self.filter.filter()).map(|leaks| (outline, leaks)));
                match judged {
                    Ok((outline, leaks)) => {
                        let max_rows = self.most_rows(5);
                        all.add(&LeaksReport { leaks: &leaks, outline: &outline, max_rows })?;
                    }
                    Err(error) => tracing::warn!("{error}; it is left out"),
                }
            }
            match all.finish()? {
                0 => Err(Error::EmptyFolder { path: self.capture.clone() }),
                _ => Ok(()),
            }
        })
    }
}
