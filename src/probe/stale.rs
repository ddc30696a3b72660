//! Regions that an earlier heaptap left behind when it was killed: found by their magic, undone by their own
//! table of patches.
//!
//! Nothing in a region is trusted further than it can be checked: a patch is undone only where memory holds
//! exactly what that patch planted.

use super::error::ProbeError;
use super::install::{calling_thread, munmap, sigaction};
use super::lift::LeftBehind;
use super::references;
use super::region::{HANDLER_INSTALLED, HEADER_LEN, MAGIC, ORIGINAL_ACTION, PATCH_LEN, REGION_LEN};
use crate::addr::RemoteAddr;
use crate::inferior::error::TraceError;
use crate::inferior::{Inferior, facts, maps};
use crate::mapping::{Backing, Mapping};
use crate::memory::RemoteMemory;
use std::time::{Duration, Instant};

/// Bytes of each thread's stack that are searched for return addresses into a region.
const STACK_SCAN: usize = 256 << 10;
const PATIENCE: Duration = Duration::from_secs(1);

/// A region found in a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stale {
    /// Where it is.
    pub base: RemoteAddr,
    /// Pid of the heaptap that wrote it, and when that started (clock ticks since boot).
    pub controller: (i32, u64),
    handler_installed: bool,
    /// address, length, before, planted
    patches: Vec<(RemoteAddr, usize, [u8; 8], [u8; 8])>,
}

impl Stale {
    /// Whether the heaptap that wrote it still runs.
    pub fn controller_lives(&self) -> bool {
        maps::start_time(self.controller.0).is_ok_and(|t| t == self.controller.1)
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

    /// Takes the patches back. Answers the thunks behind words that hold something else by now: somebody wrapped the
    /// allocator and may call through them, so that they must only pass calls on.
    fn undo_patches(&self, inferior: &Inferior) -> Result<Vec<u64>, ProbeError> {
        let mut changed = Vec::new();
        for (address, len, before, planted) in &self.patches {
            let now = inferior.memory().read_vec(*address, *len);
            if now.is_ok_and(|now| now == planted[..*len]) {
                inferior.write(*address, &before[..*len])?;
            } else if let Some(thunk) = self.thunk_of_word(*len, *planted) {
                inferior.write(thunk, &[super::region::NOP])?;
                changed.push(thunk.0);
            }
        }
        Ok(changed)
    }
}

/// Every region of ours in a process. Reads only.
pub fn find(memory: &dyn RemoteMemory, maps: &[Mapping]) -> Vec<Stale> {
    let candidates = maps.iter().filter(|m| {
        m.backing == Backing::Anonymous
            && m.perms.execute
            && !m.perms.write
            && m.len() % REGION_LEN as u64 == 0
    });
    // The kernel shows neighbouring mappings with equal rights as one.
    candidates
        .flat_map(|m| (0..m.len() / REGION_LEN as u64).map(move |i| m.start.offset(i * REGION_LEN as u64)))
        .filter_map(|base| parse(base, &memory.read_vec(base, REGION_LEN).ok()?))
        .collect()
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn parse(base: RemoteAddr, bytes: &[u8]) -> Option<Stale> {
    if bytes.get(..8)? != MAGIC {
        return None;
    }
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
        handler_installed: word(bytes, HANDLER_INSTALLED as usize)? == 1,
        patches,
    })
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
    let mut changed = Vec::new();
    for stale in found {
        changed.push(stale.undo_patches(inferior)?);
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
        inferior.resume()?;
        std::thread::sleep(Duration::from_millis(5));
        inferior.stop_to_leave()?;
    }
    let tid = calling_thread(inferior)?;
    for stale in found {
        if stale.handler_installed {
            let original = stale.base.offset(ORIGINAL_ACTION);
            inferior.remote_syscall(tid, sigaction(original, RemoteAddr::NULL))?;
        }
    }
    for (stale, thunks) in found.iter().zip(changed) {
        if references::any(inferior, &thunks)? {
            inferior.write(stale.base.offset(HANDLER_INSTALLED), &0_u64.to_le_bytes())?;
            left.regions.push(stale.base);
            left.why = vec![references::WHY.into()];
        } else {
            inferior.remote_syscall(tid, munmap(stale.base))?;
        }
    }
    Ok(left)
}

/// Whether a thread is in a region, holds an address of one, or may return into one. Nobody kept the
/// calls under way: the stacks are searched, which can only err on the careful side.
fn is_busy(inferior: &Inferior, found: &[Stale]) -> Result<bool, ProbeError> {
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
mod tests {
    use super::*;
    use crate::probe::region::{Controller, Patch, Region};

    #[test]
    fn a_region_written_is_a_region_found() {
        let mut region = Region::new(RemoteAddr(0x10000), Controller { pid: 77, start_time: 5 });
        let patch = Patch {
            address: RemoteAddr(0x4000),
            len: 1,
            before: [0x55, 0, 0, 0, 0, 0, 0, 0],
            planted: [0xcc, 0, 0, 0, 0, 0, 0, 0],
        };
        region.finish_first(&[patch], &[(RemoteAddr(1), RemoteAddr(2))], &[], true).unwrap();
        region.set_original_action(&[0; 32], true);
        let stale = parse(RemoteAddr(0x10000), &region.image().unwrap()).unwrap();
        assert_eq!(stale.controller, (77, 5));
        assert!(stale.handler_installed);
        assert_eq!(stale.patches, [(RemoteAddr(0x4000), 1, patch.before, patch.planted)]);
    }

    #[test]
    fn hostile_bytes_are_no_region() {
        let mut bytes = vec![0xff; REGION_LEN];
        assert_eq!(parse(RemoteAddr(0), &bytes), None);
        bytes[..8].copy_from_slice(&MAGIC);
        assert_eq!(parse(RemoteAddr(0), &bytes), None);
    }
}
