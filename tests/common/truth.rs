//! Holds a recording against what the fixture says it did. Every difference is reported, not only the first.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::dump::{Allocation, Dump};

/// One group of equal records a fixture claims.
#[derive(Clone, Debug, Deserialize)]
pub struct Claim {
    function: String,
    line: u32,
    allocator: String,
    size: u64,
    count: usize,
    freed: usize,
    stack: Option<Vec<String>>,
}

/// Records that must have an empty stack.
#[derive(Clone, Debug, Deserialize)]
struct Native {
    size: u64,
    count: usize,
    allocator: String,
}

#[derive(Clone, Debug, Deserialize)]
struct AtPeak {
    function: String,
    size: u64,
    count: usize,
}

/// What a fixture program says after its work (see `fixtures/programs/driver.py`).
#[derive(Clone, Debug, Deserialize)]
pub struct Truth {
    file: String,
    floor: u64,
    functions: Vec<String>,
    records: Vec<Claim>,
    #[serde(default)]
    silent_functions: Vec<String>,
    #[serde(default)]
    unknown_frees: Vec<u64>,
    #[serde(default)]
    leaked_bytes: BTreeMap<String, u64>,
    #[serde(default)]
    high_water: Vec<AtPeak>,
    #[serde(default)]
    exact_sizes: bool,
    native: Option<Native>,
    /// The flavour the figures hold for, when not for all.
    pub only_flavour: Option<String>,
}

/// A group of records: allocator class, function, line, size.
type Key = (String, String, u32, u64);

/// What CPython takes whenever it needs it: a mapping of 256 KiB or 1 MiB, a 16 KiB (or doubled) frame stack chunk, and in free-threaded
/// builds, whose own allocators are always recorded, a thread's tables of reference counts (`resize_local_refcounts`) and of
/// delayed frees (`struct _mem_work_chunk`).
fn is_arena(allocation: &Allocation) -> bool {
    allocation.allocator == "mmap" && matches!(allocation.size, 0x4_0000 | 0x10_0000)
        || allocation.allocator == "mmap" && allocation.size.is_power_of_two() && allocation.size >= 0x4000
        || allocation.allocator.starts_with("mem_")
            && allocation.size.is_power_of_two()
            && allocation.size >= 0x1000
}

/// memalign and aligned_alloc are the same code in glibc before 2.38, so a breakpoint cannot tell them apart.
fn class<'a>(allocator: &'a str, claimed: &str) -> &'a str {
    match (claimed, allocator) {
        ("any", _) => "any",
        ("python", name) if name.contains("object") || name.contains("mem_") || name.contains("raw") => {
            "python"
        }
        (_, "aligned_alloc" | "memalign") => "memalign",
        (_, name) => name,
    }
}

impl Truth {
    /// From the fixture's "done" line.
    pub fn from_json(truth: serde_json::Value) -> Truth {
        serde_json::from_value(truth.clone()).unwrap_or_else(|error| panic!("not a truth: {error}: {truth}"))
    }

    /// Everything in which the recording differs from this truth.
    pub fn differences(&self, dump: &Dump) -> Vec<String> {
        let mut found = Vec::new();
        self.compare_groups(dump, &mut found);
        self.compare_stacks(dump, &mut found);
        self.compare_silence(dump, &mut found);
        self.compare_leaks(dump, &mut found);
        self.compare_peak(dump, &mut found);
        for address in self.unknown_frees.iter().filter(|address| !dump.unknown_frees.contains(address)) {
            found.push(format!("the free of {address:#x}, from before the attach, is not recorded as such"));
        }
        if let Some(Native { size, count, allocator }) = &self.native {
            let same = |a: &&Allocation| a.size == *size && a.allocator == *allocator;
            let recorded: Vec<&Allocation> = dump.allocations.iter().filter(same).collect();
            let stackless = recorded.iter().filter(|allocation| allocation.stack.is_empty()).count();
            if (recorded.len(), stackless) != (*count, *count) {
                found.push(format!(
                    "native threads: {count} records of {size} bytes without stack expected, {} found, {stackless} without stack",
                    recorded.len()
                ));
            }
        }
        found
    }

