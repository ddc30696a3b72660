//! [`TargetState`]: the agent's state as it lies in the target, and what has become of the target.
//!
//! Read and written through `/proc/PID/mem`, opened once: that file is the memory of the program that was attached to, and ends
//! with it, whatever the process executes later.

use crate::addr::RemoteAddr;
use crate::agent_abi::{SLOTS, STATE_MAGIC, Slot, State, TOMBSTONE, TRACKED_BUCKETS};
use crate::inferior::error::TraceError;
use crate::inferior::handle::Handle;
use crate::inferior::stop::StopEvent;
use crate::inferior::{facts, maps};
use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::os::unix::fs::FileExt;

/// In `/proc/PID/pagemap` (Documentation/admin-guide/mm/pagemap.rst): the page is in memory.
const PRESENT: u64 = 1 << 63;
const PAGE: u64 = 4096;

/// What has become of the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// It runs, and the agent records.
    Recording,
    /// It runs, but the agent has switched itself off: we were silent for too long.
    SwitchedOff,
    /// It became another program.
    Executed,
    /// It ended; `None` where nobody told how.
    Ended(Option<StopEvent>),
}

/// What the agent counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AgentCounts {
    /// Ticks that all threads spent recording samples.
    pub spent: u64,
    /// Calls of signal handlers that came while the agent ran on their thread.
    pub passed_through: u64,
    /// Calls of threads without a slot.
    pub without_slot: u64,
    /// Slots that threads have, or had when they ended.
    pub slots: usize,
}

/// See the module.
pub struct TargetState {
    pid: i32,
    /// Tells when it has ended, and how.
    handle: Handle,
    file: File,
    state: RemoteAddr,
}

impl TargetState {
    /// The state at `state` in process `pid`.
    pub fn open(pid: i32, state: RemoteAddr, handle: Handle) -> Result<Self, TraceError> {
        let path = format!("/proc/{}/mem", maps::memory_holder(pid));
        let file = File::options().read(true).write(true).open(&path);
        let file = file.map_err(|source| TraceError::Proc { path, source })?;
        Ok(Self { pid, handle, file, state })
    }

    /// What has become of the target.
    pub fn condition(&self) -> Condition {
        let mut head = [0; offset_of!(State, abi_version)];
        if self.read(0, &mut head).is_err() || number(&head, offset_of!(State, magic)) != STATE_MAGIC {
            return self.end();
        }
        let enabled = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
        if enabled == 0 { Condition::SwitchedOff } else { Condition::Recording }
    }

    /// What the agent has counted until now.
    pub fn counts(&self) -> io::Result<AgentCounts> {
        let mut word = [0; 8];
        let mut one = |at: usize| self.read(at, &mut word).map(|()| u64::from_le_bytes(word));
        let without_slot = one(offset_of!(State, without_slot))?;
        let passed_through = one(offset_of!(State, in_agent))?;
        let mut slots = vec![0; size_of::<[Slot; SLOTS]>()];
        self.read(offset_of!(State, slots), &mut slots)?;
        let words =
            |slot: &[u8]| (number(slot, offset_of!(Slot, key)), number(slot, offset_of!(Slot, spent)));
        let slots: Vec<(u64, u64)> =
            slots.chunks_exact(size_of::<Slot>()).map(words).filter(|(key, _)| *key != 0).collect();
        let spent = slots.iter().fold(0, |sum: u64, (_, spent)| sum.saturating_add(*spent));
        let slots = slots.iter().filter(|(key, _)| *key != TOMBSTONE).count();
        Ok(AgentCounts { spent, passed_through, without_slot, slots })
    }

    /// Addresses of the samples that the agent knows; `None` if it is gone.
    pub fn tracked(&self) -> Option<Vec<u64>> {
        let mut bytes = vec![0; size_of::<[[u64; 8]; TRACKED_BUCKETS]>()];
        self.read(offset_of!(State, tracked), &mut bytes).ok()?;
        Some(bytes.chunks_exact(8).map(|entry| number(entry, 0)).filter(|address| *address != 0).collect())
    }

    /// Sets the sampling interval. Each thread takes it at its next draw.
    pub fn set_interval(&self, interval: u64) -> io::Result<()> {
        let at = self.state.0 + offset_of!(State, interval) as u64;
        self.file.write_all_at(&interval.to_le_bytes(), at)
    }

    /// Whether no thread is in the agent at this moment: none has a word of what was published before the last change. False where that
    /// can't be told.
    pub fn is_quiet(&self) -> bool {
        let mut slots = vec![0; size_of::<[Slot; SLOTS]>()];
        let is_in = |slot: &[u8]| {
            let (key, in_agent) =
                (number(slot, offset_of!(Slot, key)), number(slot, offset_of!(Slot, in_agent)));
            key > TOMBSTONE && in_agent as u32 != 0
        };
        let is_read = self.read(offset_of!(State, slots), &mut slots).is_ok();
        is_read && !slots.chunks_exact(size_of::<Slot>()).any(is_in)
    }

    /// Tells the agent which code is mapped: what is to be written for it, and then where the directory of it is.
    pub fn set_native_code(&self, writes: &[(RemoteAddr, Vec<u8>)], directory: RemoteAddr) -> io::Result<()> {
        for (at, bytes) in writes {
            self.file.write_all_at(bytes, at.0)?;
        }
        self.file.write_all_at(&directory.0.to_le_bytes(), self.state.0 + offset_of!(State, native) as u64)
    }

