//! The top error: what the user reads, what to do about it, and the exit code.
//!
//! Exit codes: 0 done, 1 failed, 2 usage (clap's), 3 the target was refused and nothing was done to it.

use crate::analysis::NoSuchMoment;
use crate::capture::CaptureError;
use crate::cpython::LocateError;
use crate::image::ImageError;
use crate::inferior::error::AttachError;
use crate::inferior::maps::effective_capabilities;
use crate::probe::error::ProbeError;
use crate::recorder::RecordError;
use crate::recorder::control::ControlError;
use crate::report::ReportError;
use crate::report::dump::DumpError;
use crate::tree::TreeError;
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
    /// A snapshot could not be asked for.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// Several processes could not be recorded.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A capture can't be read or written.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// A report could not be made.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// A capture does not have the moment that was asked for.
    #[error(transparent)]
    Moment(#[from] NoSuchMoment),
    /// Arguments that don't go together.
    #[error("{0}")]
    Usage(&'static str),
    /// Two moments are in the wrong order.
    #[error(
        "the first moment is after the second: --from is {from_s:.3} s after the start, --to {to_s:.3} s"
    )]
    MomentsReversed {
        /// The first.
        from_s: f64,
        /// The second.
        to_s: f64,
    },
    /// A folder in which no capture can be read.
    #[error("{} holds no capture that can be read", path.display())]
    EmptyFolder {
        /// The folder.
        path: PathBuf,
    },
    /// Processes can't be kept apart where there is one.
    #[error("{} is not a folder of captures: there are no processes to keep apart", path.display())]
    NotAFolder {
        /// The file.
        path: PathBuf,
    },
    /// A report that is of one process.
    #[error("{} is a folder: `{verb}` is of one process, so give it one of the captures in it", path.display())]
    FolderOfProcesses {
        /// The folder.
        path: PathBuf,
        /// The report.
        verb: &'static str,
    },
    /// Records of several processes are in no order.
    #[error("{} is a folder: the records of its captures are of different processes and in no common order", path.display())]
    FolderOfRecords {
        /// The folder.
        path: PathBuf,
    },
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
    /// The demo's program can't be run.
    #[error("cannot run {program}: {source}")]
    Demo {
        /// The interpreter.
        program: String,
        /// Why.
        source: io::Error,
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
    pub fn exit(&self) -> Exit {
        match self {
            Self::Record(error) => record_exit(error),
            Self::Tree(TreeError::Folder(_) | TreeError::Signals(_)) => Exit::Failed,
            Self::Tree(_) => Exit::Refused,
            Self::CannotAttach { .. } => Exit::Refused,
            Self::Usage(_) => Exit::Usage,
            Self::RecordingFailed { .. }
            | Self::Control(_)
            | Self::Capture(_)
            | Self::Report(_)
            | Self::Moment(_)
            | Self::MomentsReversed { .. }
            | Self::EmptyFolder { .. }
            | Self::NotAFolder { .. }
            | Self::FolderOfProcesses { .. }
            | Self::FolderOfRecords { .. }
            | Self::OutputExists(_)
            | Self::OutputNotRegular(_)
            | Self::Output { .. }
            | Self::Demo { .. } => Exit::Failed,
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

    /// What the user can do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Record(error) => record_hint(error),
            Self::Tree(error) => tree_hint(error),
            Self::RecordingFailed { capture, .. } => Some(format!(
                "what was recorded until then can be read: heaptap summary {}",
                capture.display()
            )),
            Self::Control(ControlError::Nobody { .. }) => Some(
                "`heaptap attach --pid PID --snapshot-every 60s` records with snapshots; run this as the same user"
                    .into(),
            ),
            Self::Control(ControlError::Unreachable { .. }) => {
                Some("run this as the user who records it, or as root".into())
            }
            Self::Capture(error) => error.hint().map(str::to_string),
            Self::Report(ReportError::Nothing(_)) => {
                Some("`heaptap stats` shows what the capture holds".into())
            }
            Self::EmptyFolder { .. } => Some("its index.json tells what became of each process".into()),
            Self::NotAFolder { .. } => Some("leave --split-processes out".into()),
            Self::FolderOfProcesses { path, verb } => {
                Some(format!("heaptap {verb} {}/PID.heaptap", path.display()))
            }
            Self::FolderOfRecords { path } => {
                Some(format!("dump one of them: heaptap dump {}/PID.heaptap", path.display()))
            }
            Self::OutputExists(_) => Some("give another name with -o, or --force to write over it".into()),
            Self::OutputNotRegular(_) => Some("give the name of a file with -o, or - for stdout".into()),
            Self::Output { .. } => Some("give a path you may write to with -o".into()),
            Self::Demo { .. } => Some("install a CPython 3.8 to 3.15, or name one with --python".into()),
            Self::Moment(_) => {
                Some("`heaptap dump CAPTURE | grep -i snapshot` lists the snapshots of a capture".into())
            }
            Self::Report(_)
            | Self::Control(_)
            | Self::CannotAttach { .. }
            | Self::Usage(_)
            | Self::MomentsReversed { .. } => None,
        }
    }
}

