//! [`rewrite`]: a capture anew beside itself, without some of its snapshots.
//!
//! What came and went by a snapshot that goes is added to the next one that stays, so that the sums of what stays are those of
//! all. Everything else is copied as it is, but for gauges, of which fewer stay the older they are. Memory: one snapshot and
//! what went between two.

use super::chunk::{self, ChunkHeader};
use super::create::create;
use super::format::{CHUNK_HEADER_LEN, PREFIX_LEN, kind};
use super::gauges::{self, Gauges};
use super::keeper::{Kept, Plan};
use super::record::StackId;
use super::snapshot::{ROWS_PER_PART, SiteState, Snapshot, part_of};
use super::snapshot_parts::{Assembler, Taken};
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Gauges of so old a moment (seconds) are kept once in so many seconds.
const GAUGE_STEPS: [(u64, u64); 3] = [(2_592_000, 3_600), (86_400, 60), (3_600, 10)];
const SECOND: u64 = 1_000_000_000;
/// Moments of gauges that are put into one chunk.
const GAUGES_PER_CHUNK: usize = 1024;

/// A file that has taken the place of another.
pub(super) struct Rewritten {
    pub(super) file: File,
    pub(super) len: u64,
    pub(super) kept: Vec<Kept>,
}

/// Writes the `len` bytes of whole chunks in `old`, which is at `path`, anew by `plan`, and gives the new file its name. `rest` is
/// the stack of what sites are summed up to. If it fails the old file is as it was.
pub(super) fn rewrite(
    (old, len, path): (&File, u64, &Path),
    (plan, kept, rest): (&Plan, &[Kept], StackId),
    now_ns: u64,
) -> io::Result<Rewritten> {
    let beside = beside(path);
    let out = create(&beside, true).map_err(io::Error::other)?;
    let rewritten = Rewrite {
        out: BufWriter::with_capacity(1 << 20, out),
        len: 0,
        plan,
        rest,
        now_ns,
        before: kept,
        kept: Vec::new(),
        assembler: Assembler::default(),
        carried: Vec::new(),
        gauges: Vec::new(),
        last_gauge: None,
        packed: Vec::new(),
    }
    .run(old, len)
    .and_then(|rewritten| {
        is_still_at(old, path)?;
        fs::rename(&beside, path)?;
        Ok(rewritten)
    });
    if rewritten.is_err() {
        let _ = fs::remove_file(&beside);
    }
    rewritten
}

fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".rewrite");
    name.into()
}

/// A file that was moved away, or over which another was put, is not to be written over.
fn is_still_at(file: &File, path: &Path) -> io::Result<()> {
    let (ours, there) = (file.metadata()?, fs::symlink_metadata(path)?);
    if (ours.dev(), ours.ino()) == (there.dev(), there.ino()) {
        Ok(())
    } else {
        Err(io::Error::other("it was moved, or another file has taken its name"))
    }
}

struct Rewrite<'a> {
    out: BufWriter<File>,
    len: u64,
    plan: &'a Plan,
    rest: StackId,
    now_ns: u64,
    /// The snapshots of the old file.
    before: &'a [Kept],
    kept: Vec<Kept>,
    assembler: Assembler,
    /// What came and went since the last snapshot that stays.
    carried: Vec<SiteState>,
    gauges: Vec<Gauges>,
    last_gauge: Option<u64>,
    packed: Vec<u8>,
}

