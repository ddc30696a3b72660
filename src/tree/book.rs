//! [`Book`]: what became of every process of a tree, and the index that is written of it.
//!
//! Knows nothing of live processes. Its memory is bounded by the recordings made and a number of other entries.

use super::processes::{Facts, unix_ns};
use super::told::Ended;
use crate::capture::{CaptureError, Index, IndexEntry, NotRecorded};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The shortest time between two writings of the index, which take no more than one part in so many of the time.
const WRITE_EVERY: Duration = Duration::from_secs(1);
const WRITE_SHARE: u32 = 50;
/// Processes that were not recorded and are listed all the same.
const MOST_NOT_RECORDED: usize = 2000;

/// An entry, for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct EntryId(u64);

/// A tree that was recorded.
#[derive(Debug, Clone, Default)]
pub struct TreeSummary {
    /// Why it ended, in words.
    pub ended: String,
    /// Recordings made.
    pub recorded: usize,
    /// Programs not recorded.
    pub not_recorded: usize,
    /// Recordings that an error ended.
    pub failed: usize,
    /// Sums over all recordings.
    pub totals: Ended,
    /// For how long.
    pub elapsed: Duration,
}

/// See the module.
pub(super) struct Book {
    folder: PathBuf,
    /// Without its entries.
    index: Index,
    entries: BTreeMap<EntryId, IndexEntry>,
    next: u64,
    /// Those not recorded, the oldest first.
    not_recorded: VecDeque<EntryId>,
    /// Why the first was not.
    first_reason: Option<String>,
    /// Captures named after each pid.
    captures: HashMap<u32, u32>,
    changed: bool,
    due: Instant,
    summary: TreeSummary,
}

impl Book {
    pub(super) fn new(folder: PathBuf, selected: String) -> Self {
        Self {
            folder,
            index: Index::new(selected, unix_ns()),
            entries: BTreeMap::new(),
            next: 0,
            not_recorded: VecDeque::new(),
            first_reason: None,
            captures: HashMap::new(),
            changed: true,
            due: Instant::now(),
            summary: TreeSummary::default(),
        }
    }

    /// A process, or another program of one.
    pub(super) fn add(&mut self, facts: &Facts, command_line: Vec<String>, executable: String) -> EntryId {
        let id = EntryId(self.next);
        self.next += 1;
        self.changed = true;
        let entry = IndexEntry {
            pid: facts.id.pid as u32,
            parent_pid: facts.parent as u32,
            namespace_pid: facts.namespace_pid as u32,
            command_line,
            executable,
            born_unix_ns: facts.born_unix_ns,
            found_unix_ns: unix_ns(),
            ..IndexEntry::default()
        };
        self.entries.insert(id, entry);
        id
    }

    /// `None` where it is not listed any more.
    pub(super) fn entry(&self, id: EntryId) -> Option<&IndexEntry> {
        self.entries.get(&id)
    }

    /// Names the capture of an entry: `PID.heaptap`; for a later program of the process, or another process with this pid,
    /// `PID-2.heaptap` and so on.
    pub(super) fn name_capture(&mut self, id: EntryId) -> Option<PathBuf> {
        let entry = self.entries.get_mut(&id)?;
        let number = self.captures.entry(entry.pid).or_default();
        *number += 1;
        let name = match *number {
            1 => format!("{}.heaptap", entry.pid),
            number => format!("{}-{number}.heaptap", entry.pid),
        };
        let path = self.folder.join(&name);
        entry.capture = Some(name);
        Some(path)
    }

    /// A recording began. Answers the entry.
    pub(super) fn recording(
        &mut self,
        id: EntryId,
        unix_ns: u64,
        command_line: Vec<String>,
        executable: String,
    ) -> Option<&IndexEntry> {
        self.changed = true;
        let entry = self.entries.get_mut(&id)?;
        *entry =
            IndexEntry { start_unix_ns: Some(unix_ns), command_line, executable, ..std::mem::take(entry) };
        Some(entry)
    }

    /// A recording ended. Answers the entry.
    pub(super) fn ended(&mut self, id: EntryId, ended: &Ended) -> Option<&IndexEntry> {
        self.changed = true;
        self.summary.recorded += 1;
        self.summary.failed += usize::from(ended.error.is_some());
        let totals = &mut self.summary.totals;
        totals.allocations += ended.allocations;
        totals.frees += ended.frees;
        totals.drops += ended.drops;
        totals.live_bytes += ended.live_bytes;
        totals.live_blocks += ended.live_blocks;
        totals.file_bytes += ended.file_bytes;
        let entry = self.entries.get_mut(&id)?;
        entry.end_unix_ns = Some(ended.unix_ns);
        entry.end_reason = Some(ended.reason.clone());
        entry.error.clone_from(&ended.error);
        Some(entry)
    }

