//! What a [`CaptureWriter`] does beside writing where it takes snapshots: it keeps the file small, and goes on where it can't be
//! written.
//!
//! - Snapshots are thinned ([`thin`](super::thin), [`compact`](super::compact)) when there are too many or the file is full.
//! - Definitions and events have their share of the file ([`keeper`](super::keeper)). Without one, events are counted as dropped,
//!   and a stack that is new becomes [`NOT_KEPT`].
//! - Names of threads are written with the first snapshot that has the thread, so that a thread for every request costs nothing.
//! - Drops are told so seldom that they take no room: when there are an eighth more, and at the end.

use super::chunk;
use super::compact;
use super::error::CaptureError;
use super::format::{MAX_STRING_LEN, kind};
use super::intern::cut;
use super::keeper::{EVENTS_SHARE, Keep, Keeper, Kept, LEAST_ROWS, LOG_SHARE, SNAPSHOT_SHARE};
use super::record::{DropReason, FrameId, StackId};
use super::snapshot::Snapshot;
use super::writer::CaptureWriter;
use foldhash::fast::RandomState;
use std::collections::HashMap;

/// The function of stacks that were not written, for want of room.
pub const NOT_KEPT: &str = "<stack not kept>";

/// The longest record, with its chunk.
const MARGIN: u64 = 5 * MAX_STRING_LEN as u64;
/// How long after a failed attempt the file is not rewritten again, in nanoseconds.
const REWRITE_AGAIN_NS: u64 = 30_000_000_000;
/// Names of threads that are kept back at most.
const MOST_NAMES: usize = 1 << 14;
/// The share of the file that names of threads may have is one in so many.
const NAMES_PART: u64 = 50;

/// The state of that.
pub(super) struct Keeping {
    pub(super) keeper: Keeper,
    /// The frame and the stack [`NOT_KEPT`].
    not_kept: (FrameId, StackId),
    /// Definitions have had their share.
    log_is_full: bool,
    /// The event log ended before the recording.
    log_ended: bool,
    names: HashMap<u32, Names, RandomState>,
    names_bytes: u64,
    drops: Vec<Drops>,
    rewrite_not_before_ns: u64,
    trouble: Option<String>,
}

struct Names {
    os: String,
    python: String,
    is_written: bool,
}

struct Drops {
    reason: DropReason,
    told: u64,
    untold: u64,
}

impl Keeping {
    pub(super) fn dropped(&mut self, count: u64, reason: DropReason) {
        match self.drops.iter_mut().find(|drops| drops.reason == reason) {
            Some(drops) => drops.untold = drops.untold.saturating_add(count),
            None => self.drops.push(Drops { reason, told: 0, untold: count }),
        }
    }
}

impl CaptureWriter {
    /// Begins to take snapshots, and to keep the file so small. From now on a disk that is full is no error:
    /// [`trouble`](Self::trouble) tells of it, and what is written waits in memory, up to 16 MiB.
    pub fn keep(&mut self, keep: Keep) -> Result<(), CaptureError> {
        let frame = self.intern_frame(NOT_KEPT, "", 0)?;
        let stack = self.intern_stack(&[frame])?;
        self.output.wait_for_room();
        self.keeping = Some(Box::new(Keeping {
            keeper: Keeper::new(keep),
            not_kept: (frame, stack),
            log_is_full: false,
            log_ended: false,
            names: HashMap::default(),
            names_bytes: 0,
            drops: Vec::new(),
            rewrite_not_before_ns: 0,
            trouble: None,
        }));
        Ok(())
    }

    /// What keeps snapshots from being written, if anything does.
    pub fn trouble(&self) -> Option<&str> {
        self.keeping.as_ref().and_then(|keeping| keeping.trouble.as_deref())
    }

    /// Snapshots in the file.
    pub fn snapshots_kept(&self) -> usize {
        self.keeping.as_ref().map_or(0, |keeping| keeping.keeper.kept.len())
    }

    /// Writes a snapshot (its stacks are this writer's), after [`keep`](Self::keep). False if there is no room for it:
    /// [`trouble`](Self::trouble) says why, and what came and went by it belongs to the next.
    pub fn keep_snapshot(&mut self, mut snapshot: Snapshot) -> Result<bool, CaptureError> {
        self.time(snapshot.head.time_ns);
        if let Some(keeping) =
            self.keeping.as_mut().filter(|keeping| self.now_ns >= keeping.rewrite_not_before_ns)
        {
            keeping.trouble = None;
        }
        let live_bytes = snapshot.live().bytes();
        self.limit_rows(&mut snapshot);
        self.tell_names(&snapshot)?;
        self.tell_dropped(false)?;
        self.flush()?;
        let chunks = self.encode_within_share(&mut snapshot);
        let is_written = !self.output.is_waiting()
            && self.make_room(chunks.len() as u64, 1)
            && self.output.offer(&chunks)?;
        let Some(keeping) = &mut self.keeping else { return Ok(is_written) };
        if is_written {
            keeping.keeper.kept.push(Kept { head: snapshot.head, live_bytes, stored: chunks.len() as u64 });
        } else {
            let full = || {
                "its disk is full: recording goes on in memory, and each next snapshot is tried".to_owned()
            };
            keeping.trouble.get_or_insert_with(full);
        }
        Ok(is_written)
    }

