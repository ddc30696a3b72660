//! What is asked of a stopped thread: its registers, signals and mask, a system call in its name.

use super::error::TraceError;
use super::remote_call::{self, Call, Ended, Gadgets};
use super::sys::{self, Of, Registers, Wait, Waited};
use super::world::Held;
use super::{Inferior, SI_KERNEL, maps, write_memory};
use crate::addr::RemoteAddr;
use nix::errno::Errno;

impl Inferior {
    /// Writes into the process, also where it may only read or execute (`FOLL_FORCE`): such a page becomes
    /// the process's private copy.
    pub fn write(&self, addr: RemoteAddr, bytes: &[u8]) -> Result<(), TraceError> {
        write_memory(&self.mem_file, self.pid, addr, bytes)
    }

    /// Registers of a stopped thread.
    pub fn registers(&self, tid: i32) -> Result<Registers, TraceError> {
        sys::registers(tid).map_err(TraceError::of("read the registers of", tid))
    }

    /// The vector registers and the rest of a stopped thread's extended state; `None` where the processor has none.
    pub fn extended_state(&self, tid: i32) -> Result<Option<Vec<u8>>, TraceError> {
        sys::extended_state(tid).map_err(TraceError::of("read the vector registers of", tid))
    }

    /// Sets the instruction pointer of a stopped thread.
    pub fn set_rip(&self, tid: i32, rip: RemoteAddr) -> Result<(), TraceError> {
        sys::set_rip(tid, rip.0).map_err(TraceError::of("set the instruction pointer of", tid))
    }

    /// Blocked signals of a stopped thread; bit `n - 1` is signal `n`.
    pub fn mask(&self, tid: i32) -> Result<u64, TraceError> {
        sys::signal_mask(tid).map_err(TraceError::of("read the signal mask of", tid))
    }

    /// Sets the blocked signals of a stopped thread.
    pub fn set_mask(&self, tid: i32, mask: u64) -> Result<(), TraceError> {
        sys::set_signal_mask(tid, mask).map_err(TraceError::of("set the signal mask of", tid))
    }

    /// The signal that a stopped thread holds, if any.
    pub fn held_signal(&self, tid: i32) -> Option<i32> {
        match self.world.held(tid) {
            Some(Held::Signal(signal)) => Some(signal),
            _ => None,
        }
    }

    /// The held signal of `tid` was ours: it is not delivered. (While the thread is stopped the kernel still
    /// has it, should we be killed: see [`sys::wait`].)
    pub fn drop_signal(&mut self, tid: i32) {
        self.world.set_held(tid, Held::Nothing);
    }

    /// Drops the held signal of `tid`, for the kernel too: the thread is taken to another stop without
    /// executing an instruction.
    pub fn drop_signal_now(&mut self, tid: i32) -> Result<(), TraceError> {
        let settled = remote_call::settle(tid, Held::Nothing)?;
        let held = self.unless_ended(tid, settled)?;
        self.world.set_held(tid, held);
        Ok(())
    }

    /// Whether the SIGTRAP that a stopped thread holds, or that is queued to it, was raised by an int3.
    pub fn trapped_by_int3(&self, tid: i32) -> bool {
        match self.world.held(tid) {
            Some(Held::Signal(libc::SIGTRAP)) => {
                sys::signal_info(tid).is_ok_and(|(_, code)| code == SI_KERNEL)
            }
            _ => false,
        }
    }

    /// Whether an int3's SIGTRAP is queued to a stopped thread and has not been reported yet.
    pub fn int3_queued(&self, tid: i32) -> bool {
        sys::queued_signals(tid).is_ok_and(|q| q.contains(&(libc::SIGTRAP, SI_KERNEL)))
    }

    /// Takes a stopped thread to its next stop without letting it execute an instruction, so that a signal
    /// that is queued but not yet reported (an int3's SIGTRAP, after PTRACE_INTERRUPT won the race) is held.
    pub fn report_queued_signal(&mut self, tid: i32) -> Result<(), TraceError> {
        sys::resume(tid, 0).map_err(TraceError::of("resume", tid))?;
        loop {
            match sys::wait(Of::Tracee(tid), Wait::Block).map_err(TraceError::Wait)? {
                Waited::Stop(tid, event) => return self.on_stop(tid, event),
                Waited::Nothing => {}
                Waited::NoTracees => return Err(TraceError::Gone { tid }),
            }
        }
    }

