//! What the kernel tells of a process: memory, threads, descriptors.
//!
//! `/proc/PID/status` is counters, read every second. `/proc/PID/smaps_rollup` is the only source of the proportional set, and
//! walks all page tables under the process's mmap_lock: in proportion to what is resident, in the target's way (before Linux 5.11
//! for as long as it takes, since then until somebody waits). So it is read seldom, and never when it would take long.

use super::pace::Pace;
use crate::capture::Gauges;
use crate::inferior::maps::memory_holder;
use procfs::process::{Process, Status};
use std::time::{Duration, Instant};

/// No longer may the page tables be walked at a time.
const LONGEST_WALK: Duration = Duration::from_millis(50);
/// What a page costs, before it was measured: 10 to 25 ns where it was.
const PAGE_COST_NS: u64 = 25;
const PAGE: u64 = 4096;

/// The kernel's gauges of one process.
#[derive(Debug)]
pub struct Kernel {
    pid: i32,
    pace: Pace,
    page_cost_ns: u64,
}

impl Kernel {
    /// Those of process `pid`.
    pub fn new(pid: i32) -> Self {
        Self { pid, pace: Pace::default(), page_cost_ns: PAGE_COST_NS }
    }

    /// Reads them. False: the process has no memory any more.
    pub fn read(&mut self, gauges: &mut Gauges) -> bool {
        let Some((process, status)) = holder(self.pid) else { return false };
        let bytes = |kilobytes: Option<u64>| kilobytes.map(|k| k * 1024);
        gauges.resident = bytes(status.vmrss);
        gauges.anonymous = bytes(status.rssanon);
        gauges.swap = bytes(status.vmswap);
        gauges.threads = Some(status.threads);
        gauges.descriptors = process.fd_count().ok().map(|count| count as u64);
        gauges.proportional = self.proportional(&process, gauges.resident.unwrap_or(0));
        true
    }

    /// See [`Pace::at_last`].
    pub fn at_last(&mut self) {
        self.pace.at_last();
    }

    fn proportional(&mut self, process: &Process, resident: u64) -> Option<u64> {
        let pages = (resident / PAGE).max(1);
        let expected = Duration::from_nanos(pages.saturating_mul(self.page_cost_ns));
        let start = Instant::now();
        if !self.pace.is_due(start) || expected > LONGEST_WALK {
            return None;
        }
        let rollup = process.smaps_rollup();
        let cost = start.elapsed();
        // What the call costs anyhow is not the pages'.
        self.page_cost_ns = (cost.as_nanos() as u64 / pages).clamp(1, PAGE_COST_NS * 4);
        self.pace.took(cost, start + cost);
        rollup.ok()?.memory_map_rollup.iter().next()?.extension.map.get("Pss").copied()
    }
}

/// The process by a thread that still has its memory.
fn holder(pid: i32) -> Option<(Process, Status)> {
    let by = |tid: i32| {
        let process = Process::new(tid).ok()?;
        let status = process.status().ok().filter(|status| status.vmrss.is_some())?;
        Some((process, status))
    };
    by(pid).or_else(|| by(memory_holder(pid)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_gauges_are_known_and_fit_together() {
        let mut gauges = Gauges::default();
        assert!(Kernel::new(std::process::id() as i32).read(&mut gauges));
        let resident = gauges.resident.unwrap();
        assert!(resident > 1 << 20, "{gauges:?}");
        assert!(gauges.anonymous.unwrap() <= resident && gauges.proportional.unwrap() <= resident * 2);
        assert!(gauges.threads.unwrap() >= 1 && gauges.descriptors.unwrap() >= 3 && gauges.swap.is_some());
    }

    #[test]
    fn page_tables_are_not_walked_where_it_would_take_long_or_was_done_just_now() {
        let process = Process::myself().unwrap();
        let mut kernel = Kernel::new(process.pid());
        assert_eq!(kernel.proportional(&process, 100 << 30), None);
        assert!(kernel.proportional(&process, 1 << 20).is_some());
        assert_eq!(kernel.proportional(&process, 1 << 20), None);
    }

    #[test]
    fn a_process_that_is_gone_has_no_gauges() {
        // Above the largest pid Linux gives (PID_MAX_LIMIT is 2^22).
        assert!(!Kernel::new(1 << 23).read(&mut Gauges::default()));
    }
}