    /// Panics unless every claim is within 5 standard deviations (or of what can be missed by as little a chance) of what the samples of its line and size stand for, what was freed
    /// is, and no samples are of anything else that the fixture would have claimed. `drops` events that the recording told as
    /// dropped (heaptap did not come to run on a busy machine) may be missing: frees, or allocations with what they stand for.
    pub fn assert_estimated(&self, dump: &Dump, drops: usize) {
        let mut found = Vec::new();
        let mut samples: BTreeMap<Key, Vec<&Allocation>> = BTreeMap::new();
        for allocation in &dump.allocations {
            if let Some(key) = self.key(allocation) {
                samples.entry(key).or_default().push(allocation);
            }
        }
        for claim in &self.records {
            let class = class(&claim.allocator, &claim.allocator).to_owned();
            let own =
                samples.remove(&(class, claim.function.clone(), claim.line, claim.size)).unwrap_or_default();
            // The mmap family is recorded whole.
            let p = |a: &Allocation| {
                if a.interval == 0 { 1.0 } else { -(-(a.size as f64) / a.interval as f64).exp_m1() }
            };
            let estimate: f64 = own.iter().map(|a| 1.0 / p(a)).sum();
            // By the first interval, or by all of them: `--max-cpu` may have raised it.
            let first: f64 = own.first().map_or(0.0, |a| claim.count as f64 * (1.0 - p(a)) / p(a));
            let variance = own.iter().map(|a| (1.0 - p(a)) / p(a).powi(2)).sum::<f64>().max(first);
            let dropped = drops as f64 * own.iter().map(|a| 1.0 / p(a)).fold(0.0, f64::max);
            // Few that nearly all are sampled are not spread as many are: those that are missed come one by one.
            let missed = own.first().map_or(0.0, |a| most_missed(claim.count as f64 * (1.0 - p(a))) / p(a));
            let (off, bound) = (estimate - claim.count as f64, (5.0 * variance.sqrt()).max(missed) + 1e-6);
            if own.is_empty() && drops == 0 || off > bound || !own.is_empty() && -off > bound + dropped {
                found.push(format!(
                    "{} line {}, {} of {} bytes: {} samples stand for {estimate:.0} (standard deviation {:.0}, {drops} drops)",
                    claim.function, claim.line, claim.count, claim.size, own.len(), variance.sqrt()
                ));
            }
            let live = own.iter().filter(|a| !a.is_freed()).count();
            if claim.freed == claim.count && live > drops || claim.freed == 0 && live < own.len() {
                found.push(format!(
                    "{} line {}: {live} of {} samples are live",
                    claim.function,
                    claim.line,
                    own.len()
                ));
            }
        }
        found.extend(
            samples
                .into_iter()
                .map(|(key, own)| format!("{key:?}: not in the fixture, {} samples", own.len())),
        );
        self.compare_silence(dump, &mut found);
        assert!(
            found.is_empty(),
            "{}: the samples are not of the truth:\n  {}",
            self.file,
            found.join("\n  ")
        );
    }

    /// Panics with all differences.
    pub fn assert_matches(&self, dump: &Dump) {
        let found = self.differences(dump);
        assert!(found.is_empty(), "{}: the recording is not the truth:\n  {}", self.file, found.join("\n  "));
    }

    fn claimed_class(&self, function: &str, size: u64) -> &str {
        let same = |claim: &&Claim| claim.function == function && claim.size == size;
        self.records.iter().find(same).map_or("", |claim| claim.allocator.as_str())
    }

    /// The group a record belongs to, if it is one the fixture speaks of.
    fn key(&self, allocation: &Allocation) -> Option<Key> {
        let frame = allocation.stack.first()?;
        if frame.base() != self.file || !self.functions.contains(&frame.function) {
            return None;
        }
        let claimed = self.claimed_class(&frame.function, allocation.size);
        let ours = !claimed.is_empty();
        if !ours && (self.exact_sizes || allocation.size < self.floor || is_arena(allocation)) {
            return None;
        }
        let class = class(&allocation.allocator, claimed).to_owned();
        Some((class, frame.function.clone(), frame.line, allocation.size))
    }

