//! The memory that recording adds to the target, and whether the target's control groups have so much left: a process that is
//! killed for what was put into it is worse than no recording.
//!
//! Everything is counted as if the target were charged for all of it at once. In truth a page is charged to the group of whoever
//! touches it first: the agent's state and code to the target (also where heaptap writes them: an anonymous page belongs to the
//! process it is in), the rings' pages to the target, which fills them, but for those that heaptap looks at before.

use super::RecordError;
use super::examine::Examined;
use super::plant::{JumpOptions, ring_bytes};
use crate::agent_abi::State;
use crate::capture::EndReason;
use crate::inferior::cgroup::{MemoryGroups, Room};
use crate::inferior::maps;
use crate::probe::agent_image::AgentImage;
use crate::probe::region::REGION_LEN;
use std::collections::BTreeSet;

/// Page tables and what else the kernel keeps for some new mappings.
const KERNEL: u64 = 64 << 10;
/// What heaptap itself comes to use within its first minutes: it may be in the same group.
const OWN: u64 = 24 << 20;

/// Bytes that recording adds to the target at most; `native`: those of the unwind rows that native stacks need.
pub fn needed(examined: &Examined, jump: Option<&JumpOptions>, native: u64) -> Result<u64, RecordError> {
    let libraries: BTreeSet<&str> = examined.plan.entries.iter().map(|e| e.module.as_str()).collect();
    let regions = libraries.len() as u64 * REGION_LEN as u64;
    let Some(jump) = jump else { return Ok(regions + KERNEL) };
    let threads = maps::tasks(examined.pid)?.len();
    let agent = AgentImage::new()?.bytes.len() as u64;
    Ok(native + regions + agent + size_of::<State>() as u64 + ring_bytes(jump.exact, threads) + KERNEL)
}

/// The control group of a process that has the least left, if one has a limit.
pub fn tightest(pid: i32) -> Option<Room> {
    MemoryGroups::of(pid)?.rooms().into_iter().min_by_key(Room::left)
}

/// Refuses a recording for which a control group of the target has no room.
pub fn check(examined: &Examined, jump: Option<&JumpOptions>, native: u64) -> Result<(), RecordError> {
    let Some(groups) = MemoryGroups::of(examined.pid) else { return Ok(()) };
    let ours = MemoryGroups::of(std::process::id() as i32);
    let added = needed(examined, jump, native)?;
    let shared = |room: &Room| ours.as_ref().is_some_and(|ours| ours.are_within(&room.group));
    let short = groups.rooms().into_iter().map(|room| (added + if shared(&room) { OWN } else { 0 }, room));
    let short = short.filter(|(needed, room)| *needed > room.left());
    match short.max_by_key(|(needed, room)| needed - room.left()) {
        None => Ok(()),
        Some((needed, room)) => Err(RecordError::NoRoom {
            pid: examined.pid,
            needed,
            with_heaptap: needed > added,
            exact: jump.is_some_and(|j| j.exact),
            room,
        }),
    }
}

/// Watches for kills of the kernel's OOM killer in the target's own group.
#[derive(Debug)]
pub struct OomWatch {
    groups: Option<MemoryGroups>,
    before: Option<u64>,
    last: Option<u64>,
}

impl OomWatch {
    /// From now on.
    pub fn start(pid: i32) -> Self {
        let groups = MemoryGroups::of(pid);
        let now = groups.as_ref().and_then(MemoryGroups::oom_kills);
        Self { groups, before: now, last: now }
    }

    /// About once a second. The end of a process is seen some time after its kill was counted: the count of the look before is
    /// what an end is compared with.
    pub fn look(&mut self) {
        self.before = self.last;
        self.last = self.now().or(self.last);
    }

    /// Whether an end by SIGKILL was the OOM killer's. Only the kernel knows whom that chose: where it struck in the target's group
    /// since the look before the last, it is taken to have been the target.
    pub fn explain(&self, reason: EndReason) -> EndReason {
        match reason {
            EndReason::TargetKilled { signal, .. } if signal == "SIGKILL" => {
                let struck = self.now().zip(self.before).is_some_and(|(now, before)| now > before);
                EndReason::TargetKilled { signal, out_of_memory: struck }
            }
            reason => reason,
        }
    }

    fn now(&self) -> Option<u64> {
        self.groups.as_ref()?.oom_kills()
    }
}
