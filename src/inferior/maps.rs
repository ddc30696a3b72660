//! Facts about a process from procfs: mappings, threads, status, auxiliary vector.
//!
//! Reads `/proc` only; stops nothing and writes nothing. Every answer is a snapshot which may be stale
//! when it is used.

use crate::addr::RemoteAddr;
use crate::mapping::{Backing, Mapping, Perms};
use procfs::ProcError;
use procfs::process::{MMPermissions, MMapPath, Process};
use std::path::PathBuf;

/// A fact about a process that could not be learnt.
#[derive(Debug, thiserror::Error)]
pub enum FactError {
    /// No such process, or it has exited.
    #[error("process {pid} does not exist (or has exited): check the pid")]
    Gone {
        /// The process.
        pid: i32,
    },
    /// The kernel denies access.
    #[error(
        "may not read {what} of process {pid}: run as its user or as root, with CAP_SYS_PTRACE \
         (see also /proc/sys/kernel/yama/ptrace_scope)"
    )]
    Denied {
        /// The process.
        pid: i32,
        /// Name of the file under `/proc/PID`.
        what: &'static str,
    },
    /// Anything else.
    #[error("cannot read {what} of process {pid}")]
    Unreadable {
        /// The process.
        pid: i32,
        /// Name of the file under `/proc/PID`.
        what: &'static str,
        /// What went wrong.
        #[source]
        source: Box<ProcError>,
    },
}

impl FactError {
    fn new(pid: i32, what: &'static str, source: ProcError) -> Self {
        match source {
            ProcError::NotFound(_) => Self::Gone { pid },
            ProcError::PermissionDenied(_) => Self::Denied { pid, what },
            ProcError::Io(ref e, _) if e.raw_os_error() == Some(libc::ESRCH) => Self::Gone { pid },
            source => Self::Unreadable { pid, what, source: Box::new(source) },
        }
    }
}

/// The thread by whose id the memory of process `pid` can be reached: its leader, or, when that has exited before the
/// others (pthread_exit in the main thread), one of those. A dead leader has no memory any more, but its process has.
pub fn memory_holder(pid: i32) -> i32 {
    let dead = |tid: i32| status(pid, tid).map_or(true, |s| matches!(s.state, 'Z' | 'X'));
    if !dead(pid) {
        return pid;
    }
    tasks(pid).unwrap_or_default().into_iter().find(|tid| !dead(*tid)).unwrap_or(pid)
}

/// The memory map of `pid`, by ascending address.
pub fn mappings(pid: i32) -> Result<Vec<Mapping>, FactError> {
    let maps = Process::new(memory_holder(pid))
        .and_then(|p| p.maps())
        .map_err(|e| FactError::new(pid, "maps", e))?;
    Ok(maps.into_iter().map(mapping).collect())
}

fn mapping(map: procfs::process::MemoryMap) -> Mapping {
    Mapping {
        start: RemoteAddr(map.address.0),
        end: RemoteAddr(map.address.1),
        perms: Perms {
            read: map.perms.contains(MMPermissions::READ),
            write: map.perms.contains(MMPermissions::WRITE),
            execute: map.perms.contains(MMPermissions::EXECUTE),
            shared: map.perms.contains(MMPermissions::SHARED),
        },
        offset: map.offset,
        device: map.dev,
        inode: map.inode,
        backing: backing(map.pathname),
    }
}

fn backing(path: MMapPath) -> Backing {
    let named = |name: &str| Backing::Named(name.to_owned());
    match path {
        MMapPath::Path(path) => file(path),
        MMapPath::Heap => named("[heap]"),
        MMapPath::Stack => named("[stack]"),
        MMapPath::TStack(tid) => Backing::Named(format!("[stack:{tid}]")),
        MMapPath::Vdso => named("[vdso]"),
        MMapPath::Vvar => named("[vvar]"),
        MMapPath::Vsyscall => named("[vsyscall]"),
        MMapPath::Rollup => named("[rollup]"),
        MMapPath::Anonymous => Backing::Anonymous,
        MMapPath::Vsys(key) => Backing::Named(format!("/SYSV{key:08x}")),
        MMapPath::Other(name) => Backing::Named(format!("[{name}]")),
    }
}

/// The kernel appends ` (deleted)` to the path of a file without directory entry (`proc_pid_maps(5)`), and
/// writes a newline as `\012`. A file really so named is taken for a deleted one; opening it through
/// `map_files` works all the same.
fn file(path: PathBuf) -> Backing {
    let shown = path.to_string_lossy();
    let (name, deleted) = match shown.strip_suffix(" (deleted)") {
        Some(name) => (name, true),
        None => (&*shown, false),
    };
    if !deleted && !name.contains("\\012") {
        return Backing::File { path, deleted };
    }
    Backing::File { path: PathBuf::from(name.replace("\\012", "\n")), deleted }
}

/// The thread ids of `pid`, ascending. Threads are born and die while this is read.
pub fn tasks(pid: i32) -> Result<Vec<i32>, FactError> {
    let tasks = Process::new(pid).and_then(|p| p.tasks()).map_err(|e| FactError::new(pid, "task", e))?;
    let mut tids: Vec<i32> = tasks.filter_map(|task| task.ok().map(|t| t.tid)).collect();
    tids.sort_unstable();
    if tids.is_empty() { Err(FactError::Gone { pid }) } else { Ok(tids) }
}

