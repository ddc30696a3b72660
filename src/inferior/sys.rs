//! Every ptrace(2), wait4(2), kcmp(2), pidfd and signal-handler call of the controller, and the only place that
//! reads their errno. nix is not used for `waitpid` here: its decoder rejects stops by real-time signals.
//!
//! Knows the kernel's calling conventions; knows nothing of what the stops mean.
#![allow(unsafe_code)]

use super::stop::{StopEvent, decode};
use nix::errno::Errno;
use std::ffi::{c_int, c_long, c_void};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;

/// General registers of a stopped thread, as `PTRACE_GETREGS` gives them.
pub type Registers = libc::user_regs_struct;

/// Options that every tracee gets at SEIZE, so that none runs a moment without them.
const OPTIONS: c_int = libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACEEXEC;
/// `<linux/ptrace.h>`: seccomp filters rest while the tracee has this option (needs CAP_SYS_ADMIN).
const SUSPEND_SECCOMP: c_int = 1 << 21;
const PTRACE_LISTEN: u32 = 0x4208;
const PTRACE_PEEKSIGINFO: u32 = 0x4209;
const PTRACE_GETSIGMASK: u32 = 0x420a;
const PTRACE_SETSIGMASK: u32 = 0x420b;
/// `offsetof(struct user, regs.rip)`.
const USER_RIP: usize = std::mem::offset_of!(libc::user_regs_struct, rip);
const KCMP_VM: c_int = 1;
/// FXSAVE area and XSAVE header: what every XSAVE image has.
pub const LEAST_XSAVE_LEN: usize = 576;
/// `<linux/elf.h>`
const NT_X86_XSTATE: usize = 0x202;

/// `struct ptrace_peeksiginfo_args` of `<linux/ptrace.h>`.
#[repr(C)]
struct PeekSiginfo {
    offset: u64,
    flags: u32,
    count: i32,
}

fn ptrace(request: u32, tid: i32, addr: usize, data: usize) -> Result<c_long, Errno> {
    Errno::clear();
    // SAFETY: every caller in this file passes, for requests that make the kernel write to or read from our
    // memory, the address of a live value of the type that ptrace(2) names for that request.
    let value = unsafe { libc::ptrace(request, tid, addr as *mut c_void, data as *mut c_void) };
    if value == -1 && Errno::last_raw() != 0 { Err(Errno::last()) } else { Ok(value) }
}

/// How much of a process is traced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// All of it, and whatever it gives birth to from the first moment on.
    Whole,
    /// One thread; what it gives birth to is not.
    Thread,
}

impl Scope {
    fn options(self) -> c_int {
        match self {
            Self::Whole => OPTIONS,
            Self::Thread => libc::PTRACE_O_TRACESYSGOOD,
        }
    }
}

/// Starts tracing `tid` without stopping it.
pub fn seize(tid: i32, scope: Scope) -> Result<(), Errno> {
    ptrace(libc::PTRACE_SEIZE, tid, 0, scope.options() as usize).map(drop)
}

