//! One system call made in the name of a stopped thread of the target.
//!
//! The call runs on a `syscall` instruction that the target has anyway (the vDSO's), under
//! PTRACE_SYSCALL, with every signal blocked: no trap signal is raised (an int3 or a single step would make
//! the kernel reset a blocked SIGTRAP's disposition) and no signal of the target's is taken early or lost.
//! Afterwards registers and mask are what they were, and the thread is taken to a stop inside the kernel's
//! signal path, so that an interrupted system call restarts when it runs on.

use super::error::TraceError;
use super::stop::StopEvent;
use super::sys::{self, Registers, Wait, Waited};
use super::world::Held;
use crate::addr::RemoteAddr;
use crate::memory::RemoteMemory;
use nix::errno::Errno;
use procfs::process::{MMPermissions, MMapPath, Process};

/// `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// Text read at a time while looking for it, and the most that is looked at.
const SCAN_CHUNK: usize = 64 << 10;
const SCAN_LIMIT: usize = 4 << 20;
/// `MAX_ERRNO` of the kernel: results in -4095..=-1 are errors.
const MAX_ERRNO: u64 = 4095;

/// A system call to be made: name (for messages), number, arguments.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// Its name.
    pub name: &'static str,
    /// Its number.
    pub number: i64,
    /// Its arguments.
    pub args: [u64; 6],
}

/// A `syscall` instruction somewhere in the target's executable memory.
pub fn find_syscall_instruction(pid: i32, memory: &dyn RemoteMemory) -> Result<RemoteAddr, TraceError> {
    let path = format!("/proc/{pid}/maps");
    let failed =
        |e: procfs::ProcError| TraceError::Proc { path: path.clone(), source: std::io::Error::other(e) };
    let maps = Process::new(pid).and_then(|p| p.maps()).map_err(failed)?;
    let executable = |m: &&procfs::process::MemoryMap| {
        m.perms.contains(MMPermissions::EXECUTE | MMPermissions::READ) && m.pathname != MMapPath::Vsyscall
    };
    let vdso = maps.iter().filter(|m| m.pathname == MMapPath::Vdso);
    let others = maps.iter().filter(|m| m.pathname != MMapPath::Vdso);
    for map in vdso.chain(others).filter(executable) {
        let (mut at, end) = (map.address.0, map.address.1.min(map.address.0 + SCAN_LIMIT as u64));
        while at < end {
            let len = SCAN_CHUNK.min((end - at) as usize);
            let Ok(text) = memory.read_vec(RemoteAddr(at), len) else { break };
            if let Some(found) = text.windows(2).position(|w| w == SYSCALL) {
                return Ok(RemoteAddr(at + found as u64));
            }
            at += len as u64;
        }
    }
    Err(TraceError::Proc {
        path,
        source: std::io::Error::other("no syscall instruction in executable memory"),
    })
}

/// What became of a thread while a call was made in its name.
pub struct Outcome {
    /// The raw result, or how the thread ended.
    pub result: Result<u64, Ended>,
    /// What the thread has coming now.
    pub held: Held,
}

/// The thread ended under the call.
#[derive(Debug, Clone, Copy)]
pub struct Ended(pub StopEvent);

/// Takes a stopped thread, delivering what it held, to a stop in the kernel's signal path. No instruction of
/// the target runs: the interrupt is pending before the thread is let go.
pub fn settle(tid: i32, held: Held) -> Result<Result<Held, Ended>, TraceError> {
    sys::interrupt(tid).map_err(TraceError::of("interrupt", tid))?;
    let signal = if let Held::Signal(signal) = held { signal } else { 0 };
    sys::resume(tid, signal).map_err(TraceError::of("resume", tid))?;
    Ok(match wait_for(tid)? {
        end @ (StopEvent::Exited(_) | StopEvent::Killed(_)) => Err(Ended(end)),
        StopEvent::Signal(signal) => Ok(Held::Signal(signal)),
        StopEvent::GroupStop(signal) => Ok(Held::GroupStop(signal)),
        _ => Ok(Held::Nothing),
    })
}

