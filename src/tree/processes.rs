//! The processes there are: who is whose child, since when, running what. Reads /proc.
//!
//! A pid may be given out again: with the time of its start it is a process ([`ProcessId`]). Every answer may be stale when it is
//! used. A child whose parent has died between two looks has another parent by then, and is not found.

use crate::inferior::maps;
use nix::time::{ClockId, clock_gettime};
use procfs::process::Process;
use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A process, whatever becomes of its pid later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProcessId {
    /// As we see it.
    pub pid: i32,
    /// Clock ticks since boot.
    pub started: u64,
}

/// What is told of a process when it is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The process.
    pub id: ProcessId,
    /// Its parent's pid.
    pub parent: i32,
    /// Its pid in its innermost pid namespace.
    pub namespace_pid: i32,
    /// When it was born: wall clock, nanoseconds since 1970.
    pub born_unix_ns: u64,
}

/// What a process executes: another program, or the same anew, is another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Program {
    /// Device and inode of the executable.
    file: Option<(u64, u64)>,
    /// Where the stack of its main thread begins: it is laid out at random anew by each execve.
    stack: u64,
}

/// The process that has this pid now; `None` if there is none, or it has ended.
pub fn identify(pid: i32) -> Option<ProcessId> {
    maps::start_time(pid).ok().map(|started| ProcessId { pid, started })
}

/// Looks at a process; `None` if it is gone, or a thread of the kernel.
pub fn facts(pid: i32) -> Option<Facts> {
    let stat = Process::new(pid).and_then(|process| process.stat()).ok()?;
    let status = maps::status(pid, pid).ok()?;
    let started = Duration::from_secs_f64(stat.starttime as f64 / procfs::ticks_per_second() as f64);
    let since_boot = clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).ok()?;
    let age = since_boot.saturating_sub(started).as_nanos() as u64;
    Some(Facts {
        id: ProcessId { pid, started: stat.starttime },
        parent: stat.ppid,
        namespace_pid: status.ns_pids.last().copied().unwrap_or(pid),
        born_unix_ns: unix_ns().saturating_sub(age),
    })
}

/// What a process executes now; `None` if it is gone.
pub fn program(pid: i32) -> Option<Program> {
    let stat = Process::new(pid).and_then(|process| process.stat()).ok()?;
    let file = fs::metadata(format!("/proc/{pid}/exe")).ok().map(|file| (file.dev(), file.ino()));
    Some(Program { file, stack: stat.startstack })
}

/// The pids of all processes.
pub fn all() -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Looks for children.
#[derive(Clone, Copy, Debug)]
pub struct Children {
    /// The kernel lists the children of each thread (CONFIG_PROC_CHILDREN).
    listed: bool,
}

impl Children {
    /// Learns how this kernel tells of children.
    pub fn new() -> Self {
        let pid = std::process::id();
        Self { listed: Path::new(&format!("/proc/{pid}/task/{pid}/children")).exists() }
    }

    /// The children that `parents` have now, each with its parent.
    pub fn of(self, parents: &[i32]) -> Vec<(i32, i32)> {
        if self.listed {
            return parents
                .iter()
                .flat_map(|parent| listed(*parent).into_iter().map(|child| (*parent, child)))
                .collect();
        }
        // One look at every process tells the same.
        let parents: HashSet<i32> = parents.iter().copied().collect();
        let parent = |pid: &i32| Some((parent_of(*pid)?, *pid));
        all().iter().filter_map(parent).filter(|(parent, _)| parents.contains(parent)).collect()
    }

    /// All below `roots`, parents before children, without `roots`.
    pub fn descendants(self, roots: &[i32]) -> Vec<i32> {
        let mut known: HashSet<i32> = roots.iter().copied().collect();
        let (mut found, mut generation) = (Vec::new(), roots.to_vec());
        while !generation.is_empty() {
            let children = self.of(&generation).into_iter().map(|(_, child)| child);
            generation = children.filter(|child| known.insert(*child)).collect();
            found.extend(&generation);
        }
        found
    }
}

impl Default for Children {
    fn default() -> Self {
        Self::new()
    }
}

/// Each thread lists those that it gave birth to, and those it took over from one that ended.
fn listed(pid: i32) -> Vec<i32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let mut children = Vec::new();
    for task in tasks.flatten() {
        let Ok(text) = fs::read_to_string(task.path().join("children")) else { continue };
        children.extend(text.split_ascii_whitespace().filter_map(|word| word.parse::<i32>().ok()));
    }
    children
}

fn parent_of(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold spaces and parentheses; the state follows it, then the parent.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Nanoseconds since 1970.
pub fn unix_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::process::{Child, Command, Stdio};

    /// A shell that waits, and the pid of its child, which sleeps.
    fn family() -> (Child, i32) {
        let mut parent = Command::new("sh")
            .args(["-c", "sh -c 'echo $$; exec sleep 100' & read -r line; wait"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(parent.stdout.take().unwrap()).read_line(&mut line).unwrap();
        (parent, line.trim().parse().unwrap())
    }

    #[test]
    fn children_are_found_by_either_way_and_threads_count_as_their_process() {
        for listed in [Children::new().listed, false] {
            let children = Children { listed };
            let (mut parent, child) = family();
            let us = std::process::id() as i32;
            let pid = parent.id() as i32;
            assert!(children.of(&[us]).contains(&(us, pid)), "the parent was started by a thread of ours");
            assert_eq!(children.descendants(&[pid]), [child]);
            let below_us = children.descendants(&[us]);
            let at = |of: i32| below_us.iter().position(|pid| *pid == of).unwrap();
            assert!(at(pid) < at(child));
            parent.kill().unwrap();
            parent.wait().unwrap();
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(child), nix::sys::signal::SIGKILL).unwrap();
        }
    }

    #[test]
    fn a_process_that_executes_another_program_is_another_program_but_the_same_process() {
        let mut child = Command::new("sh")
            .args(["-c", "echo; read -r line; exec sh -c 'echo; read -r line'"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let pid = child.id() as i32;
        let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
        said.next();
        let (id, before) = (identify(pid).unwrap(), program(pid).unwrap());
        assert_eq!(program(pid), Some(before));
        std::io::Write::write_all(child.stdin.as_mut().unwrap(), b"\n").unwrap();
        said.next();
        assert_ne!(program(pid), Some(before));
        assert_eq!(identify(pid), Some(id));
        let facts = facts(pid).unwrap();
        assert_eq!((facts.id, facts.parent), (id, std::process::id() as i32));
        let age = Duration::from_nanos(unix_ns().saturating_sub(facts.born_unix_ns));
        assert!(age < Duration::from_secs(60), "{age:?}");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
