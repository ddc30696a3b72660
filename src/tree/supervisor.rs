//! The loop that keeps a tree recorded: looks for children, starts a [`Worker`] for each process, keeps the index, and ends
//! when all have ended, or it is asked to.
//!
//! Knows processes by [`ProcessId`] and what their workers tell; how all of them end is [`super::ending`]'s. A process is followed until it ends, whoever its parent is by
//! then. What it did before it was found is not recorded.

use super::TreeError;
use super::book::{Book, EntryId, TreeSummary};
use super::processes::{Children, Facts, ProcessId, Program, facts, identify, program, unix_ns};
use super::told::{Ended, Told};
use super::worker::{Heard, Worker};
use crate::capture::{
    EndReason, IndexEntry, NotRecorded, NotRecordedKind, prepare_folder, short_command_line,
};
use crate::inferior::error::TraceError;
use crate::inferior::handle::Handle;
use crate::inferior::sys;
use crate::recorder::header::{command_line, executable};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use std::collections::{HashMap, VecDeque};
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// The shortest time between two looks for children.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// The longest.
const LOOK_AT_LEAST_EVERY: Duration = Duration::from_secs(1);
/// Looking takes no more than one part in so many of a processor's time.
const LOOK_SHARE: u32 = 100;
/// A process that is not recorded is looked at for another program once in so many looks.
const LOOKS_PER_PROGRAM: u32 = 10;

/// What is to be recorded.
#[derive(Debug, Clone)]
pub struct TreeOptions {
    /// The processes asked for.
    pub roots: Vec<i32>,
    /// What was asked for, in words.
    pub selected: String,
    /// Record the descendants that there are.
    pub children: bool,
    /// Record those born later, and programs executed later.
    pub follow_forks: bool,
    /// The most that are recorded at once.
    pub max_processes: usize,
    /// Where the captures go.
    pub folder: PathBuf,
    /// Take a folder that has something in it.
    pub force: bool,
    /// End after this time.
    pub duration: Option<Duration>,
}

/// What one worker is to do.
#[derive(Debug, Clone)]
pub struct Task {
    /// The process to record.
    pub pid: i32,
    /// Into this file.
    pub capture: PathBuf,
    /// For so long.
    pub duration: Option<Duration>,
}

/// What the caller does for a tree.
pub trait TreeObserver {
    /// The arguments by which our executable does a task, in a process of its own.
    fn arguments(&self, task: &Task) -> Vec<OsString>;
    /// A recording begins.
    fn recording(&mut self, entry: &IndexEntry, python: &str);
    /// A recording ended.
    fn ended(&mut self, entry: &IndexEntry, ended: &Ended);
    /// A process can't be recorded.
    fn not_recorded(&mut self, entry: &IndexEntry, why: &NotRecorded);
}

/// Records until something ends it.
pub fn record_tree(options: &TreeOptions, observer: &mut dyn TreeObserver) -> Result<TreeSummary, TreeError> {
    sys::install_stop_signals(Duration::ZERO).map_err(TraceError::Wait)?;
    raise_file_limit();
    let roots: Vec<Facts> = options.roots.iter().filter_map(|pid| facts(*pid)).collect();
    if roots.is_empty() {
        return Err(TreeError::NoProcess { pid: options.roots.first().copied().unwrap_or(0) });
    }
    prepare_folder(&options.folder, options.force)?;
    let mut tree = Tree::new(options, observer);
    tree.book.write()?;
    for root in roots {
        tree.found(root);
    }
    if options.children {
        tree.find_descendants();
    }
    let ended = tree.run();
    tree.finish(ended)
}

/// A few descriptors are held for each process: as many as we may have.
fn raise_file_limit() {
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    }
}

/// What becomes of a process that is followed.
pub(super) enum State {
    /// It is to be recorded as soon as there is room.
    Waiting,
    /// A worker is at it.
    Working(Worker),
    /// It is followed for its children's sake, and recorded when it executes another program than this.
    Watched(Option<Program>),
    /// It ended. While nobody has waited for it, it is still among its parent's children.
    Ended,
}