fn record_exit(error: &RecordError) -> Exit {
    match error {
        RecordError::Attach(AttachError::Trace(_)) | RecordError::Trace(_) | RecordError::Capture(_) => {
            Exit::Failed
        }
        RecordError::Probe(ProbeError::Trace(_) | ProbeError::Read(_) | ProbeError::NotRestored { .. }) => {
            Exit::Failed
        }
        RecordError::Fact(_)
        | RecordError::Read(_)
        | RecordError::Ring(_)
        | RecordError::Thread { .. }
        | RecordError::SwitchedOff { .. }
        | RecordError::Panicked { .. } => Exit::Failed,
        RecordError::Attach(_)
        | RecordError::Image(_)
        | RecordError::Locate(_)
        | RecordError::Layout(_)
        | RecordError::Allocators(_)
        | RecordError::CodeDealloc(_)
        | RecordError::NotRecordable { .. }
        | RecordError::NativeFiltered { .. }
        | RecordError::NoRoom { .. }
        | RecordError::Probe(_) => Exit::Refused,
    }
}

fn record_hint(error: &RecordError) -> Option<String> {
    match error {
        RecordError::Attach(error) => attach_hint(error),
        RecordError::NoRoom { exact: true, .. } => Some(
            "record samples (without --exact), which takes less; or raise the group's limit while you record".into(),
        ),
        RecordError::NoRoom { .. } => Some("raise the group's limit while you record".into()),
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
        RecordError::Panicked { .. } => Some("please report it, with what you did".into()),
        RecordError::CodeDealloc(_) => Some("record it with --breakpoints trap, which is much slower".into()),
        RecordError::NativeFiltered { .. } => {
            Some("record it without --native, or with --breakpoints trap, which walks from outside and is much slower".into())
        }
        RecordError::NotRecordable { .. }
        | RecordError::Trace(_)
        | RecordError::Ring(_)
        | RecordError::Thread { .. }
        | RecordError::SwitchedOff { .. }
        | RecordError::Fact(_)
        | RecordError::Read(_) => None,
    }
}

fn tree_hint(error: &TreeError) -> Option<String> {
    match error {
        TreeError::NoMatch { .. } | TreeError::NoProcess { .. } => {
            Some("`pgrep -af python` lists Python processes with their command lines".into())
        }
        TreeError::Folder(CaptureError::Exists { .. }) => {
            Some("give another folder with -o, or --force to write into this one".into())
        }
        TreeError::Folder(error) => error.hint().map(str::to_string),
        TreeError::NoneRecorded { .. } => Some("the folder's index.json has the reason for each".into()),
        TreeError::NoPython { .. } | TreeError::Signals(_) => None,
    }
}

fn attach_hint(error: &AttachError) -> Option<String> {
    match error {
        AttachError::NoProcess { .. } => Some("check the pid: `pgrep -af python` lists Python processes".into()),
        AttachError::Hidden { .. } => Some(
            "run heaptap as root, as the user of the process, or in the group that /proc's mount option gid= names".into(),
        ),
        AttachError::NoProc => Some("mount it first: mount -t proc proc /proc".into()),
        AttachError::ForeignProc => Some(
            "enter the namespaces together (nsenter --target PID --all), or mount /proc anew for this one \
             (unshare --pid --fork --mount-proc)"
                .into(),
        ),
        AttachError::IsThread { pid, .. } => Some(format!("attach to the process: --pid {pid}")),
        AttachError::NotPermitted { ptrace_scope, owner, .. } => Some(match ptrace_scope {
            Some(3) => "kernel.yama.ptrace_scope is 3: no process may be traced until the next boot".into(),
            // CAP_DAC_OVERRIDE is 1.
            _ if effective_capabilities().is_some_and(|caps| caps & (1 << 19) != 0 && caps & (1 << 1) == 0)
                && *owner != nix::unistd::geteuid().as_raw() =>
            {
                format!(
                    "heaptap has CAP_SYS_PTRACE, but the memory of a process belongs to its user: run heaptap as user {owner}, \
                     or give it CAP_DAC_OVERRIDE as well"
                )
            }
            // capability.h: CAP_SYS_PTRACE is 19.
            _ if effective_capabilities().is_some_and(|caps| caps & (1 << 19) != 0) => {
                "heaptap has CAP_SYS_PTRACE, so the process belongs to another user namespace (the host's, where heaptap \
                 runs in a container) or a security module protects it: run heaptap where the process was started"
                    .into()
            }
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
        ProbeError::HandlerStays { .. } => Some("try again when the handler has returned".into()),
        ProbeError::SigtrapInUse { .. } => {
            Some("--unsafe-trap records all the same: the target dies should heaptap be killed meanwhile".into())
        }
        ProbeError::Seccomp { .. } => Some("run heaptap as root (CAP_SYS_ADMIN) to suspend the filter".into()),
        ProbeError::NoDetour { .. } => Some("record it with --breakpoints trap, which is much slower".into()),
        ProbeError::NoAllocator { .. } => Some(
            "`heaptap doctor --pid PID` shows what was found; where a warning says that a library was left out, run heaptap as root"
                .into(),
        ),
        ProbeError::ControllerAlive { controller, .. } => Some(format!("end it first: kill -INT {controller}")),
        _ => None,
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
