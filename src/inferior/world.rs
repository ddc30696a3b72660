//! The stop-the-world machine: which threads run, which are stopped and what each still has to get.
//!
//! Pure: stops go in, [`Reaction`]s come out; no system call is made here. What it holds together:
//! * after PTRACE_INTERRUPT another stop may come first (a signal, a breakpoint, a clone): it counts as the
//!   stop, and what it carried is delivered when the thread is released;
//! * a signal held is delivered exactly once, at release;
//! * a group-stopped thread is released by LISTEN, never by CONT: it stays stopped, as it was found;
//! * a thread born while the world stops is part of the world: it is expected from the moment its parent
//!   tells of it until its own first stop.

use super::stop::StopEvent;
use std::collections::{BTreeMap, BTreeSet};

/// What a stopped thread has coming.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// Nothing: it can just run on.
    Nothing,
    /// This signal, at release.
    Signal(i32),
    /// It belongs to a group stop by this signal.
    GroupStop(i32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    Listening,
    Stopped(Held),
}

/// What the driver has to do about a stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reaction {
    /// Nothing: the thread stays stopped.
    Hold,
    /// Let the thread run on with this signal (0: none).
    Resume(i32),
    /// Let it stay in its group stop.
    Listen,
    /// A SIGTRAP: the thread stays stopped until somebody decides whether a breakpoint of ours was hit.
    Trap,
    /// The thread made another: ask the kernel which, call [`World::expect`], then do the inner thing.
    Born {
        /// The parent runs on at once (it stays stopped when the world is being stopped).
        resume: bool,
    },
    /// The process executed a program: this thread is the only one left.
    Executed,
    /// A thread ended.
    ThreadEnded,
    /// The leader ended, and with it the process.
    ProcessEnded,
    /// Not a thread that we know: the driver finds out what it is.
    Stranger,
}

/// How a stopped thread is let go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// PTRACE_CONT with this signal.
    Resume(i32),
    /// PTRACE_LISTEN.
    Listen,
}

/// All threads of one process.
#[derive(Debug)]
pub struct World {
    leader: i32,
    threads: BTreeMap<i32, State>,
    expected: BTreeSet<i32>,
    stopping: bool,
}

impl World {
    /// The world of process `leader`, without threads yet.
    pub fn new(leader: i32) -> Self {
        Self { leader, threads: BTreeMap::new(), expected: BTreeSet::new(), stopping: false }
    }

    /// A thread that was just seized, and runs.
    pub fn add_running(&mut self, tid: i32) {
        self.threads.entry(tid).or_insert(State::Running);
    }

    /// A child of a traced thread that will show itself by a stop of its own.
    pub fn expect(&mut self, tid: i32) {
        if !self.threads.contains_key(&tid) {
            self.expected.insert(tid);
        }
    }

    /// The child that was expected showed itself (or died before it could).
    pub fn arrived(&mut self, tid: i32) {
        self.expected.remove(&tid);
    }

    /// A stranger proved to be a thread of this process; `event` is its first stop.
    pub fn adopt(&mut self, tid: i32, event: StopEvent) -> Reaction {
        self.arrived(tid);
        self.threads.insert(tid, State::Running);
        self.on_stop(tid, event)
    }

    /// Tells the machine of a stop.
    pub fn on_stop(&mut self, tid: i32, event: StopEvent) -> Reaction {
        if !self.threads.contains_key(&tid) {
            return Reaction::Stranger;
        }
        match event {
            StopEvent::Exited(_) | StopEvent::Killed(_) => {
                self.threads.remove(&tid);
                if tid == self.leader { Reaction::ProcessEnded } else { Reaction::ThreadEnded }
            }
            StopEvent::Exec => {
                // The kernel has killed every other thread, and gave this one the leader's id (execve(2)).
                self.threads.clear();
                self.expected.clear();
                self.threads.insert(tid, State::Stopped(Held::Nothing));
                Reaction::Executed
            }
            StopEvent::Signal(libc::SIGTRAP) => {
                self.hold(tid, Held::Signal(libc::SIGTRAP));
                if self.stopping { Reaction::Hold } else { Reaction::Trap }
            }
            StopEvent::Signal(signal) if self.stopping => self.hold(tid, Held::Signal(signal)),
            StopEvent::Signal(signal) => self.run(tid, signal),
            StopEvent::GroupStop(signal) if self.stopping => self.hold(tid, Held::GroupStop(signal)),
            StopEvent::GroupStop(_) => {
                self.threads.insert(tid, State::Listening);
                Reaction::Listen
            }
            StopEvent::Clone | StopEvent::Fork | StopEvent::Vfork => {
                let state = if self.stopping { State::Stopped(Held::Nothing) } else { State::Running };
                self.threads.insert(tid, state);
                Reaction::Born { resume: !self.stopping }
            }
            StopEvent::Interrupted | StopEvent::Syscall | StopEvent::Other(_) if self.stopping => {
                self.hold(tid, Held::Nothing)
            }
            StopEvent::Interrupted | StopEvent::Syscall | StopEvent::Other(_) => self.run(tid, 0),
        }
    }