impl Rewrite<'_> {
    fn run(mut self, old: &File, len: u64) -> io::Result<Rewritten> {
        let mut input = old.try_clone()?;
        input.seek(SeekFrom::Start(0))?;
        let mut input = BufReader::with_capacity(1 << 20, input.take(len));
        let mut prefix = [0; PREFIX_LEN];
        input.read_exact(&mut prefix)?;
        self.put(&prefix)?;
        let (mut stored, mut raw) = (Vec::new(), Vec::new());
        let mut at = PREFIX_LEN as u64;
        while at < len {
            let mut header = [0; CHUNK_HEADER_LEN];
            input.read_exact(&mut header)?;
            let chunk = ChunkHeader::parse(&header);
            if !chunk.is_plausible() {
                return Err(io::Error::other(format!("there is no chunk at byte {at}")));
            }
            stored.resize(chunk.stored_len, 0);
            input.read_exact(&mut stored)?;
            at += (CHUNK_HEADER_LEN + chunk.stored_len) as u64;
            let is_ours = matches!(chunk.kind, kind::SNAPSHOT | kind::GAUGES);
            let is_read = is_ours && chunk.matches(&stored) && chunk.unpack(&stored, &mut raw).is_ok();
            match chunk.kind {
                kind::SNAPSHOT if is_read => self.snapshot_part(&raw, &header, &stored)?,
                kind::GAUGES if is_read => self.take_gauges(&raw)?,
                _ => self.copy(&header, &stored)?,
            }
        }
        self.put_gauges()?;
        let file = self.out.into_inner().map_err(io::IntoInnerError::into_error)?;
        Ok(Rewritten { file, len: self.len, kept: self.kept })
    }

    fn snapshot_part(&mut self, raw: &[u8], header: &[u8], stored: &[u8]) -> io::Result<()> {
        let broken = |why| io::Error::other(format!("a snapshot in it can't be read: {why}"));
        let (index, parts) = part_of(raw).ok_or_else(|| broken("its head"))?;
        let is_dropped = self.plan.dropped.contains(&index);
        // At its last part `parts` times as many rows at most: what may be too many is counted.
        let may_be_too_large = parts > (self.plan.rows / ROWS_PER_PART) as u64;
        if !is_dropped && self.carried.is_empty() && !may_be_too_large {
            let start = self.len;
            self.copy(header, stored)?;
            self.keep(index, self.len - start);
            return Ok(());
        }
        let Taken::Whole(mut snapshot) = self.assembler.take(raw, u32::MAX as usize).map_err(broken)? else {
            return Ok(());
        };
        if is_dropped {
            self.carry(snapshot);
            return Ok(());
        }
        snapshot.rows.append(&mut self.carried);
        snapshot.settle();
        snapshot.limit_rows(self.plan.rows, self.rest);
        let start = self.len;
        snapshot.encode(|part| {
            chunk::seal(kind::SNAPSHOT, part, &mut self.packed);
            let packed = std::mem::take(&mut self.packed);
            self.put(&packed)?;
            self.packed = packed;
            self.packed.clear();
            io::Result::Ok(())
        })?;
        self.keep(index, self.len - start);
        Ok(())
    }

    /// Keeps what came and went by a snapshot that goes.
    fn carry(&mut self, snapshot: Snapshot) {
        let flows =
            snapshot.rows.into_iter().filter(|row| !row.allocated.is_empty() || !row.freed.is_empty());
        let flows = flows.map(|row| SiteState {
            stack: row.stack,
            allocator: row.allocator,
            tid: row.tid,
            allocated: row.allocated,
            freed: row.freed,
            ..SiteState::default()
        });
        let rows = std::mem::take(&mut self.carried).into_iter().chain(flows).collect();
        let mut sum = Snapshot { rows, ..Snapshot::default() };
        sum.settle();
        self.carried = sum.rows;
    }

    fn keep(&mut self, index: u32, bytes: u64) {
        match self.kept.last_mut().filter(|kept| kept.head.index == index) {
            Some(kept) => kept.stored += bytes,
            None => {
                let before = self.before.iter().find(|kept| kept.head.index == index);
                self.kept.extend(before.map(|kept| Kept { stored: bytes, ..*kept }));
            }
        }
    }

    fn take_gauges(&mut self, raw: &[u8]) -> io::Result<()> {
        for moment in gauges::decode(raw).map_err(io::Error::other)? {
            let age = self.now_ns.saturating_sub(moment.time_ns) / SECOND;
            let step = GAUGE_STEPS.iter().find(|(older, _)| age > *older).map_or(0, |(_, step)| *step);
            let is_due = |last: u64| step == 0 || moment.time_ns / SECOND / step != last / SECOND / step;
            if self.last_gauge.is_none_or(is_due) {
                self.last_gauge = Some(moment.time_ns);
                self.gauges.push(moment);
            }
        }
        if self.gauges.len() >= GAUGES_PER_CHUNK { self.put_gauges() } else { Ok(()) }
    }

    fn put_gauges(&mut self) -> io::Result<()> {
        for some in std::mem::take(&mut self.gauges).chunks(GAUGES_PER_CHUNK) {
            let mut packed = Vec::new();
            chunk::seal(kind::GAUGES, &gauges::encode(some), &mut packed);
            self.put(&packed)?;
        }
        Ok(())
    }

    fn copy(&mut self, header: &[u8], stored: &[u8]) -> io::Result<()> {
        self.put(header)?;
        self.put(stored)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.len += bytes.len() as u64;
        self.out.write_all(bytes)
    }
}
