//! `heaptap flamegraph`.

use super::view::{ViewArgs, to_stdout};
use crate::analysis::View;
use crate::error::Error;
use crate::report::{FlameGraph, Format, Report};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

const EXAMPLES: &str = "\
Examples:
  heaptap flamegraph app.heaptap                  write app.svg
  heaptap flamegraph --leaks app.heaptap          write app-leaks.svg
  heaptap flamegraph --inverted -o - app.heaptap > by-line.svg";

/// A flame graph as an SVG file for any browser.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    #[command(flatten)]
    view: ViewArgs,

    /// Where to write: a file, or - for stdout. [default: the capture's name with .svg, in this directory]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Write over an existing file.
    #[arg(long)]
    force: bool,

    /// Merge from the innermost frames: who asked for memory, then who called them.
    #[arg(long)]
    inverted: bool,

    /// Draw the roots at the top.
    #[arg(long)]
    icicle: bool,
}

impl Args {
    pub(super) fn run(self) -> Result<(), Error> {
        let output = self.output.clone().unwrap_or_else(|| self.default_output());
        let to_pipe = output == Path::new("-");
        if !to_pipe {
            self.check_writable(&output)?;
        }
        let findings = self.view.findings()?;
        let report = FlameGraph { inverted: self.inverted, icicle: self.icicle };
        let format = Format::default();
        if to_pipe {
            return to_stdout(|out, _| Ok(report.write(&findings, format, out)?));
        }
        self.write_file(&output, |out| Ok(report.write(&findings, format, out)?))?;
        to_stdout(|out, _| {
            writeln!(out, "wrote {}", crate::report::text::escaped(&output.to_string_lossy()))
                .map_err(|error| crate::report::ReportError::from(error).into())
        })
    }

    fn default_output(&self) -> PathBuf {
        // A folder's name may have dots in it, and a path may end in `..`.
        let folder = self.view.capture.is_dir();
        let stem = if folder { self.view.capture.file_name() } else { self.view.capture.file_stem() };
        let mut name = stem.unwrap_or("heaptap".as_ref()).to_owned();
        name.push(match self.view.view() {
            View::HighWaterMark => ".svg",
            View::Leaks => "-leaks.svg",
            View::Temporary(_) => "-temporary.svg",
        });
        name.into()
    }

    /// Said before the capture is read, which may take a while.
    fn check_writable(&self, output: &Path) -> Result<(), Error> {
        match std::fs::symlink_metadata(output) {
            Ok(found) if !found.is_file() => Err(Error::OutputNotRegular(output.to_owned())),
            Ok(_) if !self.force => Err(Error::OutputExists(output.to_owned())),
            _ => Ok(()),
        }
    }

    /// Writes beside `output` and renames, so that there is a whole file or none.
    fn write_file(
        &self,
        output: &Path,
        write: impl FnOnce(&mut dyn Write) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let failed = |source| Error::Output { path: output.to_owned(), source };
        let directory = match output.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let mut file = BufWriter::new(tempfile::NamedTempFile::new_in(directory).map_err(failed)?);
        write(&mut file)?;
        let file = file.into_inner().map_err(|error| failed(error.into_error()))?;
        let persisted = if self.force { file.persist(output) } else { file.persist_noclobber(output) };
        match persisted {
            Ok(_) => Ok(()),
            Err(error) if error.error.kind() == std::io::ErrorKind::AlreadyExists => {
                Err(Error::OutputExists(output.to_owned()))
            }
            Err(error) => Err(failed(error.error)),
        }
    }
}
