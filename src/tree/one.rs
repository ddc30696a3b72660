//! Recording one process of a tree, in a process of our own that the supervisor started.
//!
//! A process that was just born may not be Python yet: between fork and exec it runs in its parent's memory (vfork) or as its
//! parent's copy, after exec it loads and initialises. What may pass is waited for, for a bounded time; what can't pass
//! is told at once. Ends as on SIGTERM when the supervisor is gone.

use super::processes::{Program, identify, program, unix_ns};
use super::told::{Ended, Told};
use crate::capture::NotRecordedKind;
use crate::cpython::LocateError;
use crate::inferior::error::{AttachError, TraceError};
use crate::inferior::maps::FactError;
use crate::inferior::{facts, sys};
use crate::probe::error::ProbeError;
use crate::recorder::RecordError;
use crate::recorder::header::{command_line, executable};
use crate::recorder::record::{Observer, RecordOptions, Summary, record};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::getppid;
use std::time::{Duration, Instant};

/// How long an interpreter may take to initialise.
const INITIALISING: Duration = Duration::from_secs(10);
/// How long the structures of one that is just initialising, or ending, may look wrong.
const SETTLING: Duration = Duration::from_secs(2);
/// How long a program may take to load its libraries, of which one may be Python.
const LOADING: Duration = Duration::from_millis(300);
/// How long a process may run in its parent's memory: as long as it takes.
const BORROWING: Duration = Duration::MAX;
/// Pauses between two looks: the first and the longest.
const PAUSES: [Duration; 2] = [Duration::from_millis(2), Duration::from_millis(100)];
/// How often the end is asked for meanwhile.
const TICK: Duration = Duration::from_millis(100);

/// Records a process for `supervisor`. `observer` hears of its beginning.
pub fn record_one(options: &RecordOptions, supervisor: i32, observer: &mut dyn Observer) -> Told {
    // The signal may have come due before it was asked for.
    let bound = set_pdeathsig(Some(Signal::SIGTERM)).is_ok();
    if !bound || getppid().as_raw() != supervisor {
        return failed("the heaptap that started this one is gone");
    }
    if let Err(error) = sys::install_stop_signals(TICK) {
        return failed(TraceError::Wait(error));
    }
    let pid = options.pid;
    let Some(process) = identify(pid) else { return ended_before() };
    let mut waiting = Waiting::new(program(pid));
    loop {
        if sys::requested_stop().is_some() {
            return told(NotRecordedKind::Ended, "recording ended before it could be recorded");
        }
        let obstacle = if runs_in_its_parents_memory(pid) {
            Obstacle {
                patience: BORROWING,
                kind: NotRecordedKind::Ended,
                why: "it runs in its parent's memory".into(),
            }
        } else {
            match record(options, observer) {
                Ok(summary) => return Told::Ended(summary_of(summary)),
                Err(error) => obstacle(&error),
            }
        };
        if identify(pid) != Some(process) {
            return ended_before();
        }
        if !waiting.goes_on(program(pid), obstacle.patience) {
            return Told::NotRecorded { kind: obstacle.kind, why: obstacle.why };
        }
    }
}

/// How long is waited already, for one program.
struct Waiting {
    program: Option<Program>,
    since: Instant,
    pause: Duration,
}

impl Waiting {
    fn new(program: Option<Program>) -> Self {
        Self { program, since: Instant::now(), pause: PAUSES[0] }
    }

    /// Pauses, and answers whether it is worth another look. Another program begins anew.
    fn goes_on(&mut self, program: Option<Program>, patience: Duration) -> bool {
        if program != self.program {
            *self = Self::new(program);
            return true;
        }
        if self.since.elapsed() >= patience {
            return false;
        }
        std::thread::sleep(self.pause);
        self.pause = (self.pause * 2).min(PAUSES[1]);
        true
    }
}

/// Why a process can't be recorded at this moment.
struct Obstacle {
    /// How long that may pass.
    patience: Duration,
    kind: NotRecordedKind,
    why: String,
}

