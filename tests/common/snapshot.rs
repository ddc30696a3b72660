//! What a process looks like from outside, and whether a visitor left anything behind in it.
//!
//! Read from /proc alone. Deliberately independent of the library's own reading of the same files.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::Target;
use super::pointers::{self, Pointers};

/// One line of /proc/PID/maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// Address behind the last.
    pub end: u64,
    /// As in `r-xp`.
    pub permissions: String,
    offset: u64,
    /// 0 for anonymous memory.
    pub inode: u64,
    path: String,
}

impl Mapping {
    /// True for code.
    pub fn is_executable(&self) -> bool {
        self.permissions.as_bytes().get(2) == Some(&b'x')
    }

    /// Name of the file it shows.
    pub fn file_name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or_default()
    }

    /// True for memory that shows a file.
    pub fn is_file(&self) -> bool {
        self.inode != 0 && self.path.starts_with('/')
    }
}

/// Fields of /proc/PID/task/TID/status that a tracer can change.
type ThreadState = BTreeMap<String, String>;

/// A process as it was at one moment.
#[derive(Debug)]
pub struct Snapshot {
    mappings: Vec<Mapping>,
    changed_text: Vec<String>,
    pointers: Pointers,
    not_inherited: Vec<String>,
    descriptors: BTreeMap<String, String>,
    threads: BTreeMap<i32, ThreadState>,
    stopped: bool,
    compiles: bool,
}

/// Signal numbers a fixture may use itself are part of its state: compared, not excluded.
const THREAD_FIELDS: &[&str] = &["TracerPid", "SigBlk", "SigIgn", "SigCgt", "Seccomp", "NoNewPrivs"];

impl Snapshot {
    /// Looks at a live process. The process should not be starting threads or opening files just then.
    pub fn take(pid: i32) -> Snapshot {
        let mappings = mappings(pid);
        let changed_text = changed_text(pid, &mappings);
        let threads = threads(pid);
        let state = status_field(&read_text(&format!("/proc/{pid}/status")), "State");
        Snapshot {
            pointers: pointers::pointers(pid, &mappings),
            not_inherited: pointers::not_inherited(pid),
            mappings,
            changed_text,
            descriptors: descriptors(pid),
            threads,
            stopped: state.starts_with('T'),
            compiles: has_jit(pid),
        }
    }

    /// Without the look for words that point elsewhere than before: for a program that copies the tables it finds.
    pub fn without_pointers(self) -> Snapshot {
        Snapshot { pointers: Pointers::new(), ..self }
    }

    /// Where executable memory was not what its file holds; for a process there is no earlier look at.
    pub fn changed_text(&self) -> &[String] {
        &self.changed_text
    }

    /// Mappings that could be written and executed.
    pub fn writable_code(&self) -> Vec<String> {
        let both = |m: &&Mapping| m.is_executable() && m.permissions.as_bytes().get(1) == Some(&b'w');
        self.mappings.iter().filter(both).map(|m| format!("{:x}-{:x} {}", m.start, m.end, m.path)).collect()
    }

    /// True when no thread had a tracer.
    pub fn is_untraced(&self) -> bool {
        self.threads.values().all(|thread| thread["TracerPid"] == "0")
    }

    /// Everything that differs now and that a visitor may have done. Empty means: no trace.
    pub fn differences(&self, pid: i32) -> Vec<String> {
        let now = self.take_when_settled(pid);
        let mut found = Vec::new();
        for change in now.changed_text.iter().filter(|change| !self.changed_text.contains(change)) {
            found.push(format!("text differs from its file: {change}"));
        }
        self.compare_mappings(&now, pid, &mut found);
        found.extend(pointers::led_astray(pid, &self.pointers, &now.mappings));
        for range in now.not_inherited.iter().filter(|range| !self.not_inherited.contains(range)) {
            found.push(format!("new memory that children do not get: {range}"));
        }
        for (number, name) in &now.descriptors {
            match self.descriptors.get(number) {
                None => found.push(format!("new file descriptor {number} -> {name}")),
                Some(old) if old != name => {
                    found.push(format!("file descriptor {number} was {old}, is {name}"))
                }
                Some(_) => {}
            }
        }
        for (number, name) in
            self.descriptors.iter().filter(|(number, _)| !now.descriptors.contains_key(*number))
        {
            found.push(format!("file descriptor {number} -> {name} was closed"));
        }
        self.compare_threads(&now, &mut found);
        if self.stopped != now.stopped {
            found.push(format!("was stopped: {}, is stopped: {}", self.stopped, now.stopped));
        }
        found
    }

