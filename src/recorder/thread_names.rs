//! Names of threads, for the capture: the kernel's and Python's. Python's is known only some time after a thread's
//! first allocation (`threading` registers a thread from within it), so it is asked for again.

use super::RecordError;
use super::ledger::Ledger;
use crate::cpython::Python;
use crate::inferior::maps;
use crate::memory::RemoteMemory;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

/// Events of a thread after which its name is looked up again, while it has none.
const LOOKS: [u32; 6] = [1, 8, 32, 128, 1024, 8192];
/// How often threads lately heard of are looked up again, while they have no name, and how many times.
const YOUNG_EVERY: Duration = Duration::from_millis(25);
const YOUNG_LOOKS: u32 = 6;
/// Threads remembered at which those that are gone are forgotten.
const MANY: usize = 256;

#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Known {
    events: u32,
    os: String,
    python: String,
}

/// What was told of each thread.
#[derive(Debug, Default)]
pub struct ThreadNames {
    known: HashMap<i32, Known>,
    /// Threads lately heard of, and looks that are left.
    young: Vec<(i32, u32)>,
    /// When they are looked up next.
    due: Option<Instant>,
}

impl ThreadNames {
    /// Counts an event of `tid` and names the thread in the capture when it is due.
    pub fn saw(
        &mut self,
        pid: i32,
        tid: i32,
        python: &Python,
        memory: &dyn RemoteMemory,
        ledger: &mut Ledger,
    ) -> Result<(), RecordError> {
        let known = self.known.entry(tid).or_default();
        known.events = known.events.saturating_add(1);
        if !known.python.is_empty() || !LOOKS.contains(&known.events) {
            return Ok(());
        }
        let names = python_names(pid, python, memory);
        self.tell(pid, tid, names.get(&tid).map_or("", String::as_str), ledger)
    }

    /// The thread was heard of: its kernel name is told now, Python's when [`ThreadNames::look_again`] finds it.
    pub fn heard(&mut self, pid: i32, tid: i32, ledger: &mut Ledger) -> Result<(), RecordError> {
        if self.known.contains_key(&tid) {
            return Ok(());
        }
        self.known.insert(tid, Known::default());
        self.young.push((tid, YOUNG_LOOKS));
        self.due.get_or_insert_with(Instant::now);
        self.tell(pid, tid, "", ledger)
    }

    /// Whether [`ThreadNames::look_again`] has something to do.
    pub fn is_due(&self, now: Instant) -> bool {
        self.due.is_some_and(|due| now >= due)
    }

    /// Looks up threads lately heard of.
    pub fn look_again(
        &mut self,
        pid: i32,
        python: &Python,
        memory: &dyn RemoteMemory,
        ledger: &mut Ledger,
        now: Instant,
    ) -> Result<(), RecordError> {
        let names = python_names(pid, python, memory);
        for (tid, left) in std::mem::take(&mut self.young) {
            match names.get(&tid) {
                Some(name) => self.tell(pid, tid, name, ledger)?,
                None if left > 1 => self.young.push((tid, left - 1)),
                None => {}
            }
        }
        self.due = (!self.young.is_empty()).then(|| now + YOUNG_EVERY);
        Ok(())
    }

    /// Looks every thread up once more: about once a second.
    pub fn refresh(
        &mut self,
        pid: i32,
        python: &Python,
        memory: &dyn RemoteMemory,
        ledger: &mut Ledger,
    ) -> Result<(), RecordError> {
        let names = python_names(pid, python, memory);
        if self.known.len() > MANY
            && let Ok(tasks) = maps::tasks(pid)
        {
            let tasks: HashSet<i32> = tasks.into_iter().collect();
            self.known.retain(|tid, _| tasks.contains(tid));
        }
        let tids: Vec<i32> = self.known.keys().copied().collect();
        for tid in tids {
            if let Some(name) = names.get(&tid) {
                self.tell(pid, tid, name, ledger)?;
            }
        }
        Ok(())
    }

    fn tell(&mut self, pid: i32, tid: i32, python: &str, ledger: &mut Ledger) -> Result<(), RecordError> {
        let Some(known) = self.known.get_mut(&tid) else { return Ok(()) };
        let os = maps::task_name(pid, tid).unwrap_or_else(|| known.os.clone());
        if (os == known.os && python == known.python) || (os.is_empty() && python.is_empty()) {
            return Ok(());
        }
        ledger.writer().define_thread(tid as u32, &os, python)?;
        known.os = os;
        known.python = python.to_string();
        Ok(())
    }

    /// The thread ended; its id may be used again.
    pub fn forget(&mut self, tid: i32) {
        self.known.remove(&tid);
    }
}

/// The threads run while they are looked at: what can't be read now is asked for again.
fn python_names(pid: i32, python: &Python, memory: &dyn RemoteMemory) -> HashMap<i32, String> {
    let threads = python.threads(memory).unwrap_or_default();
    let mut names: HashMap<i32, String> =
        threads.into_iter().filter_map(|t| Some((t.tid?, t.name?))).collect();
    // Python numbers threads as its own pid namespace does.
    if maps::status(pid, pid).is_ok_and(|leader| leader.ns_pids.len() > 1) {
        let tasks = maps::namespaced_tasks(pid).unwrap_or_default();
        names = tasks.iter().filter_map(|(outer, inner)| Some((*outer, names.remove(inner)?))).collect();
    }
    names
}
