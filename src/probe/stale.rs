//! What an earlier heaptap left behind when it was killed, of either kind: found by the magic of its first region, undone by that
//! region's own table of patches. A forked child of a recorded process has the same, from its birth on.
//!
//! Nothing in a region is trusted further than it can be checked: a patch is undone only where memory holds
//! exactly what that patch planted, a mapping is unmapped only where it looks like ours.

use super::agent_image::AgentImage;
use super::error::ProbeError;
use super::install::{calling_thread, sigaction};
use super::jump::Presence;
use super::lift::LeftBehind;
use super::load;
use super::near::{self, Parts};
use super::references;
use super::region::{HANDLER_INSTALLED, HEADER_LEN, MAGIC, NOP, ORIGINAL_ACTION, PATCH_LEN, REGION_LEN};
use crate::addr::RemoteAddr;
use crate::agent_abi::{ABI_VERSION, STATE_MAGIC, State};
use crate::inferior::error::TraceError;
use crate::inferior::remote_call::Call;
use crate::inferior::{Inferior, facts, maps};
use crate::mapping::{Backing, Mapping};
use crate::memory::RemoteMemory;
use std::time::{Duration, Instant};

/// Bytes of each thread's stack that are searched for return addresses into a region.
const STACK_SCAN: usize = 256 << 10;
const PATIENCE: Duration = Duration::from_secs(1);
const INTERVAL: Duration = Duration::from_millis(2);
const PAGE: u64 = 4096;

/// A region found in a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stale {
    /// Where it is.
    pub base: RemoteAddr,
    /// Pid of the heaptap that wrote it, and when that started (clock ticks since boot).
    pub controller: (i32, u64),
    handler_installed: bool,
    /// The process that it was written into, as that numbers itself; 0: not told.
    target: u64,
    /// address, length, before, planted
    patches: Vec<(RemoteAddr, usize, [u8; 8], [u8; 8])>,
    /// The rest of the jump kind.
    jump: Option<Jump>,
    /// Mapped, and nothing written into it yet: see [`blank`].
    blank: bool,
}

/// What the jump kind has beside its first region.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Jump {
    parts: Parts,
    others: Vec<RemoteAddr>,
    /// Not of a live recording: a forked child's, whose state is wiped.
    inherited: bool,
}

impl Stale {
    /// Whether the heaptap that wrote it still runs.
    pub fn controller_lives(&self) -> bool {
        let inherited = self.jump.as_ref().is_some_and(|j| j.inherited);
        !inherited && maps::start_time(self.controller.0).is_ok_and(|t| t == self.controller.1)
    }

    /// Whether it is of the jump kind.
    pub fn is_jump(&self) -> bool {
        self.jump.is_some()
    }

    /// Whether the disposition of SIGTRAP leads into it.
    pub fn has_handler(&self) -> bool {
        self.handler_installed
    }

    /// What `word` of an allocator table held before this heaptap made it hold `value`, if it did.
    pub fn word_before(&self, word: RemoteAddr, value: RemoteAddr) -> Option<RemoteAddr> {
        let planted = value.0.to_le_bytes();
        let patch = self.patches.iter().find(|(at, len, _, now)| (*at, *len, *now) == (word, 8, planted))?;
        Some(RemoteAddr(u64::from_le_bytes(patch.2)))
    }

    /// The thunk that a patch made a table's word point to, if it is such a patch and lies where it must.
    fn thunk_of_word(&self, len: usize, planted: [u8; 8]) -> Option<RemoteAddr> {
        let thunk = RemoteAddr(u64::from_le_bytes(planted));
        (len == 8 && thunk.0.wrapping_sub(self.base.0) < REGION_LEN as u64).then_some(thunk)
    }

    /// Takes the patches back, and has the thunks of words only pass calls on. Answers those whose address the application may
    /// have: of words that hold something else by now, and of CPython's tables, which it may have copied at any time.
    fn undo_patches(&self, inferior: &Inferior) -> Result<Vec<u64>, ProbeError> {
        let mut thunks = Vec::new();
        // A recording without the tables has one word, `tp_dealloc`, of which nobody takes a copy.
        let has_tables = self.patches.iter().filter(|(_, len, ..)| *len == 8).count() > 1;
        for (address, len, before, planted) in &self.patches {
            let now = inferior.memory().read_vec(*address, *len).unwrap_or_default();
            let first = near::first_to_restore(&now, &planted[..*len]);
            if let Some(first) = first {
                inferior.write(address.offset(first as u64), &before[first..*len])?;
            }
            let Some(thunk) = self.thunk_of_word(*len, *planted) else { continue };
            if self.is_jump() {
                pass_on(inferior, thunk, RemoteAddr(u64::from_le_bytes(*before)))?;
            } else {
                inferior.write(thunk, &[NOP])?;
            }
            if first.is_none() || has_tables {
                thunks.push(thunk.0);
            }
        }
        Ok(thunks)
    }