    /// The chunks of a snapshot; its rows become fewer until it has no more than its share of the file.
    fn encode_within_share(&mut self, snapshot: &mut Snapshot) -> Vec<u8> {
        loop {
            let mut chunks = Vec::new();
            let encoded: Result<(), std::convert::Infallible> = snapshot.encode(|part| {
                chunk::seal(kind::SNAPSHOT, part, &mut chunks);
                Ok(())
            });
            let Ok(()) = encoded;
            let Some(keeping) = &mut self.keeping else { return chunks };
            let keeper = &mut keeping.keeper;
            if chunks.len() as u64 <= keeper.share(SNAPSHOT_SHARE) || snapshot.rows.len() <= LEAST_ROWS {
                return chunks;
            }
            keeper.rows = (snapshot.rows.len() / 2).min(keeper.rows).max(LEAST_ROWS);
            self.limit_rows(snapshot);
        }
    }

    fn limit_rows(&self, snapshot: &mut Snapshot) {
        if let Some(keeping) = &self.keeping {
            snapshot.limit_rows(keeping.keeper.rows, keeping.not_kept.1);
        }
    }

    /// Writes what is packed and what waits, where there must be room for snapshots too.
    pub(super) fn write_beside_snapshots(&mut self) -> Result<(), CaptureError> {
        if self.keeping.is_none() {
            return self.output.write(&mut self.packed);
        }
        self.output.hold(&mut self.packed);
        if self.make_room(self.output.waiting_bytes(), 0) { self.output.write_waiting() } else { Ok(()) }
    }

    /// Whether so many bytes that are no snapshot can be written now, rather than wait.
    pub(super) fn has_room_for(&mut self, bytes: u64) -> bool {
        self.keeping.is_none() || !self.output.is_waiting() && self.make_room(bytes, 0)
    }

    /// Rewrites the file without some of its snapshots if `extra` bytes (`snapshots` more of them) would be too much. Whether
    /// there is room now.
    fn make_room(&mut self, extra: u64, snapshots: usize) -> bool {
        let Some(keeping) = &mut self.keeping else { return true };
        let size = self.output.offset();
        if keeping.keeper.fits(size, extra, snapshots) || !is_file(self.output.file()) {
            return true;
        }
        if self.now_ns < keeping.rewrite_not_before_ns {
            return size.saturating_add(extra) <= keeping.keeper.max_bytes();
        }
        if let Some(plan) = keeping.keeper.plan(size, extra) {
            let started = std::time::Instant::now();
            let old = (self.output.file(), size, self.output.path());
            match compact::rewrite(old, (&plan, &keeping.keeper.kept, keeping.not_kept.1), self.now_ns) {
                Ok(new) => {
                    tracing::debug!("rewrote {size} bytes as {} in {:?}", new.len, started.elapsed());
                    self.output.replace(new.file, new.len);
                    (keeping.keeper.kept, keeping.keeper.rows) = (new.kept, plan.rows);
                }
                Err(error) => {
                    keeping.rewrite_not_before_ns = self.now_ns.saturating_add(REWRITE_AGAIN_NS);
                    keeping.trouble = Some(format!("it can't be made smaller: {error}"));
                }
            }
        }
        let fits = self.output.offset().saturating_add(extra) <= keeping.keeper.max_bytes();
        if !fits {
            keeping
                .trouble
                .get_or_insert_with(|| "it is as large as it may be, and no snapshot fits".to_owned());
        }
        fits
    }

    /// Whether nothing new may be defined.
    pub(super) fn is_closed_to_definitions(&mut self) -> Result<bool, CaptureError> {
        let Some(keeping) = &self.keeping else { return Ok(false) };
        if keeping.log_is_full || self.output.is_clogged() {
            return Ok(true);
        }
        let is_full = !self.has_share(LOG_SHARE)?;
        if let Some(keeping) = &mut self.keeping {
            keeping.log_is_full = is_full;
        }
        Ok(is_full)
    }

