//! How a [`Tree`] ends: every worker by its own duration or by a signal, what waited told of, what was not recorded left clean.

use super::book::TreeSummary;
use super::supervisor::{State, Tree};
use super::{TreeError, inherited};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

/// How long workers may take to end by themselves when the duration is over.
const OWN_END: Duration = Duration::from_secs(5);
/// How long workers that were asked to end are waited for before that is told.
const ENDING: Duration = Duration::from_secs(30);

impl Tree<'_> {
    /// Once: a second signal would seem to be the reason.
    pub(super) fn ask_all_to_end(&mut self, signal: Signal) {
        self.ending = true;
        if std::mem::replace(&mut self.asked, true) {
            return;
        }
        for process in self.processes.values() {
            if let State::Working(worker) = &process.state {
                worker.signal(signal);
            }
        }
    }

    fn ask_those_not_recording_to_end(&mut self) {
        self.ending = true;
        for process in self.processes.values() {
            if let State::Working(worker) = &process.state
                && !self.is_recording(process.entry)
            {
                worker.signal(Signal::SIGTERM);
            }
        }
    }

    /// Those that were not recorded and live on are left without what they inherited of a recorded parent.
    fn clean_the_others(&self) {
        for (pid, process) in &self.processes {
            let unrecorded = self.book.entry(process.entry).is_none_or(|entry| entry.not_recorded.is_some());
            if unrecorded
                && process.handle.end().is_none()
                && let Err(error) = inherited::remove(*pid)
            {
                // One that can't be traced was refused for that before.
                tracing::debug!("process {pid}: {error}");
            }
        }
    }

    /// Ends every recording and tells what came of all.
    pub(super) fn finish(mut self, ended: String) -> Result<TreeSummary, TreeError> {
        let mut told_since = Instant::now();
        self.ask_those_not_recording_to_end();
        // The others have the duration of their own, which began when they had attached.
        let own_end = Instant::now() + OWN_END;
        while !self.workers.is_empty() {
            if Instant::now() >= own_end {
                self.ask_all_to_end(Signal::SIGTERM);
            }
            self.listen(Duration::from_millis(50));
            if told_since.elapsed() >= ENDING {
                told_since = Instant::now();
                let pids: Vec<String> = self.workers.values().map(ToString::to_string).collect();
                tracing::warn!("still letting go of: {}", pids.join(", "));
            }
        }
        for pid in std::mem::take(&mut self.waiting) {
            if let Some(entry) = self.processes.get(&pid).map(|process| process.entry) {
                let why = self.why_waited("recording ended before it could be recorded");
                self.not_recorded(entry, why);
            }
        }
        self.clean_the_others();
        let elapsed = self.start.elapsed();
        let (summary, why) = self.book.close(ended)?;
        match why {
            Some(why) => {
                let found = match summary.not_recorded {
                    1 => "1 process".into(),
                    count => format!("{count} processes"),
                };
                Err(TreeError::NoneRecorded { found, why })
            }
            None => Ok(TreeSummary { elapsed, ..summary }),
        }
    }
}
