//! `leaks` on the services of fixtures/services, recorded live: it names the right line first for every leak, and condemns no
//! innocent.
//!
//! Sampled at 512 KiB, with Python's own allocators. A service is asked for its requests in even portions, so that a few seconds
//! stand for hours. `HEAPTAP_LEAK_MIB` (32) is how much each leak leaks: with how little it works is told in docs/leaks.md.

mod common;

use common::heaptap::{Capture, report};
use common::{Python, Recording, Snapshot, Target, for_each_python};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

const LEAKS: [&str; 7] = [
    "growing_list",
    "unbounded_cache",
    "callback_registry",
    "cyclic_nodes",
    "native_blocks",
    "waiting_threads",
    "open_connections",
];
const INNOCENTS: [&str; 4] = ["bounded_cache", "batches", "import_warm_up", "fragmenting"];
/// Requests that an innocent serves.
const REQUESTS: u64 = 3000;
const PORTIONS: u64 = 60;
/// Between two portions: it paces the requests, nothing waits for it to have happened.
const PACE: Duration = Duration::from_millis(50);

/// The truth in a service's header.
struct Truth {
    verdict: String,
    function: String,
    line: Option<u64>,
    also: Vec<String>,
    leaks: u64,
}

impl Truth {
    fn read(service: &str, python: &Python) -> Truth {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fixtures/services/{service}.py"));
        let source = fs::read_to_string(path).expect("a service");
        let header = source.split("\"\"\"").nth(1).expect("a docstring");
        let fields: BTreeMap<&str, &str> = header.lines().filter_map(|line| line.split_once(": ")).collect();
        let field = |name: &str| fields.get(name).copied().unwrap_or_default();
        // Qualified names are known from 3.11 on.
        let named = |name: &str| match python.minor() {
            11.. => name.to_owned(),
            _ => name.rsplit('.').next().unwrap_or_default().to_owned(),
        };
        let tag = format!("# @{}", field("marker"));
        let at = source.lines().position(|line| line.ends_with(&tag) && !field("marker").is_empty());
        Truth {
            verdict: field("verdict").to_owned(),
            function: named(field("function")),
            line: at.map(|at| at as u64 + 1),
            also: field("also").split(", ").map(named).collect(),
            leaks: field("leaks").parse().unwrap_or(0),
        }
    }

    fn is_here(&self, site: &Value) -> bool {
        site["function"] == self.function.as_str() && site["line"].as_u64() == self.line
    }
}

fn recorded(python: &Python, service: &str, requests: u64) -> Capture {
    let mut target = Target::start(python, &format!("../services/{service}.py"));
    let before = Snapshot::take(target.pid());
    let arguments = ["--sample", "512KiB", "--seed", "4711", "--max-cpu", "100", "--python-allocators"];
    let recording = Recording::attach(&target, &arguments);
    for portion in 0..PORTIONS {
        let part = requests * (portion + 1) / PORTIONS - requests * portion / PORTIONS;
        target.send(&format!("requests {part}"));
        target.expect("served");
        std::thread::sleep(PACE);
    }
    let capture = recording.stop();
    capture.assert_code(0);
    // What the services themselves open and import.
    let own = |difference: &String| {
        difference.starts_with("new file descriptor") && difference.contains("socket:")
            || difference.starts_with("new thread")
            || difference.starts_with("new executable mapping")
                && difference.contains("/lib")
                && difference.contains(".so")
    };
    let mut found = before.differences(target.pid());
    found.retain(|difference| !own(difference));
    assert!(found.is_empty(), "{service} carries traces:\n  {}", found.join("\n  "));
    target.ping();
    capture
}

fn judged(capture: &Capture) -> Vec<Value> {
    let document: Value = serde_json::from_str(&report(&capture.path, "leaks", &["--json"])).expect("JSON");
    document.as_array().expect("a list of sites").clone()
}

fn usual(python: &Python) -> bool {
    python.name.starts_with("pyenv-")
        && ([9, 13].contains(&python.minor()) || common::soak() && python.minor() == 11)
}

fn leaked_mib() -> u64 {
    std::env::var("HEAPTAP_LEAK_MIB").map_or(32, |text| text.parse().expect("a number of MiB"))
}

fn short(sites: &[Value]) -> String {
    let line = |site: &Value| {
        format!("{} {}:{} {}", site["verdict"], site["function"], site["line"], site["evidence"])
    };
    sites.iter().take(8).map(line).collect::<Vec<_>>().join("\n  ")
}

#[test]
fn every_leak_is_named_first_and_nothing_else_is() {
    for_each_python(usual, |python| {
        for service in LEAKS {
            let truth = Truth::read(service, python);
            assert_eq!(truth.verdict, "leak");
            let sites = judged(&recorded(python, service, (leaked_mib() << 20) / truth.leaks));
            let text = short(&sites);
            assert!(
                sites[0]["verdict"] == "leak" && truth.is_here(&sites[0]),
                "{service} on {python}:\n  {text}"
            );
            let others = sites[1..].iter().filter(|site| site["verdict"] == "leak");
            for other in others {
                let function = other["function"].as_str().unwrap_or_default().to_owned();
                assert!(truth.also.contains(&function), "{service} on {python} condemns {other}:\n  {text}");
            }
        }
    });
}

#[test]
fn no_innocent_is_condemned() {
    for_each_python(usual, |python| {
        for service in INNOCENTS {
            let truth = Truth::read(service, python);
            let sites = judged(&recorded(python, service, REQUESTS));
            let text = short(&sites);
            assert!(sites.iter().all(|site| site["verdict"] != "leak"), "{service} on {python}:\n  {text}");
            if truth.line.is_some() {
                let own = sites.iter().find(|site| truth.is_here(site));
                let verdict = own.map(|site| site["verdict"].clone()).unwrap_or_default();
                assert_eq!(verdict, truth.verdict.as_str(), "{service} on {python}:\n  {text}");
            }
        }
    });
}