pub(super) struct Process {
    id: ProcessId,
    pub(super) handle: Handle,
    pub(super) state: State,
    /// Its entry in the index.
    pub(super) entry: EntryId,
}

pub(super) struct Tree<'a> {
    pub(super) options: &'a TreeOptions,
    observer: &'a mut dyn TreeObserver,
    children: Children,
    /// By pid. Ends are noticed before a pid that is given out again is taken for the former process.
    pub(super) processes: HashMap<i32, Process>,
    /// Workers by number: which process each is at.
    pub(super) workers: HashMap<usize, i32>,
    next_worker: usize,
    pub(super) waiting: VecDeque<i32>,
    pub(super) book: Book,
    pub(super) start: Instant,
    looks: u32,
    /// Processes are in line because as many are recorded as may be.
    limit_was_reached: bool,
    /// The workers were asked to end.
    pub(super) asked: bool,
    /// Nothing is begun any more.
    pub(super) ending: bool,
    tell: Sender<Heard>,
    heard: Receiver<Heard>,
}

impl<'a> Tree<'a> {
    fn new(options: &'a TreeOptions, observer: &'a mut dyn TreeObserver) -> Self {
        let (tell, heard) = channel();
        Self {
            options,
            observer,
            children: Children::new(),
            processes: HashMap::new(),
            workers: HashMap::new(),
            next_worker: 0,
            waiting: VecDeque::new(),
            book: Book::new(options.folder.clone(), options.selected.clone()),
            start: Instant::now(),
            looks: 0,
            limit_was_reached: false,
            asked: false,
            ending: false,
            tell,
            heard,
        }
    }

