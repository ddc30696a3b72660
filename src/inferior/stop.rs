//! A raw wait status becomes a [`StopEvent`]. Pure.
//!
//! Source: ptrace(2) "Stopped states", for tracees attached by PTRACE_SEIZE. Who a clone or fork event
//! tells of is not in the status: see [`super::sys::event_message`].

/// What a tracee's wait status tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopEvent {
    /// The thread (or, for the leader, the process) exited with this code.
    Exited(i32),
    /// It was killed by this signal.
    Killed(i32),
    /// A signal is about to be delivered; SIGTRAP here is also what an int3 gives.
    Signal(i32),
    /// The process is stopped by this job-control signal.
    GroupStop(i32),
    /// PTRACE_INTERRUPT took effect, or a new tracee shows up, or a group stop ended.
    Interrupted,
    /// Entry to or exit from a system call, under PTRACE_SYSCALL.
    Syscall,
    /// `clone`: mostly a new thread.
    Clone,
    /// `fork`, or a clone that signals SIGCHLD.
    Fork,
    /// `vfork`, or a clone with CLONE_VFORK.
    Vfork,
    /// The process executed a program.
    Exec,
    /// An event that was not asked for; harmless, resumed.
    Other(i32),
}

impl StopEvent {
    /// True when the tracee does not exist any more.
    pub fn is_end(self) -> bool {
        matches!(self, Self::Exited(_) | Self::Killed(_))
    }
}

/// Decodes a status as `waitpid` stored it.
pub fn decode(status: i32) -> StopEvent {
    if libc::WIFEXITED(status) {
        return StopEvent::Exited(libc::WEXITSTATUS(status));
    }
    if libc::WIFSIGNALED(status) {
        return StopEvent::Killed(libc::WTERMSIG(status));
    }
    let signal = libc::WSTOPSIG(status);
    match status >> 16 {
        0 if signal == libc::SIGTRAP | 0x80 => StopEvent::Syscall,
        0 => StopEvent::Signal(signal),
        libc::PTRACE_EVENT_STOP if signal == libc::SIGTRAP => StopEvent::Interrupted,
        libc::PTRACE_EVENT_STOP => StopEvent::GroupStop(signal),
        libc::PTRACE_EVENT_CLONE => StopEvent::Clone,
        libc::PTRACE_EVENT_FORK => StopEvent::Fork,
        libc::PTRACE_EVENT_VFORK => StopEvent::Vfork,
        libc::PTRACE_EVENT_EXEC => StopEvent::Exec,
        other => StopEvent::Other(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stopped(signal: i32, event: i32) -> i32 {
        (event << 16) | (signal << 8) | 0x7f
    }

    #[test]
    fn ends_are_told_from_stops() {
        assert_eq!(decode(0), StopEvent::Exited(0));
        assert_eq!(decode(3 << 8), StopEvent::Exited(3));
        assert_eq!(decode(libc::SIGKILL), StopEvent::Killed(libc::SIGKILL));
        assert_eq!(decode(libc::SIGSEGV | 0x80), StopEvent::Killed(libc::SIGSEGV));
    }

    #[test]
    fn a_group_stop_is_told_from_a_stop_signal_and_from_an_interrupt() {
        assert_eq!(decode(stopped(libc::SIGSTOP, 0)), StopEvent::Signal(libc::SIGSTOP));
        assert_eq!(
            decode(stopped(libc::SIGSTOP, libc::PTRACE_EVENT_STOP)),
            StopEvent::GroupStop(libc::SIGSTOP)
        );
        assert_eq!(
            decode(stopped(libc::SIGTSTP, libc::PTRACE_EVENT_STOP)),
            StopEvent::GroupStop(libc::SIGTSTP)
        );
        assert_eq!(decode(stopped(libc::SIGTRAP, libc::PTRACE_EVENT_STOP)), StopEvent::Interrupted);
    }

    #[test]
    fn traps_syscalls_and_events_differ() {
        assert_eq!(decode(stopped(libc::SIGTRAP, 0)), StopEvent::Signal(libc::SIGTRAP));
        assert_eq!(decode(stopped(libc::SIGTRAP | 0x80, 0)), StopEvent::Syscall);
        assert_eq!(decode(stopped(libc::SIGTRAP, libc::PTRACE_EVENT_EXEC)), StopEvent::Exec);
        assert_eq!(decode(stopped(libc::SIGTRAP, libc::PTRACE_EVENT_CLONE)), StopEvent::Clone);
        assert_eq!(decode(stopped(64, 0)), StopEvent::Signal(64));
    }
}