/// Asks a running tracee to stop.
pub fn interrupt(tid: i32) -> Result<(), Errno> {
    ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// Lets a stopped tracee run, delivering `signal` (0: none).
pub fn resume(tid: i32, signal: i32) -> Result<(), Errno> {
    ptrace(libc::PTRACE_CONT, tid, 0, signal as usize).map(drop)
}

/// Lets a stopped tracee run to the next entry to or exit from a system call, delivering `signal` (0: none).
pub fn resume_to_syscall_with(tid: i32, signal: i32) -> Result<(), Errno> {
    ptrace(libc::PTRACE_SYSCALL, tid, 0, signal as usize).map(drop)
}

/// Keeps a group-stopped tracee stopped, but reports SIGCONT.
pub fn listen(tid: i32) -> Result<(), Errno> {
    ptrace(PTRACE_LISTEN, tid, 0, 0).map(drop)
}

/// Ends tracing of a stopped tracee, delivering `signal` (0: none).
pub fn detach(tid: i32, signal: i32) -> Result<(), Errno> {
    ptrace(libc::PTRACE_DETACH, tid, 0, signal as usize).map(drop)
}

/// Registers of a stopped tracee.
pub fn registers(tid: i32) -> Result<Registers, Errno> {
    let mut regs = no_registers();
    ptrace(libc::PTRACE_GETREGS, tid, 0, &raw mut regs as usize)?;
    Ok(regs)
}

/// Sets the registers of a stopped tracee.
pub fn set_registers(tid: i32, regs: &Registers) -> Result<(), Errno> {
    ptrace(libc::PTRACE_SETREGS, tid, 0, std::ptr::from_ref(regs) as usize).map(drop)
}

/// The extended state (XSAVE image in the standard format) of a stopped tracee; `None` where the processor has none.
pub fn extended_state(tid: i32) -> Result<Option<Vec<u8>>, Errno> {
    let mut image = vec![0_u8; 16 << 10];
    let mut iov = libc::iovec { iov_base: image.as_mut_ptr().cast(), iov_len: image.len() };
    match ptrace(libc::PTRACE_GETREGSET, tid, NT_X86_XSTATE, &raw mut iov as usize) {
        Ok(_) => {
            image.truncate(iov.iov_len);
            Ok(Some(image))
        }
        Err(Errno::ENODEV | Errno::EINVAL) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Bytes of an XSAVE image in the standard format that holds these features (CPUID leaf 0xD).
pub fn xsave_len(features: u64) -> usize {
    let wanted = (2..63).filter(|i| features & (1 << i) != 0);
    let ends = wanted.map(|i| {
        let leaf = std::arch::x86_64::__cpuid_count(0xd, i);
        (leaf.ebx + leaf.eax) as usize
    });
    ends.max().unwrap_or(0).max(LEAST_XSAVE_LEN)
}

/// Sets the instruction pointer of a stopped tracee.
pub fn set_rip(tid: i32, rip: u64) -> Result<(), Errno> {
    ptrace(libc::PTRACE_POKEUSER, tid, USER_RIP, rip as usize).map(drop)
}

/// Signal number and `si_code` of the signal-delivery-stop that `tid` is in.
pub fn signal_info(tid: i32) -> Result<(i32, i32), Errno> {
    // SAFETY: an all-zero siginfo_t is a valid value: it holds integers alone.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    ptrace(libc::PTRACE_GETSIGINFO, tid, 0, &raw mut info as usize)?;
    Ok((info.si_signo, info.si_code))
}

/// Signals queued to the stopped thread `tid` itself: number and `si_code` of each, up to 32.
pub fn queued_signals(tid: i32) -> Result<Vec<(i32, i32)>, Errno> {
    let args = PeekSiginfo { offset: 0, flags: 0, count: 32 };
    // SAFETY: as in `signal_info`; the kernel fills at most `count` elements.
    let mut infos: [libc::siginfo_t; 32] = unsafe { std::mem::zeroed() };
    let n = ptrace(PTRACE_PEEKSIGINFO, tid, &raw const args as usize, infos.as_mut_ptr() as usize)?;
    Ok(infos[..n as usize].iter().map(|i| (i.si_signo, i.si_code)).collect())
}

/// Blocked signals of a stopped tracee; bit `n - 1` is signal `n`.
pub fn signal_mask(tid: i32) -> Result<u64, Errno> {
    let mut mask = 0_u64;
    ptrace(PTRACE_GETSIGMASK, tid, 8, &raw mut mask as usize)?;
    Ok(mask)
}

/// Sets the blocked signals of a stopped tracee.
pub fn set_signal_mask(tid: i32, mask: u64) -> Result<(), Errno> {
    ptrace(PTRACE_SETSIGMASK, tid, 8, &raw const mask as usize).map(drop)
}

/// Thread or process id that the PTRACE_EVENT stop of `tid` tells of.
pub fn event_message(tid: i32) -> Result<i32, Errno> {
    let mut message: libc::c_ulong = 0;
    ptrace(libc::PTRACE_GETEVENTMSG, tid, 0, &raw mut message as usize)?;
    Ok(message as i32)
}

/// Turns seccomp filters of a stopped tracee off (until it is detached) or on again.
pub fn suspend_seccomp(tid: i32, scope: Scope, suspended: bool) -> Result<(), Errno> {
    let options = scope.options() | if suspended { SUSPEND_SECCOMP } else { 0 };
    ptrace(libc::PTRACE_SETOPTIONS, tid, 0, options as usize).map(drop)
}

/// How [`wait`] waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Until something stops or a signal handler of ours ran.
    Block,
    /// Not at all.
    Poll,
}

/// Whose stops [`wait`] looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Of {
    /// Any tracee's.
    Any,
    /// This one's.
    Tracee(i32),
}

/// The answer of [`wait`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waited {
    /// A tracee is stopped or ended.
    Stop(i32, StopEvent),
    /// Nothing is there now (`Poll`), or a signal of ours came (`Block`).
    Nothing,
    /// There is no such tracee (any more).
    NoTracees,
}

