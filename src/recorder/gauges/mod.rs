//! Gauges of the target once a second, beside what is recorded: what the kernel and the allocators say.
//!
//! Taken by a thread of its own, so that recording never waits for a look, from outside and from a running target: nothing
//! is stopped, nothing is written. What changes while it is read is left unknown for that moment, never guessed. Costs of more than
//! some microseconds are paced ([`pace`]).

mod glibc;
mod kernel;
mod pace;

use super::RecordError;
use super::examine::Examined;
use super::ledger::Ledger;
use crate::capture::Gauges;
use crate::cpython::{Collections, Pymalloc};
use crate::image::libc::LibcKind;
use crate::inferior::cgroup::MemoryGroups;
use crate::inferior::memory::ProcessMemory;
use crate::python_binary::binaries;
use glibc::Heap;
use kernel::Kernel;
use pace::Pace;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often a set is taken.
const EVERY: Duration = Duration::from_secs(1);
/// How often sets are written: a heaptap that is killed loses so much of them.
const WRITE_EVERY: Duration = Duration::from_secs(10);

/// Everything that gauges of one process are read by. What it has of allocators that are not known here, or not for certain, is
/// unknown: there is nothing to read it by.
pub struct Instruments {
    memory: ProcessMemory,
    kernel: Kernel,
    groups: Option<(MemoryGroups, Pace)>,
    heap: Option<(Heap, Pace)>,
    collections: Option<Collections>,
    pymalloc: Option<(Pymalloc, Pace)>,
}

impl Instruments {
    /// Those of a process that was examined.
    pub fn of(examined: &Examined) -> Self {
        let (pid, python) = (examined.pid, &examined.python);
        let memory = ProcessMemory::new(pid);
        let collections = python.collections(&memory).unwrap_or_default();
        let pymalloc = python.pymalloc(&memory, &binaries(&examined.modules));
        let heap = heap(examined, &memory);
        tracing::debug!("gauges: {heap:?}, {collections:?}, {pymalloc:?}");
        Self {
            memory,
            kernel: Kernel::new(pid),
            groups: MemoryGroups::of(pid).map(|groups| (groups, Pace::default())),
            heap: heap.map(|heap| (heap, Pace::default())),
            collections,
            pymalloc: pymalloc.map(|pymalloc| (pymalloc, Pace::default())),
        }
    }

    /// One set; `None`: the process has no memory any more.
    fn take(&mut self, start: Instant) -> Option<Gauges> {
        let mut gauges = Gauges { time_ns: start.elapsed().as_nanos() as u64, ..Gauges::default() };
        if !self.kernel.read(&mut gauges) {
            return None;
        }
        self.read_limit(&mut gauges);
        if let Some((heap, pace)) = &mut self.heap {
            heap.read(&self.memory, pace, &mut gauges);
        }
        self.read_python(&mut gauges);
        Some(gauges)
    }

    /// The next set is the last: it has everything that is not too dear.
    fn at_last(&mut self) {
        let heap = self.heap.iter_mut().map(|(_, pace)| pace);
        let rest = self.groups.iter_mut().map(|(_, pace)| pace);
        let rest = rest.chain(self.pymalloc.iter_mut().map(|(_, pace)| pace));
        heap.chain(rest).for_each(Pace::at_last);
        self.kernel.at_last();
    }

    fn read_limit(&mut self, gauges: &mut Gauges) {
        let Some((groups, pace)) = &mut self.groups else { return };
        let start = Instant::now();
        if pace.is_due(start) {
            let least = groups.rooms().into_iter().min_by_key(|room| room.limit);
            (gauges.limit, gauges.limit_used) =
                (least.as_ref().map(|room| room.limit), least.map(|room| room.used));
            pace.took(start.elapsed(), Instant::now());
        }
    }