/// The thread ids of `pid`, each with the id that its own (innermost) pid namespace gives it: what the process itself sees.
pub fn namespaced_tasks(pid: i32) -> Result<Vec<(i32, i32)>, FactError> {
    let inner = |tid: i32| status(pid, tid).ok().and_then(|s| s.ns_pids.last().copied()).unwrap_or(tid);
    Ok(tasks(pid)?.into_iter().map(|tid| (tid, inner(tid))).collect())
}

/// The number that the innermost pid namespace of process `pid` gives it: what it itself sees.
pub fn own_pid(pid: i32) -> Option<i32> {
    status(pid, pid).ok()?.ns_pids.last().copied()
}

/// The name the kernel has for a thread (`comm`), `None` when the thread is gone.
pub fn task_name(pid: i32, tid: i32) -> Option<String> {
    let bytes = std::fs::read(format!("/proc/{pid}/task/{tid}/comm")).ok()?;
    let name = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
    Some(String::from_utf8_lossy(name).into_owned())
}

/// What `/proc/PID/task/TID/status` says of a thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThreadStatus {
    /// `comm`.
    pub name: String,
    /// One letter: R, S, D, T (stopped), t (traced), Z, X, I.
    pub state: char,
    /// Process the thread belongs to.
    pub tgid: i32,
    /// Tracer of the thread, 0 for none.
    pub tracer_pid: i32,
    /// Effective user id.
    pub euid: u32,
    /// Seccomp mode: 0 none, 1 strict, 2 filter; `None` where the kernel doesn't say.
    pub seccomp: Option<u32>,
    /// Process ids, outermost pid namespace first; empty where the kernel doesn't say.
    pub ns_pids: Vec<i32>,
    /// Blocked signals, bit n-1 for signal n.
    pub blocked: u64,
    /// Ignored signals.
    pub ignored: u64,
    /// Caught signals.
    pub caught: u64,
    /// False for a kernel thread or a zombie: there is no user memory.
    pub has_memory: bool,
}

/// The status of thread `tid` of process `pid`.
pub fn status(pid: i32, tid: i32) -> Result<ThreadStatus, FactError> {
    let status = Process::new(pid)
        .and_then(|p| p.task_from_tid(tid))
        .and_then(|t| t.status())
        .map_err(|e| FactError::new(pid, "status", e))?;
    Ok(ThreadStatus {
        state: status.state.chars().next().unwrap_or('?'),
        tgid: status.tgid,
        tracer_pid: status.tracerpid,
        euid: status.euid,
        seccomp: status.seccomp,
        ns_pids: status.nspid.unwrap_or_default(),
        blocked: status.sigblk,
        ignored: status.sigign,
        caught: status.sigcgt,
        has_memory: status.vmsize.is_some(),
        name: status.name,
    })
}

/// When the kernel says the process was started, in clock ticks since boot: with the pid, the identity of a
/// process.
pub fn start_time(pid: i32) -> Result<u64, FactError> {
    let stat = Process::new(pid).and_then(|p| p.stat()).map_err(|e| FactError::new(pid, "stat", e))?;
    Ok(stat.starttime)
}

/// When the process was started, in seconds since the epoch.
pub fn started_at(pid: i32) -> Result<f64, FactError> {
    let boot = procfs::boot_time_secs().map_err(|e| FactError::new(pid, "stat", e))?;
    Ok(boot as f64 + start_time(pid)? as f64 / procfs::ticks_per_second() as f64)
}

/// Our own effective capabilities, bit n for capability n (capability.h); `None` where the kernel doesn't say.
pub fn effective_capabilities() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let hex = status.lines().find_map(|l| l.strip_prefix("CapEff:"))?;
    u64::from_str_radix(hex.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_its_own_code_and_threads() {
        let pid = std::process::id() as i32;
        let here = RemoteAddr(finds_its_own_code_and_threads as *const () as u64);
        let maps = mappings(pid).unwrap();
        let text = maps.iter().find(|m| m.contains(here)).expect("own text is mapped");
        assert!(text.perms.execute && !text.perms.write && text.is_file());
        assert!(tasks(pid).unwrap().contains(&pid));
        let status = status(pid, pid).unwrap();
        assert_eq!((status.tgid, status.has_memory), (pid, true));
        assert_eq!(task_name(pid, pid).unwrap(), status.name);
    }

    #[test]
    fn a_process_that_is_not_there_is_said_to_be_gone() {
        // Above the largest pid Linux gives (PID_MAX_LIMIT is 2^22).
        assert!(matches!(mappings(1 << 23), Err(FactError::Gone { .. })));
    }

    #[test]
    fn the_mark_of_deletion_is_not_part_of_the_path() {
        let Backing::File { path, deleted } = file(PathBuf::from("/x/a\\012b (deleted)")) else { panic!() };
        assert_eq!((path, deleted), (PathBuf::from("/x/a\nb"), true));
    }
}
