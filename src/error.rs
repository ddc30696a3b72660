//! The top error: what the user reads, what to do about it, and the exit code.
//!
//! Exit codes: 0 done, 1 failed, 2 usage (clap's), 3 the target was refused and nothing was done to it.

use crate::capture::CaptureError;
use crate::cli::stacks::StacksError;
use crate::cli::{EXIT_FAILED as FAILED, EXIT_REFUSED as REFUSED};
use crate::cpython::LocateError;
use crate::image::ImageError;
use crate::inferior::error::AttachError;
use crate::probe::error::ProbeError;
use crate::recorder::RecordError;
use std::path::PathBuf;

/// Anything that ends a verb.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A recording could not be made.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A recording ended by an error; what was recorded is in the capture, and the target was let go.
    #[error("recording ended early: {message}")]
    RecordingFailed {
        /// What failed.
        message: String,
        /// The capture.
        capture: PathBuf,
    },
    /// A capture can't be read or written.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The stacks can't be shown.
    #[error(transparent)]
    Stacks(#[from] StacksError),
    /// A file other than a capture can't be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Standard output can't be written.
    #[error("cannot write to standard output: {0}")]
    Output(std::io::Error),
    /// The demo's program can't be run.
    #[error("cannot run {program}: {source}")]
    Demo {
        /// The interpreter.
        program: String,
        /// Why.
        source: std::io::Error,
    },
    /// The doctor found that the process can't be attached to, and said so.
    #[error("process {pid} can't be attached to")]
    CannotAttach {
        /// The process.
        pid: i32,
    },
}

impl Error {
    /// What the process ends with.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Record(error) => record_exit_code(error),
            Self::Stacks(error) => error.exit_code(),
            Self::CannotAttach { .. } => REFUSED,
            Self::RecordingFailed { .. }
            | Self::Capture(_)
            | Self::Write { .. }
            | Self::Output(_)
            | Self::Demo { .. } => FAILED,
        }
    }

    /// What the user can do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Record(error) => record_hint(error),
            Self::RecordingFailed { capture, .. } => Some(format!(
                "what was recorded until then can be read: heaptap summary {}",
                capture.display()
            )),
            Self::Capture(error) => error.hint().map(str::to_string),
            Self::Write { .. } => Some("give a path you may write to with -o".into()),
            Self::Demo { .. } => Some("install a CPython 3.8 to 3.15, or name one with --python".into()),
            Self::Stacks(_) | Self::Output(_) | Self::CannotAttach { .. } => None,
        }
    }
}

fn record_exit_code(error: &RecordError) -> u8 {
    match error {
        RecordError::Attach(AttachError::Trace(_)) | RecordError::Trace(_) | RecordError::Capture(_) => {
            FAILED
        }
        RecordError::Probe(ProbeError::Trace(_) | ProbeError::Read(_) | ProbeError::NotRestored { .. }) => {
            FAILED
        }
        RecordError::Fact(_) | RecordError::Read(_) => FAILED,
        RecordError::Attach(_)
        | RecordError::Image(_)
        | RecordError::Locate(_)
        | RecordError::Layout(_)
        | RecordError::Allocators(_)
        | RecordError::NotRecordable { .. }
        | RecordError::Probe(_) => REFUSED,
    }
}

fn record_hint(error: &RecordError) -> Option<String> {
    match error {
        RecordError::Attach(error) => attach_hint(error),
        RecordError::Capture(error) => error.hint().map(str::to_string),
        RecordError::Probe(error) => probe_hint(error),
        RecordError::Layout(_) => {
            Some("the layout does not fit this build; report it with the output of `heaptap doctor`".into())
        }
        RecordError::Locate(LocateError::NoPython { .. }) => Some(
            "give the pid of the Python process itself: `pgrep -af python` lists them (a launcher or supervisor \
             starts it as a child)"
                .into(),
        ),
        RecordError::Locate(LocateError::NotInitialized { .. }) => Some("try again in a moment".into()),
        RecordError::Locate(LocateError::Layout(_)) => {
            Some("`heaptap doctor --pid PID` shows what was found; report it as a build to be supported".into())
        }
        RecordError::Locate(_) => Some("run the program with a CPython 3.8 to 3.15".into()),
        RecordError::Image(ImageError::Architecture { .. }) => {
            Some("heaptap records 64-bit x86-64 processes on machines of that kind".into())
        }
        RecordError::Image(_) => Some("`heaptap doctor --pid PID` shows what was found".into()),
        RecordError::Allocators(_) => Some("record without --python-allocators".into()),
        RecordError::NotRecordable { .. }
        | RecordError::Trace(_)
        | RecordError::Fact(_)
        | RecordError::Read(_) => None,
    }
}

fn attach_hint(error: &AttachError) -> Option<String> {
    match error {
        AttachError::NoProcess { .. } => Some("check the pid: `pgrep -af python` lists Python processes".into()),
        AttachError::IsThread { pid, .. } => Some(format!("attach to the process: --pid {pid}")),
        AttachError::NotPermitted { ptrace_scope, .. } => Some(match ptrace_scope {
            Some(3) => "kernel.yama.ptrace_scope is 3: no process may be traced until the next boot".into(),
            _ => "run heaptap as root, or give it CAP_SYS_PTRACE (in a container: --cap-add SYS_PTRACE); to trace \
                  processes of your own user, kernel.yama.ptrace_scope has to be 0"
                .into(),
        }),
        AttachError::AlreadyTraced { tracer, .. } => {
            Some(format!("a process has one tracer at a time: end process {tracer} (a debugger, strace, heaptap) first"))
        }
        AttachError::Zombie { .. } => Some("it is gone; only its parent can collect it".into()),
        AttachError::Myself { .. } | AttachError::KernelThread { .. } => {
            Some("give the pid of a CPython process".into())
        }
        AttachError::Unstoppable { .. } => Some("try again when the thread's I/O is done".into()),
        AttachError::Trace(_) => None,
    }
}

fn probe_hint(error: &ProbeError) -> Option<String> {
    match error {
        ProbeError::EntryChanged { .. } => Some(
            "end the other tool first (perf, bpftrace, a debugger, an allocation tracker); `heaptap detach --pid PID` \
             removes what a killed heaptap left"
                .into(),
        ),
        ProbeError::SigtrapInUse { .. } => {
            Some("--unsafe-trap records all the same: the target dies should heaptap be killed meanwhile".into())
        }
        ProbeError::Seccomp { .. } => Some("run heaptap as root (CAP_SYS_ADMIN) to suspend the filter".into()),
        ProbeError::ControllerAlive { controller, .. } => Some(format!("end it first: kill -INT {controller}")),
        _ => None,
    }
}
