//! Slots of threads that ended, given back. A slot is found by its thread's pointer, and a libc that maps each thread's
//! stack anew (musl; glibc beyond its cache) gives nearly every thread a pointer of its own: without this a program that makes
//! thousands of threads in turn would run out of slots.
//!
//! A new thread may get an old one's pointer, and with it the slot, at any moment: what nobody uses is told with the world
//! stopped, by the thread pointers of all threads that there are. That is done only when slots run short.

use super::RecordError;
use super::target_state::AgentCounts;
use crate::addr::RemoteAddr;
use crate::agent_abi::{SLOTS, Slot, State, TOMBSTONE};
use crate::inferior::error::TraceError;
use crate::inferior::{Inferior, maps};
use crate::memory::RemoteMemory;
use crate::probe::error::ProbeError;
use std::mem::offset_of;

/// Looks (a second apart) that are left out after a sweep that found little.
const REST: u32 = 60;

/// When to sweep.
#[derive(Debug, Default)]
pub struct Graves {
    without_slot: u64,
    rest: u32,
}

impl Graves {
    /// Called every second. Sweeps where slots run short and most are of threads that ended.
    pub fn look(&mut self, pid: i32, state: RemoteAddr, counts: &AgentCounts) {
        let lost = counts.without_slot > self.without_slot;
        self.without_slot = counts.without_slot;
        self.rest = self.rest.saturating_sub(1);
        if self.rest > 0 || !(lost || counts.slots > SLOTS / 2) {
            return;
        }
        let threads = maps::tasks(pid).map_or(SLOTS, |tasks| tasks.len());
        if counts.slots < 2 * threads {
            return;
        }
        match sweep(pid, state) {
            Ok(swept) if swept > SLOTS / 8 => {
                tracing::debug!("{swept} slots of threads that ended given back")
            }
            Ok(_) => self.rest = REST,
            Err(error) => {
                tracing::debug!("slots of threads that ended cannot be given back: {error}");
                self.rest = REST;
            }
        }
    }
}

/// Stops the world, and marks the slots that are no thread's.
fn sweep(pid: i32, state: RemoteAddr) -> Result<usize, RecordError> {
    let mut inferior = Inferior::seize(pid)?;
    let swept = inferior.stop_to_leave().map_err(Into::into).and_then(|()| sweep_stopped(&inferior, state));
    inferior.detach()?;
    Ok(swept?)
}

fn sweep_stopped(inferior: &Inferior, state: RemoteAddr) -> Result<usize, ProbeError> {
    // What does not stop may use any slot.
    if !inferior.unstopped().is_empty() || inferior.has_guests() {
        return Ok(0);
    }
    let mut alive = Vec::new();
    for tid in inferior.tids() {
        match inferior.registers(tid) {
            Ok(regs) => alive.push(regs.fs_base),
            Err(TraceError::Gone { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let slots = state.offset(offset_of!(State, slots) as u64);
    let bytes = inferior.memory().read_vec(slots, SLOTS * size_of::<Slot>())?;
    let mut swept = 0;
    for (i, slot) in bytes.chunks_exact(size_of::<Slot>()).enumerate() {
        let word = |at: usize| u64::from_le_bytes(slot[at..at + 8].try_into().unwrap_or_default());
        let at = offset_of!(Slot, key);
        let key = word(at);
        // One of which a call is under way, or that its thread had not finished, could be somebody's still or is no use to anybody.
        // (`depth` and `in_agent` are halves of one word.)
        let is_whole = word(offset_of!(Slot, control)) != 0
            && word(offset_of!(Slot, data)) != 0
            && word(offset_of!(Slot, random)) != 0
            && word(offset_of!(Slot, depth)) == 0;
        if key != 0 && key != TOMBSTONE && is_whole && !alive.contains(&key) {
            let word = slots.offset((i * size_of::<Slot>() + at) as u64);
            inferior.write(word, &TOMBSTONE.to_le_bytes())?;
            swept += 1;
        }
    }
    Ok(swept)
}
