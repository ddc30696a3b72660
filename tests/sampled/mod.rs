//! What `fixtures/programs/sampled_sites.py` says it did, and what a capture says of it.

pub mod figures;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::mem::offset_of;
use std::os::unix::fs::FileExt;
use std::path::Path;

use heaptap::agent_abi::{STATE_MAGIC, State};
use heaptap::analysis::{Findings, Totals, View, analyse};
use heaptap::capture::{Allocation, CaptureReader, Record, StackId, StackTable};
use serde_json::Value;

/// How the interval was while it was recorded.
#[derive(Clone, Copy)]
pub enum Mode {
    /// The same all the time.
    Fixed(u64),
    /// It changed, up to this.
    UpTo(u64),
}

/// A place of the program: its blocks, and which of them live at the end.
pub struct Place {
    pub allocator: String,
    pub sizes: Vec<u64>,
    pub live: HashMap<u64, u64>,
}

/// All places, by their function.
pub struct Truth {
    pub file: String,
    pub places: BTreeMap<String, Place>,
}

impl Truth {
    pub fn from_json(truth: &Value) -> Truth {
        let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("{value} is no number"));
        let array = |value: &Value| value.as_array().unwrap_or_else(|| panic!("{value} is no list")).clone();
        let text = |value: &Value| value.as_str().unwrap_or_else(|| panic!("{value} is no text")).to_owned();
        let place = |place: &Value| Place {
            allocator: text(&place["allocator"]),
            sizes: array(&place["sizes"]).iter().map(number).collect(),
            live: array(&place["live"]).iter().map(|pair| (number(&pair[0]), number(&pair[1]))).collect(),
        };
        let places = array(&truth["places"]).iter().map(|p| (text(&p["function"]), place(p))).collect();
        Truth { file: text(&truth["file"]), places }
    }
}

/// A capture, as far as it is about the program's places.
pub struct Run {
    /// Allocations by place, in the order of the capture, each with whether it lives at the end.
    allocations: Vec<(String, Allocation, bool)>,
    /// The analysis of the whole capture, by the code that makes the reports.
    pub leaks: BTreeMap<String, Totals>,
    pub allocated: BTreeMap<String, Totals>,
    pub drops: u64,
    missed_frees: u64,
}

impl Run {
    pub fn read(path: &Path, truth: &Truth) -> Run {
        let mut reader = CaptureReader::open(path).unwrap();
        let mut events: Vec<Allocation> = Vec::new();
        let mut live: HashMap<u64, usize> = HashMap::new();
        let mut freed = BTreeSet::new();
        for record in reader.by_ref() {
            match record.unwrap() {
                Record::Allocation(event) if !event.allocator.is_ranged() => {
                    // What was there before is gone, though nobody told: a missed free.
                    freed.extend(live.insert(event.address.0, events.len()));
                    events.push(event);
                }
                Record::Free(event) => {
                    freed.extend(live.remove(&event.address.0));
                }
                _ => {}
            }
        }
        let drops = reader.trailer().unwrap().counters.drops;
        let stacks = reader.into_stacks();
        let places = events.into_iter().enumerate().filter_map(|(index, event)| {
            place_of(&stacks, event.stack, truth).map(|place| (place, event, !freed.contains(&index)))
        });
        let findings = analyse(CaptureReader::open(path).unwrap(), View::Leaks).unwrap();
        let missed_frees = findings.missing.missed_frees;
        let mut run = Run {
            allocations: places.collect(),
            leaks: leaks(&findings, truth),
            allocated: BTreeMap::new(),
            drops,
            missed_frees,
        };
        for (place, event, _) in &run.allocations {
            run.allocated.entry(place.clone()).or_default().add(Totals::one(event.size, event.interval));
        }
        run
    }

    /// What no chance excuses: each block has a size that the place asked for, and what is told as live
    /// lives, with its size.
    pub fn assert_sound(&self, truth: &Truth) {
        assert!(self.missed_frees <= self.drops, "{} frees not seen", self.missed_frees);
        for (name, event, lives) in &self.allocations {
            let place = &truth.places[name];
            assert_eq!(event.allocator.name(), place.allocator, "{name}");
            assert!(place.sizes.contains(&event.size), "{name}: nobody asks for {} bytes", event.size);
            let really = place.live.get(&event.address.0);
            assert_eq!(lives.then_some(&event.size), really.filter(|_| *lives), "{name}: {event:?}");
        }
        // All that lives, and none of what does not: the analysis has the same rows.
        let live: BTreeSet<&str> =
            self.allocations.iter().filter(|(.., lives)| *lives).map(|(name, ..)| name.as_str()).collect();
        assert_eq!(self.leaks.keys().map(String::as_str).collect::<BTreeSet<_>>(), live);
    }

    /// Every event was recorded.
    pub fn assert_exact(&self, truth: &Truth) {
        for (name, place) in &truth.places {
            let mut sizes: Vec<u64> = self
                .allocations
                .iter()
                .filter(|(of, ..)| of == name)
                .map(|(_, event, _)| event.size)
                .collect();
            let mut expected = place.sizes.clone();
            sizes.sort_unstable();
            expected.sort_unstable();
            assert!(sizes == expected, "{name}: {} of {}", sizes.len(), expected.len());
            let lives = self.allocations.iter().filter(|(of, _, lives)| of == name && *lives).count();
            assert_eq!(lives, place.live.len(), "{name}");
        }
    }

    pub fn sizes(&self) -> Vec<(String, u64)> {
        self.allocations.iter().map(|(name, event, _)| (name.clone(), event.size)).collect()
    }

    pub fn intervals(&self) -> BTreeSet<u64> {
        self.allocations.iter().map(|(_, event, _)| event.interval).collect()
    }
}

fn leaks(findings: &Findings, truth: &Truth) -> BTreeMap<String, Totals> {
    let mut leaks: BTreeMap<String, Totals> = BTreeMap::new();
    for row in findings.sites.iter().filter(|row| !row.site.allocator.is_ranged()) {
        if let Some(place) = place_of(&findings.stacks, row.site.stack, truth) {
            leaks.entry(place).or_default().add(row.totals);
        }
    }
    leaks
}

/// The place whose function is innermost.
fn place_of(stacks: &StackTable, stack: StackId, truth: &Truth) -> Option<String> {
    let frame = stacks.frame(stacks.frames(stack).next()?);
    let ours = frame.file.ends_with(&truth.file) && truth.places.contains_key(frame.function);
    ours.then(|| frame.function.to_owned())
}

/// The agent's sampling interval in a live process.
pub struct Word {
    memory: File,
    at: u64,
}

impl Word {
    pub fn write(&self, interval: u64) {
        self.memory.write_all_at(&interval.to_le_bytes(), self.at).unwrap();
    }

    pub fn read(&self) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read_exact_at(&mut bytes, self.at).unwrap();
        u64::from_le_bytes(bytes)
    }
}

/// Finds it, by the mark of the agent's state: at the start of a page, not always of a line of the list, which shows neighbours
/// with the same rights as one.
pub fn interval_word(pid: i32) -> Word {
    let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem")).unwrap();
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let range = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
    };
    let pages = maps
        .lines()
        .filter(|line| line.contains(" rw-p "))
        .flat_map(|line| range(line).expect("a range").step_by(4096));
    let mut mark = [0; 8];
    let state = pages.filter(|page| {
        let read = memory.read_exact_at(&mut mark, page + offset_of!(State, magic) as u64);
        read.is_ok() && u64::from_le_bytes(mark) == STATE_MAGIC
    });
    let at = state.last().expect("an agent's state") + offset_of!(State, interval) as u64;
    Word { memory, at }
}
