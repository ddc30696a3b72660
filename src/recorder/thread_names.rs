//! Names of threads, for the capture: the kernel's and Python's. Python's is known only some time after a thread's
//! first allocation (`threading` registers a thread from within it), so it is asked for again.

use super::RecordError;
use super::ledger::Ledger;
use crate::cpython::Python;
use crate::inferior::maps;
use crate::memory::RemoteMemory;
use std::collections::HashMap;

/// Events of a thread after which its name is looked up again, while it has none.
const LOOKS: [u32; 6] = [1, 8, 32, 128, 1024, 8192];

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
        let names = python_names(python, memory);
        self.tell(pid, tid, names.get(&tid).map_or("", String::as_str), ledger)
    }

    /// Looks every thread up once more: about once a second.
    pub fn refresh(
        &mut self,
        pid: i32,
        python: &Python,
        memory: &dyn RemoteMemory,
        ledger: &mut Ledger,
    ) -> Result<(), RecordError> {
        let names = python_names(python, memory);
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
fn python_names(python: &Python, memory: &dyn RemoteMemory) -> HashMap<i32, String> {
    let threads = python.threads(memory).unwrap_or_default();
    threads.into_iter().filter_map(|t| Some((t.tid?, t.name?))).collect()
}