    /// Whether all of a region is zero.
    fn is_still_blank(&self, memory: &dyn RemoteMemory) -> bool {
        let (base, len) = self.jump.as_ref().map_or((self.base, 0), |jump| jump.parts.code);
        memory.read_vec(base, len as usize).is_ok_and(|bytes| bytes.iter().all(|byte| *byte == 0))
    }

    /// Ranges in which a thread executes our code.
    fn code(&self) -> Vec<(RemoteAddr, u64)> {
        let region = |at| (at, REGION_LEN as u64);
        match &self.jump {
            None => vec![region(self.base)],
            Some(jump) => {
                std::iter::once(jump.parts.code).chain(jump.others.iter().map(|at| region(*at))).collect()
            }
        }
    }

    /// Tells in the first region what is about to be unmapped: should we be killed before that goes too, nobody may take for
    /// ours what the application has there then.
    fn withdraw(&self, inferior: &Inferior, keep: bool) -> Result<(), TraceError> {
        if self.jump.is_none() {
            return Ok(());
        }
        load::withdraw_state(inferior, self.base)?;
        if keep {
            let code = [self.base.0.to_le_bytes(), (REGION_LEN as u64).to_le_bytes()].concat();
            inferior.write(self.base.offset(near::CODE_AT as u64), &code)?;
        }
        Ok(())
    }

    /// The state is gone, the first region stays.
    fn forget_state(&self, inferior: &Inferior) -> Result<(), TraceError> {
        match self.jump {
            Some(_) => inferior.write(self.base.offset(near::STATE_AT as u64), &[0; 16]),
            None => Ok(()),
        }
    }

    /// Everything mapped, the first region last, so that what finds the rest goes when the rest is gone. `keep`: without the
    /// first region.
    fn mapped(&self, maps: &[Mapping], keep: bool) -> Vec<(RemoteAddr, u64)> {
        let Some(jump) = &self.jump else {
            return if keep { vec![] } else { vec![(self.base, REGION_LEN as u64)] };
        };
        let at = |addr: RemoteAddr| maps.iter().find(|m| m.contains(addr));
        let is_ring =
            |m: &&Mapping| matches!(&m.backing, Backing::File { path, .. } if path.ends_with(near::MEMFD));
        let rings = maps.iter().filter(is_ring).map(|m| (m.start, m.len()));
        let private = |m: &Mapping| m.backing == Backing::Anonymous && m.perms.write && !m.perms.execute;
        let state = at(jump.parts.state.0).is_some_and(private).then_some(jump.parts.state);
        let others = jump.others.iter().map(|at| (*at, REGION_LEN as u64));
        let others = others.filter(|(at, len)| is_code(maps, *at, *len));
        let (base, len) = jump.parts.code;
        let region = REGION_LEN as u64;
        // Where only the first region was left, there is nothing behind it.
        let agent = Some((base.offset(region), len.saturating_sub(region)));
        let agent = agent.filter(|(at, len)| *len > 0 && is_code(maps, *at, *len));
        let first = Some((base, region)).filter(|_| !keep);
        rings.chain(state).chain(others).chain(agent).chain(first).collect()
    }
}

/// Every region of ours in process `pid`. Reads only.
pub fn find_in(pid: i32, memory: &dyn RemoteMemory, maps: &[Mapping]) -> Vec<Stale> {
    let mut found = find(memory, maps);
    let own = maps::own_pid(pid);
    for stale in &mut found {
        if let Some(jump) = &mut stale.jump {
            // Written into the process that forked this one, however much of it was written by then.
            jump.inherited |= stale.target != 0 && own.is_some_and(|own| own as u64 != stale.target);
        }
    }
    found
}

fn find(memory: &dyn RemoteMemory, maps: &[Mapping]) -> Vec<Stale> {
    let mut found = written(memory, maps);
    found.extend(maps.iter().filter_map(|m| blank(memory, m)));
    found
}

