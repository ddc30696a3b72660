//! Planting and lifting probes of the trap kind in a stopped process.
//!
//! A transaction: everything is checked before the first byte is written, and whatever fails while
//! planting is undone. Order of planting: regions (writable, not executable) → their contents → executable, not
//! writable → our SIGTRAP handler → breakpoints. So at every instant a thread that meets a breakpoint
//! finds the handler, should we be gone. Order of lifting is the reverse.

use super::calls::{Calls, Observation, Trap};
use super::error::ProbeError;
use super::place::places;
use super::plan::{ENTRY_BYTES, Plan};
use super::references;
use super::region::{self, ACTION_LEN, Controller, INT3, Observed, Patch, REGION_LEN, Region};
use crate::addr::RemoteAddr;
use crate::inferior::error::TraceError;
use crate::inferior::remote_call::Call;
use crate::inferior::sys::{Registers, Wait};
use crate::inferior::{Inferior, Notice, maps};
use crate::memory::RemoteMemory;
use nix::errno::Errno;
use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

/// How long lifting waits for threads to come out of the thunks.
const QUIET_PATIENCE: Duration = Duration::from_secs(1);
/// How long they run between two looks.
const QUIET_INTERVAL: Duration = Duration::from_millis(2);
const MAP_FLAGS: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
const SIGSET_LEN: u64 = 8;

/// What may be done to the target.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Plant even where the target uses SIGTRAP itself; its own disposition stays in force, and it dies at the
    /// next breakpoint should we be killed.
    pub unsafe_trap: bool,
    /// The target's threads may make any system call: no seccomp filter.
    pub may_heal: bool,
}

/// Probes in a process.
pub struct Installed {
    regions: Vec<RemoteAddr>,
    patches: Vec<Patch>,
    calls: Calls,
    handler_installed: bool,
    first_region: RemoteAddr,
}

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

/// Checks that memory at every entry point is what its file has there, and that every table's word is as planned.
pub fn check_entries(memory: &dyn RemoteMemory, plan: &Plan) -> Result<(), ProbeError> {
    for entry in &plan.entries {
        let found = memory.read_vec(entry.address, ENTRY_BYTES)?;
        if found != entry.file_bytes {
            return Err(ProbeError::EntryChanged {
                function: entry.function.name(),
                addr: entry.address,
                module: entry.module.clone(),
                found,
                expected: entry.file_bytes.clone(),
            });
        }
    }
    for word in &plan.words {
        let found = memory.read_ptr(word.word)?;
        if found != word.value {
            return Err(ProbeError::EntryChanged {
                function: word.function().name(),
                addr: word.word,
                module: "the allocator table".into(),
                found: found.0.to_le_bytes().to_vec(),
                expected: word.value.0.to_le_bytes().to_vec(),
            });
        }
    }
    Ok(())
}

/// A half-planted state, undone when dropped through [`Planting::undo`].
struct Planting<'a> {
    inferior: &'a mut Inferior,
    /// The thread in whose name system calls are made.
    tid: i32,
    regions: Vec<Region>,
    mapped: Vec<RemoteAddr>,
    patches: Vec<Patch>,
    planted: usize,
    handler_installed: bool,
}

/// Plants the probes of `plan` in a stopped process.
pub fn install(inferior: &mut Inferior, plan: &Plan, options: Options) -> Result<Installed, ProbeError> {
    check_entries(inferior.memory(), plan)?;
    let tid = calling_thread(inferior)?;
    let mut planting = Planting {
        inferior,
        tid,
        regions: Vec::new(),
        mapped: Vec::new(),
        patches: Vec::new(),
        planted: 0,
        handler_installed: false,
    };
    match planting.run(plan, options) {
        Ok(()) => Ok(planting.done()),
        Err(error) => {
            planting.undo();
            Err(error)
        }
    }
}