    /// A thread of the program's own may still be on its way out; one that a visitor left would stay.
    fn take_when_settled(&self, pid: i32) -> Snapshot {
        let started = Instant::now();
        loop {
            let now = Snapshot::take(pid);
            if now.threads.len() <= self.threads.len() || started.elapsed() > Duration::from_secs(2) {
                return now;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn compare_mappings(&self, now: &Snapshot, pid: i32, found: &mut Vec<String>) {
        let memory = fs::File::open(format!("/proc/{pid}/mem")).ok();
        for mapping in &now.mappings {
            let known = self.mappings.contains(mapping);
            let Mapping { start, end, permissions, path, .. } = mapping;
            let text = format!("{start:x}-{end:x} {permissions} {path}");
            // Python may load an extension module of its own during the work.
            let own_module = mapping.is_file() && path.contains("lib-dynload/");
            // A trace that it compiles takes some pages; of what a visitor has, only the region with its magic is that small.
            let own_trace = self.compiles && mapping.inode == 0 && end - start < 32 << 10;
            if !known && mapping.is_executable() && !own_module && !own_trace {
                found.push(format!("new executable mapping {text}"));
            } else if !known && (path.contains("memfd:") || mapping.file_name().contains("heaptap")) {
                found.push(format!("new mapping {text}"));
            } else if !known && !mapping.is_file() {
                let mut head = [0_u8; 16];
                let read = memory.as_ref().map(|memory| memory.read_at(&mut head, *start));
                if matches!(read, Some(Ok(_))) && head.to_ascii_lowercase().starts_with(b"heaptap") {
                    found.push(format!("new mapping with our magic {text}"));
                }
            }
        }
        for mapping in self.mappings.iter().filter(|mapping| mapping.is_file() || mapping.is_executable()) {
            // The heap and anonymous memory are the program's to give back; files and code are not a visitor's.
            let own_trace = self.compiles && mapping.inode == 0;
            if mapping.is_executable() && !own_trace && !now.mappings.contains(mapping) {
                found.push(format!(
                    "gone: {:x}-{:x} {} {}",
                    mapping.start, mapping.end, mapping.permissions, mapping.path
                ));
            }
        }
    }

    fn compare_threads(&self, now: &Snapshot, found: &mut Vec<String>) {
        for (tid, state) in &now.threads {
            if state["TracerPid"] != "0" {
                found.push(format!("thread {tid} is traced by {}", state["TracerPid"]));
            }
            if state["State"].starts_with('t') {
                found.push(format!("thread {tid} is in a tracing stop"));
            }
            let Some(before) = self.threads.get(tid) else {
                // A thread of ours would have been made while no thread of the program's own came or went.
                if now.threads.len() > self.threads.len() {
                    found.push(format!("new thread {tid} ({})", state["Name"]));
                }
                continue;
            };
            // What a thread that has exited blocks is nobody's business (a leader that went first stays listed).
            if state["State"].starts_with('Z') {
                continue;
            }
            for field in THREAD_FIELDS.iter().filter(|field| before.get(**field) != state.get(**field)) {
                found.push(format!(
                    "thread {tid}: {field} was {:?}, is {:?}",
                    before.get(*field),
                    state.get(*field)
                ));
            }
        }
    }
}

/// Panics with all differences unless the process looks as it did, is free, and (when not stopped) still computes.
pub fn assert_left_no_trace(before: &Snapshot, target: &mut Target) {
    target.assert_alive();
    let mut found = before.differences(target.pid());
    if !found.is_empty() && !before.stopped {
        // Whatever a visitor left stays. A number that looked like an address of code, of an executable that lies low, and is
        // counted up goes on.
        target.ping();
        let still = before.differences(target.pid());
        found.retain(|difference| still.contains(difference));
    }
    assert!(found.is_empty(), "pid {} carries traces:\n  {}", target.pid(), found.join("\n  "));
    if !before.stopped {
        target.ping();
    }
}

/// Whether CPython was told to compile what runs often.
fn has_jit(pid: i32) -> bool {
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment.split(|byte| *byte == 0).any(|variable| variable == b"PYTHON_JIT=1")
}

fn read_text(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn status_field(status: &str, name: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().trim().to_owned()
}

fn mappings(pid: i32) -> Vec<Mapping> {
    let parse = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let permissions = words.next()?.to_owned();
        let offset = u64::from_str_radix(words.next()?, 16).ok()?;
        let inode = words.nth(1)?.parse().ok()?;
        let path = line.splitn(6, ' ').nth(5).unwrap_or_default().trim_start().to_owned();
        let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
        Some(Mapping { start, end, permissions, offset, inode, path })
    };
    let text = read_text(&format!("/proc/{pid}/maps"));
    text.lines().map(|line| parse(line).unwrap_or_else(|| panic!("not a mapping: {line:?}"))).collect()
}

/// Where the bytes of executable file mappings are not those of the file, as one line per run of bytes.
fn changed_text(pid: i32, mappings: &[Mapping]) -> Vec<String> {
    let memory = fs::File::open(format!("/proc/{pid}/mem")).expect("/proc/PID/mem of an own child");
    let mut found = Vec::new();
    for mapping in mappings.iter().filter(|mapping| mapping.is_file() && mapping.is_executable()) {
        let length = usize::try_from(mapping.end - mapping.start).expect("fits");
        let (mut held, mut real) = (vec![0_u8; length], vec![0_u8; length]);
        memory
            .read_exact_at(&mut held, mapping.start)
            .unwrap_or_else(|error| panic!("{mapping:x?}: {error}"));
        let file = open_mapped(pid, mapping);
        let mut filled = 0;
        while filled < length {
            match file.read_at(&mut real[filled..], mapping.offset + filled as u64).expect("the mapped file")
            {
                0 => break, // behind the end of the file the last page holds zeros, as `real` does
                count => filled += count,
            }
        }
        let mut at = 0;
        while let Some(first) = (at..length).find(|&i| held[i] != real[i]) {
            let last = (first..length).find(|&i| held[i] == real[i]).unwrap_or(length);
            let (is, was) = (&held[first..last.min(first + 16)], &real[first..last.min(first + 16)]);
            found.push(format!(
                "{} +{:#x}: {is:02x?}, file {was:02x?}",
                mapping.path,
                mapping.offset + first as u64
            ));
            at = last;
        }
    }
    found
}

/// The mapped file itself: by the kernel's link where allowed, else by path as the process sees it, else as we do.
fn open_mapped(pid: i32, mapping: &Mapping) -> fs::File {
    let Mapping { start, end, path, .. } = mapping;
    let ways =
        [format!("/proc/{pid}/map_files/{start:x}-{end:x}"), format!("/proc/{pid}/root{path}"), path.clone()];
    let opened = ways.iter().map(PathBuf::from).find_map(|way| fs::File::open(way).ok());
    opened.unwrap_or_else(|| panic!("cannot open the file mapped as {path} in {pid}"))
}

fn descriptors(pid: i32) -> BTreeMap<String, String> {
    let folder = fs::read_dir(format!("/proc/{pid}/fd")).expect("/proc/PID/fd of an own child");
    let named = folder.flatten().filter_map(|entry| {
        let target = fs::read_link(entry.path()).ok()?;
        Some((entry.file_name().to_string_lossy().into_owned(), target.to_string_lossy().into_owned()))
    });
    named.collect()
}

fn threads(pid: i32) -> BTreeMap<i32, ThreadState> {
    let folder = fs::read_dir(format!("/proc/{pid}/task")).expect("/proc/PID/task of an own child");
    let mut found = BTreeMap::new();
    for tid in folder.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()) {
        let Ok(status) = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")) else { continue };
        let fields = THREAD_FIELDS.iter().chain(&["State", "Name"]);
        found.insert(tid, fields.map(|field| ((*field).to_owned(), status_field(&status, field))).collect());
    }
    found
}
