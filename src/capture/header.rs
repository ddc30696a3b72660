//! The header document: everything about the run that a reader needs years later.
//!
//! Plain facts as JSON. A field that is missing in the file takes its default, and an unknown one is
//! ignored, so fields can be added within a format version.

use serde::{Deserialize, Serialize};

/// The facts of one run. Empty strings mean "not known".
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Header {
    /// The heaptap that wrote the file.
    pub heaptap_version: String,
    /// The target's process id.
    pub pid: u32,
    /// The target's arguments.
    pub command_line: Vec<String>,
    /// The target's executable.
    pub executable: String,
    /// When recording began: wall clock, nanoseconds since 1970 UTC. Record times count from here.
    pub start_unix_ns: u64,
    /// The machine.
    pub hostname: String,
    /// The kernel's release.
    pub kernel: String,
    /// `x86_64`.
    pub architecture: String,
    /// Bytes per page in the target.
    pub page_size: u64,
    /// The interpreter.
    pub python: PythonFacts,
    /// The C library.
    pub libc: LibcFacts,
    /// The library that defines `malloc` for the target.
    pub allocator_library: String,
    /// Where the interpreter's layout came from.
    pub layout_source: String,
    /// How the entry points were hooked.
    pub breakpoints: BreakpointKind,
    /// Whether the object, mem and raw domains of CPython were recorded.
    pub python_allocators: bool,
    /// `None`: every allocation. Otherwise one in so many bytes on average.
    pub sampling_mean_bytes: Option<u64>,
    /// What the random numbers of the sampling were made from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sampling_seed: Option<u64>,
    /// The share of the target's time, in percent, that recording might take before the sampling interval was raised.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_cpu_percent: Option<f64>,
    /// There is no event log: what was live, came and went is in snapshots alone.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub aggregated: bool,
    /// Nanoseconds between snapshots, where they were taken regularly.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot_every_ns: Option<u64>,
    /// Native frames were recorded with the Python ones.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub native: bool,
    /// The hooked functions.
    pub entry_points: Vec<EntryPoint>,
    /// The mapped ELF files.
    pub modules: Vec<Module>,
}

/// The interpreter of the target.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PythonFacts {
    /// As `3.12.1`.
    pub version: String,
    /// `default`, `debug`, `free-threaded`, …
    pub flavour: String,
    /// How version and flavour were learnt.
    pub learnt_from: String,
}

/// The C library of the target.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LibcFacts {
    /// `glibc`, `musl`.
    pub name: String,
    /// As `2.36`.
    pub version: String,
}

/// How an entry point is hooked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BreakpointKind {
    /// A trap instruction, and the controller at every stop.
    Trap,
    /// A jump to code in the target.
    Jump,
    /// A kind that this version does not know.
    #[default]
    #[serde(other)]
    Unknown,
}

impl BreakpointKind {
    /// `trap`, `jump` or `unknown`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Trap => "trap",
            Self::Jump => "jump",
            Self::Unknown => "unknown",
        }
    }
}

/// One hooked function.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EntryPoint {
    /// Its symbol.
    pub name: String,
    /// The file that defines it.
    pub module: String,
    /// Its address in the target.
    pub address: u64,
    /// The allocator kind its events have.
    pub allocator: String,
}

/// One mapped ELF file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Module {
    /// Its path in the target.
    pub path: String,
    /// Its build id in hex.
    pub build_id: Option<String>,
    /// Where it is mapped: first byte and the one after the last.
    pub ranges: Vec<(u64, u64)>,
}

const MAX_ARGUMENT: usize = 4 << 10;
const MAX_ARGUMENTS: usize = 64 << 10;
const MAX_MODULES: usize = 2000;

impl Header {
    /// The same facts cut to what fits a chunk: a command line can be 2 MiB and there can be any number
    /// of modules. What was cut ends in `…`.
    pub(super) fn clamped(&self) -> Self {
        let mut header = self.clone();
        header.command_line = clamped_arguments(&self.command_line, MAX_ARGUMENT, MAX_ARGUMENTS);
        header.modules.truncate(MAX_MODULES);
        header
    }
}

/// Arguments cut to `one` byte count each and `all` together. What was cut ends in `…`.
pub(super) fn clamped_arguments(arguments: &[String], one: usize, all: usize) -> Vec<String> {
    let mut left = all;
    let mut kept = Vec::new();
    for argument in arguments {
        if left == 0 {
            kept.push("…".to_owned());
            break;
        }
        let text = super::intern::cut(argument, one.min(left));
        left = left.saturating_sub(text.len() + 1);
        kept.push(text.into_owned());
    }
    kept
}