/// A region that a heaptap mapped which was killed before it had written a byte: private executable memory of exactly the size of
/// one, all zero. No thread can be in it, for zeroes fault; and whoever writes there by now is told by a second look, taken
/// while the process stands still.
fn blank(memory: &dyn RemoteMemory, mapping: &Mapping) -> Option<Stale> {
    let region = REGION_LEN as u64;
    let agent = AgentImage::new().ok()?.bytes.len() as u64;
    let len = mapping.len();
    let is_ours = len == region || len == (region + agent).next_multiple_of(PAGE);
    if !is_ours || !is_code(std::slice::from_ref(mapping), mapping.start, len) {
        return None;
    }
    let parts = Parts { code: (mapping.start, len), ..Parts::default() };
    let jump = Some(Jump { parts, others: vec![], inherited: false });
    let (base, controller) = (mapping.start, (0, 0));
    let stale =
        Stale { base, controller, handler_installed: false, target: 0, patches: vec![], jump, blank: true };
    stale.is_still_blank(memory).then_some(stale)
}

/// The regions that begin with a magic.
fn written(memory: &dyn RemoteMemory, maps: &[Mapping]) -> Vec<Stale> {
    let candidates =
        maps.iter().filter(|m| m.backing == Backing::Anonymous && m.perms.execute && !m.perms.write);
    // The kernel shows neighbouring mappings with equal rights as one.
    let pages = candidates.flat_map(|m| (0..m.len() / PAGE).map(move |i| m.start.offset(i * PAGE)));
    let with_magic = pages.filter(|page| {
        memory.read_vec(*page, MAGIC.len()).is_ok_and(|bytes| bytes == MAGIC || bytes == near::MAGIC)
    });
    with_magic
        .filter_map(|base| {
            let mut stale = parse(base, &memory.read_vec(base, REGION_LEN).ok()?)?;
            if let Some(jump) = &mut stale.jump {
                let magic = jump.parts.state.0.offset(std::mem::offset_of!(State, magic) as u64);
                let has_magic = memory.read_u64(magic).ok() == Some(STATE_MAGIC);
                let (at, noted) = jump.parts.state;
                let len = noted & !(near::LEAVING | near::COMING);
                let is_gone = noted & near::LEAVING != 0 && !has_magic;
                let never_came = noted & near::COMING != 0 && !is_state(maps, at, len);
                // What is there then, if anything, is the application's.
                jump.parts.state = if is_gone || never_came { (RemoteAddr::NULL, 0) } else { (at, len) };
                // The state is written before the table of patches.
                let complete = jump.parts.state.1 > 0 && !stale.patches.is_empty();
                jump.inherited = complete && !has_magic;
                jump.others.retain(|at| is_other_region(memory, maps, *at, stale.controller));
            }
            Some(stale)
        })
        .collect()
}

/// Whether a further region that the first names is one still: private code that begins as that heaptap's regions begin. What is
/// not ours any more is none.
fn is_other_region(
    memory: &dyn RemoteMemory,
    maps: &[Mapping],
    at: RemoteAddr,
    (pid, start_time): (i32, u64),
) -> bool {
    let Ok(bytes) = memory.read_vec(at, HEADER_LEN) else { return false };
    is_code(maps, at, REGION_LEN as u64)
        && bytes[..8] == near::MAGIC
        && bytes[8..12] == (REGION_LEN as u32).to_le_bytes()
        && (word(&bytes, 16), word(&bytes, 24)) == (Some(pid as u64), Some(start_time))
}

/// Whether a mapping of the application's own memory is at this place and has this length to the page.
fn is_state(maps: &[Mapping], at: RemoteAddr, len: u64) -> bool {
    let pages = len.checked_next_multiple_of(PAGE);
    let ours = |m: &&Mapping| m.backing == Backing::Anonymous && m.perms.write && !m.perms.execute;
    maps.iter().filter(ours).any(|m| m.start == at && Some(m.len()) == pages)
}

