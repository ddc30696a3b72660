//! The controller's end of the rings ([`crate::agent_abi`]): maps the ring memory, reads what is published, gives the room
//! back, keeps the heartbeat.
//!
//! The other end is a process that may be corrupt or hostile. Each word is read once; every length is checked against what
//! is published; what makes no sense is an [`Unreadable`], is counted, and the ring goes on behind what is published. Knows
//! nothing of the order between rings ([`crate::recorder::merge`]) and nothing of what an event comes to.

#![allow(unsafe_code)]

use super::ring_record::{Definitions, Event, Unreadable, What, decode};
use crate::agent_abi::{MAX_DEPTH, RING_CONTROLS_AT, RingControl, ring_data_at, ring_memory_len};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::stat::fstat;
use std::ffi::c_void;
use std::mem::offset_of;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// The most rings: one for every thread that the agent can tell apart, and the shared one.
const MAX_RINGS: usize = crate::agent_abi::SLOTS + 1;
/// The least and the most bytes of a ring: the longest record (a stack) must fit.
const MIN_RING_LEN: usize = 2 * MAX_DEPTH * 16;
const MAX_RING_LEN: usize = 1 << 30;
/// How often the heartbeat is kept, of which a thread that waits for room learns that nobody makes any.
const BEAT: Duration = Duration::from_millis(20);
/// The same where nobody waits: often enough for an agent that takes seconds of silence for death.
const LAZY_BEAT: Duration = Duration::from_millis(200);

const HEAD: usize = offset_of!(RingControl, head) / 8;
const DROPPED: usize = offset_of!(RingControl, dropped) / 8;
const TAIL: usize = offset_of!(RingControl, tail) / 8;

/// Why ring memory can't be used.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// No such rings exist.
    #[error("{ring_count} rings of {ring_len} bytes cannot be: 1 to {MAX_RINGS} rings, a power of two bytes")]
    Shape {
        /// Rings.
        ring_count: usize,
        /// Bytes of each.
        ring_len: usize,
    },
    /// The file is shorter than the rings.
    #[error("the ring memory has {len} bytes, {ring_count} rings of {ring_len} bytes need {needed}")]
    TooShort {
        /// Bytes of the file.
        len: u64,
        /// Rings.
        ring_count: usize,
        /// Bytes of each.
        ring_len: usize,
        /// Bytes needed.
        needed: usize,
    },
    /// The kernel refused.
    #[error("the ring memory cannot be mapped: {what}: {errno}")]
    Refused {
        /// Which request.
        what: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },
}

/// The time stamp counter; not ordered with what is around it.
pub fn ticks() -> u64 {
    // SAFETY: reads a counter that every x86-64 has.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// The mapping, as words that the target changes under us.
struct Memory {
    at: NonNull<c_void>,
    len: usize,
}

// SAFETY: the mapping belongs to no thread; it is reached through atomics alone.
unsafe impl Send for Memory {}
// SAFETY: as for Send.
unsafe impl Sync for Memory {}

impl Memory {
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: `at` is the page-aligned start of a readable and writable mapping of `len` bytes that lives until drop;
        // any bytes are a u64, and AtomicU64 allows that others change them.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr().cast(), self.len / 8) }
    }

    /// The heartbeat is the agent's clock, too: of the two who keep it, neither sets it back.
    fn beat(&self, now: u64) {
        self.words()[0].fetch_max(now, Ordering::Relaxed);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: made by mmap with this length; no reference into it outlives `self`.
        let gone = unsafe { munmap(self.at, self.len) };
        if let Err(errno) = gone {
            tracing::warn!("the ring memory cannot be unmapped: {errno}");
        }
    }
}

/// Where the controller is in a ring. Positions count bytes and never wrap.
struct Lane {
    /// First of its words in the memory: control, data.
    control: usize,
    data: usize,
    /// The next record.
    at: u64,
    /// End of what is published, as last seen.
    end: u64,
    /// The end at the look before.
    settled: u64,
    /// Where the last event lay.
    last: u64,
    /// Definitions before this were told.
    defined: u64,
    /// What the writer was told is free.
    released: u64,
    /// Its counter of drops as last seen.
    dropped: u64,
    /// Whose records these are.
    tid: u32,
    /// The time of its records; it does not go back.
    stamp: u64,
    complained: bool,
}

/// Events that are known to be missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Missing {
    /// The agent had no room.
    pub full: u64,
    /// What could not be understood; one for each time that a ring was skipped to its end.
    pub unreadable: u64,
}