    /// Bytes of these ranges that are in memory.
    pub fn resident(&self, ranges: &[(RemoteAddr, u64)]) -> io::Result<u64> {
        let file = File::open(format!("/proc/{}/pagemap", maps::memory_holder(self.pid)))?;
        let mut pages = 0;
        for (start, len) in ranges {
            let mut entries = vec![0; (len.div_ceil(PAGE) * 8) as usize];
            file.read_exact_at(&mut entries, start.0 / PAGE * 8)?;
            pages += entries.chunks_exact(8).filter(|entry| number(entry, 0) & PRESENT != 0).count() as u64;
        }
        Ok(pages * PAGE)
    }

    fn read(&self, at: usize, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, self.state.0 + at as u64)
    }

    /// The memory is gone. A process that ends has none any more a while before it has ended.
    fn end(&self) -> Condition {
        match self.handle.end() {
            Some(how) => Condition::Ended(how),
            None if facts::has_memory(self.pid) => Condition::Executed,
            None => Condition::Recording,
        }
    }
}

/// The word at `at`.
fn number(bytes: &[u8], at: usize) -> u64 {
    let word = bytes.get(at..at + 8).and_then(|word| word.try_into().ok());
    word.map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Read};
    use std::process::{Child, Command, Stdio};

    /// A shell that tells where a made-up state lies in it can't be had: our own memory serves.
    fn ours() -> (Vec<u64>, TargetState) {
        let mut words = vec![0_u64; size_of::<State>() / 8];
        words[offset_of!(State, enabled) / 8] = 1;
        words[offset_of!(State, magic) / 8] = STATE_MAGIC;
        words[offset_of!(State, without_slot) / 8] = 3;
        words[offset_of!(State, in_agent) / 8] = 4;
        for n in 0..10 {
            let slot = (offset_of!(State, slots) + n * size_of::<Slot>()) / 8;
            // 1 is a tombstone.
            words[slot + offset_of!(Slot, key) / 8] = 2 * u64::from(n != 5);
            words[slot + offset_of!(Slot, spent) / 8] = 100;
        }
        let state = RemoteAddr(words.as_ptr() as u64);
        let opened =
            TargetState::open(std::process::id() as i32, state, Handle::open(std::process::id() as i32))
                .unwrap();
        (words, opened)
    }

    #[test]
    fn counts_and_condition_are_read_and_the_interval_is_written() {
        let (mut words, state) = ours();
        assert_eq!(state.condition(), Condition::Recording);
        let counts = AgentCounts { spent: 900, passed_through: 4, without_slot: 3, slots: 9 };
        assert_eq!(state.counts().unwrap(), counts);
        state.set_interval(4096).unwrap();
        assert_eq!(words[offset_of!(State, interval) / 8], 4096);
        words[offset_of!(State, enabled) / 8] = 0;
        assert_eq!(state.condition(), Condition::SwitchedOff);
    }

    #[test]
    fn resident_pages_are_counted() {
        let (words, state) = ours();
        let touched = vec![1_u8; 64 << 10];
        let all = [(RemoteAddr(touched.as_ptr() as u64 & !(PAGE - 1)), 64 << 10)];
        assert!(state.resident(&all).unwrap() >= 60 << 10);
        drop(words);
    }

    fn shell(script: &str) -> Child {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.spawn().unwrap()
    }

    /// The first address that is mapped in the process.
    fn a_place_in(pid: i32) -> RemoteAddr {
        maps::mappings(pid).unwrap().iter().find(|m| m.perms.write).unwrap().start
    }

    /// What a process whose memory is watched has become, after it was told to go on.
    fn became(script: &str, reap: bool) -> (Condition, i32) {
        let mut child = shell(&format!("echo ready; read x; {script}"));
        let pid = child.id() as i32;
        let mut out = BufReader::new(child.stdout.take().unwrap());
        out.read_line(&mut String::new()).unwrap();
        let state = TargetState::open(pid, a_place_in(pid), Handle::open(pid)).unwrap();
        drop(child.stdin.take());
        if reap {
            child.wait().unwrap();
        } else {
            // Its output ends with its memory, or tells that another program runs.
            out.read_exact(&mut [0]).ok();
        }
        // Its memory goes a moment before it has ended.
        let mut condition = state.condition();
        while condition == Condition::Recording {
            std::thread::yield_now();
            condition = state.condition();
        }
        child.kill().ok();
        child.wait().unwrap();
        (condition, pid)
    }

    #[test]
    fn an_end_and_another_program_are_told_apart() {
        assert_eq!(became("exit 7", false).0, Condition::Ended(Some(StopEvent::Exited(7))));
        assert_eq!(became("kill -9 $$", false).0, Condition::Ended(Some(StopEvent::Killed(9))));
        // Since Linux 6.15 a pidfd tells it after the wait, too.
        let told = became("exit 7", true).0;
        assert!(matches!(told, Condition::Ended(None | Some(StopEvent::Exited(7)))), "{told:?}");
        assert_eq!(became("exec sh -c 'echo other; sleep 60'", false).0, Condition::Executed);
    }
}
