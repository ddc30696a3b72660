//! One system call made in the name of a stopped thread of the target.
//!
//! The call runs on a `syscall` instruction that the target has anyway (its libc's), under
//! PTRACE_SYSCALL, with every signal blocked: no trap signal is raised (an int3 or a single step would make
//! the kernel reset a blocked SIGTRAP's disposition) and no signal of the target's is taken early or lost.
//! Should heaptap be killed in the middle of it, the thread finds home by itself: see [`super::recovery`].
//!
//! Afterwards registers and mask are what they were, and a thread that was interrupted in a system call is taken to a
//! stop inside the kernel's signal path, so that the call restarts when it runs on.

use super::error::TraceError;
use super::recovery;
use super::stop::StopEvent;
use super::sys::{self, Of, Registers, Wait, Waited};
use super::world::Held;
use crate::addr::RemoteAddr;
use crate::mapping::{Backing, Mapping};
use crate::memory::RemoteMemory;
use nix::errno::Errno;

/// `syscall; ret`
const SYSCALL_RET: &[u8] = &[0x0f, 0x05, 0xc3];
/// `syscall`
const SYSCALL: &[u8] = &[0x0f, 0x05];
/// `mov $15, %rax; syscall` and `mov $15, %eax; syscall`: how signal handlers return (`__restore_rt`).
const RESTORERS: [&[u8]; 2] =
    [&[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05], &[0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05]];
/// Text read at a time while looking for it, and the most that is looked at.
const SCAN_CHUNK: u64 = 256 << 10;
const SCAN_LIMIT: u64 = 8 << 20;
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

/// Instructions that the target has anyway and that a call uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gadgets {
    /// `syscall`, followed by `ret` where there is a restorer.
    pub syscall: RemoteAddr,
    /// What a signal handler returns through.
    pub restorer: Option<RemoteAddr>,
}

/// Looks for [`Gadgets`] in the target's executable memory: its libc has all of them, its vDSO a bare `syscall`. The
/// libc comes first: all that is looked at becomes part of the target's resident set, and a numeric library's code is tens
/// of megabytes.
pub fn find_gadgets(pid: i32, memory: &dyn RemoteMemory, maps: &[Mapping]) -> Result<Gadgets, TraceError> {
    let (mut bare, mut with_ret, mut restorer) = (None, None, None);
    // Not in anonymous memory: that may be a region of ours which the call is to unmap.
    let lasting = |m: &&Mapping| m.is_file() || m.backing == Backing::Named("[vdso]".into());
    let mut places: Vec<_> =
        maps.iter().filter(|m| m.perms.execute && m.perms.read).filter(lasting).collect();
    places.sort_by_key(|m| !is_libc(m));
    for map in places {
        let (mut at, end) = (map.start.0, map.end.0.min(map.start.0 + SCAN_LIMIT));
        while at < end {
            let len = SCAN_CHUNK.min(end - at) as usize;
            let Ok(text) = memory.read_vec(RemoteAddr(at), len) else { break };
            let find = |pattern: &[u8]| {
                text.windows(pattern.len()).position(|w| w == pattern).map(|i| RemoteAddr(at + i as u64))
            };
            bare = bare.or_else(|| find(SYSCALL));
            with_ret = with_ret.or_else(|| find(SYSCALL_RET));
            restorer = restorer.or_else(|| RESTORERS.iter().find_map(|r| find(r)));
            if let (Some(syscall), Some(_)) = (with_ret, restorer) {
                return Ok(Gadgets { syscall, restorer });
            }
            // Chunks overlap by a page, lest a pattern lie across two.
            at += SCAN_CHUNK - 4096;
        }
    }
    tracing::debug!("process {pid} has no `syscall; ret` with a signal restorer: calls have no way home");
    bare.map(|syscall| Gadgets { syscall, restorer: None }).ok_or_else(|| TraceError::Proc {
        path: format!("/proc/{pid}/maps"),
        source: std::io::Error::other("no syscall instruction in executable memory"),
    })
}

/// By its name alone: glibc's `libc.so.6` and `libc-2.31.so`, musl's `ld-musl-x86_64.so.1`.
fn is_libc(map: &Mapping) -> bool {
    let Backing::File { path, .. } = &map.backing else { return false };
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    [&b"libc.so"[..], b"libc-", b"ld-musl-"].iter().any(|start| name.starts_with(start))
}

/// Writes into the target.
pub type Write<'a> = &'a dyn Fn(RemoteAddr, &[u8]) -> Result<(), TraceError>;

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