/// Makes `call` in the name of the stopped and settled thread `tid`.
pub fn call(tid: i32, instruction: RemoteAddr, call: Call, held: Held) -> Result<Outcome, TraceError> {
    let saved = sys::registers(tid).map_err(TraceError::of("read the registers of", tid))?;
    let mask = sys::signal_mask(tid).map_err(TraceError::of("read the signal mask of", tid))?;
    sys::set_signal_mask(tid, !0).map_err(TraceError::of("block the signals of", tid))?;
    let mut held = held;
    let ran = run(tid, &prepared(&saved, instruction, call), &mut held);
    if let Ok(Err(ended)) = &ran {
        return Ok(Outcome { result: Err(*ended), held });
    }
    sys::set_registers(tid, &saved).map_err(TraceError::of("restore the registers of", tid))?;
    sys::set_signal_mask(tid, mask).map_err(TraceError::of("restore the signal mask of", tid))?;
    match settle(tid, Held::Nothing)? {
        Err(ended) => Ok(Outcome { result: Err(ended), held }),
        Ok(Held::Nothing) => Ok(Outcome { result: ran?, held }),
        Ok(now) => Ok(Outcome { result: ran?, held: now }),
    }
}

fn prepared(saved: &Registers, instruction: RemoteAddr, call: Call) -> Registers {
    let mut regs = *saved;
    regs.rip = instruction.0;
    regs.rax = call.number as u64;
    // No system call is being left: the kernel must not "restart" one over our registers.
    regs.orig_rax = u64::MAX;
    [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = call.args;
    regs
}

/// Runs to the entry, then to the exit of the call.
fn run(tid: i32, regs: &Registers, held: &mut Held) -> Result<Result<u64, Ended>, TraceError> {
    sys::set_registers(tid, regs).map_err(TraceError::of("set the registers of", tid))?;
    for _ in ["entry", "exit"] {
        let mut signal = 0;
        loop {
            sys::resume_to_syscall_with(tid, signal).map_err(TraceError::of("resume", tid))?;
            signal = 0;
            match wait_for(tid)? {
                StopEvent::Syscall => break,
                end @ (StopEvent::Exited(_) | StopEvent::Killed(_)) => return Ok(Err(Ended(end))),
                // SIGSTOP can't be blocked: it takes effect, and the thread stops again after the call.
                StopEvent::Signal(s) => signal = s,
                StopEvent::GroupStop(s) => *held = Held::GroupStop(s),
                _ => {}
            }
        }
    }
    let after = sys::registers(tid).map_err(TraceError::of("read the registers of", tid))?;
    Ok(Ok(after.rax))
}

fn wait_for(tid: i32) -> Result<StopEvent, TraceError> {
    loop {
        match sys::wait(tid, Wait::Block).map_err(TraceError::Wait)? {
            Waited::Stop(_, event) => return Ok(event),
            Waited::Nothing => {}
            Waited::NoTracees => return Err(TraceError::Gone { tid }),
        }
    }
}

/// A raw result of the kernel as value or error.
pub fn decode_result(pid: i32, name: &'static str, raw: u64) -> Result<u64, TraceError> {
    if raw > u64::MAX - MAX_ERRNO {
        let errno = Errno::from_raw(raw.wrapping_neg() as i32);
        return Err(TraceError::RemoteCall { pid, name, errno });
    }
    Ok(raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_the_kernel_are_told_from_errors() {
        assert_eq!(decode_result(1, "mmap", 0x7f00_0000_0000).unwrap(), 0x7f00_0000_0000);
        assert_eq!(decode_result(1, "mmap", (-4096_i64) as u64).unwrap(), (-4096_i64) as u64);
        let refused = decode_result(1, "mmap", (-12_i64) as u64);
        assert!(matches!(refused, Err(TraceError::RemoteCall { errno: Errno::ENOMEM, .. })));
    }
}
