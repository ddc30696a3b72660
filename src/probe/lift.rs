//! Lifting the probes of the trap kind from a stopped process, so that nothing of them is left.
//!
//! The breakpoints go first; then the process runs, for up to a second, until no thread is inside a thunk; then the
//! SIGTRAP handler and the regions go. What can't go (somebody may still run into it) stays, and is told.

use super::calls::{Observation, Trap};
use super::error::ProbeError;
use super::install::{Installed, calling_thread, munmap, sigaction};
use super::references;
use super::region::{self, Patch, REGION_LEN};
use crate::addr::RemoteAddr;
use crate::inferior::error::TraceError;
use crate::inferior::sys::{Registers, Wait};
use crate::inferior::{Inferior, Notice};
use crate::memory::RemoteMemory;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How long lifting waits for threads to come out of the thunks.
const QUIET_PATIENCE: Duration = Duration::from_secs(1);
/// How long they run between two looks.
const QUIET_INTERVAL: Duration = Duration::from_millis(2);
const SIGTRAP_BIT: u64 = 1 << (libc::SIGTRAP - 1);

/// What could not be taken back.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LeftBehind {
    /// Regions that stay mapped, readable and executable, because something may still run in them.
    pub regions: Vec<RemoteAddr>,
    /// Why, in words for the user.
    pub why: Vec<String>,
    /// A thread may be running in one of them. Otherwise nothing in them does anything, but the application keeps an
    /// address in them.
    pub busy: bool,
}

pub(super) fn why_busy(inferior: &Inferior) -> String {
    match inferior.unstopped().first() {
        Some(tid) => format!("thread {tid} sleeps in the kernel and does not stop"),
        None if inferior.has_guests() => "a child still runs in the target's own memory".into(),
        None => format!("a thread was still inside an allocator call after {} s", QUIET_PATIENCE.as_secs()),
    }
}