/// Makes `call` in the name of the stopped thread `tid`, which is settled or at a trap. `write` writes into the target.
pub fn call(
    tid: i32,
    gadgets: Gadgets,
    call: Call,
    held: Held,
    write: Write<'_>,
) -> Result<Outcome, TraceError> {
    let saved = sys::registers(tid).map_err(TraceError::of("read the registers of", tid))?;
    let mask = sys::signal_mask(tid).map_err(TraceError::of("read the signal mask of", tid))?;
    let errand = prepared(tid, &saved, mask, gadgets, call, write)?;
    let mut held = held;
    let ran = run(tid, &errand, &mut held);
    if let Ok(Err(ended)) = &ran {
        return Ok(Outcome { result: Err(*ended), held });
    }
    // The mask first: killed in between, we leave a thread that is still on its way home.
    sys::set_signal_mask(tid, mask).map_err(TraceError::of("restore the signal mask of", tid))?;
    sys::set_registers(tid, &saved).map_err(TraceError::of("restore the registers of", tid))?;
    if held == Held::Nothing && !recovery::restarts(&saved) {
        return Ok(Outcome { result: ran?, held });
    }
    match settle(tid, Held::Nothing)? {
        Err(ended) => Ok(Outcome { result: Err(ended), held }),
        Ok(Held::Nothing) => Ok(Outcome { result: ran?, held }),
        Ok(now) => Ok(Outcome { result: ran?, held: now }),
    }
}

