//! The process under ptrace: [`Inferior`] seizes every thread of it, reports what happens to them, stops and
//! resumes the world, makes system calls in its name, and lets go.
//!
//! The decisions are made by the pure [`world::World`]; this file carries them out. Knows threads, stops,
//! registers, memory and children. Knows nothing of Python, nor of why anybody wants to stop a process.
//!
//! Children. Every thread has PTRACE_O_TRACE{CLONE,FORK,VFORK} from its first traced moment, so that nothing
//! that inherits our breakpoints ever runs untraced. A child with memory of its own ([`Notice::Forked`]) stays
//! stopped until it is released; one that borrows its parent's memory (vfork) is a guest: it runs
//! under trace until it executes a program or exits, for its parent can't be stopped before.

pub mod error;
pub mod facts;
pub mod maps;
pub mod memory;
pub mod recovery;
pub mod remote_call;
pub mod stop;
pub mod sys;
pub mod world;

use crate::addr::RemoteAddr;
use error::{AttachError, TraceError};
use memory::ProcessMemory;
use nix::errno::Errno;
use remote_call::{Call, Ended, Gadgets};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};
use stop::StopEvent;
use sys::{Of, Registers, Wait, Waited};
use world::{Held, Reaction, Release, World};

/// How long [`Inferior::stop`] waits. A thread in vfork(2) or in uninterruptible sleep takes as long as that takes.
const STOP_PATIENCE: Duration = Duration::from_secs(5);
/// `si_code` of the SIGTRAP that int3 raises on x86 (`do_int3_user` of the kernel sends it by `force_sig`).
const SI_KERNEL: i32 = 0x80;
/// Polls without sleeping before it starts to sleep between them.
const STOP_SPINS: u32 = 2_000;

/// Something happened that is not this layer's business alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// Thread `tid` is stopped by a SIGTRAP; see [`Inferior::drop_signal`] and [`Inferior::let_go`].
    Trap(i32),
    /// A child with a copy of the memory is stopped at its birth; see [`Inferior::release_child`].
    Forked(i32),
    /// The process executed another program and is stopped in it.
    Executed,
    /// A thread ended.
    ThreadEnded(i32),
    /// The process ended.
    Ended(StopEvent),
}

/// A process all of whose threads are traced by us.
pub struct Inferior {
    pid: i32,
    world: World,
    /// Children at their birth, stopped, of which [`Notice::Forked`] was given.
    newborns: BTreeSet<i32>,
    guests: BTreeSet<i32>,
    notices: VecDeque<Notice>,
    memory: ProcessMemory,
    mem_file: File,
    /// Instruction pointer that a breakpoint's trap reports → where execution goes on as if it weren't there.
    bypasses: HashMap<u64, RemoteAddr>,
    gadgets: Option<Gadgets>,
    /// Its threads have seccomp filters, which remote calls suspend.
    filtered: bool,
    ended: bool,
}