/// Whether all of the range is private executable memory that nothing backs and nobody may write to, as our code is.
fn is_code(maps: &[Mapping], at: RemoteAddr, len: u64) -> bool {
    let Some(end) = at.0.checked_add(len) else { return false };
    let ours = |m: &&Mapping| {
        let perms = m.perms;
        m.backing == Backing::Anonymous && perms.execute && !perms.write && !perms.shared
    };
    let mut from = at;
    // The kernel shows neighbours with unequal flags as two.
    while from.0 < end {
        match maps.iter().filter(ours).find(|m| m.contains(from)) {
            Some(mapping) => from = mapping.end,
            None => return false,
        }
    }
    at.0.is_multiple_of(PAGE)
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn parse(base: RemoteAddr, bytes: &[u8]) -> Option<Stale> {
    let jump = match bytes.get(..8)? {
        magic if magic == MAGIC => None,
        magic if magic == near::MAGIC => Some(parse_jump(base, bytes)?),
        _ => return None,
    };
    let count = u32::from_le_bytes(bytes.get(12..16)?.try_into().ok()?) as usize;
    let mut patches = Vec::new();
    for i in 0..count {
        let at = HEADER_LEN + i * PATCH_LEN;
        let len = word(bytes, at + 8)? as usize;
        if !(1..=8).contains(&len) {
            return None;
        }
        let eight = |at: usize| bytes.get(at..at + 8)?.try_into().ok();
        patches.push((RemoteAddr(word(bytes, at)?), len, eight(at + 16)?, eight(at + 24)?));
    }
    Some(Stale {
        base,
        controller: (i32::try_from(word(bytes, 16)?).ok()?, word(bytes, 24)?),
        handler_installed: jump.is_none() && word(bytes, HANDLER_INSTALLED as usize)? == 1,
        target: if jump.is_some() { word(bytes, near::TARGET_PID_AT)? } else { 0 },
        patches,
        jump,
        blank: false,
    })
}

fn parse_jump(base: RemoteAddr, bytes: &[u8]) -> Option<Jump> {
    let pair = |at| Some((RemoteAddr(word(bytes, at)?), word(bytes, at + 8)?));
    let parts =
        Parts { state: pair(near::STATE_AT)?, rings: pair(near::RINGS_AT)?, code: pair(near::CODE_AT)? };
    // Not the first region, or one that was not finished when heaptap was killed: it is found by itself.
    let unfinished = parts.code == (RemoteAddr::NULL, 0);
    let abi = u32::from_le_bytes(bytes.get(near::ABI_AT..near::ABI_AT + 4)?.try_into().ok()?);
    let plausible = parts.code.0 == base
        && (REGION_LEN as u64..16 << 20).contains(&parts.code.1)
        && parts.state.1 & !(near::LEAVING | near::COMING) < 1 << 30
        && abi == ABI_VERSION;
    let others = (0..8).map_while(|i| word(bytes, near::OTHERS_AT + 8 * i).filter(|at| *at != 0));
    let others: Vec<_> = others.map(RemoteAddr).collect();
    match (unfinished, plausible) {
        (true, _) => Some(Jump {
            parts: Parts { code: (base, REGION_LEN as u64), ..Parts::default() },
            others: vec![],
            inherited: false,
        }),
        (false, true) => Some(Jump { parts, others, inherited: false }),
        (false, false) => None,
    }
}

/// Removes the regions found in a stopped process and undoes their patches. The process is stopped before
/// and after.
pub fn remove(inferior: &mut Inferior, found: &[Stale]) -> Result<LeftBehind, ProbeError> {
    if let Some(alive) = found.iter().find(|s| s.controller_lives()) {
        return Err(ProbeError::ControllerAlive { pid: inferior.pid(), controller: alive.controller.0 });
    }
    if facts::has_seccomp(inferior.pid())? {
        inferior.suspend_filters().map_err(|errno| ProbeError::Seccomp { errno })?;
    }
    inferior.prepare_calls()?;
    let mut thunks = Vec::new();
    for stale in found {
        thunks.push(stale.undo_patches(inferior)?);
    }
    let mut left = LeftBehind::default();
    let start = Instant::now();
    while is_busy(inferior, found)? {
        if start.elapsed() > PATIENCE {
            left.why.push("a thread may still return into it".into());
            left.regions = found.iter().map(|s| s.base).collect();
            left.busy = true;
            return Ok(left);
        }
        inferior.run_for(INTERVAL)?;
    }
    // Before anything is unmapped: the process may run while its memory is searched.
    let mut kept = Vec::new();
    for (stale, thunks) in found.iter().zip(&thunks) {
        let search = if stale.is_jump() {
            references::kept(inferior, thunks)
        } else {
            references::any(inferior, thunks)
        };
        kept.push(search?);
    }
    let tid = calling_thread(inferior)?;
    let maps = mappings(inferior)?;
    for stale in found {
        if stale.handler_installed {
            let original = stale.base.offset(ORIGINAL_ACTION);
            inferior.remote_syscall(tid, sigaction(original, RemoteAddr::NULL))?;
        }
    }
    for (stale, keep) in found.iter().zip(kept) {
        if stale.blank {
            if stale.is_still_blank(inferior.memory()) {
                unmap(inferior, tid, &stale.mapped(&maps, false))?;
            }
            continue;
        }
        if keep {
            if !stale.is_jump() {
                inferior.write(stale.base.offset(HANDLER_INSTALLED), &0_u64.to_le_bytes())?;
            }
            left.regions.push(stale.base);
            left.why = vec![references::WHY.into()];
        }
        stale.withdraw(inferior, keep)?;
        unmap(inferior, tid, &stale.mapped(&maps, keep))?;
        if keep {
            stale.forget_state(inferior)?;
        }
    }
    close_ring_files(inferior, tid)?;
    Ok(left)
}

/// See [`near::pass_on`]. An older heaptap has written a thunk that does nothing else over the ordinary one: that stays.
fn pass_on(inferior: &Inferior, thunk: RemoteAddr, original: RemoteAddr) -> Result<(), TraceError> {
    if inferior.memory().read_vec(thunk, 8).is_ok_and(|head| near::is_thunk(&head)) {
        let (at, bytes) = near::pass_on(thunk, original);
        inferior.write(at, &bytes)?;
    }
    Ok(())
}

/// A heaptap that was killed between making the ring memory and closing its descriptor left that open.
fn close_ring_files(inferior: &mut Inferior, tid: i32) -> Result<(), ProbeError> {
    let folder = format!("/proc/{}/fd", maps::memory_holder(inferior.pid()));
    let open = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let ours = open.filter(|fd| {
        std::fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().starts_with(near::RING_FILE))
    });
    for fd in ours.filter_map(|fd| fd.file_name().to_str()?.parse().ok()).collect::<Vec<u64>>() {
        let args = [fd, 0, 0, 0, 0, 0];
        inferior.remote_syscall(tid, Call { name: "close", number: libc::SYS_close, args })?;
    }
    Ok(())
}