/// What [`Rings::look`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Found {
    /// Bytes published since the last look, in all rings.
    pub fresh: u64,
    /// Bytes that wait in the fullest ring.
    pub fullest: u64,
}

/// The rings of one target.
pub struct Rings {
    memory: Arc<Memory>,
    ring_len: u64,
    lanes: Vec<Lane>,
    /// The counter at the last look: no record is later.
    now: u64,
    missing: Missing,
    scratch: Vec<u8>,
}

impl Rings {
    /// Maps the ring memory behind `fd`, as the loader made it.
    pub fn map(fd: &OwnedFd, ring_count: usize, ring_len: usize) -> Result<Self, RingError> {
        let possible = (1..=MAX_RINGS).contains(&ring_count)
            && (MIN_RING_LEN..=MAX_RING_LEN).contains(&ring_len)
            && ring_len.is_power_of_two();
        if !possible {
            return Err(RingError::Shape { ring_count, ring_len });
        }
        let needed = ring_memory_len(ring_count, ring_len);
        // A file made shorter under a mapping kills whoever touches it. Kernels before 6.3 seal only what was made to be.
        if let Err(errno) = fcntl(fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)) {
            tracing::debug!("the ring memory cannot be sealed: {errno}");
        }
        let refused = |what| move |errno| RingError::Refused { what, errno };
        let len = fstat(fd).map_err(refused("fstat"))?.st_size as u64;
        if len < needed as u64 {
            return Err(RingError::TooShort { len, ring_count, ring_len, needed });
        }
        let Some(size) = NonZeroUsize::new(needed) else {
            return Err(RingError::Shape { ring_count, ring_len });
        };
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping where the kernel likes; what lies there is used as atomics alone.
        let mapped = unsafe { mmap(None, size, access, MapFlags::MAP_SHARED, fd, 0) };
        let at = mapped.map_err(refused("mmap"))?;
        let lane = |ring: usize| Lane {
            control: (RING_CONTROLS_AT + ring * size_of::<RingControl>()) / 8,
            data: ring_data_at(ring_count, ring_len, ring) / 8,
            at: 0,
            end: 0,
            settled: 0,
            last: 0,
            defined: 0,
            released: 0,
            dropped: 0,
            tid: 0,
            stamp: 0,
            complained: false,
        };
        Ok(Self {
            memory: Arc::new(Memory { at, len: needed }),
            ring_len: ring_len as u64,
            lanes: (0..ring_count).map(lane).collect(),
            now: 0,
            missing: Missing::default(),
            scratch: Vec::new(),
        })
    }

    /// Rings.
    pub fn count(&self) -> usize {
        self.lanes.len()
    }

    /// Bytes of each.
    pub fn ring_len(&self) -> u64 {
        self.ring_len
    }

    /// Tells the agent that somebody reads, and what time it is.
    pub fn beat(&self, now: u64) {
        self.memory.beat(now);
    }

    /// Keeps the heartbeat from a thread of its own: a slow disk must not look like a dead controller. It has beaten when this
    /// returns: on a busy machine the thread's first turn may come after the agent's first event, which would find nobody alive.
    /// `exact`: threads may wait for us.
    pub fn heart(&self, exact: bool) -> std::io::Result<Heart> {
        self.memory.beat(ticks());
        let memory = Arc::clone(&self.memory);
        let beat = if exact { BEAT } else { LAZY_BEAT };
        let (stop, stopped) = channel::<()>();
        let thread = std::thread::Builder::new().name("heartbeat".into()).spawn(move || {
            loop {
                memory.beat(ticks());
                if stopped.recv_timeout(beat) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        })?;
        Ok(Heart { stop: Some(stop), thread: Some(thread) })
    }

    /// Sees what was published until now. `now` is the counter, read before.
    pub fn look(&mut self, now: u64) -> Found {
        self.now = self.now.max(now);
        let words = self.memory.words();
        let mut found = Found::default();
        for (ring, lane) in self.lanes.iter_mut().enumerate() {
            lane.settled = lane.end;
            let head = words[lane.control + HEAD].load(Ordering::Acquire);
            if head != lane.end {
                if !head.is_multiple_of(8) || head < lane.end || head - lane.at > self.ring_len {
                    let why = Unreadable::End { from: lane.end, to: head };
                    lane.skip(ring, head & !7, &why, &mut self.missing);
                } else {
                    found.fresh += head - lane.end;
                    lane.end = head;
                }
            }
            found.fullest = found.fullest.max(lane.end - lane.at);
            let dropped = words[lane.control + DROPPED].load(Ordering::Relaxed);
            self.missing.full = self.missing.full.saturating_add(dropped.saturating_sub(lane.dropped));
            lane.dropped = dropped;
        }
        found
    }

    /// Takes the next event out of a ring; what is defined before it is told. `None`: nothing more was published at the
    /// last [`Rings::look`].
    #[inline]
    pub fn read(&mut self, ring: usize, told: &mut impl Definitions) -> Option<Event> {
        let lane = &mut self.lanes[ring];
        let words = self.memory.words();
        let event = loop {
            if lane.at >= lane.end {
                break None;
            }
            let data = &words[lane.data..][..self.ring_len as usize / 8];
            let record = match decode(published(data, lane.at, lane.end), lane.at, self.ring_len) {
                Ok(record) => record,
                Err(why) => {
                    lane.skip(ring, lane.end, &why, &mut self.missing);
                    break None;
                }
            };
            let from = lane.at;
            lane.at += record.len;
            if let Some(what) = record.what {
                lane.last = from;
                if let What::Thread(tid) = what {
                    lane.tid = tid;
                }
                break Some(Event { stamp: lane.stamp, tid: lane.tid, number: record.number, what });
            }
            match record.time() {
                Some(time) => lane.stamp = time.min(self.now).max(lane.stamp),
                None if from < lane.defined => {}
                None => record.define(published(data, from, lane.end), &mut self.scratch, told),
            }
        };
        if lane.at - lane.released >= self.ring_len / 8 {
            lane.release(words);
        }
        event
    }

    /// Whether the last event of a ring had been published before the last look: by now all has been seen that was
    /// published before it.
    pub fn is_settled(&self, ring: usize) -> bool {
        let lane = &self.lanes[ring];
        lane.last < lane.settled
    }

    /// Shows `see` what [`Rings::read`] will give next, in order, with the event's number and whether it is settled.
    pub fn ahead(&self, ring: usize, mut see: impl FnMut(&What, u32, bool)) {
        let lane = &self.lanes[ring];
        let data = &self.memory.words()[lane.data..][..self.ring_len as usize / 8];
        let mut at = lane.at;
        while at < lane.end {
            let Ok(record) = decode(published(data, at, lane.end), at, self.ring_len) else { return };
            if let Some(what) = &record.what {
                see(what, record.number, at < lane.settled);
            }
            at += record.len;
        }
    }

    /// Tells all that is defined in what was published, ahead of its turn.
    pub fn define_ahead(&mut self, told: &mut impl Definitions) {
        for lane in &mut self.lanes {
            let data = &self.memory.words()[lane.data..][..self.ring_len as usize / 8];
            let mut at = lane.at.max(lane.defined);
            while at < lane.end {
                let payload = published(data, at, lane.end);
                let Ok(record) = decode(payload, at, self.ring_len) else { break };
                record.define(payload, &mut self.scratch, told);
                at += record.len;
            }
            lane.defined = at;
        }
    }

    /// Gives back the room of all that was read.
    pub fn release(&mut self) {
        let words = self.memory.words();
        for lane in self.lanes.iter_mut().filter(|lane| lane.at != lane.released) {
            lane.release(words);
        }
    }

    /// What went missing since the last call.
    pub fn take_missing(&mut self) -> Missing {
        std::mem::take(&mut self.missing)
    }
}

impl Lane {
    fn release(&mut self, words: &[AtomicU64]) {
        self.released = self.at;
        words[self.control + TAIL].store(self.at, Ordering::Release);
    }

    /// Goes on behind `end`: what is before it can't be understood.
    #[cold]
    fn skip(&mut self, ring: usize, end: u64, why: &Unreadable, missing: &mut Missing) {
        if !std::mem::replace(&mut self.complained, true) {
            tracing::warn!("ring {ring} of the agent, at {:#x}: {why}; its records are skipped", self.at);
        }
        missing.unreadable += 1;
        (self.at, self.end, self.settled, self.defined) = (end, end, end, end);
        // No record may be taken for released by a difference that went below zero.
        self.released = self.released.min(end);
    }
}

/// The published words from `at` on that lie in one piece.
#[inline]
fn published(data: &[AtomicU64], at: u64, end: u64) -> &[AtomicU64] {
    let from = (at / 8) as usize & (data.len() - 1);
    let most = ((end - at) / 8) as usize;
    let rest = &data[from..];
    &rest[..most.min(rest.len())]
}

/// Keeps the heartbeat until it is dropped.
pub struct Heart {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Heart {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::warn!("the heartbeat's thread panicked");
        }
    }
}