    fn compare_groups(&self, dump: &Dump, found: &mut Vec<String>) {
        let mut expected: BTreeMap<Key, (usize, usize)> = BTreeMap::new();
        for claim in &self.records {
            let class = class(&claim.allocator, &claim.allocator).to_owned();
            let sums = expected.entry((class, claim.function.clone(), claim.line, claim.size)).or_default();
            *sums = (sums.0 + claim.count, sums.1 + claim.freed);
        }
        let mut recorded: BTreeMap<Key, (usize, usize)> = BTreeMap::new();
        for allocation in &dump.allocations {
            if let Some(key) = self.key(allocation) {
                let sums = recorded.entry(key).or_default();
                *sums = (sums.0 + 1, sums.1 + usize::from(allocation.is_freed()));
            }
        }
        for (key, sums) in &expected {
            let got = recorded.get(key).copied().unwrap_or_default();
            if got != *sums {
                found.push(format!("{key:?}: (count, freed) expected {sums:?}, recorded {got:?}"));
            }
        }
        for (key, sums) in recorded.iter().filter(|(key, _)| !expected.contains_key(*key)) {
            found.push(format!("{key:?}: not in the fixture, recorded {sums:?} times (count, freed)"));
        }
    }

    /// The names of the stack's frames that lie in the fixture's file.
    fn own_frames(&self, allocation: &Allocation) -> Vec<String> {
        allocation
            .stack
            .iter()
            .filter(|frame| frame.base() == self.file)
            .map(|frame| frame.function.clone())
            .collect()
    }

    fn compare_stacks(&self, dump: &Dump, found: &mut Vec<String>) {
        for claim in &self.records {
            let Some(stack) = &claim.stack else { continue };
            let of_claim = dump.allocations.iter().filter(|allocation| {
                allocation.size == claim.size
                    && allocation
                        .stack
                        .first()
                        .is_some_and(|frame| frame.line == claim.line && frame.base() == self.file)
            });
            let stacks: Vec<Vec<String>> = of_claim.map(|allocation| self.own_frames(allocation)).collect();
            let right = stacks.iter().filter(|recorded| *recorded == stack).count();
            if right != claim.count {
                let example = stacks.iter().find(|recorded| *recorded != stack);
                found.push(format!(
                    "{} line {}: {right} of {} stacks are {stack:?}; one other: {example:?}",
                    claim.function, claim.line, claim.count
                ));
            }
        }
    }

    fn compare_silence(&self, dump: &Dump, found: &mut Vec<String>) {
        for allocation in dump.allocations.iter().filter(|a| a.size >= self.floor && !is_arena(a)) {
            let Some(frame) = allocation.stack.first() else { continue };
            if frame.base() == self.file && self.silent_functions.contains(&frame.function) {
                let Allocation { allocator, size, .. } = allocation;
                found.push(format!(
                    "{} line {}: {allocator} of {size} must not be recorded",
                    frame.function, frame.line
                ));
            }
        }
    }

    fn compare_leaks(&self, dump: &Dump, found: &mut Vec<String>) {
        for (function, expected) in &self.leaked_bytes {
            let own = dump.allocations.iter().filter(|a| self.key(a).is_some_and(|key| key.1 == *function));
            let live: u64 = own.map(|allocation| allocation.live).sum();
            if live != *expected {
                found.push(format!("{function}: {expected} bytes are live at the end, recorded {live}"));
            }
        }
    }

    fn compare_peak(&self, dump: &Dump, found: &mut Vec<String>) {
        if self.high_water.is_empty() {
            return;
        }
        let mut recorded: BTreeMap<(String, u64), usize> = BTreeMap::new();
        for allocation in dump.high_water.iter().map(|&index| &dump.allocations[index]) {
            if let Some(key) = self.key(allocation) {
                *recorded.entry((key.1, key.3)).or_default() += 1;
            }
        }
        let expected: BTreeMap<(String, u64), usize> =
            self.high_water.iter().map(|peak| ((peak.function.clone(), peak.size), peak.count)).collect();
        if recorded != expected {
            found.push(format!("live at the high-water mark: expected {expected:?}, recorded {recorded:?}"));
        }
    }
}

