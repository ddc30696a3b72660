//! What /proc tells of a process or thread before and while it is traced. Reads only.

use super::error::{AttachError, TraceError};
use super::maps;
use super::stop::StopEvent;
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::sys::statfs::{PROC_SUPER_MAGIC, statfs};
use nix::unistd::Pid;
use procfs::ProcError;
use procfs::process::{Process, Status};

/// `PF_KTHREAD` of the kernel's `sched.h`, in the flags of proc_pid_stat(5).
const PF_KTHREAD: u32 = 0x0020_0000;

fn proc_error(path: String) -> impl FnOnce(ProcError) -> TraceError {
    move |e| TraceError::Proc { path, source: std::io::Error::other(e) }
}

/// `/proc/TID/status`, or `None` when the thread is gone.
pub fn status(tid: i32) -> Result<Option<Status>, TraceError> {
    match Process::new(tid).and_then(|p| p.status()) {
        Ok(status) => Ok(Some(status)),
        Err(ProcError::NotFound(_)) => Ok(None),
        Err(ProcError::Io(e, _)) if e.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(e) => Err(proc_error(format!("/proc/{tid}/status"))(e)),
    }
}

/// State letter of a thread (`R S D T t Z X …`), or `None` when it is gone.
pub fn state(pid: i32, tid: i32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat")).ok()?;
    // The name may hold spaces and parentheses: the state follows the last ')'.
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

/// The most memory that we ourselves had resident, in bytes; 0 if the kernel won't say.
pub fn peak_resident() -> u64 {
    let status = Process::myself().and_then(|p| p.status()).ok();
    status.and_then(|s| s.vmhwm).map_or(0, |kilobytes| kilobytes * 1024)
}

/// How process `pid` ended, while nobody has waited for it.
pub fn zombie(pid: i32) -> Option<StopEvent> {
    let stat = Process::new(pid).and_then(|p| p.stat()).ok()?;
    // The status as waitpid(2) gives it.
    let status = stat.exit_code.filter(|_| stat.state == 'Z')?;
    match status & 0x7f {
        0 => Some(StopEvent::Exited(status >> 8 & 0xff)),
        signal => Some(StopEvent::Killed(signal)),
    }
}

/// Ids of the threads of `pid` now.
pub fn threads(pid: i32) -> Result<Vec<i32>, TraceError> {
    let path = format!("/proc/{pid}/task");
    let entries = match std::fs::read_dir(&path) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(TraceError::Proc { path, source }),
    };
    Ok(entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
}

/// Whether any thread of `pid` runs under seccomp, by a filter or strictly. Each thread may have filters of its own.
pub fn has_seccomp(pid: i32) -> Result<bool, TraceError> {
    for tid in threads(pid)? {
        if status(tid)?.is_some_and(|s| s.seccomp.unwrap_or(0) != 0) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// `/proc/PID/comm`, without its newline.
pub fn name(tid: i32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{tid}/comm")).unwrap_or_default();
    name.trim_end_matches('\n').to_string()
}

/// `kernel.yama.ptrace_scope`, where the kernel has it.
pub fn ptrace_scope() -> Option<u8> {
    std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").ok()?.trim().parse().ok()
}

/// Refuses what can't be traced, by what /proc shows, before anything is asked of the kernel.
pub fn check_attachable(pid: i32) -> Result<(), AttachError> {
    if pid == std::process::id() as i32 {
        return Err(AttachError::Myself { pid });
    }
    if pid <= 0 {
        return Err(AttachError::NoProcess { pid });
    }
    check_proc()?;
    let seen = Process::new(pid).and_then(|process| Ok((process.status()?, process)));
    let (status, process) = match seen {
        Ok(seen) => seen,
        // What hidepid=noaccess says of a process that is not ours to see; hidepid=invisible says nothing.
        Err(ProcError::PermissionDenied(_)) => return Err(AttachError::Hidden { pid }),
        Err(ProcError::NotFound(_)) if lives(pid) => return Err(AttachError::Hidden { pid }),
        Err(_) => return Err(AttachError::NoProcess { pid }),
    };
    if status.tgid != pid {
        return Err(AttachError::IsThread { tid: pid, pid: status.tgid });
    }
    let stat = process.stat().map_err(proc_error(format!("/proc/{pid}/stat")))?;
    if stat.flags & PF_KTHREAD != 0 {
        return Err(AttachError::KernelThread { pid, name: stat.comm });
    }
    // A leader that exited before its threads is a zombie, too, but its process lives.
    if stat.state == 'Z' && threads(pid)?.len() <= 1 {
        return Err(AttachError::Zombie { pid });
    }
    if status.tracerpid != 0 {
        return Err(already_traced(pid, status.tracerpid));
    }
    check_permitted(pid)
}

/// Whether /proc is there and means the same processes by their numbers as the kernel does for us.
fn check_proc() -> Result<(), AttachError> {
    let is_proc = statfs("/proc").is_ok_and(|found| found.filesystem_type() == PROC_SUPER_MAGIC);
    if !is_proc {
        return Err(AttachError::NoProc);
    }
    let myself = std::fs::read_link("/proc/self").ok();
    match myself.and_then(|link| link.to_str()?.parse::<u32>().ok()) {
        Some(pid) if pid == std::process::id() => Ok(()),
        _ => Err(AttachError::ForeignProc),
    }
}

/// Whether a process is there at all, /proc aside.
fn lives(pid: i32) -> bool {
    matches!(kill(Pid::from_raw(pid), None), Ok(()) | Err(Errno::EPERM))
}

pub(super) fn already_traced(pid: i32, tracer: i32) -> AttachError {
    AttachError::AlreadyTraced { pid, tracer, name: name(tracer) }
}

/// The refusal of the kernel, with what explains it.
pub(super) fn not_permitted(pid: i32) -> AttachError {
    let owner = std::fs::metadata(format!("/proc/{pid}"))
        .map(|m| std::os::unix::fs::MetadataExt::uid(&m))
        .unwrap_or_default();
    AttachError::NotPermitted { pid, owner, ptrace_scope: ptrace_scope() }
}

/// Refuses what the kernel would not let us trace: opening the target's memory for writing takes the same
/// check as PTRACE_ATTACH (`ptrace_may_access` with PTRACE_MODE_ATTACH), and changes nothing.
pub fn check_permitted(pid: i32) -> Result<(), AttachError> {
    let path = format!("/proc/{}/mem", maps::memory_holder(pid));
    match std::fs::File::options().read(true).write(true).open(&path) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => Err(not_permitted(pid)),
        Err(source) => Err(TraceError::Proc { path, source }.into()),
    }
}

/// Whether a process has memory: one that is ending has none for a while before it has ended.
pub fn has_memory(pid: i32) -> bool {
    match std::fs::read(format!("/proc/{}/maps", maps::memory_holder(pid))) {
        Ok(maps) => !maps.is_empty(),
        // What it executes now is not to be looked at by us.
        Err(error) => error.kind() == std::io::ErrorKind::PermissionDenied,
    }
}

/// Bytes that process `pid` has resident; `None` where it has ended.
pub fn resident(pid: i32) -> Option<u64> {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * 4096)
}

/// A value of the auxiliary vector of `pid` (getauxval(3)).
pub fn auxiliary(pid: i32, key: u64) -> Option<u64> {
    let bytes = std::fs::read(format!("/proc/{}/auxv", super::maps::memory_holder(pid))).ok()?;
    let word = |b: &[u8]| u64::from_le_bytes(b.try_into().unwrap_or_default());
    bytes.chunks_exact(16).find(|pair| word(&pair[..8]) == key).map(|pair| word(&pair[8..]))
}
