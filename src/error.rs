//! The error that a run of heaptap ends with: its message, what to do about it, its exit code.

use crate::capture::CaptureError;
use crate::report::ReportError;
use crate::report::dump::DumpError;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

/// Exit codes: 0 done, 1 failed, 2 usage (clap's), 3 the target was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Exit {
    /// All is done.
    Done = 0,
    /// Something failed.
    Failed = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// The target can't be worked with; nothing was written into it.
    Refused = 3,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

/// Why a verb did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A capture could not be written or read.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// A report could not be made.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// A report's file is there already.
    #[error("{} exists already", .0.display())]
    OutputExists(PathBuf),
    /// A report's file can't be written over, even with `--force`.
    #[error("{} is not a regular file; it was left as it is", .0.display())]
    OutputNotRegular(PathBuf),
    /// A report's file could not be written.
    #[error("cannot write {}: {source}", path.display())]
    Output {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Capture(error) => error.hint().map(str::to_owned),
            Self::Report(ReportError::Nothing(_)) => {
                Some("`heaptap stats` shows what the capture holds".to_owned())
            }
            Self::Report(_) => None,
            Self::OutputExists(_) => {
                Some("give another name with -o, or --force to write over it".to_owned())
            }
            Self::OutputNotRegular(_) => Some("give the name of a file with -o, or - for stdout".to_owned()),
            Self::Output { .. } => Some("give a path you may write to with -o".to_owned()),
        }
    }

    /// The code to exit with.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Capture(_)
            | Self::Report(_)
            | Self::OutputExists(_)
            | Self::OutputNotRegular(_)
            | Self::Output { .. } => Exit::Failed,
        }
    }

    /// True if a reader of our output went away (`heaptap dump … | head`): that is no failure.
    pub fn is_broken_pipe(&self) -> bool {
        let source = match self {
            Self::Report(ReportError::Write(source)) => source,
            Self::Output { source, .. } => source,
            _ => return false,
        };
        // Libraries in between wrap what they were given.
        let mut error: &(dyn std::error::Error + 'static) = source;
        loop {
            if let Some(io) = error.downcast_ref::<io::Error>() {
                if io.kind() == io::ErrorKind::BrokenPipe {
                    return true;
                }
                match io.get_ref() {
                    Some(inner) => error = inner,
                    None => return false,
                }
            } else {
                match error.source() {
                    Some(inner) => error = inner,
                    None => return false,
                }
            }
        }
    }
}

impl From<DumpError> for Error {
    fn from(error: DumpError) -> Self {
        match error {
            DumpError::Capture(error) => Self::Capture(error),
            DumpError::Report(error) => Self::Report(error),
        }
    }
}