    fn read_python(&mut self, gauges: &mut Gauges) {
        if let Some(Ok(counts)) = self.collections.map(|collections| collections.read(&self.memory)) {
            [gauges.collections_0, gauges.collections_1, gauges.collections_2] = counts.map(Some);
        }
        let Some((pymalloc, pace)) = &mut self.pymalloc else { return };
        let Some(arenas) = pymalloc.read(&self.memory) else { return };
        (gauges.arenas, gauges.pools) = (Some(arenas.bytes), Some(arenas.pools));
        let start = Instant::now();
        if pace.is_due(start) {
            gauges.arenas_in_use = pymalloc.in_use(&self.memory);
            pace.took(start.elapsed(), Instant::now());
        }
    }
}

/// glibc's heap, if it serves the process's malloc.
fn heap(examined: &Examined, memory: &ProcessMemory) -> Option<Heap> {
    let libc = examined.libc.as_ref()?;
    let serves = libc.kind == LibcKind::Glibc && libc.malloc == Some(libc.module);
    if serves { Heap::find(memory, &examined.modules[libc.module], libc.version.as_deref()?) } else { None }
}

/// Gauges of one recording, being taken.
pub struct GaugeReader {
    stop: Sender<()>,
    thread: JoinHandle<()>,
    taken: Receiver<Gauges>,
    waiting: Vec<Gauges>,
    written: Instant,
}

impl GaugeReader {
    /// Begins to take gauges; their times are since `start`.
    pub fn start(instruments: Instruments, start: Instant) -> Result<Self, RecordError> {
        let (stop, stopped) = channel();
        let (sender, taken) = channel();
        let run = move || take_sets(instruments, start, &stopped, &sender);
        let thread = std::thread::Builder::new().name("gauges".into()).spawn(run);
        let thread = thread.map_err(|source| RecordError::Thread { source })?;
        Ok(Self { stop, thread, taken, waiting: Vec::new(), written: start })
    }

    /// Takes over what was read meanwhile, and writes it when it is time.
    pub fn look(&mut self, ledger: &mut Ledger) -> Result<(), RecordError> {
        let live = ledger.live().live_bytes();
        self.waiting.extend(self.taken.try_iter().map(|gauges| Gauges { live: Some(live), ..gauges }));
        if self.written.elapsed() < WRITE_EVERY || self.waiting.is_empty() {
            return Ok(());
        }
        self.write(ledger)
    }

    /// Ends the thread, after one more set where the target is `still_there`, and writes what is left.
    pub fn finish(mut self, still_there: bool, ledger: &mut Ledger) -> Result<(), RecordError> {
        if still_there {
            // It is gone only if the target is.
            let _ = self.stop.send(());
        }
        drop(self.stop);
        // A panic there loses sets, not the recording.
        if self.thread.join().is_err() {
            tracing::warn!("the thread that takes gauges has failed; the last of them are missing");
        }
        let live = ledger.live().live_bytes();
        self.waiting.extend(self.taken.try_iter().map(|gauges| Gauges { live: Some(live), ..gauges }));
        if self.waiting.is_empty() {
            Ok(())
        } else {
            ledger.writer().gauges(&self.waiting).map_err(Into::into)
        }
    }

    fn write(&mut self, ledger: &mut Ledger) -> Result<(), RecordError> {
        self.written = Instant::now();
        ledger.writer().gauges(&self.waiting)?;
        self.waiting.clear();
        Ok(())
    }
}

/// The thread: a set at once, one every second, and one when it is asked for the last.
fn take_sets(mut instruments: Instruments, start: Instant, stopped: &Receiver<()>, sets: &Sender<Gauges>) {
    let mut next = Instant::now();
    loop {
        let Some(gauges) = instruments.take(start) else { return };
        if sets.send(gauges).is_err() {
            return;
        }
        // Seconds that were slept through (a stopped machine) are not made up for.
        next = (next + EVERY).max(Instant::now());
        match stopped.recv_timeout(next.saturating_duration_since(Instant::now())) {
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
            Ok(()) => break,
        }
    }
    instruments.at_last();
    if let Some(gauges) = instruments.take(start) {
        let _ = sets.send(gauges);
    }
}