    fn hold(&mut self, tid: i32, held: Held) -> Reaction {
        self.threads.insert(tid, State::Stopped(held));
        Reaction::Hold
    }

    fn run(&mut self, tid: i32, signal: i32) -> Reaction {
        self.threads.insert(tid, State::Running);
        Reaction::Resume(signal)
    }

    /// From now on every stop is held. Answers the threads to be interrupted.
    pub fn begin_stop(&mut self) -> Vec<i32> {
        self.stopping = true;
        self.threads.iter().filter(|(_, s)| !matches!(s, State::Stopped(_))).map(|(t, _)| *t).collect()
    }

    /// Whether every thread is stopped and none is still to show itself.
    pub fn all_stopped(&self) -> bool {
        self.expected.is_empty() && self.threads.values().all(|s| matches!(s, State::Stopped(_)))
    }

    /// Threads (and children) that all_stopped still waits for.
    pub fn not_stopped(&self) -> Vec<i32> {
        let running = self.threads.iter().filter(|(_, s)| !matches!(s, State::Stopped(_))).map(|(t, _)| *t);
        running.chain(self.expected.iter().copied()).collect()
    }

    /// Lets the world run: answers how each stopped thread is released.
    pub fn begin_resume(&mut self) -> Vec<(i32, Release)> {
        self.stopping = false;
        let tids: Vec<i32> = self.threads.keys().copied().collect();
        tids.into_iter().filter_map(|tid| self.release(tid).map(|r| (tid, r))).collect()
    }

    /// How the stopped thread `tid` is released; `None` when it is not stopped.
    pub fn release(&mut self, tid: i32) -> Option<Release> {
        let Some(State::Stopped(held)) = self.threads.get(&tid).copied() else { return None };
        let (state, release) = match held {
            Held::Nothing => (State::Running, Release::Resume(0)),
            Held::Signal(signal) => (State::Running, Release::Resume(signal)),
            Held::GroupStop(_) => (State::Listening, Release::Listen),
        };
        self.threads.insert(tid, state);
        Some(release)
    }

    /// What the stopped thread `tid` has coming; `None` when it is not stopped.
    pub fn held(&self, tid: i32) -> Option<Held> {
        match self.threads.get(&tid) {
            Some(State::Stopped(held)) => Some(*held),
            _ => None,
        }
    }

    /// Replaces what a stopped thread has coming: a breakpoint's SIGTRAP is ours and goes no further; a stop
    /// made between two steps of a remote call may have changed it.
    pub fn set_held(&mut self, tid: i32, held: Held) {
        if let Some(state @ State::Stopped(_)) = self.threads.get_mut(&tid) {
            *state = State::Stopped(held);
        }
    }

    /// The thread is gone, as a failed request told.
    pub fn forget(&mut self, tid: i32) {
        self.threads.remove(&tid);
        self.expected.remove(&tid);
    }

    /// Every thread known.
    pub fn tids(&self) -> Vec<i32> {
        self.threads.keys().copied().collect()
    }