/// More than so many are missed, of which `expected` are on average, once in three million times (Poisson). 0 where there are enough for
/// the standard deviation to tell.
fn most_missed(expected: f64) -> f64 {
    let (mut term, mut below, mut missed) = ((-expected).exp(), 0.0, 0.0);
    while expected < 30.0 && missed < 100.0 {
        below += term;
        if 1.0 - below < 3e-7 {
            return missed;
        }
        missed += 1.0;
        term *= expected / missed;
    }
    0.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A truth of one site: two blocks of 1013 bytes, one freed.
    fn truth() -> Truth {
        Truth::from_json(serde_json::json!({
            "file": "p.py", "floor": 1000, "functions": ["f"], "silent_functions": ["g"], "unknown_frees": [77],
            "records": [{"function": "f", "line": 3, "allocator": "malloc", "size": 1013, "count": 2, "freed": 1,
                         "stack": ["f", "work"]}],
        }))
    }

    fn allocation(function: &str, line: u32, size: u64, address: u64) -> String {
        // Ids that no other allocation's definitions have.
        let (id, work) = (address * 2 + 1, address * 2 + 2);
        let frame = |id: u64, function: &str, line: u32| {
            serde_json::json!({"record": "frame", "id": id, "function": function,
                                                                            "file": "/x/p.py", "line": line})
        };
        let stack = |id: u64, caller: u64| serde_json::json!({"record": "stack", "id": id, "frame": id, "caller": caller});
        let event = serde_json::json!({"record": "allocation", "allocator": "malloc", "bytes": size, "address": address,
                                       "tid": 1, "stack": id});
        let lines =
            [frame(work, "work", 9), stack(work, 0), frame(id, function, line), stack(id, work), event];
        lines.map(|line| line.to_string()).join("\n")
    }

    fn free(address: u64) -> String {
        // The one from before the attach is told as such.
        let record = if address == 77 { "free_from_before" } else { "free" };
        serde_json::json!({"record": record, "deallocator": "free", "address": address, "tid": 1}).to_string()
    }

    fn right() -> Vec<String> {
        vec![
            allocation("f", 3, 1013, 16),
            allocation("f", 3, 1013, 32),
            free(16),
            free(77),
            allocation("f", 3, 100, 64),
        ]
    }

    fn differences(lines: &[String]) -> Vec<String> {
        truth().differences(&Dump::parse(&lines.join("\n")))
    }

    #[test]
    fn a_right_recording_has_no_differences() {
        assert_eq!(differences(&right()), Vec::<String>::new());
    }

    #[test]
    fn every_kind_of_mistake_is_seen() {
        let mut missing = right();
        missing.remove(1);
        assert!(differences(&missing)[0].contains("expected (2, 1), recorded (1, 1)"));
        let mut not_freed = right();
        not_freed.remove(2);
        assert!(differences(&not_freed)[0].contains("recorded (2, 0)"));
        let mut wrong_line = right();
        wrong_line[1] = allocation("f", 4, 1013, 32);
        assert_eq!(differences(&wrong_line).len(), 3);
        let mut phantom = right();
        phantom.push(allocation("f", 3, 2000, 128));
        assert!(differences(&phantom)[0].contains("not in the fixture"));
        let mut known = right();
        known.remove(3);
        assert!(differences(&known)[0].contains("before the attach"));
        let mut loud = right();
        loud.push(allocation("g", 3, 2000, 128));
        assert!(differences(&loud)[0].contains("must not be recorded"));
    }

    #[test]
    fn a_partly_unmapped_range_stays_live_in_part() {
        let map = serde_json::json!({"record": "allocation", "allocator": "mmap", "bytes": 0x5000, "address": 0x1000,
                                     "tid": 1, "stack": 0});
        let unmap = serde_json::json!({"record": "unmap", "address": 0x2000, "bytes": 0x1000, "tid": 1});
        let dump = Dump::parse(&format!("{map}\n{unmap}\n"));
        assert_eq!(dump.allocations[0].live, 0x4000);
    }
}
