//! The header of a capture: everything about the run that a report, made elsewhere and years later, may want.

use super::examine::Examined;
use super::ledger::kind;
use super::record::RecordOptions;
use crate::capture::{self, BreakpointKind, Header, LibcFacts, PythonFacts};
use crate::image::libc::LibcKind;
use crate::inferior::maps;
use std::time::{SystemTime, UNIX_EPOCH};

/// The target's page size in bytes: x86_64 has one.
pub const PAGE_SIZE: u64 = 4096;

/// Nanoseconds since 1970.
pub fn unix_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

/// The facts of a recording that begins now.
pub fn header(examined: &Examined, options: &RecordOptions) -> Header {
    let (jump, snapshots) = (options.jump.as_ref(), options.snapshots.as_ref());
    let sampled = jump.filter(|j| !j.exact);
    let pid = examined.pid;
    let kernel = nix::sys::utsname::uname().ok();
    let text = |s: Option<&std::ffi::OsStr>| s.map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    Header {
        heaptap_version: env!("CARGO_PKG_VERSION").into(),
        pid: pid as u32,
        command_line: command_line(pid),
        executable: executable(pid),
        start_unix_ns: unix_ns(),
        hostname: text(kernel.as_ref().map(|k| k.nodename())),
        kernel: text(kernel.as_ref().map(|k| k.release())),
        architecture: "x86_64".into(),
        page_size: PAGE_SIZE,
        python: python_facts(examined),
        libc: LibcFacts {
            name: match examined.libc.as_ref().map(|l| l.kind) {
                Some(LibcKind::Glibc) => "glibc".into(),
                Some(LibcKind::Musl) => "musl".into(),
                None => String::new(),
            },
            version: examined.libc.as_ref().and_then(|l| l.version.clone()).unwrap_or_default(),
        },
        allocator_library: examined.allocator_library(),
        layout_source: examined.python.layout_source.clone(),
        breakpoints: if jump.is_some() { BreakpointKind::Jump } else { BreakpointKind::Trap },
        python_allocators: !examined.plan.words.is_empty(),
        sampling_mean_bytes: sampled.map(|j| j.sample),
        sampling_seed: sampled.map(|j| j.seed),
        max_cpu_percent: sampled.and_then(|j| j.max_cpu),
        aggregated: snapshots.is_some_and(|s| !s.events),
        native: options.native,
        snapshot_every_ns: snapshots.and_then(|s| s.every).map(|every| every.as_nanos() as u64),
        entry_points: entry_points(examined),
        modules: examined.modules.iter().map(module).collect(),
    }
}

fn python_facts(examined: &Examined) -> PythonFacts {
    let python = &examined.python;
    let learnt: Vec<_> =
        python.evidence.iter().map(|e| format!("{}: {} ({})", e.fact, e.value, e.source)).collect();
    PythonFacts {
        version: python.version.to_string(),
        flavour: python.flavour.to_string(),
        learnt_from: learnt.join("; "),
    }
}

fn entry_points(examined: &Examined) -> Vec<capture::EntryPoint> {
    let functions = examined.plan.entries.iter().map(|e| capture::EntryPoint {
        name: e.names.join(", "),
        module: e.module.clone(),
        address: e.address.0,
        allocator: kind(e.function).name().into(),
    });
    let words = examined.plan.words.iter().map(|w| capture::EntryPoint {
        name: w.function().name().into(),
        module: examined.python.binary.clone(),
        address: w.word.0,
        allocator: kind(w.function()).name().into(),
    });
    functions.chain(words).collect()
}

fn module(module: &crate::image::Module) -> capture::Module {
    capture::Module {
        path: module.path().display().to_string(),
        build_id: module.build_id(),
        ranges: module.ranges().iter().map(|r| (r.start.0, r.end.0)).collect(),
    }
}

/// The arguments of a process.
pub fn command_line(pid: i32) -> Vec<String> {
    let bytes = std::fs::read(format!("/proc/{}/cmdline", maps::memory_holder(pid))).unwrap_or_default();
    let mut arguments: Vec<String> =
        bytes.split(|b| *b == 0).map(|a| String::from_utf8_lossy(a).into_owned()).collect();
    // Every argument ends in a NUL.
    arguments.pop();
    arguments
}

/// The executable of a process, as the kernel names it.
pub fn executable(pid: i32) -> String {
    std::fs::read_link(format!("/proc/{}/exe", maps::memory_holder(pid)))
        .map(|p| p.display().to_string())
        .unwrap_or_default()
}