/// The registers of the call, after the way home was laid on the thread's stack. Where that can't be (the stack
/// would have to grow for it, or there is no restorer) the call is made without.
fn prepared(
    tid: i32,
    saved: &Registers,
    mask: u64,
    gadgets: Gadgets,
    call: Call,
    write: Write<'_>,
) -> Result<Registers, TraceError> {
    let mut regs = *saved;
    regs.rip = gadgets.syscall.0;
    regs.rax = call.number as u64;
    // No system call is being left: the kernel must not "restart" one over our registers.
    regs.orig_rax = u64::MAX;
    [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = call.args;
    let xstate = sys::extended_state(tid).map_err(TraceError::of("read the vector registers of", tid))?;
    let frame = gadgets.restorer.zip(xstate).and_then(|(r, x)| recovery::frame(saved, mask, &x, r));
    match frame {
        Some(frame) if write(frame.at, &frame.bytes).is_ok() => regs.rsp = frame.at.0,
        _ => tracing::warn!("thread {tid} has no way home should heaptap be killed within the next 100 µs"),
    }
    Ok(regs)
}

/// Runs to the entry, then to the exit of the call.
fn run(tid: i32, regs: &Registers, held: &mut Held) -> Result<Result<u64, Ended>, TraceError> {
    sys::set_registers(tid, regs).map_err(TraceError::of("set the registers of", tid))?;
    sys::set_signal_mask(tid, !0).map_err(TraceError::of("block the signals of", tid))?;
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
        match sys::wait(Of::Tracee(tid), Wait::Block).map_err(TraceError::Wait)? {
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
    use crate::mapping::Perms;
    use crate::memory::{BytesMemory, ReadError};

    #[test]
    fn results_of_the_kernel_are_told_from_errors() {
        assert_eq!(decode_result(1, "mmap", 0x7f00_0000_0000).unwrap(), 0x7f00_0000_0000);
        assert_eq!(decode_result(1, "mmap", (-4096_i64) as u64).unwrap(), (-4096_i64) as u64);
        let refused = decode_result(1, "mmap", (-12_i64) as u64);
        assert!(matches!(refused, Err(TraceError::RemoteCall { errno: Errno::ENOMEM, .. })));
    }

    /// Fails where it is read outside of one place.
    struct Only(BytesMemory);

    impl RemoteMemory for Only {
        fn read(&self, addr: RemoteAddr, into: &mut [u8]) -> Result<(), ReadError> {
            assert!(addr.0 >= 0x9000, "{addr} is not of the libc");
            self.0.read(addr, into)
        }
    }

    #[test]
    fn nothing_but_the_libc_is_looked_at_for_what_it_has() {
        let map = |start, path: &str| Mapping {
            start: RemoteAddr(start),
            end: RemoteAddr(start + 0x1000),
            perms: Perms { read: true, execute: true, ..Perms::default() },
            offset: 0,
            device: (0, 0),
            inode: 1,
            backing: Backing::File { path: path.into(), deleted: false },
        };
        for libc in ["/lib/x86_64-linux-gnu/libc.so.6", "/lib/libc-2.31.so", "/lib/ld-musl-x86_64.so.1"] {
            let maps =
                [map(0x1000, "/lib/libopenblas.so"), map(0x5000, "/usr/bin/python3"), map(0x9000, libc)];
            let mut text = vec![0x90; 0x1000];
            text[0x100..][..3].copy_from_slice(SYSCALL_RET);
            text[0x200..][..9].copy_from_slice(RESTORERS[0]);
            let mut memory = BytesMemory::new();
            memory.map(RemoteAddr(0x9000), text);
            let memory = Only(memory);
            let found = find_gadgets(1, &memory, &maps).unwrap();
            let expected = Gadgets { syscall: RemoteAddr(0x9100), restorer: Some(RemoteAddr(0x9200)) };
            assert_eq!(found, expected, "{libc}");
        }
    }
}

/// A controller that is killed in the middle of an errand: the thread comes home and goes on.
#[cfg(test)]
mod killed_on_an_errand {
    use super::*;
    use crate::inferior::Inferior;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Child, Command, Stdio};

    const TARGET: &str = "HEAPTAP_TEST_ERRAND_TARGET";
    const STAGE: &str = "HEAPTAP_TEST_ERRAND_STAGE";

    /// Not a test of its own: run by the one below, it dies while `TARGET`'s thread has our registers.
    #[test]
    fn controller() {
        let (Ok(pid), Ok(stage)) = (std::env::var(TARGET), std::env::var(STAGE)) else { return };
        let mut inferior = Inferior::seize(pid.parse().unwrap()).unwrap();
        inferior.stop().unwrap();
        let tid = inferior.pid();
        let gadgets = inferior.gadgets().unwrap();
        assert!(gadgets.restorer.is_some());
        let held = inferior.world.held(tid).unwrap();
        settle(tid, held).unwrap().unwrap();
        let saved = sys::registers(tid).unwrap();
        let mask = sys::signal_mask(tid).unwrap();
        let getppid = Call { name: "getppid", number: libc::SYS_getppid, args: [0; 6] };
        let errand = prepared(tid, &saved, mask, gadgets, getppid, &|a, b| inferior.write(a, b)).unwrap();
        sys::set_registers(tid, &errand).unwrap();
        if stage != "registers" {
            sys::set_signal_mask(tid, !0).unwrap();
            for _ in 0..if stage == "exit" { 2 } else { 1 } {
                sys::resume_to_syscall_with(tid, 0).unwrap();
                assert_eq!(wait_for(tid).unwrap(), StopEvent::Syscall);
            }
        }
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL).unwrap();
    }

    /// Copies and compares blocks with the vector instructions of libc's memcpy and memcmp for as long as its
    /// input is open; answers every line.
    const BUSY: &str = "
import sys, threading
def serve():
    for line in sys.stdin:
        print(line.strip(), flush=True)
    done.set()
done = threading.Event()
threading.Thread(target=serve).start()
block = bytes(range(256)) * 40
while not done.is_set():
    copy = bytearray(block)
    assert copy == block and bytes(copy[1:]) == block[1:]
";
    /// Mostly blocked in a read.
    const BLOCKED: &str = "
import sys
for line in sys.stdin:
    print(line.strip(), flush=True)
";

    fn target(program: &str) -> Child {
        let python =
            ["python3", "python3.11"].into_iter().find(|p| Command::new(p).arg("-V").output().is_ok());
        let python = python.expect("this test needs a python3 on PATH");
        let mut command = Command::new(python);
        command.args(["-c", program]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
    }

    fn survives(program: &str) {
        let mut target = target(program);
        let mut input = target.stdin.take().unwrap();
        let mut output = BufReader::new(target.stdout.take().unwrap()).lines();
        let mut ask = |n: u32| {
            writeln!(input, "{n}").unwrap();
            output.next().expect("the target is alive").unwrap()
        };
        assert_eq!(ask(1), "1");
        for round in 0..20 {
            for stage in ["registers", "entry", "exit"] {
                let controller = Command::new(std::env::current_exe().unwrap())
                    .args(["--exact", "inferior::remote_call::killed_on_an_errand::controller"])
                    .env(TARGET, target.id().to_string())
                    .env(STAGE, stage)
                    .output()
                    .unwrap();
                let told = String::from_utf8_lossy(&controller.stderr);
                assert_eq!(controller.status.signal(), Some(9), "{told}");
                assert_eq!(ask(round), round.to_string(), "killed at {stage}");
            }
        }
        drop(input);
        assert!(target.wait().unwrap().success());
    }

    #[test]
    fn leaves_a_blocked_thread_as_it_was() {
        survives(BLOCKED);
    }

    #[test]
    fn leaves_a_thread_with_live_vector_registers_as_it_was() {
        survives(BUSY);
    }
}