/// A stop of a tracee. It is looked at, not taken: it is reported again until the tracee is resumed.
///
/// A stop that is taken from the kernel (`waitpid` without WNOWAIT) loses the signal that it carries should
/// we die before we resume the tracee (`wait_task_stopped` clears the exit code that `ptrace_stop` would
/// deliver): a thread at a breakpoint would go on in the middle of an instruction, and an application's own
/// signals would be lost. Only ends are taken.
pub fn wait(of: Of, how: Wait) -> Result<Waited, Errno> {
    let (id_type, id) = match of {
        Of::Any => (libc::P_ALL, 0),
        Of::Tracee(tid) => (libc::P_PID, tid as libc::id_t),
    };
    let hang = if how == Wait::Poll { libc::WNOHANG } else { 0 };
    let flags = libc::WEXITED | libc::WSTOPPED | libc::WNOWAIT | libc::__WALL | hang;
    // SAFETY: an all-zero siginfo_t is valid, and outlives the call.
    let (answer, info) = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        (libc::waitid(id_type, id, &raw mut info, flags), info)
    };
    if answer == -1 {
        return match Errno::last() {
            Errno::EINTR => Ok(Waited::Nothing),
            Errno::ECHILD => Ok(Waited::NoTracees),
            errno => Err(errno),
        };
    }
    // SAFETY: waitid filled the fields of a SIGCHLD; where it found nothing, they are zero.
    let (tid, status) = unsafe { (info.si_pid(), info.si_status()) };
    if tid == 0 {
        return Ok(Waited::Nothing);
    }
    let event = match info.si_code {
        libc::CLD_EXITED => StopEvent::Exited(status),
        libc::CLD_KILLED | libc::CLD_DUMPED => StopEvent::Killed(status),
        // What waitpid(2) would give as status.
        _ => decode(status << 8 | 0x7f),
    };
    if event.is_end() {
        // SAFETY: no status is asked for.
        unsafe { libc::waitpid(tid, std::ptr::null_mut(), libc::__WALL | libc::WNOHANG) };
    }
    Ok(Waited::Stop(tid, event))
}

/// Whether two processes share one address space; `None` where the kernel won't say.
pub fn share_memory(a: i32, b: i32) -> Option<bool> {
    // SAFETY: kcmp takes integers alone.
    match unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_VM, 0, 0) } {
        0 => Some(true),
        1..=3 => Some(false),
        _ => None,
    }
}