impl Inferior {
    /// Seizes every thread of `pid`; they go on running. Refuses, with nothing changed, what can't be traced.
    pub fn seize(pid: i32) -> Result<Self, AttachError> {
        facts::check_attachable(pid)?;
        let path = format!("/proc/{}/mem", maps::memory_holder(pid));
        let mem_file = match File::options().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
                return Err(facts::not_permitted(pid));
            }
            Err(source) => return Err(TraceError::Proc { path, source }.into()),
        };
        let mut inferior = Self {
            pid,
            world: World::new(pid),
            newborns: BTreeSet::new(),
            guests: BTreeSet::new(),
            notices: VecDeque::new(),
            memory: ProcessMemory::new(pid),
            mem_file,
            bypasses: HashMap::new(),
            gadgets: None,
            filtered: false,
            ended: false,
        };
        match inferior.seize_new_threads() {
            Ok(()) => Ok(inferior),
            Err(error) => {
                // Nothing was written; what was seized must not stay traced.
                if let Err(e) = inferior.detach() {
                    tracing::warn!("letting go of process {pid} after a refused attach: {e}");
                }
                Err(error)
            }
        }
    }

    /// Seizes threads until a whole listing shows none that is new.
    fn seize_new_threads(&mut self) -> Result<(), AttachError> {
        loop {
            let mut new = false;
            for tid in facts::threads(self.pid)? {
                if self.world.knows(tid) || matches!(facts::state(self.pid, tid), None | Some('Z' | 'X')) {
                    continue;
                }
                match sys::seize(tid) {
                    Ok(()) => {
                        self.world.add_running(tid);
                        new = true;
                    }
                    Err(Errno::ESRCH) => {}
                    Err(Errno::EPERM) => new |= self.explain_refusal(tid)?,
                    Err(errno) => return Err(TraceError::of("seize", tid)(errno).into()),
                }
            }
            if !new {
                return if self.world.tids().is_empty() {
                    Err(AttachError::NoProcess { pid: self.pid })
                } else {
                    Ok(())
                };
            }
        }
    }

    /// SEIZE says EPERM for four reasons; two are no refusals: the thread was born to a traced one and is
    /// ours already, or it is exiting.
    fn explain_refusal(&mut self, tid: i32) -> Result<bool, AttachError> {
        let Some(status) = facts::status(tid)? else { return Ok(false) };
        match status.tracerpid {
            0 if matches!(facts::state(self.pid, tid), None | Some('Z' | 'X')) => Ok(false),
            0 => Err(facts::not_permitted(self.pid)),
            tracer if tracer == std::process::id() as i32 => {
                self.world.expect(tid);
                Ok(true)
            }
            tracer => Err(facts::already_traced(self.pid, tracer)),
        }
    }

    /// The process id.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Every thread traced.
    pub fn tids(&self) -> Vec<i32> {
        self.world.tids()
    }

    /// The memory of the process, for reading.
    pub fn memory(&self) -> &ProcessMemory {
        &self.memory
    }

    /// Whether the process was seen to end.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Writes into the process, also where it may only read or execute (`FOLL_FORCE`): such a page becomes
    /// the process's private copy.
    pub fn write(&self, addr: RemoteAddr, bytes: &[u8]) -> Result<(), TraceError> {
        write_memory(&self.mem_file, self.pid, addr, bytes)
    }

    /// The next notice; `None` when there is none (`Poll`) or one of our own signals came (`Block`).
    pub fn next(&mut self, how: Wait) -> Result<Option<Notice>, TraceError> {
        loop {
            if let Some(notice) = self.notices.pop_front() {
                return Ok(Some(notice));
            }
            match sys::wait(Of::Any, how).map_err(TraceError::Wait)? {
                Waited::Stop(tid, event) => self.on_stop(tid, event)?,
                Waited::Nothing => return Ok(None),
                Waited::NoTracees => {
                    self.ended = true;
                    return Ok(Some(Notice::Ended(StopEvent::Other(0))));
                }
            }
        }
    }

    fn on_stop(&mut self, tid: i32, event: StopEvent) -> Result<(), TraceError> {
        let reaction = self.world.on_stop(tid, event);
        self.react(tid, event, reaction)
    }

    fn react(&mut self, tid: i32, event: StopEvent, reaction: Reaction) -> Result<(), TraceError> {
        match reaction {
            Reaction::Hold => Ok(()),
            Reaction::Resume(signal) => self.gone_is_fine(tid, sys::resume(tid, signal)),
            Reaction::Listen => self.gone_is_fine(tid, sys::listen(tid)),
            Reaction::Trap => {
                self.notices.push_back(Notice::Trap(tid));
                Ok(())
            }
            Reaction::Born { resume } => {
                self.expect_child_of(tid);
                if resume { self.gone_is_fine(tid, sys::resume(tid, 0)) } else { Ok(()) }
            }
            Reaction::Executed => {
                self.notices.push_back(Notice::Executed);
                Ok(())
            }
            Reaction::ThreadEnded => {
                self.notices.push_back(Notice::ThreadEnded(tid));
                Ok(())
            }
            Reaction::ProcessEnded => {
                self.end(event);
                Ok(())
            }
            Reaction::Stranger => self.on_stranger(tid, event),
        }
    }

    fn end(&mut self, event: StopEvent) {
        self.ended = true;
        self.notices.push_back(Notice::Ended(event));
    }

    /// A request that finds the thread gone is no failure: its end is reported by a wait to come.
    fn gone_is_fine(&mut self, tid: i32, answer: Result<(), Errno>) -> Result<(), TraceError> {
        match answer {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(TraceError::of("resume", tid)(errno)),
        }
    }

    fn expect_child_of(&mut self, parent: i32) {
        let Ok(child) = sys::event_message(parent) else { return };
        if self.newborns.contains(&child) || self.guests.contains(&child) {
            return;
        }
        // It may have come, gone and been collected before its parent's event was.
        let ours =
            facts::status(child).ok().flatten().is_some_and(|s| s.tracerpid == std::process::id() as i32);
        if ours {
            self.world.expect(child);
        }
    }

    /// A stop of something that is not a known thread: a new thread, a child at its birth, or a guest.
    fn on_stranger(&mut self, tid: i32, event: StopEvent) -> Result<(), TraceError> {
        self.world.arrived(tid);
        if event.is_end() {
            self.guests.remove(&tid);
            self.newborns.remove(&tid);
            if tid == self.pid {
                self.end(event);
            }
            return Ok(());
        }
        if self.guests.contains(&tid) {
            return self.on_guest_stop(tid, event);
        }
        let Some(status) = facts::status(tid)? else { return Ok(()) };
        if status.tgid == self.pid {
            let reaction = self.world.adopt(tid, event);
            return self.react(tid, event, reaction);
        }
        if sys::share_memory(self.pid, tid).unwrap_or(false) {
            self.guests.insert(tid);
            return self.on_guest_stop(tid, event);
        }
        self.newborns.insert(tid);
        self.notices.push_back(Notice::Forked(tid));
        Ok(())
    }

    fn on_guest_stop(&mut self, tid: i32, event: StopEvent) -> Result<(), TraceError> {
        let answer = match event {
            StopEvent::Exec => {
                // Its memory is its own now, and clean.
                self.guests.remove(&tid);
                sys::detach(tid, 0)
            }
            StopEvent::Signal(libc::SIGTRAP) => self.bypass(tid),
            StopEvent::Signal(signal) => sys::resume(tid, signal),
            StopEvent::GroupStop(_) => sys::listen(tid),
            StopEvent::Clone | StopEvent::Fork | StopEvent::Vfork => {
                self.expect_child_of(tid);
                sys::resume(tid, 0)
            }
            _ => sys::resume(tid, 0),
        };
        self.gone_is_fine(tid, answer)
    }

    /// A guest runs past a breakpoint of its parent's; a SIGTRAP of its own it gets.
    fn bypass(&self, guest: i32) -> Result<(), Errno> {
        let rip = sys::registers(guest)?.rip;
        match self.bypasses.get(&rip) {
            Some(to) if sys::signal_info(guest)?.1 == SI_KERNEL => {
                sys::set_rip(guest, to.0)?;
                sys::resume(guest, 0)
            }
            _ => sys::resume(guest, libc::SIGTRAP),
        }
    }

    /// Tells which traps are breakpoints: the instruction pointer that each reports, and where execution goes
    /// on as if it were not there.
    pub fn set_bypasses(&mut self, bypasses: HashMap<u64, RemoteAddr>) {
        self.bypasses = bypasses;
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

    /// Stops every thread. Traps not yet handed out by [`Inferior::next`] are to be found by
    /// [`Inferior::held_signal`]. On `NotStopped` those that did stop stay stopped.
    pub fn stop(&mut self) -> Result<(), TraceError> {
        self.notices.retain(|n| !matches!(n, Notice::Trap(_)));
        for tid in self.world.begin_stop() {
            if let Err(errno) = sys::interrupt(tid)
                && errno != Errno::ESRCH
            {
                return Err(TraceError::of("interrupt", tid)(errno));
            }
        }
        let start = Instant::now();
        let mut polls = 0;
        while !self.world.all_stopped() {
            if self.look_at_unstopped()? {
                polls = 0;
            } else {
                polls += 1;
                self.wait_a_little(polls, start)?;
            }
            if self.ended {
                return Err(TraceError::Gone { tid: self.pid });
            }
        }
        Ok(())
    }

    /// One look at each thread that is not stopped yet, each child that is awaited and each guest (whose
    /// parent can't stop before the guest is done). Whether anything happened.
    fn look_at_unstopped(&mut self) -> Result<bool, TraceError> {
        let mut happened = false;
        let unstopped = self.world.not_stopped();
        for tid in unstopped.into_iter().chain(self.guests.clone()) {
            match sys::wait(Of::Tracee(tid), Wait::Poll).map_err(TraceError::Wait)? {
                Waited::Stop(tid, event) => {
                    self.on_stop(tid, event)?;
                    happened = true;
                }
                Waited::NoTracees => self.on_vanished(tid),
                Waited::Nothing => {}
            }
        }
        Ok(happened)
    }

    /// There is nobody to wait for: another thread's execve(2) took the id, or the end was collected.
    fn on_vanished(&mut self, tid: i32) {
        self.guests.remove(&tid);
        self.world.forget(tid);
        if tid == self.pid && facts::state(self.pid, tid).is_none() {
            self.end(StopEvent::Other(0));
        }
    }

    fn wait_a_little(&mut self, polls: u32, start: Instant) -> Result<(), TraceError> {
        if polls < STOP_SPINS {
            std::thread::yield_now();
            return Ok(());
        }
        // A leader that called pthread_exit is a zombie until its last thread ends: it never stops.
        for tid in self.world.not_stopped() {
            if matches!(facts::state(self.pid, tid), Some('Z' | 'X')) {
                self.world.forget(tid);
            }
        }
        if start.elapsed() > STOP_PATIENCE {
            let tids = self.world.not_stopped();
            return Err(TraceError::NotStopped { tids, seconds: STOP_PATIENCE.as_secs() });
        }
        std::thread::sleep(Duration::from_micros(200));
        Ok(())
    }

    /// Lets every stopped thread run on, each with what it held.
    pub fn resume(&mut self) -> Result<(), TraceError> {
        for (tid, release) in self.world.begin_resume() {
            self.carry_out(tid, release)?;
        }
        Ok(())
    }

    /// Lets one stopped thread run on with what it held.
    pub fn let_go(&mut self, tid: i32) -> Result<(), TraceError> {
        match self.world.release(tid) {
            Some(release) => self.carry_out(tid, release),
            None => Ok(()),
        }
    }

    fn carry_out(&mut self, tid: i32, release: Release) -> Result<(), TraceError> {
        let answer = match release {
            Release::Resume(signal) => sys::resume(tid, signal),
            Release::Listen => sys::listen(tid),
        };
        self.gone_is_fine(tid, answer)
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

    /// Registers of a stopped thread.
    pub fn registers(&self, tid: i32) -> Result<Registers, TraceError> {
        sys::registers(tid).map_err(TraceError::of("read the registers of", tid))
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

    /// Makes a system call in the name of the stopped thread `tid`. What the thread held is delivered first
    /// when it is a signal; a group stop stays in force.
    pub fn remote_syscall(&mut self, tid: i32, call: Call) -> Result<u64, TraceError> {
        let gadgets = self.gadgets()?;
        let held = self.world.held(tid).ok_or(TraceError::Gone { tid })?;
        let settled = remote_call::settle(tid, held)?;
        let held = self.unless_ended(tid, settled)?;
        self.world.set_held(tid, held);
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
        sys::suspend_seccomp(tid, true)?;
        sys::suspend_seccomp(tid, false)?;
        self.filtered = true;
        Ok(())
    }

    fn without_seccomp<T>(
        &mut self,
        tid: i32,
        act: impl FnOnce(&mut Self) -> Result<T, TraceError>,
    ) -> Result<T, TraceError> {
        if !self.filtered {
            return act(self);
        }
        sys::suspend_seccomp(tid, true).map_err(TraceError::of("suspend the seccomp filter of", tid))?;
        let result = act(self);
        match sys::suspend_seccomp(tid, false) {
            Ok(()) | Err(Errno::ESRCH) => result,
            Err(errno) => Err(TraceError::of("restore the seccomp filter of", tid)(errno)),
        }
    }

    fn unless_ended<T>(&mut self, tid: i32, result: Result<T, Ended>) -> Result<T, TraceError> {
        result.map_err(|Ended(event)| {
            // The machine has to know; what it answers is reported by `next`.
            let reaction = self.world.on_stop(tid, event);
            let _ = self.react(tid, event, reaction);
            TraceError::Gone { tid }
        })
    }

    fn gadgets(&mut self) -> Result<Gadgets, TraceError> {
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

    /// Makes a system call in the name of a child at its birth (see [`Notice::Forked`]).
    pub fn child_syscall(&mut self, child: i32, call: Call) -> Result<u64, TraceError> {
        let gadgets = self.gadgets()?;
        let outcome = self.without_seccomp(child, |me| {
            let write = |addr, bytes: &[u8]| me.write_child(child, addr, bytes);
            remote_call::call(child, gadgets, call, Held::Nothing, &write)
        })?;
        match outcome.result {
            Ok(raw) => remote_call::decode_result(child, call.name, raw),
            Err(Ended(_)) => {
                self.newborns.remove(&child);
                Err(TraceError::Gone { tid: child })
            }
        }
    }

    /// Children stopped at their birth, of which no notice was handed out yet; none will be.
    pub fn newborns(&mut self) -> Vec<i32> {
        self.notices.retain(|n| !matches!(n, Notice::Forked(_)));
        self.newborns.iter().copied().collect()
    }

    /// Whether a child runs in the process's own memory (see the head of this module).
    pub fn has_guests(&self) -> bool {
        !self.guests.is_empty()
    }

    /// Writes into a child at its birth.
    pub fn write_child(&self, child: i32, addr: RemoteAddr, bytes: &[u8]) -> Result<(), TraceError> {
        let path = format!("/proc/{child}/mem");
        let file = File::options().write(true).open(&path);
        write_memory(&file.map_err(|source| TraceError::Proc { path, source })?, child, addr, bytes)
    }

    /// Lets a child at its birth go, untraced.
    pub fn release_child(&mut self, child: i32) -> Result<(), TraceError> {
        self.newborns.remove(&child);
        self.gone_is_fine(child, sys::detach(child, 0))
    }

    /// Ends tracing. Threads that are not stopped, and can't be, are let go by the kernel when we exit.
    pub fn detach(mut self) -> Result<(), TraceError> {
        if self.ended {
            return Ok(());
        }
        let stopped = self.stop();
        for child in std::mem::take(&mut self.newborns) {
            let _ = sys::detach(child, 0);
        }
        for (tid, release) in self.world.begin_resume() {
            let signal = if let Release::Resume(signal) = release { signal } else { 0 };
            if let Err(errno) = sys::detach(tid, signal)
                && errno != Errno::ESRCH
            {
                return Err(TraceError::of("detach from", tid)(errno));
            }
        }
        match stopped {
            Err(TraceError::Gone { .. }) if self.ended => Ok(()),
            other => other,
        }
    }
}

fn write_memory(file: &File, pid: i32, addr: RemoteAddr, bytes: &[u8]) -> Result<(), TraceError> {
    file.write_all_at(bytes, addr.0).map_err(|source| TraceError::Write {
        pid,
        addr,
        len: bytes.len(),
        source,
    })
}
