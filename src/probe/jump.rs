//! The second stage of the jump kind: planting the jumps in a stopped process, and lifting them again.
//!
//! Planting: memory at each entry is compared with the file once more, threads that stand inside bytes about to be overwritten
//! are moved to the same instruction of the trampoline, the jumps and words are written, the agent is switched on.
//! Lifting is the reverse; then the process runs, free of jumps, until no thread is in our code: the depth word of
//! each thread's slot tells of calls under way, the instruction pointer of the rest.

use super::error::ProbeError;
use super::lift::LeftBehind;
use super::load::{self, Loaded};
use super::near::{self, Hook, Hooked};
use super::references;
use super::region::Patch;
use super::signal_frames::interrupted_at;
use crate::addr::RemoteAddr;
use crate::agent_abi::{SLOTS, Slot, State, function};
use crate::inferior::error::TraceError;
use crate::inferior::sys::Registers;
use crate::inferior::{Inferior, maps};
use crate::mapping::Mapping;
use crate::memory::RemoteMemory;
use std::mem::offset_of;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// How often planting tries again when a signal handler has interrupted a thread inside the bytes to be overwritten.
const PLANT_TRIES: u32 = 20;
const PLANT_PAUSE: Duration = Duration::from_millis(1);
/// How long lifting waits for threads to come out of our code, and how long they run between two looks.
const QUIET_PATIENCE: Duration = Duration::from_secs(1);
const QUIET_INTERVAL: Duration = Duration::from_millis(2);

impl Hook {
    /// The bytes of the function that are overwritten or jumped over: a thread may stand at any but the first of them.
    fn covered(&self) -> Option<(RemoteAddr, RemoteAddr)> {
        match &self.hooked {
            Hooked::Body(detour) => {
                Some((detour.patch_at(), detour.patch_at().offset(detour.covered_len as u64)))
            }
            Hooked::Word { .. } => None,
        }
    }

    /// Where a thread goes on that stands at `rip` inside the covered bytes.
    fn trampolined(&self, rip: RemoteAddr) -> Option<RemoteAddr> {
        let (first, end) = self.covered()?;
        if rip == end && self.ends_in_syscall() {
            // Interrupted in that call it would go back to the instruction, should the kernel restart the call.
            return self.trampoline.as_ref()?.rest();
        }
        if rip <= first || rip >= end {
            return None;
        }
        self.trampoline.as_ref()?.moved(rip)
    }

    /// Whether the last of the covered bytes are a `syscall`.
    fn ends_in_syscall(&self) -> bool {
        matches!(&self.hooked, Hooked::Body(detour) if detour.file_bytes().ends_with(&[0x0f, 0x05]))
    }

    fn is_covered(&self, rip: RemoteAddr) -> bool {
        self.covered().is_some_and(|(first, end)| rip > first && rip < end)
    }

    /// Where a thread goes on that stands at `rip` inside the trampoline, once the function is whole again.
    fn out_of_trampoline(&self, rip: RemoteAddr) -> Option<RemoteAddr> {
        self.trampoline.as_ref()?.moved_back(rip)
    }
}

/// Plants the jumps in a stopped process and switches the agent on. On failure nothing of it remains.
pub fn plant(inferior: &mut Inferior, loaded: &Loaded) -> Result<(), ProbeError> {
    for tries_left in (0..PLANT_TRIES).rev() {
        check_unchanged(inferior, loaded)?;
        if !handler_inside(inferior, |rip| loaded.hooks.iter().any(|h| h.is_covered(rip)))? {
            break;
        }
        if tries_left == 0 {
            return Err(ProbeError::HandlerStays { pid: inferior.pid() });
        }
        inferior.run_for(PLANT_PAUSE)?;
        inferior.stop()?;
    }
    move_threads(inferior, |rip| loaded.hooks.iter().find_map(|h| h.trampolined(rip)))?;
    let mut planted = 0;
    let written = loaded.patches().try_for_each(|patch| {
        inferior.write(patch.address, &patch.planted[..patch.len])?;
        planted += 1;
        Ok::<(), TraceError>(())
    });
    let enabled = loaded.parts.state.0.offset(offset_of!(State, enabled) as u64);
    match written.and_then(|()| inferior.write(enabled, &1_u32.to_le_bytes())) {
        Ok(()) => Ok(()),
        Err(error) => {
            for patch in loaded.patches().take(planted) {
                if let Err(e) = inferior.write(patch.address, &patch.before[..patch.len]) {
                    tracing::error!("undoing a refused attach: {e}");
                }
            }
            Err(error.into())
        }
    }
}

