//! What `diff` and `leaks` cost on a capture with 100 snapshots of 50,000 stacks: writes one, runs both on it, prints time and peak
//! memory.
//!
//! `cargo build --release && cargo run --release --example snapshots_at_scale [PATH]`
//!
//! Sampled, one in ten sites changes between two snapshots, stacks have 20 frames, and every site has a line of its own.

use heaptap::capture::{
    AGES, Age, AllocatorKind, CaptureWriter, Header, SiteState, Snapshot, SnapshotHead, Totals, Trailer,
};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const SNAPSHOTS: u32 = 100;
const STACKS: u64 = 50_000;
const INTERVAL: u64 = 512 << 10;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let folder = tempfile::tempdir()?;
    let path = arguments.get(1).map_or(folder.path().join("scale.heaptap"), PathBuf::from);
    write(&path)?;
    println!("{}: {:.1} MiB", path.display(), std::fs::metadata(&path)?.len() as f64 / 1_048_576.0);
    let heaptap = std::env::current_exe()?.ancestors().nth(2).ok_or("no target folder")?.join("heaptap");
    for verb in [&["leaks"][..], &["diff", "--from", "first", "--to", "last"], &["diff", "--by", "traceback"]]
    {
        let started = Instant::now();
        let mut child = Command::new(&heaptap).args(verb).arg(&path).stdout(Stdio::null()).spawn()?;
        let mut peak_kib = 0;
        let status = loop {
            peak_kib = peak_kib.max(peak(child.id()));
            match child.try_wait()? {
                Some(status) => break status,
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        let seconds = started.elapsed().as_secs_f64();
        println!("{}: {seconds:.2} s, {} MiB peak", verb.join(" "), peak_kib / 1024);
        assert!(status.success(), "{verb:?} ended with {status}");
    }
    Ok(())
}

/// The most that was resident, in KiB; 0 once the process is gone.
fn peak(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}

fn write(path: &Path) -> Result<(), Box<dyn Error>> {
    let header = Header { sampling_mean_bytes: Some(INTERVAL), page_size: 4096, ..Header::default() };
    let mut writer = CaptureWriter::create(path, true, &header)?;
    let mut stacks = Vec::new();
    for n in 0..STACKS {
        let mut frames = Vec::new();
        for depth in 0..20 {
            // The innermost differs in each; callers are shared by more and more.
            let line = if depth == 0 { n } else { n >> depth };
            let function = format!("handler_{}", line % 5000);
            frames.push(writer.intern_frame(
                &function,
                &format!("/srv/app/module_{}.py", line % 300),
                line as u32 + 1,
            )?);
        }
        stacks.push(writer.intern_stack(&frames)?);
    }
    let one = Totals::one(4096, INTERVAL);
    let mut rows: Vec<SiteState> = stacks
        .iter()
        .map(|stack| SiteState {
            stack: *stack,
            allocator: AllocatorKind::Malloc,
            tid: 1,
            ..SiteState::default()
        })
        .collect();
    for index in 0..SNAPSHOTS {
        for (n, row) in rows.iter_mut().enumerate() {
            (row.allocated, row.freed) = (Totals::default(), Totals::default());
            if index == 0 || (n as u32 * 7 + index).is_multiple_of(10) {
                row.allocated.add(one);
                row.live.add(one);
                let class = (index as usize / 10).min(AGES - 1);
                row.ages[class] = Age { bytes: row.ages[class].bytes + one.bytes(), blocks: one.count() };
            }
        }
        let time_ns = u64::from(index + 1) * 60_000_000_000;
        let head = SnapshotHead { index, time_ns, unix_ns: time_ns, ..SnapshotHead::default() };
        writer.snapshot(&Snapshot { head, rows: rows.clone() })?;
    }
    writer.finish(Trailer { duration_ns: u64::from(SNAPSHOTS) * 60_000_000_000, ..Trailer::default() })?;
    Ok(())
}