    /// A process was not recorded. Where there are too many of them, the oldest goes.
    pub(super) fn not_recorded(&mut self, id: EntryId, why: NotRecorded) {
        self.changed = true;
        self.summary.not_recorded += 1;
        self.first_reason.get_or_insert_with(|| why.why.clone());
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if let Some(name) = entry.capture.take()
            && let Some(number) = self.captures.get_mut(&entry.pid)
            && !self.folder.join(name).exists()
        {
            // Its recorder has left no file, so the name is free.
            *number -= 1;
        }
        entry.not_recorded = Some(why);
        self.not_recorded.push_back(id);
        if self.not_recorded.len() > MOST_NOT_RECORDED
            && let Some(oldest) = self.not_recorded.pop_front()
        {
            self.entries.remove(&oldest);
            self.index.not_listed += 1;
        }
    }

    /// Writes the index, when it has changed and it is time.
    pub(super) fn write_when_due(&mut self) {
        if !self.changed || Instant::now() < self.due {
            return;
        }
        let began = Instant::now();
        // The disk may be full for a while: what is recorded goes on.
        if let Err(error) = self.write() {
            tracing::warn!("{error}");
        }
        self.due = Instant::now() + WRITE_EVERY.max(began.elapsed() * WRITE_SHARE);
    }

    /// Writes the index.
    pub(super) fn write(&mut self) -> Result<(), CaptureError> {
        self.changed = false;
        let processes = self.entries.values().cloned().collect();
        Index { processes, ..self.index.clone() }.write(&self.folder)
    }

    /// Writes the index for the last time. Answers the sums, and where nothing was recorded why the first was not.
    pub(super) fn close(mut self, ended: String) -> Result<(TreeSummary, Option<String>), CaptureError> {
        self.index.end_unix_ns = Some(unix_ns());
        self.index.ended = Some(ended.clone());
        self.write()?;
        let summary = TreeSummary { ended, ..self.summary };
        let why = (summary.recorded == 0).then(|| self.first_reason.unwrap_or_default());
        Ok((summary, why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::NotRecordedKind;
    use crate::tree::processes::ProcessId;

    fn add(book: &mut Book, pid: i32) -> EntryId {
        let id = ProcessId { pid, started: 7 };
        let facts = Facts { id, parent: 1, namespace_pid: pid, born_unix_ns: 5 };
        book.add(&facts, vec!["python".into()], "/usr/bin/python".into())
    }

    fn refused() -> NotRecorded {
        NotRecorded { kind: NotRecordedKind::Refused, why: "of a reason".into() }
    }

    #[test]
    fn captures_of_one_pid_have_names_of_their_own() {
        let folder = tempfile::tempdir().unwrap();
        let mut book = Book::new(folder.path().to_owned(), String::new());
        let name = |book: &mut Book, id| {
            book.name_capture(id).unwrap().file_name().unwrap().to_str().unwrap().to_owned()
        };
        let (first, other) = (add(&mut book, 7), add(&mut book, 8));
        assert_eq!(
            (name(&mut book, first), name(&mut book, other)),
            ("7.heaptap".into(), "8.heaptap".into())
        );
        let refused_one = add(&mut book, 7);
        assert_eq!(name(&mut book, refused_one), "7-2.heaptap");
        book.not_recorded(refused_one, refused());
        let second = add(&mut book, 7);
        assert_eq!(name(&mut book, second), "7-2.heaptap");
    }

    #[test]
    fn entries_of_recordings_stay_and_the_others_are_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let mut book = Book::new(folder.path().to_owned(), "x".into());
        let recorded = add(&mut book, 1);
        book.recording(recorded, 9, vec!["python".into(), "now".into()], "/usr/bin/python".into());
        let first = add(&mut book, 2);
        book.not_recorded(first, refused());
        for pid in 0..MOST_NOT_RECORDED as i32 {
            let id = add(&mut book, 10 + pid);
            book.not_recorded(id, refused());
        }
        assert!(book.entry(first).is_none() && book.entry(recorded).is_some());
        book.ended(recorded, &Ended { allocations: 3, ..Ended::default() });
        let (summary, why) = book.close("it was enough".into()).unwrap();
        assert_eq!((summary.recorded, summary.not_recorded, why), (1, MOST_NOT_RECORDED + 1, None));
        let index = Index::read(folder.path()).unwrap();
        assert_eq!((index.processes.len(), index.not_listed), (MOST_NOT_RECORDED + 1, 1));
        assert_eq!(index.processes[0].command_line, ["python", "now"]);
        assert_eq!(index.ended.as_deref(), Some("it was enough"));
    }

    #[test]
    fn where_nothing_was_recorded_the_first_reason_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let mut book = Book::new(folder.path().to_owned(), "x".into());
        let id = add(&mut book, 1);
        book.not_recorded(id, refused());
        assert_eq!(book.close(String::new()).unwrap().1.as_deref(), Some("of a reason"));
    }
}