    /// Makes a system call in the name of the stopped thread `tid`. What the thread held is delivered first
    /// when it is a signal; a group stop stays in force.
    pub fn remote_syscall(&mut self, tid: i32, call: Call) -> Result<u64, TraceError> {
        let held = self.world.held(tid).ok_or(TraceError::Gone { tid })?;
        let settled = remote_call::settle(tid, held)?;
        let held = self.unless_ended(tid, settled)?;
        self.world.set_held(tid, held);
        self.call_from(tid, call, held)
    }

    /// The same for a thread that is stopped at a trap whose signal was dropped: it executes user code, and nothing has
    /// to be delivered or restarted.
    pub fn remote_syscall_at_trap(&mut self, tid: i32, call: Call) -> Result<u64, TraceError> {
        self.call_from(tid, call, Held::Nothing)
    }

    fn call_from(&mut self, tid: i32, call: Call, held: Held) -> Result<u64, TraceError> {
        let gadgets = self.gadgets()?;
        let outcome = self.without_seccomp(tid, |me| {
            remote_call::call(tid, gadgets, call, held, &|addr, bytes| me.write(addr, bytes))
        })?;
        self.world.set_held(tid, outcome.held);
        let raw = self.unless_ended(tid, outcome.result)?;
        remote_call::decode_result(self.pid, call.name, raw)
    }

    /// From now on system calls in the target's name are made with its seccomp filters suspended, each for
    /// just as long as it takes.
    pub fn suspend_filters(&mut self) -> Result<(), Errno> {
        let Some(tid) = self.world.tids().into_iter().find(|t| self.world.held(*t).is_some()) else {
            return Err(Errno::ESRCH);
        };
        sys::suspend_seccomp(tid, self.scope, true)?;
        sys::suspend_seccomp(tid, self.scope, false)?;
        self.filtered = true;
        Ok(())
    }

    pub(super) fn without_seccomp<T>(
        &mut self,
        tid: i32,
        act: impl FnOnce(&mut Self) -> Result<T, TraceError>,
    ) -> Result<T, TraceError> {
        if !self.filtered {
            return act(self);
        }
        sys::suspend_seccomp(tid, self.scope, true)
            .map_err(TraceError::of("suspend the seccomp filter of", tid))?;
        let result = act(self);
        match sys::suspend_seccomp(tid, self.scope, false) {
            Ok(()) | Err(Errno::ESRCH) => result,
            Err(errno) => Err(TraceError::of("restore the seccomp filter of", tid)(errno)),
        }
    }

    pub(super) fn unless_ended<T>(&mut self, tid: i32, result: Result<T, Ended>) -> Result<T, TraceError> {
        result.map_err(|Ended(event)| {
            // The machine has to know; what it answers is reported by `next`.
            let reaction = self.world.on_stop(tid, event);
            let _ = self.react(tid, event, reaction);
            TraceError::Gone { tid }
        })
    }

    /// Looks up what system calls in the target's name need, before anything is stopped for them.
    pub fn prepare_calls(&mut self) -> Result<(), TraceError> {
        self.gadgets().map(drop)
    }

    /// What the target's signal handlers return through, as far as known; see [`Inferior::prepare_calls`].
    pub fn restorer(&self) -> Option<RemoteAddr> {
        self.gadgets.and_then(|g| g.restorer)
    }

    pub(super) fn gadgets(&mut self) -> Result<Gadgets, TraceError> {
        if let Some(found) = self.gadgets {
            return Ok(found);
        }
        let maps = maps::mappings(self.pid).map_err(|e| TraceError::Proc {
            path: format!("/proc/{}/maps", self.pid),
            source: std::io::Error::other(e),
        })?;
        let found = remote_call::find_gadgets(self.pid, &self.memory, &maps)?;
        self.gadgets = Some(found);
        Ok(found)
    }
}
