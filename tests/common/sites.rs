//! Snapshots in a capture, as `heaptap dump --json` tells them: what each had by function and line.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde_json::Value;

use super::heaptap::heaptap;

/// Bytes and blocks.
pub type Sum = (u64, u64);

/// One snapshot, its rows summed up by what asked.
#[derive(Debug, Default)]
pub struct Moment {
    /// Its index.
    pub index: u64,
    /// When: since the start of recording, and by the wall clock.
    pub time_ns: u64,
    pub unix_ns: u64,
    /// Why it was taken.
    pub reason: String,
    /// By innermost function and line: live, allocated, freed.
    pub sites: HashMap<(String, u64), [Sum; 3]>,
    /// Distinct threads among its rows.
    pub threads: usize,
    /// Of all sites.
    pub total: [Sum; 3],
}

/// Every snapshot of a capture, which may be one that is being written.
pub fn moments(path: &Path) -> Vec<Moment> {
    let output = heaptap().args(["dump", "--json"]).arg(path).output().expect("heaptap starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let (mut frames, mut stacks, mut found) = (HashMap::new(), HashMap::new(), Vec::new());
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        let record: Value = serde_json::from_str(line).unwrap();
        let number = |name: &str| record[name].as_u64().unwrap_or_default();
        match record["record"].as_str().unwrap() {
            "frame" => {
                let function = record["function"].as_str().unwrap_or_default().to_owned();
                frames.insert(number("id"), (function, number("line")));
            }
            "stack" => drop(stacks.insert(number("id"), number("frame"))),
            "snapshot" => {
                let mut moment = Moment {
                    index: number("index"),
                    time_ns: number("ns"),
                    unix_ns: number("unix_ns"),
                    ..Moment::default()
                };
                moment.reason = record["reason"].as_str().unwrap().into();
                let rows = record["sites"].as_array().unwrap();
                moment.threads = rows.iter().map(|row| row["tid"].as_u64()).collect::<HashSet<_>>().len();
                for row in rows {
                    let place =
                        stacks.get(&row["stack"].as_u64().unwrap()).and_then(|frame| frames.get(frame));
                    let place = place.cloned().unwrap_or_default();
                    for (at, what) in ["live", "allocated", "freed"].into_iter().enumerate() {
                        let of = |name: &str| row[what][name].as_u64().unwrap();
                        for sum in
                            [&mut moment.sites.entry(place.clone()).or_default()[at], &mut moment.total[at]]
                        {
                            *sum = (sum.0 + of("bytes"), sum.1 + of("count"));
                        }
                    }
                }
                found.push(moment);
            }
            _ => {}
        }
    }
    found
}

/// What a site had at the last of them, and all that came and went there.
pub fn over_all(moments: &[Moment], function: &str, line: u64) -> [Sum; 3] {
    let key = (function.to_owned(), line);
    let of = |moment: &Moment| moment.sites.get(&key).copied().unwrap_or_default();
    let mut sums = [moments.last().map(of).unwrap_or_default()[0], (0, 0), (0, 0)];
    for moment in moments {
        for at in [1, 2] {
            sums[at] = (sums[at].0 + of(moment)[at].0, sums[at].1 + of(moment)[at].1);
        }
    }
    sums
}