/// pidfd_open(2) of a process.
pub fn open_pidfd(pid: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: pidfd_open takes integers alone.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the kernel made it just now for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Whether every thread of a pidfd's process has exited.
pub fn has_exited(pidfd: &OwnedFd) -> bool {
    let mut poll = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, which poll writes to.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}

/// The wait status of a pidfd's process that somebody has waited for: PIDFD_GET_INFO of `<linux/pidfd.h>`, Linux 6.15.
pub fn exit_status(pidfd: &OwnedFd) -> Option<i32> {
    // SAFETY: a plain structure of integers.
    let mut info: libc::pidfd_info = unsafe { std::mem::zeroed() };
    info.mask = u64::from(libc::PIDFD_INFO_EXIT);
    // SAFETY: the request's number has the structure's size in it: the kernel writes no more.
    let answer = unsafe { libc::ioctl(pidfd.as_raw_fd(), libc::PIDFD_GET_INFO, &raw mut info) };
    let told = answer == 0 && info.mask & u64::from(libc::PIDFD_INFO_EXIT) != 0;
    told.then_some(info.exit_code)
}

static STOP_SIGNAL: AtomicI32 = AtomicI32::new(0);
static TICKED: AtomicBool = AtomicBool::new(false);
static SNAPSHOT_ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(signal: c_int) {
    match signal {
        libc::SIGALRM => TICKED.store(true, Ordering::Relaxed),
        libc::SIGUSR1 => SNAPSHOT_ASKED.store(true, Ordering::Relaxed),
        _ => STOP_SIGNAL.store(signal, Ordering::Relaxed),
    }
}

/// Makes SIGINT and SIGTERM a request to end (see [`requested_stop`]), SIGUSR1 one for a snapshot ([`snapshot_asked`]), and starts
/// a timer whose ticks end a blocking [`wait`]. Handlers are set without SA_RESTART: a signal that comes between the check and the
/// wait is seen at the next tick.
///
/// What a terminal does to us is ignored: that it goes (SIGHUP) is no reason to end, and a line of progress written from the
/// background (SIGTTOU, `stty tostop`) may not stop us, for the agent would take us for dead.
pub fn install_stop_signals(tick: Duration) -> Result<(), Errno> {
    for (signal, handler) in [
        (libc::SIGINT, on_signal as *const () as usize),
        (libc::SIGTERM, on_signal as *const () as usize),
        (libc::SIGALRM, on_signal as *const () as usize),
        (libc::SIGUSR1, on_signal as *const () as usize),
        (libc::SIGHUP, libc::SIG_IGN),
        (libc::SIGTTOU, libc::SIG_IGN),
    ] {
        // SAFETY: an all-zero sigaction is valid; `on_signal` only stores to atomics, which is
        // async-signal-safe.
        let answer = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut())
        };
        Errno::result(answer)?;
    }
    let interval = libc::timeval { tv_sec: tick.as_secs() as i64, tv_usec: i64::from(tick.subsec_micros()) };
    let timer = libc::itimerval { it_interval: interval, it_value: interval };
    // SAFETY: `timer` is a valid itimerval; the old one is not wanted.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_setitimer,
            libc::ITIMER_REAL,
            &raw const timer,
            std::ptr::null_mut::<c_void>(),
        )
    };
    Errno::result(answer).map(drop)
}

/// The signal that asked us to end, if one came.
pub fn requested_stop() -> Option<i32> {
    match STOP_SIGNAL.load(Ordering::Relaxed) {
        0 => None,
        signal => Some(signal),
    }
}

/// Whether SIGUSR1 came since the last call.
pub fn snapshot_asked() -> bool {
    SNAPSHOT_ASKED.load(Ordering::Relaxed) && SNAPSHOT_ASKED.swap(false, Ordering::Relaxed)
}

/// The user whose process is at the other end of a Unix socket (SO_PEERCRED).
pub fn peer_user(socket: &impl AsRawFd) -> Result<u32, Errno> {
    let mut credentials = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes into `credentials`, which lives as long as the call.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut len,
        )
    };
    Errno::result(answer).map(|_| credentials.uid)
}

/// Whether the timer ticked since the last call.
pub fn ticked() -> bool {
    // The load alone, nearly always: this is asked for every event.
    TICKED.load(Ordering::Relaxed) && TICKED.swap(false, Ordering::Relaxed)
}

/// Registers that are all zero.
pub fn no_registers() -> Registers {
    // SAFETY: an all-zero user_regs_struct is a valid value: it holds integers alone.
    unsafe { std::mem::zeroed() }
}