/// A thread to make calls in the name of: one that is in no system call where there is one.
pub(super) fn calling_thread(inferior: &Inferior) -> Result<i32, ProbeError> {
    let tids = inferior.tids();
    let in_user_mode = |tid: &&i32| inferior.registers(**tid).is_ok_and(|r| r.orig_rax == u64::MAX);
    let chosen = tids.iter().find(in_user_mode).or(tids.first());
    chosen.copied().ok_or(ProbeError::Trace(TraceError::Gone { tid: inferior.pid() }))
}

fn call(name: &'static str, number: i64, args: &[u64]) -> Call {
    let mut all = [0; 6];
    all[..args.len()].copy_from_slice(args);
    Call { name, number, args: all }
}

pub(super) fn sigaction(new: RemoteAddr, old: RemoteAddr) -> Call {
    call("rt_sigaction", libc::SYS_rt_sigaction, &[libc::SIGTRAP as u64, new.0, old.0, SIGSET_LEN])
}

pub(super) fn munmap(region: RemoteAddr) -> Call {
    call("munmap", libc::SYS_munmap, &[region.0, REGION_LEN as u64])
}

impl Planting<'_> {
    fn run(&mut self, plan: &Plan, options: Options) -> Result<(), ProbeError> {
        self.map_regions(plan)?;
        let original = self.original_action()?;
        self.finish_regions(&original, options)?;
        for region in &self.regions {
            self.inferior.write(region.base, &region.image()?)?;
        }
        for base in self.mapped.clone() {
            let protection = (libc::PROT_READ | libc::PROT_EXEC) as u64;
            let protect = [base.0, REGION_LEN as u64, protection];
            self.inferior.remote_syscall(self.tid, call("mprotect", libc::SYS_mprotect, &protect))?;
        }
        if !options.unsafe_trap {
            let ours = self.mapped[0].offset(region::OUR_ACTION);
            self.inferior.remote_syscall(self.tid, sigaction(ours, RemoteAddr::NULL))?;
            self.handler_installed = true;
        }
        for patch in self.patches.clone() {
            self.inferior.write(patch.address, &patch.planted[..patch.len])?;
            self.planted += 1;
        }
        Ok(())
    }

    /// One region per module with entry points; the words' thunks are in the first.
    fn map_regions(&mut self, plan: &Plan) -> Result<(), ProbeError> {
        let modules: BTreeSet<&str> = plan.entries.iter().map(|e| e.module.as_str()).collect();
        for module in modules {
            let entries: Vec<_> = plan.entries.iter().filter(|e| e.module == module).collect();
            let base = self.map_near(entries[0].address, module)?;
            let mut region = Region::new(base, myself()?);
            for entry in entries {
                region.add(Observed::Entry(entry))?;
                self.patches.push(region::breakpoint_patch(entry.address, entry.file_bytes[0]));
            }
            if self.regions.is_empty() {
                for word in &plan.words {
                    let thunk = region.add(Observed::Word(word))?;
                    self.patches.push(region::word_patch(word, &thunk));
                }
            }
            self.regions.push(region);
        }
        Ok(())
    }

    fn map_near(&mut self, near: RemoteAddr, module: &str) -> Result<RemoteAddr, ProbeError> {
        let pid = self.inferior.pid();
        let maps = maps::mappings(pid).map_err(|e| TraceError::Proc {
            path: format!("/proc/{pid}/maps"),
            source: std::io::Error::other(e),
        })?;
        for place in places(&maps, near, REGION_LEN as u64) {
            let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
            let args = [place.0, REGION_LEN as u64, protection, MAP_FLAGS, u64::MAX, 0];
            match self.inferior.remote_syscall(self.tid, call("mmap", libc::SYS_mmap, &args)) {
                // A kernel before 4.17 does not know MAP_FIXED_NOREPLACE and takes the address as a hint.
                Ok(at) => {
                    self.mapped.push(RemoteAddr(at));
                    if at == place.0 {
                        return Ok(place);
                    }
                }
                Err(TraceError::RemoteCall { errno: Errno::EEXIST | Errno::EPERM, .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(ProbeError::NoRoom { addr: near, module: module.into() })
    }

    /// The kernel stores the disposition of SIGTRAP in the first region, while that is still writable.
    fn original_action(&mut self) -> Result<[u8; ACTION_LEN], ProbeError> {
        let scratch = self.mapped[0];
        self.inferior.remote_syscall(self.tid, sigaction(RemoteAddr::NULL, scratch))?;
        let mut action = [0; ACTION_LEN];
        self.inferior.memory().read(scratch, &mut action)?;
        Ok(action)
    }

    fn finish_regions(&mut self, original: &[u8; ACTION_LEN], options: Options) -> Result<(), ProbeError> {
        let traps: Vec<_> =
            self.regions.iter().flat_map(|r| r.thunks.iter().flat_map(|t| t.traps())).collect();
        let others: Vec<_> = self.regions.iter().skip(1).map(|r| r.base).collect();
        let first = &mut self.regions[0];
        first.finish_first(&self.patches, &traps, &others, options.may_heal)?;
        first.set_original_action(original, !options.unsafe_trap);
        Ok(())
    }

    fn done(self) -> Installed {
        let thunks = self.regions.iter().flat_map(|r| r.thunks.clone()).collect();
        let calls = Calls::new(thunks);
        self.inferior.set_bypasses(calls.bypasses());
        Installed {
            first_region: self.mapped[0],
            regions: self.mapped,
            patches: self.patches,
            calls,
            handler_installed: self.handler_installed,
        }
    }

    /// Takes back what was done so far. The first failure is told; the rest is tried all the same.
    fn undo(&mut self) {
        for patch in self.patches.iter().take(self.planted) {
            report(self.inferior.write(patch.address, &patch.before[..patch.len]));
        }
        if self.handler_installed {
            let original = self.mapped[0].offset(region::ORIGINAL_ACTION);
            report(self.inferior.remote_syscall(self.tid, sigaction(original, RemoteAddr::NULL)).map(drop));
        }
        for region in self.mapped.clone() {
            report(self.inferior.remote_syscall(self.tid, munmap(region)).map(drop));
        }
    }
}

fn report(result: Result<(), TraceError>) {
    match result {
        Ok(()) | Err(TraceError::Gone { .. }) => {}
        Err(error) => tracing::error!("undoing a refused attach: {error}"),
    }
}

fn myself() -> Result<Controller, ProbeError> {
    let pid = std::process::id() as i32;
    let start_time = maps::start_time(pid)
        .map_err(|e| TraceError::Proc { path: "/proc/self/stat".into(), source: std::io::Error::other(e) })?;
    Ok(Controller { pid: pid as u64, start_time })
}

impl Installed {
    /// The calls under way.
    pub fn calls(&mut self) -> &mut Calls {
        &mut self.calls
    }

    /// Whether our SIGTRAP handler is in force.
    pub fn has_handler(&self) -> bool {
        self.handler_installed
    }

    /// Whether a trap of ours is what stopped `tid`; then which.
    pub fn trap_of(&self, inferior: &Inferior, tid: i32) -> Result<Option<(Trap, Registers)>, TraceError> {
        if !inferior.trapped_by_int3(tid) {
            return Ok(None);
        }
        let regs = inferior.registers(tid)?;
        Ok(self.calls.trap_at(regs.rip).map(|trap| (trap, regs)))
    }

    /// Puts our SIGTRAP handler back, and `tid`'s mask, after the kernel reset both: it does that when an int3
    /// is met with SIGTRAP blocked (`force_sig_info_to_task`), as glibc has it while a thread is born or
    /// ends. `tid` is stopped at such a trap, whose signal was dropped.
    pub fn repair(&self, inferior: &mut Inferior, tid: i32, mask: u64) -> Result<(), TraceError> {
        let which = if self.handler_installed { region::OUR_ACTION } else { region::ORIGINAL_ACTION };
        let action = self.first_region.offset(which);
        inferior.remote_syscall(tid, sigaction(action, RemoteAddr::NULL))?;
        inferior.set_mask(tid, mask | 1 << (libc::SIGTRAP - 1))
    }

    fn clean_child(&self, inferior: &mut Inferior, child: i32) -> Result<(), TraceError> {
        let memory = crate::inferior::memory::ProcessMemory::new(child);
        for patch in &self.patches {
            let planted =
                memory.read_vec(patch.address, patch.len).is_ok_and(|b| b == patch.planted[..patch.len]);
            if planted {
                inferior.write_child(child, patch.address, &patch.before[..patch.len])?;
            }
        }
        let original = self.regions[0].offset(region::ORIGINAL_ACTION);
        if self.handler_installed {
            inferior.child_syscall(child, sigaction(original, RemoteAddr::NULL))?;
        }
        for region in &self.regions {
            inferior.child_syscall(child, munmap(*region))?;
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
        let mut changed = Vec::new();
        for patch in &self.patches {
            if !self.lift_patch(inferior, patch)? {
                changed.push(*patch);
            }
        }
        self.settle_traps(inferior, see)?;
        let start = Instant::now();
        while self.is_busy(inferior)? {
            if start.elapsed() > QUIET_PATIENCE {
                left.why.push(format!(
                    "a thread was still inside an allocator call after {} s",
                    QUIET_PATIENCE.as_secs()
                ));
                left.busy = true;
                break;
            }
            self.run_a_while(inferior, see)?;
        }
        self.clean_newborns(inferior)?;
        self.remove_regions(inferior, &changed, &mut left)?;
        inferior.set_bypasses(HashMap::new());
        Ok(left)
    }

    /// Gives SIGTRAP its disposition back and unmaps what nobody can run into any more.
    fn remove_regions(
        &self,
        inferior: &mut Inferior,
        changed: &[Patch],
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
        let thunks: Vec<u64> = changed.iter().map(|p| u64::from_le_bytes(p.planted)).collect();
        let wrapped = references::any(inferior, &thunks)?;
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

    /// Cleans a child at its birth and lets it go; one that dies meanwhile is no failure.
    pub fn free_child(&self, inferior: &mut Inferior, child: i32) -> Result<(), TraceError> {
        match self.clean_child(inferior, child).and_then(|()| inferior.release_child(child)) {
            Err(TraceError::Gone { .. }) => Ok(()),
            other => other,
        }
    }

    /// Takes one patch back. False where the application has changed the word since: its thunk then only passes calls on.
    fn lift_patch(&self, inferior: &Inferior, patch: &Patch) -> Result<bool, ProbeError> {
        let now = inferior.memory().read_vec(patch.address, patch.len)?;
        if patch.len == 8 && now != patch.planted {
            // Somebody wrapped the allocator after us, and may call through our thunk for ever.
            inferior.write(RemoteAddr(u64::from_le_bytes(patch.planted)), &[NOP])?;
            return Ok(false);
        }
        inferior.write(patch.address, &patch.before[..patch.len])?;
        let restored = inferior.memory().read_vec(patch.address, patch.len)?;
        if restored != patch.before[..patch.len] {
            return Err(ProbeError::NotRestored { addr: patch.address, len: patch.len });
        }
        Ok(true)
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
        Ok(holds || inferior.has_guests() || self.calls.any_under_way(inferior.memory(), &alive))
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
                Some(Notice::ThreadEnded(tid)) => self.calls.forget(tid),
                Some(Notice::Executed | Notice::Ended(_)) => {
                    return Err(TraceError::Gone { tid: inferior.pid() }.into());
                }
                None => std::thread::yield_now(),
            }
        }
        inferior.stop()?;
        self.settle_traps(inferior, see)
    }
}

/// In place of an int3 that must do nothing any more.
pub(super) const NOP: u8 = 0x90;
const _: () = assert!(INT3 == 0xcc);
