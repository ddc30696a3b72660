//! [`Handle`]: a process that nobody traces and that need not be our child: whether it has ended, and how.
//!
//! A pidfd says that it has (pidfd_open(2): readable once every thread has exited), and since Linux 6.15 also how, after its
//! parent has waited for it. Before that wait, and on older kernels only then, /proc/PID/stat has its exit code.

use super::stop::{StopEvent, decode};
use super::{maps, sys};
use procfs::process::Process;
use std::os::fd::OwnedFd;

/// See the module.
pub struct Handle {
    pid: i32,
    /// Clock ticks since boot when it was started: a pid may be given out again.
    started: Option<u64>,
    /// `None` before Linux 5.3.
    pidfd: Option<OwnedFd>,
}

impl Handle {
    /// A handle to a process that lives.
    pub fn open(pid: i32) -> Self {
        Self { pid, started: maps::start_time(pid).ok(), pidfd: sys::open_pidfd(pid).ok() }
    }

    /// How the process ended, as far as that can be learnt; `None` while a thread of it lives.
    pub fn end(&self) -> Option<Option<StopEvent>> {
        let over = match &self.pidfd {
            Some(pidfd) => sys::has_exited(pidfd),
            None => self.is_gone(),
        };
        over.then(|| self.exit_status().map(decode))
    }

    fn is_gone(&self) -> bool {
        let live = |tid: &i32| super::facts::state(self.pid, *tid).is_some_and(|s| !matches!(s, 'Z' | 'X'));
        let threads = super::facts::threads(self.pid).unwrap_or_default();
        maps::start_time(self.pid).ok() != self.started || !threads.iter().any(live)
    }

    fn exit_status(&self) -> Option<i32> {
        let told = || self.pidfd.as_ref().and_then(sys::exit_status);
        // Its parent may wait for it between the first question and the second.
        told().or_else(|| self.status_of_zombie()).or_else(told)
    }

    fn status_of_zombie(&self) -> Option<i32> {
        let stat = Process::new(self.pid).and_then(|p| p.stat()).ok()?;
        let is_it = stat.state == 'Z' && Some(stat.starttime) == self.started;
        stat.exit_code.filter(|_| is_it)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use std::time::{Duration, Instant};

    fn end_of(handle: &Handle) -> Option<StopEvent> {
        let start = Instant::now();
        loop {
            if let Some(end) = handle.end() {
                return end;
            }
            assert!(start.elapsed() < Duration::from_secs(10), "it does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn the_end_of_a_process_is_told_before_anybody_waited_for_it_and_after() {
        for (how, end) in
            [("exit 7", StopEvent::Exited(7)), ("kill -SEGV $$", StopEvent::Killed(libc::SIGSEGV))]
        {
            let mut child = Command::new("sh")
                .args(["-c", &format!("read -r line; {how}")])
                .stdin(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            let handle = Handle::open(child.id() as i32);
            assert_eq!(handle.end(), None);
            drop(child.stdin.take());
            assert_eq!(end_of(&handle), Some(end), "{how}");
            child.wait().unwrap();
            let after = end_of(&handle);
            // Kernels before 6.15 have forgotten it.
            assert!(after.is_none_or(|after| after == end), "{how}: {after:?}");
        }
    }

    #[test]
    fn without_a_pidfd_a_zombie_tells() {
        let mut child = Command::new("sh").args(["-c", "exit 5"]).spawn().unwrap();
        let handle = Handle { pidfd: None, ..Handle::open(child.id() as i32) };
        assert_eq!(end_of(&handle), Some(StopEvent::Exited(5)));
        child.wait().unwrap();
        assert_eq!(handle.end(), Some(None));
    }
}
