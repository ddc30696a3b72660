//! Children of the traced process: told apart from its threads at their first stop, cleaned or let run.
//!
//! One with memory of its own is held at its birth until it is released; one that runs in the process's own memory
//! (vfork, posix_spawn) is a guest: see the head of [`super`].

use super::error::TraceError;
use super::remote_call::{self, Call, Ended};
use super::stop::StopEvent;
use super::world::Held;
use super::{Inferior, Notice, SI_KERNEL, facts, sys, write_memory};
use crate::addr::RemoteAddr;
use nix::errno::Errno;
use std::collections::HashMap;
use std::fs::File;

impl Inferior {
    pub(super) fn expect_child_of(&mut self, parent: i32) {
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
    pub(super) fn on_stranger(&mut self, tid: i32, event: StopEvent) -> Result<(), TraceError> {
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

    pub(super) fn on_guest_stop(&mut self, tid: i32, event: StopEvent) -> Result<(), TraceError> {
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
    pub(super) fn bypass(&self, guest: i32) -> Result<(), Errno> {
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
}