impl Installed {
    /// Blocks SIGTRAP again in stopped threads that still have the mask that the kernel left them with.
    fn reblock(&self, inferior: &Inferior) -> Result<(), TraceError> {
        for tid in inferior.tids() {
            let Some(mask) = self.unblocked.get(&tid) else { continue };
            match inferior.mask(tid) {
                Ok(now) if now == *mask => inferior.set_mask(tid, mask | SIGTRAP_BIT)?,
                Ok(_) | Err(TraceError::Gone { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Lifts every probe. The process is stopped before and after; in between it may run for up to a second,
    /// free of breakpoints, until no thread is in a thunk. `see` is told what calls under way came to.
    pub fn lift(
        &mut self,
        inferior: &mut Inferior,
        see: &mut dyn FnMut(&Inferior, i32, &Registers, Observation),
    ) -> Result<LeftBehind, ProbeError> {
        let mut left = LeftBehind::default();
        let mut thunks = Vec::new();
        for patch in &self.patches {
            self.lift_patch(inferior, patch)?;
            if patch.len == 8 {
                // The application may have copied the word at any time, and may call through our thunk for ever: it only
                // passes calls on from now on.
                let thunk = u64::from_le_bytes(patch.planted);
                inferior.write(RemoteAddr(thunk), &[region::NOP])?;
                thunks.push(thunk);
            }
        }
        self.settle_traps(inferior, see)?;
        let start = Instant::now();
        while self.is_busy(inferior)? {
            if start.elapsed() > QUIET_PATIENCE {
                left.why.push(why_busy(inferior));
                left.busy = true;
                break;
            }
            self.run_a_while(inferior, see)?;
        }
        self.clean_newborns(inferior)?;
        self.reblock(inferior)?;
        self.remove_regions(inferior, &thunks, &mut left)?;
        inferior.set_bypasses(HashMap::new());
        Ok(left)
    }

    /// Gives SIGTRAP its disposition back and unmaps what nobody can run into any more.
    fn remove_regions(
        &self,
        inferior: &mut Inferior,
        thunks: &[u64],
        left: &mut LeftBehind,
    ) -> Result<(), ProbeError> {
        if left.busy {
            left.regions.clone_from(&self.regions);
            return Ok(());
        }
        let tid = calling_thread(inferior)?;
        if self.handler_installed {
            let original = self.first_region.offset(region::ORIGINAL_ACTION);
            inferior.remote_syscall(tid, sigaction(original, RemoteAddr::NULL))?;
        }
        // The thunks of words are all in the first region.
        let wrapped = references::any(inferior, thunks)?;
        for region in &self.regions {
            if wrapped && *region == self.first_region {
                inferior.write(region.offset(region::HANDLER_INSTALLED), &0_u64.to_le_bytes())?;
                left.regions.push(*region);
                left.why.push(references::WHY.into());
            } else {
                inferior.remote_syscall(tid, munmap(*region))?;
            }
        }
        Ok(())
    }

    /// Children that showed themselves while the world was stopped.
    fn clean_newborns(&self, inferior: &mut Inferior) -> Result<(), TraceError> {
        for child in inferior.newborns() {
            self.free_child(inferior, child)?;
        }
        Ok(())
    }

    /// Takes one patch back, except from a word that the application has changed since.
    fn lift_patch(&self, inferior: &Inferior, patch: &Patch) -> Result<(), ProbeError> {
        let now = inferior.memory().read_vec(patch.address, patch.len)?;
        if patch.len == 8 && now != patch.planted {
            return Ok(());
        }
        inferior.write(patch.address, &patch.before[..patch.len])?;
        let restored = inferior.memory().read_vec(patch.address, patch.len)?;
        if restored != patch.before[..patch.len] {
            return Err(ProbeError::NotRestored { addr: patch.address, len: patch.len });
        }
        Ok(())
    }

    /// Every thread that stands on a trap of ours, reported or still queued, goes on as if it weren't there.
    fn settle_traps(
        &mut self,
        inferior: &mut Inferior,
        see: &mut dyn FnMut(&Inferior, i32, &Registers, Observation),
    ) -> Result<(), ProbeError> {
        for tid in inferior.tids() {
            while inferior.held_signal(tid).is_none() && inferior.int3_queued(tid) {
                inferior.report_queued_signal(tid)?;
            }
            let Some((trap, regs)) = self.trap_of(inferior, tid)? else { continue };
            match trap {
                Trap::Entry(i) => {
                    let thunk = self.calls.thunks()[i];
                    inferior.set_rip(tid, thunk.entry.unwrap_or(thunk.bypass))?;
                    inferior.drop_signal_now(tid)?;
                }
                Trap::Return(_) => {
                    let hit = self.calls.hit(tid, trap, &regs, inferior.memory());
                    see(inferior, tid, &regs, hit.observation);
                    inferior.drop_signal_now(tid)?;
                }
            }
        }
        Ok(())
    }

    /// Whether a thread is in a thunk, or holds an address of one: the instruction after a load of a
    /// table's word may be the jump to what it pointed to.
    fn is_busy(&self, inferior: &Inferior) -> Result<bool, ProbeError> {
        let mut alive = Vec::new();
        for tid in inferior.tids() {
            match inferior.registers(tid) {
                Ok(regs) => alive.push((tid, regs)),
                Err(TraceError::Gone { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let inside = |value: &u64| self.regions.iter().any(|r| value.wrapping_sub(r.0) < REGION_LEN as u64);
        let has_words = self.patches.iter().any(|p| p.len == 8);
        let holds = alive.iter().any(|(_, r)| {
            if !has_words {
                return inside(&r.rip);
            }
            [
                r.rip, r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12,
                r.r13, r.r14, r.r15,
            ]
            .iter()
            .any(inside)
        });
        let unsure = inferior.has_guests() || !inferior.unstopped().is_empty();
        Ok(holds || unsure || self.calls.any_under_way(inferior.memory(), &alive))
    }

    fn run_a_while(
        &mut self,
        inferior: &mut Inferior,
        see: &mut dyn FnMut(&Inferior, i32, &Registers, Observation),
    ) -> Result<(), ProbeError> {
        inferior.resume()?;
        let until = Instant::now() + QUIET_INTERVAL;
        while Instant::now() < until {
            match inferior.next(Wait::Poll)? {
                Some(Notice::Trap(tid)) => {
                    if let Some((trap, regs)) = self.trap_of(inferior, tid)? {
                        inferior.drop_signal(tid);
                        let hit = self.calls.hit(tid, trap, &regs, inferior.memory());
                        if let Trap::Entry(i) = trap {
                            inferior.set_rip(tid, self.calls.thunks()[i].bypass)?;
                            self.calls.forget(tid);
                        } else {
                            see(inferior, tid, &regs, hit.observation);
                        }
                    }
                    inferior.let_go(tid)?;
                }
                Some(Notice::Forked(child)) => self.free_child(inferior, child)?,
                Some(Notice::ThreadEnded(tid)) => self.forget(tid),
                Some(Notice::Executed | Notice::Ended(_)) => {
                    return Err(TraceError::Gone { tid: inferior.pid() }.into());
                }
                None => std::thread::yield_now(),
            }
        }
        inferior.stop_to_leave()?;
        self.settle_traps(inferior, see)
    }
}