fn obstacle(error: &RecordError) -> Obstacle {
    let (kind, patience) = match error {
        RecordError::Locate(LocateError::NoPython { .. }) => (NotRecordedKind::NotPython, LOADING),
        RecordError::Locate(LocateError::NotInitialized { .. }) => (NotRecordedKind::Refused, INITIALISING),
        RecordError::Locate(LocateError::Read(_)) | RecordError::Layout(_) | RecordError::CodeDealloc(_) => {
            (NotRecordedKind::Refused, SETTLING)
        }
        // Mapped by halves: the loader is at work, or execve.
        RecordError::Image(_) | RecordError::Read(_) => (NotRecordedKind::Refused, LOADING),
        // vfork(2) holds a thread in the kernel until its child has executed a program. Who is attaching to the parent at the
        // moment of a fork traces the child too, until it is told from a thread. What the child has inherited of its parent's
        // recording can't be removed while a word on its stack may lead there.
        RecordError::Attach(AttachError::Unstoppable { .. } | AttachError::AlreadyTraced { .. })
        | RecordError::NotRecordable { .. } => (NotRecordedKind::Refused, SETTLING),
        RecordError::Probe(ProbeError::NotRestored { .. }) => (NotRecordedKind::Failed, Duration::ZERO),
        RecordError::Probe(_) => (NotRecordedKind::Refused, LOADING),
        RecordError::Attach(AttachError::NoProcess { .. } | AttachError::Zombie { .. })
        | RecordError::Fact(FactError::Gone { .. })
        | RecordError::Trace(TraceError::Gone { .. }) => (NotRecordedKind::Ended, LOADING),
        RecordError::Attach(AttachError::Trace(_)) | RecordError::Trace(_) | RecordError::Fact(_) => {
            (NotRecordedKind::Failed, LOADING)
        }
        RecordError::Capture(_) | RecordError::Panicked { .. } | RecordError::Thread { .. } => {
            (NotRecordedKind::Failed, Duration::ZERO)
        }
        _ => (NotRecordedKind::Refused, Duration::ZERO),
    };
    Obstacle { patience, kind, why: with_causes(error) }
}

/// Between vfork and exec a child has no memory of its own: what would be planted into it would be planted into its parent.
/// It gets its own by executing a program and has it ever after.
pub(super) fn runs_in_its_parents_memory(pid: i32) -> bool {
    let Some(parent) = super::processes::facts(pid).map(|facts| facts.parent) else { return false };
    match sys::share_memory(pid, parent) {
        Some(shared) => shared,
        // Without kcmp(2): the parent's thread sleeps uninterruptibly meanwhile.
        None => facts::threads(parent)
            .unwrap_or_default()
            .iter()
            .any(|tid| facts::state(parent, *tid) == Some('D')),
    }
}

fn summary_of(summary: Summary) -> Ended {
    Ended {
        unix_ns: unix_ns(),
        reason: summary.reason,
        duration_ns: summary.elapsed.as_nanos() as u64,
        allocations: summary.counters.allocations,
        frees: summary.counters.frees,
        drops: summary.counters.drops,
        peak_live_bytes: summary.counters.peak_live_bytes,
        live_bytes: summary.counters.live_bytes,
        live_blocks: summary.counters.live_blocks,
        file_bytes: summary.file_bytes,
        error: summary.failed,
        left: summary.left.why,
    }
}

/// What is told when recording begins.
pub fn recording(pid: i32, python: String) -> Told {
    Told::Recording {
        unix_ns: unix_ns(),
        command_line: crate::capture::short_command_line(&command_line(pid)),
        executable: executable(pid),
        python,
    }
}

fn told(kind: NotRecordedKind, why: impl ToString) -> Told {
    Told::NotRecorded { kind, why: why.to_string() }
}

fn failed(why: impl ToString) -> Told {
    told(NotRecordedKind::Failed, why)
}

fn ended_before() -> Told {
    told(NotRecordedKind::Ended, "it ended before it could be recorded")
}

/// An error with what caused it, in one line.
fn with_causes(error: &RecordError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Many messages end with their cause.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn what_may_pass_is_waited_for_for_a_bounded_time_and_anew_for_another_program() {
        let mut child =
            Command::new("sh").args(["-c", "read -r line"]).stdin(Stdio::piped()).spawn().unwrap();
        let its = program(child.id() as i32);
        let mut waiting = Waiting::new(its);
        assert!(waiting.goes_on(its, Duration::from_secs(60)));
        assert!(!waiting.goes_on(its, Duration::ZERO));
        assert!(waiting.goes_on(None, Duration::ZERO), "another program is given its time");
        assert!(!waiting.goes_on(None, Duration::ZERO));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_child_with_memory_of_its_own_is_told_from_us() {
        let mut child =
            Command::new("sh").args(["-c", "read -r line"]).stdin(Stdio::piped()).spawn().unwrap();
        // std waits for the exec.
        assert!(!runs_in_its_parents_memory(child.id() as i32));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
