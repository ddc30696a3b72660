//! What can go wrong between us and a traced process.

use crate::addr::RemoteAddr;
use nix::errno::Errno;

/// Why a process could not be attached to. Nothing was written into it.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// There is no such process.
    #[error("no such process: {pid}")]
    NoProcess {
        /// The pid asked for.
        pid: i32,
    },
    /// It lives, but nothing of it can be read.
    #[error("process {pid} exists, but /proc hides it from heaptap (it is mounted with hidepid)")]
    Hidden {
        /// The pid asked for.
        pid: i32,
    },
    /// There is no /proc to learn anything from.
    #[error("/proc is not mounted here: all that heaptap knows of a process comes from there")]
    NoProc,
    /// Pids mean other processes there than for the system calls that are made of us.
    #[error("/proc shows the processes of another pid namespace than heaptap's: it was mounted for that one")]
    ForeignProc,
    /// `pid` is a thread, not a process.
    #[error("{tid} is a thread of process {pid}")]
    IsThread {
        /// The id asked for.
        tid: i32,
        /// The process it belongs to.
        pid: i32,
    },
    /// It is heaptap itself.
    #[error("process {pid} is heaptap itself")]
    Myself {
        /// The pid asked for.
        pid: i32,
    },
    /// It has exited, and its parent has not collected it.
    #[error("process {pid} is a zombie: it has exited")]
    Zombie {
        /// The pid asked for.
        pid: i32,
    },
    /// It is a thread of the kernel.
    #[error("process {pid} ({name}) is a kernel thread")]
    KernelThread {
        /// The pid asked for.
        pid: i32,
        /// Its name.
        name: String,
    },
    /// Another tracer has it.
    #[error("process {pid} is already traced by process {tracer} ({name})")]
    AlreadyTraced {
        /// The pid asked for.
        pid: i32,
        /// The pid of its tracer.
        tracer: i32,
        /// The tracer's name.
        name: String,
    },
    /// The kernel refuses.
    #[error("not permitted to trace process {pid} of user {owner}{}", reason(ptrace_scope))]
    NotPermitted {
        /// The pid asked for.
        pid: i32,
        /// Effective uid of the target.
        owner: u32,
        /// `/proc/sys/kernel/yama/ptrace_scope`, where there is one.
        ptrace_scope: Option<u8>,
    },
    /// A thread would not stop in time.
    #[error(
        "thread {tid} of process {pid} does not stop (state {state}): it sleeps uninterruptibly in the kernel"
    )]
    Unstoppable {
        /// The process.
        pid: i32,
        /// The thread.
        tid: i32,
        /// State letter of proc_pid_stat(5).
        state: char,
    },
    /// Something else failed.
    #[error(transparent)]
    Trace(#[from] TraceError),
}

fn reason(scope: &Option<u8>) -> String {
    match scope {
        Some(scope) if *scope > 0 => format!(" (kernel.yama.ptrace_scope is {scope})"),
        _ => String::new(),
    }
}

/// A request to a traced process failed.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The kernel refused a ptrace request.
    #[error("cannot {request} thread {tid}: {errno}")]
    Request {
        /// What was asked.
        request: &'static str,
        /// Of whom.
        tid: i32,
        /// What the kernel said.
        errno: Errno,
    },
    /// The thread or process is gone: it exited, or was killed.
    #[error("thread {tid} of the target is gone")]
    Gone {
        /// The thread.
        tid: i32,
    },
    /// Waiting for stops failed.
    #[error("cannot wait for the target: {0}")]
    Wait(Errno),
    /// A file of /proc could not be read.
    #[error("cannot read {path}: {source}")]
    Proc {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The target's memory could not be written.
    #[error("cannot write {len} bytes at {addr} of process {pid}: {source}")]
    Write {
        /// The process.
        pid: i32,
        /// First byte.
        addr: RemoteAddr,
        /// Bytes.
        len: usize,
        /// Why.
        source: std::io::Error,
    },
    /// A system call made in the target's name failed.
    #[error("{name} in process {pid} failed: {errno}")]
    RemoteCall {
        /// The process.
        pid: i32,
        /// The system call.
        name: &'static str,
        /// What the kernel said.
        errno: Errno,
    },
    /// Threads did not stop in the time given.
    #[error("threads {tids:?} did not stop within {patience:?}")]
    NotStopped {
        /// Who did not.
        tids: Vec<i32>,
        /// How long was waited.
        patience: std::time::Duration,
    },
}

impl TraceError {
    /// Names the request; ESRCH means that the thread is gone.
    pub(crate) fn of(request: &'static str, tid: i32) -> impl FnOnce(Errno) -> Self {
        move |errno| match errno {
            Errno::ESRCH => Self::Gone { tid },
            errno => Self::Request { request, tid, errno },
        }
    }
}
