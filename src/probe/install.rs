//! Planting the probes of the trap kind in a stopped process, and what is done about them while they are in.
//!
//! A transaction: everything is checked before the first byte is written, and whatever fails while
//! planting is undone. Order of planting: regions (writable, not executable) → their contents → executable, not
//! writable → our SIGTRAP handler → breakpoints. So at every instant a thread that meets a breakpoint
//! finds the handler, should we be gone. Lifting is [`super::lift`]'s.

use super::calls::{Calls, Trap};
use super::error::ProbeError;
use super::place::places;
use super::plan::{ENTRY_BYTES, Plan};
use super::region::{self, ACTION_LEN, Controller, Observed, Patch, REGION_LEN, Region};
use crate::addr::RemoteAddr;
use crate::inferior::error::TraceError;
use crate::inferior::remote_call::Call;
use crate::inferior::sys::Registers;
use crate::inferior::{Inferior, maps};
use crate::memory::RemoteMemory;
use nix::errno::Errno;
use std::collections::{BTreeSet, HashMap};

/// Bytes below rsp that belong to the thread.
const RED_ZONE: u64 = 128;
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
    pub(super) regions: Vec<RemoteAddr>,
    pub(super) patches: Vec<Patch>,
    pub(super) calls: Calls,
    pub(super) handler_installed: bool,
    pub(super) first_region: RemoteAddr,
    /// Threads whose SIGTRAP the kernel unblocked, and the mask it left them with.
    pub(super) unblocked: HashMap<i32, u64>,
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
    let stopped: Vec<_> =
        inferior.tids().into_iter().filter_map(|tid| Some((tid, inferior.registers(tid).ok()?))).collect();
    let chosen = stopped.iter().find(|(_, regs)| regs.orig_rax == u64::MAX).or(stopped.first());
    chosen.map(|(tid, _)| *tid).ok_or(ProbeError::Trace(TraceError::Gone { tid: inferior.pid() }))
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
            let mut region = Region::new(base, myself(self.inferior.pid())?);
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
            // As it is going to be: killed at any instant, we leave a region that is known by its size or its first bytes.
            let protection = (libc::PROT_READ | libc::PROT_EXEC) as u64;
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

    /// The kernel stores the disposition of SIGTRAP on the thread's stack, beyond the 128 bytes below rsp that are the thread's (System V ABI):
    /// the regions can't be written to by the process.
    fn original_action(&mut self) -> Result<[u8; ACTION_LEN], ProbeError> {
        let free = RemoteAddr(self.inferior.registers(self.tid)?.rsp).back(RED_ZONE + ACTION_LEN as u64);
        let scratch = RemoteAddr(free.0 & !15);
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
            unblocked: HashMap::new(),
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

/// This heaptap and process `target`, as regions name them.
pub fn myself(target: i32) -> Result<Controller, ProbeError> {
    let pid = std::process::id() as i32;
    let start_time = maps::start_time(pid)
        .map_err(|e| TraceError::Proc { path: "/proc/self/stat".into(), source: std::io::Error::other(e) })?;
    let target = maps::own_pid(target).and_then(|own| u64::try_from(own).ok()).unwrap_or_default();
    Ok(Controller { pid: pid as u64, start_time, target })
}

impl Installed {
    /// The calls under way.
    pub fn calls(&mut self) -> &mut Calls {
        &mut self.calls
    }

    /// Memory that the process has in addition, in bytes.
    pub fn extra_bytes(&self) -> u64 {
        self.regions.len() as u64 * REGION_LEN as u64 + region::copied_code(&self.patches)
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

    /// Puts our SIGTRAP handler back after the kernel reset it: it does that, and unblocks SIGTRAP, when an int3 is met
    /// with SIGTRAP blocked (`force_sig_info_to_task`), as glibc has it while a thread is born or ends. `tid` is
    /// stopped at such a trap, whose signal was dropped. SIGTRAP stays unblocked, lest the next breakpoint resets the
    /// handler again: glibc restores its thread's whole mask in the end; [`Installed::reblock`] is for who does not.
    pub fn repair(&mut self, inferior: &mut Inferior, tid: i32, mask: u64) -> Result<(), TraceError> {
        let which = if self.handler_installed { region::OUR_ACTION } else { region::ORIGINAL_ACTION };
        let action = self.first_region.offset(which);
        inferior.remote_syscall_at_trap(tid, sigaction(action, RemoteAddr::NULL))?;
        self.unblocked.insert(tid, mask);
        Ok(())
    }

    /// The thread ended.
    pub fn forget(&mut self, tid: i32) {
        self.calls.forget(tid);
        self.unblocked.remove(&tid);
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

    /// Cleans a child at its birth and lets it go; one that dies meanwhile is no failure.
    pub fn free_child(&self, inferior: &mut Inferior, child: i32) -> Result<(), TraceError> {
        match self.clean_child(inferior, child).and_then(|()| inferior.release_child(child)) {
            Err(TraceError::Gone { .. }) => Ok(()),
            other => other,
        }
    }
}
