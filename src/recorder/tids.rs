//! [`Tids`]: from the thread ids that the target itself sees to ours. They differ where it lives in a pid namespace of its own.

use crate::inferior::maps;
use std::collections::HashMap;

/// The threads of one process.
#[derive(Debug)]
pub struct Tids {
    pid: i32,
    /// The process sees the same ids as we.
    same: bool,
    known: HashMap<u32, i32>,
    /// The last answer: threads make events in runs.
    last: (u32, i32),
}

impl Tids {
    /// Those of process `pid`.
    pub fn new(pid: i32) -> Self {
        let same = maps::status(pid, pid).is_ok_and(|leader| leader.ns_pids.len() <= 1);
        Self { pid, same, known: HashMap::new(), last: (0, 0) }
    }

    /// Our id of the thread whose own is `inner`; the same where the thread is gone before it could be asked for.
    #[inline]
    pub fn outer(&mut self, inner: u32) -> i32 {
        if self.same {
            return inner as i32;
        }
        if self.last.0 != inner {
            self.last = (inner, self.look_up(inner));
        }
        self.last.1
    }

    #[cold]
    fn look_up(&mut self, inner: u32) -> i32 {
        if let Some(outer) = self.known.get(&inner) {
            return *outer;
        }
        let tasks = maps::namespaced_tasks(self.pid).unwrap_or_default();
        self.known.extend(tasks.into_iter().map(|(outer, inner)| (inner as u32, outer)));
        *self.known.entry(inner).or_insert(inner as i32)
    }

    /// Forgets what was known: ids are used again.
    pub fn refresh(&mut self) {
        self.known.clear();
        self.last = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_threads_have_the_ids_that_the_kernel_shows() {
        let pid = std::process::id() as i32;
        for same in [true, false] {
            let mut tids = Tids { same, ..Tids::new(pid) };
            let inner = maps::status(pid, pid).unwrap().ns_pids.last().copied().unwrap_or(pid);
            assert_eq!(tids.outer(inner as u32), if same { inner } else { pid });
            // Nobody's.
            assert_eq!(tids.outer(1 << 23), 1 << 23);
            tids.refresh();
            assert_eq!(tids.outer(1 << 23), 1 << 23);
        }
    }
}
