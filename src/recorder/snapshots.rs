//! [`Snapshots`]: takes snapshots of what is live when they are due, asked for, or the recording begins or ends.
//!
//! Knows occasions, who asked, and what to say where one can't be written; what a snapshot holds is the ledger's.

use super::RecordError;
use super::control::{Control, Taken};
use super::header::unix_ns;
use super::ledger::Ledger;
use super::schedule::Schedule;
use crate::capture::{Keep, SnapshotHead, SnapshotReason};
use crate::inferior::{facts, maps, sys};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often the resident set is read, and the control socket looked at.
const RESIDENT_EVERY: Duration = Duration::from_secs(1);
const CONTROL_EVERY: Duration = Duration::from_millis(100);
/// Looks of the source after which everything is told that had happened when a snapshot was asked for, and how long that is waited for.
const IDLES: u64 = 2;
const WAIT_FOR_IDLES: Duration = Duration::from_secs(1);

/// When snapshots are taken and how many are kept.
#[derive(Debug, Clone)]
pub struct SnapshotOptions {
    /// At each such time.
    pub every: Option<Duration>,
    /// So many are kept, and so large is the file at most (bytes).
    pub keep: Keep,
    /// When more is live than ever.
    pub at_peak: bool,
    /// When the resident set passes so many bytes.
    pub at_rss: Option<u64>,
    /// There is an event log beside them.
    pub events: bool,
}

/// A snapshot that somebody asked for. What the target did before is in it: it is taken when the source has found and told that.
struct Wanted {
    reason: SnapshotReason,
    since: Instant,
    idles: u64,
}

/// See the module.
pub struct Snapshots {
    pid: i32,
    file: PathBuf,
    schedule: Schedule,
    control: Option<Control>,
    taken: u32,
    /// The target's threads when last seen.
    alive: HashSet<u32>,
    resident_at: Option<Instant>,
    control_at: Instant,
    wanted: Option<Wanted>,
    /// What was said of why snapshots can't be written.
    told: Option<String>,
}

impl Snapshots {
    /// Prepares the ledger, and the socket on which snapshots can be asked for.
    pub fn begin(
        options: &SnapshotOptions,
        pid: i32,
        file: &Path,
        ledger: &mut Ledger,
    ) -> Result<Self, RecordError> {
        ledger.writer().keep(options.keep)?;
        ledger.take_snapshots();
        let control = Control::listen(pid)
            .inspect_err(|error| tracing::warn!("`heaptap snapshot` can't reach this recording: {error}"))
            .ok();
        Ok(Self {
            pid,
            file: std::path::absolute(file).unwrap_or_else(|_| file.to_owned()),
            schedule: Schedule::new(options.every, options.at_peak, options.at_rss),
            control,
            taken: 0,
            alive: HashSet::new(),
            resident_at: None,
            control_at: Instant::now(),
            wanted: None,
            told: None,
        })
    }

    /// Takes the snapshot that is due `elapsed` after the start, if one is. `idles` counts the looks of the source that found all
    /// told that they had found before.
    pub fn look(
        &mut self,
        now: Instant,
        elapsed: Duration,
        idles: u64,
        ledger: &mut Ledger,
    ) -> Result<(), RecordError> {
        if now - self.control_at >= CONTROL_EVERY {
            self.control_at = now;
            if self.control.as_mut().is_some_and(Control::is_asked) {
                self.wanted.get_or_insert(Wanted { reason: SnapshotReason::Asked, since: now, idles });
            }
        }
        if sys::snapshot_asked() {
            self.wanted.get_or_insert(Wanted { reason: SnapshotReason::Signal, since: now, idles });
        }
        let is_told =
            |wanted: &mut Wanted| idles >= wanted.idles + IDLES || now - wanted.since >= WAIT_FOR_IDLES;
        if let Some(Wanted { reason, .. }) = self.wanted.take_if(is_told) {
            self.take_wanted(reason, elapsed, ledger)?;
        }
        let resident_due =
            self.schedule.watches_resident() && self.resident_at.is_none_or(|at| now - at >= RESIDENT_EVERY);
        let resident = resident_due.then(|| facts::resident(self.pid)).flatten();
        if resident_due {
            self.resident_at = Some(now);
        }
        if let Some(reason) = self.schedule.due(elapsed, ledger.live().live_bytes(), resident) {
            self.take(reason, elapsed, ledger)?;
        }
        Ok(())
    }

    /// Takes a snapshot. `None` if it can't be written now; then why not was told.
    pub fn take(
        &mut self,
        reason: SnapshotReason,
        elapsed: Duration,
        ledger: &mut Ledger,
    ) -> Result<Option<SnapshotHead>, RecordError> {
        let started = Instant::now();
        if let Ok(threads) = maps::namespaced_tasks(self.pid)
            && !threads.is_empty()
        {
            self.alive = threads.into_iter().map(|(outer, _)| outer as u32).collect();
        }
        let head = SnapshotHead {
            index: self.taken,
            time_ns: elapsed.as_nanos() as u64,
            unix_ns: unix_ns(),
            reason,
        };
        let live_bytes = ledger.live().live_bytes();
        let is_written = ledger.snapshot(head, &self.alive)?;
        tracing::debug!("snapshot {} ({}) took {:?}", head.index, reason.name(), started.elapsed());
        self.tell_trouble(ledger);
        if !is_written {
            return Ok(None);
        }
        self.taken += 1;
        self.schedule.written(live_bytes);
        Ok(Some(head))
    }

    /// How many were written.
    pub fn taken(&self) -> u32 {
        self.taken
    }

    /// Takes a snapshot and tells those who have asked for one.
    fn take_wanted(
        &mut self,
        reason: SnapshotReason,
        elapsed: Duration,
        ledger: &mut Ledger,
    ) -> Result<(), RecordError> {
        let answer = match self.take(reason, elapsed, ledger) {
            Ok(Some(head)) => Ok(Taken {
                index: head.index,
                unix_ns: head.unix_ns,
                live_bytes: ledger.live().live_bytes(),
                file: self.file.clone(),
            }),
            Ok(None) => Err(ledger.writer().trouble().unwrap_or("it could not be written").to_owned()),
            Err(error) => {
                self.reply(&Err(error.to_string()));
                return Err(error);
            }
        };
        self.reply(&answer);
        Ok(())
    }

    fn reply(&mut self, answer: &Result<Taken, String>) {
        if let Some(control) = &mut self.control {
            control.reply(answer);
        }
    }

    /// Says once that snapshots can't be written, and once that they can be again.
    fn tell_trouble(&mut self, ledger: &mut Ledger) {
        let trouble = ledger.writer().trouble().map(str::to_owned);
        if trouble == self.told {
            return;
        }
        let file = self.file.display();
        match &trouble {
            Some(why) => tracing::warn!("snapshots in {file}: {why}"),
            None => tracing::warn!("snapshots in {file} are written again"),
        }
        self.told = trouble;
    }
}