    /// Whether `tid` is a thread of this process, or a child whose first stop is awaited.
    pub fn knows(&self, tid: i32) -> bool {
        self.threads.contains_key(&tid) || self.expected.contains(&tid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use StopEvent as E;

    fn world(tids: &[i32]) -> World {
        let mut world = World::new(tids[0]);
        tids.iter().for_each(|t| world.add_running(*t));
        world
    }

    #[test]
    fn a_stop_that_comes_before_the_interrupts_own_counts_and_its_signal_is_kept() {
        let mut w = world(&[1, 2]);
        assert_eq!(w.begin_stop(), [1, 2]);
        assert_eq!(w.on_stop(1, E::Signal(14)), Reaction::Hold);
        assert!(!w.all_stopped());
        assert_eq!(w.on_stop(2, E::Interrupted), Reaction::Hold);
        assert!(w.all_stopped());
        assert_eq!(w.begin_resume(), [(1, Release::Resume(14)), (2, Release::Resume(0))]);
        // The interrupt that thread 1 never showed comes now, and is of no consequence.
        assert_eq!(w.on_stop(1, E::Interrupted), Reaction::Resume(0));
    }

    #[test]
    fn a_thread_born_in_mid_stop_is_waited_for() {
        let mut w = world(&[1]);
        w.begin_stop();
        assert_eq!(w.on_stop(1, E::Clone), Reaction::Born { resume: false });
        w.expect(7);
        assert!(!w.all_stopped());
        assert_eq!(w.on_stop(7, E::Interrupted), Reaction::Stranger);
        assert_eq!(w.adopt(7, E::Interrupted), Reaction::Hold);
        assert!(w.all_stopped());
        assert_eq!(w.begin_resume().len(), 2);
    }

    #[test]
    fn a_childs_stop_may_come_before_its_parent_tells_of_it() {
        let mut w = world(&[1]);
        assert_eq!(w.on_stop(7, E::Interrupted), Reaction::Stranger);
        assert_eq!(w.adopt(7, E::Interrupted), Reaction::Resume(0));
        assert_eq!(w.on_stop(1, E::Clone), Reaction::Born { resume: true });
        w.expect(7);
        w.begin_stop();
        w.on_stop(1, E::Interrupted);
        w.on_stop(7, E::Interrupted);
        assert!(w.all_stopped(), "an announcement of a known thread is not awaited again");
    }

    #[test]
    fn a_thread_that_dies_in_mid_stop_is_not_waited_for() {
        let mut w = world(&[1, 2]);
        w.begin_stop();
        w.on_stop(1, E::Interrupted);
        assert_eq!(w.on_stop(2, E::Exited(0)), Reaction::ThreadEnded);
        assert!(w.all_stopped());
        assert_eq!(w.on_stop(1, E::Killed(9)), Reaction::ProcessEnded);
    }

    #[test]
    fn a_group_stop_is_listened_to_and_survives_a_stop_of_the_world() {
        let mut w = world(&[1]);
        assert_eq!(w.on_stop(1, E::GroupStop(19)), Reaction::Listen);
        assert_eq!(w.begin_stop(), [1]);
        assert_eq!(w.on_stop(1, E::GroupStop(19)), Reaction::Hold);
        assert_eq!(w.begin_resume(), [(1, Release::Listen)]);
        // SIGCONT.
        assert_eq!(w.on_stop(1, E::Interrupted), Reaction::Resume(0));
    }

    #[test]
    fn a_trap_is_reported_while_running_and_held_while_stopping() {
        let mut w = world(&[1]);
        assert_eq!(w.on_stop(1, E::Signal(libc::SIGTRAP)), Reaction::Trap);
        assert!(w.begin_stop().is_empty(), "it is stopped already");
        w.set_held(1, Held::Nothing);
        assert_eq!(w.begin_resume(), [(1, Release::Resume(0))]);
        w.begin_stop();
        assert_eq!(w.on_stop(1, E::Signal(libc::SIGTRAP)), Reaction::Hold);
        assert_eq!(w.held(1), Some(Held::Signal(libc::SIGTRAP)));
    }

    #[test]
    fn exec_leaves_one_thread() {
        let mut w = world(&[1, 2, 3]);
        w.expect(9);
        assert_eq!(w.on_stop(1, E::Exec), Reaction::Executed);
        assert_eq!(w.tids(), [1]);
        assert!(w.all_stopped());
    }
}