    /// Whether the event log goes on. It never begins anew: with a hole in it a replay is wrong.
    pub(super) fn may_log_events(&mut self) -> Result<bool, CaptureError> {
        let may = !self.output.is_clogged() && self.has_share(EVENTS_SHARE)?;
        if !may && let Some(keeping) = &mut self.keeping {
            (self.logs_events, keeping.log_ended) = (false, true);
        }
        Ok(may)
    }

    pub(super) fn count_unlogged(&mut self) {
        if let Some(keeping) = self.keeping.as_mut().filter(|keeping| keeping.log_ended) {
            keeping.dropped(1, DropReason::FileFull);
            self.counters.drops += 1;
        }
    }

    /// Whether definitions and events have less than so many tenths of the file.
    fn has_share(&mut self, tenths: u64) -> Result<bool, CaptureError> {
        let has = |writer: &Self, buffered: u64| {
            let keeper = writer.keeping.as_ref().map(|keeping| &keeping.keeper);
            keeper.is_none_or(|keeper| keeper.log_bytes + buffered + MARGIN < keeper.share(tenths))
        };
        if has(self, self.encoder.len() as u64) {
            return Ok(true);
        }
        // Compressed it is less.
        if has(self, 0) {
            self.flush()?;
        }
        Ok(has(self, 0))
    }

    /// A code location that has an id, or the one for those that have none.
    pub(super) fn known_frame(&self, function: &str, file: &str, line: u32) -> FrameId {
        let string = |text| self.interner.known_string(&cut(text, MAX_STRING_LEN));
        let frame =
            string(function).zip(string(file)).and_then(|(f, file)| self.interner.known_frame(f, file, line));
        frame.unwrap_or_else(|| self.frame_not_kept())
    }

    /// The frame for those that have no id; where there is none such, an id that no frame has.
    pub(super) fn frame_not_kept(&self) -> FrameId {
        self.keeping.as_ref().map_or(FrameId(u32::MAX), |keeping| keeping.not_kept.0)
    }

    /// The same for a stack.
    pub(super) fn known_node(&self, caller: StackId, frame: FrameId) -> StackId {
        let not_kept = self.keeping.as_ref().map_or(StackId::EMPTY, |keeping| keeping.not_kept.1);
        self.interner.known_node(caller, frame).unwrap_or(not_kept)
    }

    /// Whether the names of a thread wait for a snapshot that has it.
    pub(super) fn keeps_names_back(&mut self, tid: u32, os: &str, python: &str) -> bool {
        let Some(keeping) = self.keeping.as_mut().filter(|_| !self.logs_events) else { return false };
        let (os, python) = (cut(os, MAX_STRING_LEN).into_owned(), cut(python, MAX_STRING_LEN).into_owned());
        keeping.names.insert(tid, Names { os, python, is_written: false });
        true
    }

    /// Writes the names of a snapshot's threads.
    fn tell_names(&mut self, snapshot: &Snapshot) -> Result<(), CaptureError> {
        let Some(keeping) = &mut self.keeping else { return Ok(()) };
        let mut tids: Vec<u32> = snapshot.rows.iter().map(|row| row.tid).collect();
        tids.sort_unstable();
        tids.dedup();
        if keeping.names.len() > MOST_NAMES {
            keeping.names.retain(|tid, _| tids.binary_search(tid).is_ok());
        }
        let most = keeping.keeper.max_bytes() / NAMES_PART;
        let mut told = Vec::new();
        for tid in tids {
            let Some(names) = keeping.names.get_mut(&tid).filter(|names| !names.is_written) else { continue };
            if keeping.names_bytes >= most {
                break;
            }
            names.is_written = true;
            keeping.names_bytes += (names.os.len() + names.python.len() + 8) as u64;
            told.push((tid, names.os.clone(), names.python.clone()));
        }
        for (tid, os, python) in told {
            self.room()?;
            self.encoder.thread(tid, &os, &python);
        }
        Ok(())
    }

    /// Writes how much was dropped, if it is an eighth more than was told, or with `all` anything more.
    pub(super) fn tell_dropped(&mut self, all: bool) -> Result<(), CaptureError> {
        let Some(keeping) = &mut self.keeping else { return Ok(()) };
        let mut due = Vec::new();
        for drops in &mut keeping.drops {
            if drops.untold > 0 && (all || drops.untold >= drops.told / 8) {
                due.push((drops.untold, drops.reason));
                (drops.told, drops.untold) = (drops.told.saturating_add(drops.untold), 0);
            }
        }
        due.into_iter().try_for_each(|(count, reason)| self.put_dropped(count, reason))
    }
}

/// `/dev/null` takes anything.
fn is_file(file: &std::fs::File) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.is_file())
}

#[cfg(test)]
#[path = "writer_keeping_tests.rs"]
mod tests;