    /// Until something ends it; answers what.
    fn run(&mut self) -> String {
        let mut look_due = Instant::now();
        loop {
            if let Some(signal) = sys::requested_stop() {
                let name = Signal::try_from(signal).map_or("a signal", Signal::as_str);
                self.ask_all_to_end(Signal::try_from(signal).unwrap_or(Signal::SIGTERM));
                return format!("interrupted by {name}");
            }
            if sys::snapshot_asked() {
                self.ask_for_snapshots();
            }
            if self.options.duration.is_some_and(|duration| self.start.elapsed() >= duration) {
                return "the duration was over".into();
            }
            if Instant::now() >= look_due {
                let began = Instant::now();
                self.look();
                look_due =
                    Instant::now() + (began.elapsed() * LOOK_SHARE).clamp(LOOK_EVERY, LOOK_AT_LEAST_EVERY);
            }
            self.start_waiting();
            self.book.write_when_due();
            if self.is_over() {
                return "every process ended, or its recording did".into();
            }
            self.listen(look_due.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)));
        }
    }

    fn is_over(&self) -> bool {
        let idle = self.workers.is_empty() && self.waiting.is_empty();
        // A process that lives may yet give birth.
        let all_ended = || self.processes.values().all(|process| matches!(process.state, State::Ended));
        idle && (!self.options.follow_forks || all_ended())
    }

    /// Takes in what workers told, waiting for the first word for so long.
    pub(super) fn listen(&mut self, patience: Duration) {
        let mut next = self.heard.recv_timeout(patience);
        loop {
            match next {
                Ok(heard) => self.hear(heard),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return,
            }
            next = self.heard.try_recv().map_err(|_| RecvTimeoutError::Timeout);
        }
    }

    /// Looks for new children, for ends, and for new programs.
    fn look(&mut self) {
        self.looks += 1;
        if self.options.follow_forks {
            let living = self.processes.iter().filter(|(_, p)| !matches!(p.state, State::Ended));
            let parents: Vec<i32> = living.map(|(pid, _)| *pid).collect();
            for (parent, child) in self.children.of(&parents) {
                // One that has just ended and whose pid another has by now is no parent of ours.
                let known = self.processes.get(&child).is_some_and(|known| identify(child) == Some(known.id));
                let is_ours = |p: &Process| identify(parent) == Some(p.id);
                if !known && self.processes.get(&parent).is_some_and(is_ours) {
                    self.on_end(child);
                    if let Some(facts) = facts(child) {
                        self.found(facts);
                    }
                }
            }
        }
        let ended: Vec<i32> = self
            .processes
            .iter()
            .filter(|(_, process)| {
                !matches!(process.state, State::Working(_)) && process.handle.end().is_some()
            })
            .map(|(pid, _)| *pid)
            .collect();
        for pid in ended {
            self.on_end(pid);
        }
        if self.options.follow_forks && self.looks.is_multiple_of(LOOKS_PER_PROGRAM) {
            self.look_for_programs();
        }
    }

    fn look_for_programs(&mut self) {
        let executed = |process: &&Process| match process.state {
            State::Watched(before) => program(process.id.pid).is_some_and(|now| Some(now) != before),
            _ => false,
        };
        let executed: Vec<i32> = self.processes.values().filter(executed).map(|p| p.id.pid).collect();
        for pid in executed {
            self.another_program(pid);
        }
    }

    /// The descendants that there are.
    fn find_descendants(&mut self) {
        let roots: Vec<i32> = self.processes.keys().copied().collect();
        for pid in self.children.descendants(&roots) {
            if let Some(facts) = facts(pid) {
                self.found(facts);
            }
        }
    }

    /// Begins to follow a process, and puts it in line to be recorded.
    fn found(&mut self, facts: Facts) {
        let pid = facts.id.pid;
        if self.processes.contains_key(&pid) || pid == std::process::id() as i32 {
            return;
        }
        let handle = Handle::open(pid);
        // The pid may have been given out again before it was held.
        if identify(pid) != Some(facts.id) {
            return;
        }
        let entry = self.new_entry(&facts);
        self.processes.insert(pid, Process { id: facts.id, handle, state: State::Waiting, entry });
        self.waiting.push_back(pid);
    }

    fn new_entry(&mut self, facts: &Facts) -> EntryId {
        let pid = facts.id.pid;
        self.book.add(facts, short_command_line(&command_line(pid)), executable(pid))
    }

    /// A process executed another program: that is to be recorded by itself.
    fn another_program(&mut self, pid: i32) {
        let Some(facts) = facts(pid) else { return };
        if self.processes.get(&pid).is_none_or(|process| process.id != facts.id) {
            return;
        }
        let entry = self.new_entry(&facts);
        if let Some(process) = self.processes.get_mut(&pid) {
            process.entry = entry;
            process.state = State::Waiting;
            self.waiting.push_back(pid);
        }
    }

    /// A process ended, and no worker is at it. It is forgotten once its pid may be given out again.
    fn on_end(&mut self, pid: i32) {
        let Some(process) = self.processes.get(&pid) else { return };
        match process.state {
            // Its worker has yet to tell how it ended; then nothing is known under this pid.
            State::Working(_) => return,
            State::Waiting => {
                let entry = process.entry;
                self.waiting.retain(|waiting| *waiting != pid);
                self.not_recorded(entry, self.why_waited("it ended before it could be recorded"));
            }
            State::Watched(_) | State::Ended => {}
        }
        if let Some(process) = self.processes.get_mut(&pid) {
            process.state = State::Ended;
            if identify(pid) != Some(process.id) {
                self.processes.remove(&pid);
            }
        }
    }

    /// Why a process was not recorded that waited until something happened.
    pub(super) fn why_waited(&self, otherwise: &str) -> NotRecorded {
        let most = self.options.max_processes;
        if self.limit_was_reached {
            let why = format!("{otherwise}: {most} others were recorded at that time (--max-processes)");
            return NotRecorded { kind: NotRecordedKind::OverLimit, why };
        }
        NotRecorded { kind: NotRecordedKind::Ended, why: otherwise.to_owned() }
    }

    fn start_waiting(&mut self) {
        while self.workers.len() < self.options.max_processes {
            let Some(pid) = self.waiting.pop_front() else { break };
            self.start_worker(pid);
        }
        self.limit_was_reached = !self.waiting.is_empty();
    }

    fn start_worker(&mut self, pid: i32) {
        let duration = self.options.duration.map(|d| d.saturating_sub(self.start.elapsed()));
        let Some(process) = self.processes.get_mut(&pid) else { return };
        let entry = process.entry;
        if process.handle.end().is_some() {
            process.state = State::Ended;
            let why = "it ended before it could be recorded".into();
            return self.not_recorded(entry, NotRecorded { kind: NotRecordedKind::Ended, why });
        }
        let Some(capture) = self.book.name_capture(entry) else { return };
        let task = Task { pid, capture, duration };
        let arguments = self.observer.arguments(&task);
        let number = self.next_worker;
        self.next_worker += 1;
        match Worker::start(&arguments, number, self.tell.clone()) {
            Ok(worker) => {
                process.state = State::Working(worker);
                self.workers.insert(number, pid);
            }
            Err(error) => {
                process.state = State::Watched(program(pid));
                let why = format!("heaptap can't start a process of its own: {error}");
                self.not_recorded(entry, NotRecorded { kind: NotRecordedKind::Failed, why });
            }
        }
    }

    fn hear(&mut self, heard: Heard) {
        let Some(&pid) = self.workers.get(&heard.number) else { return };
        let Some(entry) = self.processes.get(&pid).map(|process| process.entry) else { return };
        match heard.told {
            Some(Told::Recording { unix_ns, command_line, executable, python }) => {
                if let Some(entry) = self.book.recording(entry, unix_ns, command_line, executable) {
                    self.observer.recording(entry, &python);
                }
            }
            Some(Told::Ended(ended)) => self.ended(entry, &ended),
            Some(Told::NotRecorded { kind, why }) => self.not_recorded(entry, NotRecorded { kind, why }),
            None => self.worker_over(heard.number, pid),
        }
    }

    fn ended(&mut self, entry: EntryId, ended: &Ended) {
        if let Some(entry) = self.book.ended(entry, ended) {
            self.observer.ended(entry, ended);
        }
    }

    pub(super) fn not_recorded(&mut self, entry: EntryId, why: NotRecorded) {
        if let Some(entry) = self.book.entry(entry) {
            self.observer.not_recorded(entry, &why);
        }
        self.book.not_recorded(entry, why);
    }

    /// A worker has nothing more to say.
    fn worker_over(&mut self, number: usize, pid: i32) {
        self.workers.remove(&number);
        let Some(process) = self.processes.get_mut(&pid) else { return };
        let entry = process.entry;
        let State::Working(worker) = std::mem::replace(&mut process.state, State::Watched(program(pid)))
        else {
            return;
        };
        let status = worker.wait();
        let state = |of: &IndexEntry| (of.end_reason.clone(), of.not_recorded.is_some());
        let (reason, refused) = self.book.entry(entry).map(state).unwrap_or_default();
        if reason.is_none() && !refused {
            let how = status.map_or_else(|error| error.to_string(), |status| status.to_string());
            self.worker_died(entry, &how);
        }
        if matches!(reason, Some(EndReason::TargetExec { .. })) && self.options.follow_forks {
            self.another_program(pid);
        }
    }

    /// A worker ended without a last word: killed. What it had written can be read.
    fn worker_died(&mut self, entry: EntryId, how: &str) {
        let message = format!("its recorder ended without a word ({how})");
        let began = self.is_recording(entry);
        if !began && self.ending {
            // So young that the signal ended it by itself.
            let why = "recording ended before it could be recorded".into();
            self.not_recorded(entry, NotRecorded { kind: NotRecordedKind::Ended, why });
        } else if !began {
            self.not_recorded(entry, NotRecorded { kind: NotRecordedKind::Failed, why: message });
        } else {
            let reason = EndReason::ControllerError { message: message.clone() };
            self.ended(
                entry,
                &Ended { unix_ns: unix_ns(), reason, error: Some(message), ..Ended::default() },
            );
        }
    }

    pub(super) fn is_recording(&self, entry: EntryId) -> bool {
        self.book.entry(entry).is_some_and(|entry| entry.start_unix_ns.is_some())
    }

    /// Of all that record. One that does not yet would be killed by the signal.
    fn ask_for_snapshots(&self) {
        for process in self.processes.values().filter(|process| self.is_recording(process.entry)) {
            if let State::Working(worker) = &process.state {
                worker.signal(Signal::SIGUSR1);
            }
        }
    }
}