fn unmap(inferior: &mut Inferior, tid: i32, ranges: &[(RemoteAddr, u64)]) -> Result<(), ProbeError> {
    for (at, len) in ranges {
        let args = [at.0, *len, 0, 0, 0, 0];
        inferior.remote_syscall(tid, Call { name: "munmap", number: libc::SYS_munmap, args })?;
    }
    Ok(())
}

fn mappings(inferior: &Inferior) -> Result<Vec<Mapping>, TraceError> {
    let pid = inferior.pid();
    maps::mappings(pid)
        .map_err(|e| TraceError::Proc { path: format!("/proc/{pid}/maps"), source: std::io::Error::other(e) })
}

fn is_busy(inferior: &Inferior, found: &[Stale]) -> Result<bool, ProbeError> {
    for stale in found {
        let Some(jump) = &stale.jump else { continue };
        let planted = stale.patches.iter().filter(|(_, len, ..)| *len == 8);
        let presence = Presence {
            code: stale.code(),
            thunks: planted.map(|(.., planted)| u64::from_le_bytes(*planted)).collect(),
            state: (!jump.inherited && jump.parts.state.1 > 0).then_some(jump.parts.state.0),
            inferior,
        };
        if presence.is_busy()? {
            return Ok(true);
        }
    }
    let traps: Vec<&Stale> = found.iter().filter(|s| !s.is_jump()).collect();
    if traps.is_empty() { Ok(false) } else { is_busy_with_traps(inferior, &traps) }
}

/// Whether a thread is in a region of the trap kind, holds an address of one, or may return into one. Nobody kept the
/// calls under way: the stacks are searched, which can only err on the careful side.
fn is_busy_with_traps(inferior: &Inferior, found: &[&Stale]) -> Result<bool, ProbeError> {
    let inside = |value: u64| found.iter().any(|s| value.wrapping_sub(s.base.0) < REGION_LEN as u64);
    for tid in inferior.tids() {
        let regs = match inferior.registers(tid) {
            Ok(regs) => regs,
            // It does not stop: nothing is known of it.
            Err(TraceError::Gone { .. }) if inferior.unstopped().contains(&tid) => return Ok(true),
            Err(TraceError::Gone { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        // A trap that is held or queued still has to go through the handler.
        let trapped = inferior.held_signal(tid) == Some(libc::SIGTRAP) || inferior.int3_queued(tid);
        if trapped || inside(regs.rip) || inside(regs.rax) {
            return Ok(true);
        }
        let mut at = RemoteAddr(regs.rsp & !7);
        let mut left = STACK_SCAN;
        while left > 0 {
            let len = (4096 - (at.0 % 4096) as usize).min(left);
            let Ok(stack) = inferior.memory().read_vec(at, len) else { break };
            let words = stack.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().unwrap_or_default()));
            if words.into_iter().any(inside) {
                return Ok(true);
            }
            at = at.offset(len as u64);
            left -= len;
        }
    }
    Ok(false)
}

#[cfg(test)]
#[path = "stale_tests.rs"]
mod tests;