/// What is about to be overwritten is still what was planned for.
fn check_unchanged(inferior: &Inferior, loaded: &Loaded) -> Result<(), ProbeError> {
    for hook in &loaded.hooks {
        let (at, expected) = match &hook.hooked {
            Hooked::Body(detour) => (detour.entry.address, detour.file_bytes().to_vec()),
            Hooked::Word { word, value } => (*word, value.0.to_le_bytes().to_vec()),
        };
        let found = inferior.memory().read_vec(at, expected.len())?;
        if found != expected {
            let (function, module) = match &hook.hooked {
                Hooked::Body(detour) => (detour.entry.function.name(), detour.entry.module.clone()),
                Hooked::Word { .. } => ("a function pointer", "CPython's data".into()),
            };
            return Err(ProbeError::EntryChanged { function, addr: at, module, found, expected });
        }
    }
    Ok(())
}

fn registers(inferior: &Inferior) -> Result<Vec<(i32, Registers)>, TraceError> {
    let mut found = Vec::new();
    for tid in inferior.tids() {
        match inferior.registers(tid) {
            Ok(regs) => found.push((tid, regs)),
            Err(TraceError::Gone { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

fn move_threads(
    inferior: &Inferior,
    to: impl Fn(RemoteAddr) -> Option<RemoteAddr>,
) -> Result<(), TraceError> {
    for (tid, regs) in registers(inferior)? {
        if let Some(there) = to(RemoteAddr(regs.rip)) {
            tracing::debug!("thread {tid} moved from {:#x} to {there}", regs.rip);
            inferior.set_rip(tid, there)?;
        }
    }
    Ok(())
}

/// Whether a signal handler will return to a place that `inside` names.
fn handler_inside(inferior: &Inferior, inside: impl Fn(RemoteAddr) -> bool) -> Result<bool, ProbeError> {
    let Some(restorer) = inferior.restorer() else { return Ok(false) };
    let maps = mappings(inferior.pid())?;
    for tid in inferior.tids() {
        match interrupted_at(inferior, tid, restorer, &maps) {
            Ok(found) if found.iter().any(|rip| inside(*rip)) => return Ok(true),
            Ok(_) | Err(TraceError::Gone { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(false)
}

fn mappings(pid: i32) -> Result<Vec<Mapping>, TraceError> {
    maps::mappings(pid)
        .map_err(|e| TraceError::Proc { path: format!("/proc/{pid}/maps"), source: std::io::Error::other(e) })
}

/// Lifts everything from a process that is seized whole and running, and lets it go. It is stopped for the moments that this
/// takes. `filtered`: its threads have seccomp filters.
pub fn lift(mut inferior: Inferior, loaded: &Loaded, filtered: bool) -> Result<LeftBehind, ProbeError> {
    let mut left = LeftBehind::default();
    inferior.prepare_calls()?;
    let thunks = match lift_hooks(&mut inferior, loaded, &mut left) {
        Ok(thunks) => thunks,
        Err(error) => {
            let ended = inferior.has_ended();
            let let_go = inferior.detach();
            return if ended {
                Ok(LeftBehind::default())
            } else {
                Err(let_go.map_or_else(Into::into, |()| error))
            };
        }
    };
    let wrapped = !left.busy && references::kept(&mut inferior, &thunks)?;
    inferior.detach()?;
    if left.busy {
        left.regions.clone_from(&loaded.regions);
        return Ok(left);
    }
    remove(loaded, wrapped, filtered, &mut left)?;
    Ok(left)
}

/// Makes the agent pass everything through, in a process that can't be stopped: somebody else traces it.
pub fn switch_off(loaded: &Loaded) -> Result<(), ProbeError> {
    let enabled = loaded.parts.state.0.offset(offset_of!(State, enabled) as u64);
    let path = format!("/proc/{}/mem", maps::memory_holder(loaded.pid));
    let written = std::fs::File::options()
        .write(true)
        .open(&path)
        .and_then(|file| file.write_all_at(&0_u32.to_le_bytes(), enabled.0));
    Ok(written.map_err(|source| TraceError::Proc { path, source })?)
}

/// Takes the patches back and waits for quiet. The process is stopped afterwards. Answers the thunks whose address the
/// application may have: those of CPython's tables, which it may have copied at any time, whatever they hold now
/// (tracemalloc calls what it once saved even when it is started the next time), and those of other words that it has changed.
fn lift_hooks(
    inferior: &mut Inferior,
    loaded: &Loaded,
    left: &mut LeftBehind,
) -> Result<Vec<u64>, ProbeError> {
    inferior.stop_to_leave()?;
    let enabled = loaded.parts.state.0.offset(offset_of!(State, enabled) as u64);
    inferior.write(enabled, &0_u32.to_le_bytes())?;
    let mut thunks = Vec::new();
    for hook in &loaded.hooks {
        let unchanged = lift_patch(inferior, hook)?;
        if let Hooked::Word { value, .. } = &hook.hooked {
            // State and agent are about to go: whoever comes by the thunk from now on is passed on by it.
            let (at, bytes) = near::pass_on(hook.thunk, *value);
            inferior.write(at, &bytes)?;
            if !unchanged || hook.function != function::CODE_DEALLOC {
                thunks.push(hook.thunk.0);
            }
        }
    }
    let start = Instant::now();
    loop {
        move_threads(inferior, |rip| loaded.hooks.iter().find_map(|h| h.out_of_trampoline(rip)))?;
        if !is_busy(inferior, loaded)? {
            return Ok(thunks);
        }
        if start.elapsed() > QUIET_PATIENCE {
            left.busy = true;
            left.why.push(super::lift::why_busy(inferior));
            return Ok(thunks);
        }
        inferior.run_for(QUIET_INTERVAL)?;
    }
}

/// Takes one patch back. False where the application has changed the word since.
fn lift_patch(inferior: &Inferior, hook: &Hook) -> Result<bool, ProbeError> {
    let Patch { address, len, before, planted } = hook.patch;
    let now = inferior.memory().read_vec(address, len)?;
    if matches!(&hook.hooked, Hooked::Word { .. }) && now != planted[..len] {
        return Ok(false);
    }
    let first = near::first_to_restore(&now, &planted[..len]).unwrap_or(0);
    inferior.write(address.offset(first as u64), &before[first..len])?;
    let restored = inferior.memory().read_vec(address, len)?;
    if restored[first..] != before[first..len] {
        return Err(ProbeError::NotRestored { addr: address, len });
    }
    Ok(true)
}

/// Where threads may be found that are not done with our code.
pub(super) struct Presence<'a> {
    /// The code: first byte, length.
    pub code: Vec<(RemoteAddr, u64)>,
    /// Thunks that words pointed to.
    pub thunks: Vec<u64>,
    /// The state, where it can tell of calls under way.
    pub state: Option<RemoteAddr>,
    /// For threads, registers and memory.
    pub inferior: &'a Inferior,
}

impl Presence<'_> {
    /// Whether a thread is in the code, will come back to it, or is about to call it.
    pub fn is_busy(&self) -> Result<bool, ProbeError> {
        let inside = |rip: u64| self.code.iter().any(|(at, len)| rip.wrapping_sub(at.0) < *len);
        let threads = registers(self.inferior)?;
        let unsure = self.inferior.has_guests() || !self.inferior.unstopped().is_empty();
        if unsure {
            return Ok(true);
        }
        let there = threads.iter().find(|(_, regs)| inside(regs.rip) || self.holds_thunk(regs));
        if let Some((tid, regs)) = there {
            tracing::debug!("thread {tid} at {:#x} is in our code or about to call it", regs.rip);
            return Ok(true);
        }
        if let Some(state) = self.state
            && let Some(tid) = call_under_way(self.inferior, state, &threads)?
        {
            tracing::debug!("thread {tid} will come back to our code");
            return Ok(true);
        }
        let interrupted = handler_inside(self.inferior, |rip| inside(rip.0))?;
        if interrupted {
            tracing::debug!("a signal handler will return to our code");
        }
        Ok(interrupted)
    }

    /// A word's value that was loaded to be called.
    fn holds_thunk(&self, r: &Registers) -> bool {
        let all = [
            r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14,
            r.r15,
        ];
        all.iter().any(|value| self.thunks.contains(value))
    }
}

fn is_busy(inferior: &Inferior, loaded: &Loaded) -> Result<bool, ProbeError> {
    let thunks = loaded.hooks.iter().filter(|h| h.patch.len == 8).map(|h| h.thunk.0).collect();
    let state = Some(loaded.parts.state.0);
    Presence { code: loaded.code(), thunks, state, inferior }.is_busy()
}

/// Whether a live thread's slot says that a call will return through the agent, or that the agent was interrupted. What lies
/// below the thread's stack pointer is over, whatever the slot says; a thread on another stack (a signal handler's own) will
/// be back.
fn call_under_way(
    inferior: &Inferior,
    state: RemoteAddr,
    threads: &[(i32, Registers)],
) -> Result<Option<i32>, ProbeError> {
    let slots_at = state.offset(offset_of!(State, slots) as u64);
    let slots = inferior.memory().read_vec(slots_at, SLOTS * size_of::<Slot>())?;
    // Read when it is needed: the world stands still.
    let mut maps = None;
    for slot in slots.chunks_exact(size_of::<Slot>()) {
        let word = |at: usize| u64::from_le_bytes(slot[at..at + 8].try_into().unwrap_or_default());
        let half = |at: usize| u32::from_le_bytes(slot[at..at + 4].try_into().unwrap_or_default());
        let key = word(offset_of!(Slot, key));
        let Some((tid, regs)) = threads.iter().find(|(_, regs)| key != 0 && regs.fs_base == key) else {
            continue;
        };
        let mut marks = Vec::new();
        if half(offset_of!(Slot, depth)) > 0 {
            marks.push(word(offset_of!(Slot, depth_rsp)));
        }
        if half(offset_of!(Slot, in_agent)) > 0 {
            marks.push(word(offset_of!(Slot, agent_rsp)));
        }
        for rsp in marks {
            if regs.rsp <= rsp {
                return Ok(Some(*tid));
            }
            if maps.is_none() {
                maps = Some(mappings(inferior.pid())?);
            }
            if !maps.as_ref().is_some_and(|maps| same_mapping(maps, regs.rsp, rsp)) {
                return Ok(Some(*tid));
            }
        }
    }
    Ok(None)
}

fn same_mapping(maps: &[Mapping], a: u64, b: u64) -> bool {
    maps.iter().any(|m| m.contains(RemoteAddr(a)) && m.contains(RemoteAddr(b)))
}

/// Unmaps what nobody can run into any more, in the name of one thread while the others run.
fn remove(loaded: &Loaded, wrapped: bool, filtered: bool, left: &mut LeftBehind) -> Result<(), ProbeError> {
    let mut inferior = match load::seize_to_unload(loaded.pid) {
        Ok(inferior) => inferior,
        Err(error) => {
            left.regions.clone_from(&loaded.regions);
            left.why.push(format!("no thread could be stopped to unmap it: {error}"));
            return Ok(());
        }
    };
    let mut parts = loaded.parts;
    if wrapped {
        // The thunks of words are in the first region; they need nothing behind it.
        let (base, len) = parts.code;
        let agent = base.offset(super::region::REGION_LEN as u64);
        parts.code = (agent, len - super::region::REGION_LEN as u64);
        left.regions.push(base);
        left.why.push(references::WHY.into());
    }
    let withdrawn = if wrapped { withdraw(&inferior, loaded.parts.code.0) } else { Ok(()) };
    let result = withdrawn
        .map_err(ProbeError::from)
        .and_then(|()| suspended(&mut inferior, filtered))
        .and_then(|()| load::unload(&mut inferior, &parts, &loaded.regions));
    let ended = inferior.has_ended();
    let let_go = inferior.detach();
    match result {
        Err(_) if ended => Ok(()),
        Err(error) => Err(error),
        Ok(()) => Ok(let_go?),
    }
}

/// The region that stays names nothing beside itself any more, but for the state until that is unmapped: what the application
/// has there later is not ours.
fn withdraw(inferior: &Inferior, base: RemoteAddr) -> Result<(), TraceError> {
    inferior.write(base.offset(near::RINGS_AT as u64), &[0; 16])?;
    let code = [base.0.to_le_bytes(), (super::region::REGION_LEN as u64).to_le_bytes()].concat();
    inferior.write(base.offset(near::CODE_AT as u64), &code)
}

fn suspended(inferior: &mut Inferior, filtered: bool) -> Result<(), ProbeError> {
    if filtered {
        inferior.stop_to_leave()?;
        inferior.suspend_filters().map_err(|errno| ProbeError::Seccomp { errno })?;
        inferior.resume()?;
    }
    Ok(())
}
