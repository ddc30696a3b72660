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

pub mod cgroup;
mod children;
pub mod error;
pub mod facts;
pub mod handle;
pub mod maps;
pub mod memory;
pub mod recovery;
pub mod remote_call;
mod requests;
pub mod stop;
pub mod sys;
pub mod world;

use crate::addr::RemoteAddr;
use error::{AttachError, TraceError};
use memory::ProcessMemory;
use nix::errno::Errno;
use remote_call::Gadgets;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};
use stop::StopEvent;
use sys::{Of, Scope, Wait, Waited};
use world::{Reaction, Release, World};

/// How long [`Inferior::stop`] waits: the other threads stand still meanwhile. A thread in vfork(2) or in
/// uninterruptible sleep takes as long as that takes.
const STOP_PATIENCE: Duration = Duration::from_millis(500);
/// `si_code` of the SIGTRAP that int3 raises on x86 (`do_int3_user` of the kernel sends it by `force_sig`).
const SI_KERNEL: i32 = 0x80;
/// Between two looks at a world that runs for a while.
const RUN_PAUSE: Duration = Duration::from_micros(100);
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
    scope: Scope,
    /// The last stop left threads running.
    stuck: bool,
    ended: bool,
}

impl Inferior {
    /// Seizes every thread of `pid`; they go on running. Refuses, with nothing changed, what can't be traced.
    pub fn seize(pid: i32) -> Result<Self, AttachError> {
        let mut inferior = Self::open(pid, Scope::Whole)?;
        inferior.seized(|me| me.seize_new_threads())?;
        Ok(inferior)
    }

    /// Seizes one thread of `pid`, to make system calls in its name while the others run on untraced.
    pub fn seize_thread(pid: i32) -> Result<Self, AttachError> {
        let mut inferior = Self::open(pid, Scope::Thread)?;
        inferior.seized(|me| me.seize_any_thread())?;
        Ok(inferior)
    }

    /// Runs `seize`; nothing was written yet, and what it seized must not stay traced when it fails.
    fn seized(
        &mut self,
        seize: impl FnOnce(&mut Self) -> Result<(), AttachError>,
    ) -> Result<(), AttachError> {
        seize(self).inspect_err(|_| {
            if let Err(e) = self.let_all_go() {
                tracing::warn!("letting go of process {} after a refused attach: {e}", self.pid);
            }
        })
    }

    fn open(pid: i32, scope: Scope) -> Result<Self, AttachError> {
        facts::check_attachable(pid)?;
        let path = format!("/proc/{}/mem", maps::memory_holder(pid));
        let mem_file = match File::options().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
                return Err(facts::not_permitted(pid));
            }
            Err(source) => return Err(TraceError::Proc { path, source }.into()),
        };
        Ok(Self {
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
            scope,
            stuck: false,
            ended: false,
        })
    }

    /// The first thread that can be seized, the leader if it lives.
    fn seize_any_thread(&mut self) -> Result<(), AttachError> {
        for tid in facts::threads(self.pid)? {
            if matches!(facts::state(self.pid, tid), None | Some('Z' | 'X')) {
                continue;
            }
            match sys::seize(tid, self.scope) {
                Ok(()) => {
                    self.world.add_running(tid);
                    return Ok(());
                }
                Err(Errno::ESRCH) => {}
                Err(Errno::EPERM) => {
                    self.explain_refusal(tid)?;
                }
                Err(errno) => return Err(TraceError::of("seize", tid)(errno).into()),
            }
        }
        Err(AttachError::NoProcess { pid: self.pid })
    }

    /// Seizes threads until a whole listing shows none that is new.
    fn seize_new_threads(&mut self) -> Result<(), AttachError> {
        loop {
            let mut new = false;
            for tid in facts::threads(self.pid)? {
                if self.world.knows(tid) || matches!(facts::state(self.pid, tid), None | Some('Z' | 'X')) {
                    continue;
                }
                match sys::seize(tid, self.scope) {
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
            self.stuck = true;
            return Err(TraceError::NotStopped { tids, patience: STOP_PATIENCE });
        }
        std::thread::sleep(Duration::from_micros(200));
        Ok(())
    }

    /// [`Inferior::stop`] of a process that is being attached to: one that does not stop is refused.
    pub fn stop_to_attach(&mut self) -> Result<(), AttachError> {
        match self.stop() {
            Err(TraceError::NotStopped { tids, .. }) => {
                let tid = tids.first().copied().unwrap_or(self.pid);
                let state = facts::state(self.pid, tid).unwrap_or('?');
                Err(AttachError::Unstoppable { pid: self.pid, tid, state })
            }
            other => Ok(other?),
        }
    }

    /// [`Inferior::stop`] of a process that is to be left: threads that do not stop are for the caller to reckon
    /// with, see [`Inferior::unstopped`].
    pub fn stop_to_leave(&mut self) -> Result<(), TraceError> {
        match self.stop() {
            Ok(()) | Err(TraceError::NotStopped { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Threads that did not stop, or children that did not show themselves.
    pub fn unstopped(&self) -> Vec<i32> {
        self.world.not_stopped()
    }

    /// Lets every stopped thread run on, each with what it held.
    pub fn resume(&mut self) -> Result<(), TraceError> {
        self.stuck = false;
        for (tid, release) in self.world.begin_resume() {
            self.carry_out(tid, release)?;
        }
        Ok(())
    }

    /// Lets the world run for a while, then stops it as [`Inferior::stop_to_leave`] does. Meanwhile signals reach their threads (a
    /// traced thread stops at each: left alone it would come no further than its next signal), and children are let go.
    pub fn run_for(&mut self, time: Duration) -> Result<(), TraceError> {
        self.resume()?;
        let until = Instant::now() + time;
        while Instant::now() < until {
            match self.next(Wait::Poll)? {
                Some(Notice::Trap(tid)) => self.let_go(tid)?,
                Some(Notice::Forked(child)) => self.release_child(child)?,
                Some(Notice::ThreadEnded(_)) => {}
                Some(Notice::Executed | Notice::Ended(_)) => return Err(TraceError::Gone { tid: self.pid }),
                None => std::thread::sleep(RUN_PAUSE),
            }
        }
        self.stop_to_leave()
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

    /// Ends tracing. Threads that are not stopped, and can't be, are let go by the kernel when we exit.
    pub fn detach(mut self) -> Result<(), TraceError> {
        self.let_all_go()
    }

    fn let_all_go(&mut self) -> Result<(), TraceError> {
        if self.ended {
            return Ok(());
        }
        // A stop that just failed would fail again.
        let stopped = if self.stuck { Ok(()) } else { self.stop_to_leave() };
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
