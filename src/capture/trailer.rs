//! The trailer document: how the run ended, and what was counted.

use serde::{Deserialize, Serialize};

/// What is known at the end of a run. A file without one was cut short.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Trailer {
    /// When recording ended: wall clock, nanoseconds since 1970 UTC.
    pub end_unix_ns: u64,
    /// How long it recorded, on the monotonic clock, in nanoseconds.
    pub duration_ns: u64,
    /// Why it ended.
    pub reason: EndReason,
    /// What was counted.
    pub counters: Counters,
}

/// Why recording ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum EndReason {
    /// The asked time was over.
    Duration,
    /// heaptap was asked to end.
    Interrupted {
        /// `SIGINT`, `SIGTERM`, …
        signal: String,
    },
    /// The target ended by itself.
    TargetExited {
        /// Its exit code.
        code: i32,
    },
    /// The target was killed.
    TargetKilled {
        /// `SIGKILL`, …
        signal: String,
        /// By the kernel's OOM killer, as far as its control group's count tells.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        out_of_memory: bool,
    },
    /// The target ended, and nobody told how.
    TargetGone,
    /// The target became another program.
    TargetExec {
        /// Its executable.
        path: String,
    },
    /// heaptap failed.
    ControllerError {
        /// The error.
        message: String,
    },
    /// Not known, or a reason of a later version.
    #[default]
    #[serde(other)]
    Unknown,
}

impl EndReason {
    /// How reports put it.
    pub fn text(&self) -> String {
        match self {
            Self::Duration => "the duration was over".to_owned(),
            Self::Interrupted { signal } => format!("interrupted by {signal}"),
            Self::TargetExited { code } => format!("the target exited with code {code}"),
            Self::TargetKilled { signal, out_of_memory: false } => {
                format!("the target was killed by {signal}")
            }
            Self::TargetKilled { signal, out_of_memory: true } => format!(
                "the target was killed by {signal}: the kernel's OOM killer, for its control group had no memory left"
            ),
            Self::TargetGone => "the target ended".to_owned(),
            Self::TargetExec { path } => format!("the target executed {path}"),
            Self::ControllerError { message } => format!("heaptap failed: {message}"),
            Self::Unknown => "unknown".to_owned(),
        }
    }
}

/// Numbers of a run. The writer fills in those that it sees itself (the first group).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counters {
    /// Allocations, frees and unmaps written.
    pub events: u64,
    /// Allocations written.
    pub allocations: u64,
    /// Of these, samples that stand for others.
    #[serde(skip_serializing_if = "is_zero")]
    pub samples: u64,
    /// Frees of blocks of this capture.
    pub frees: u64,
    /// Frees of blocks from before the attach.
    pub frees_from_before: u64,
    /// Unmaps written.
    pub unmaps: u64,
    /// Events known to be missing.
    pub drops: u64,
    /// Spans without records.
    pub gaps: u64,
    /// Distinct stacks.
    pub distinct_stacks: u64,

    /// Unmaps of ranges not mapped during the capture.
    pub unmaps_unknown: u64,
    /// Allocations that returned an error.
    pub failed_allocations: u64,
    /// Most bytes live at once (an estimate where samples were recorded).
    pub peak_live_bytes: u64,
    /// Bytes live at the end (an estimate where samples were recorded).
    pub live_bytes: u64,
    /// Blocks live at the end (an estimate where samples were recorded).
    pub live_blocks: u64,

    /// The sampling interval in bytes when recording ended: higher than the one asked for where that would have cost the
    /// target too much.
    #[serde(skip_serializing_if = "is_zero")]
    pub interval_at_end: u64,
    /// Calls made by signal handlers while the agent ran on their thread: not recorded.
    #[serde(skip_serializing_if = "is_zero")]
    pub agent_passed_through: u64,
    /// Calls of threads that the agent had no slot for: not recorded.
    #[serde(skip_serializing_if = "is_zero")]
    pub threads_without_slot: u64,
    /// Resident memory that recording added to the target, in bytes.
    #[serde(skip_serializing_if = "is_zero")]
    pub target_extra_bytes: u64,
    /// The most memory that heaptap itself had resident, in bytes.
    #[serde(skip_serializing_if = "is_zero")]
    pub controller_peak_bytes: u64,
    /// Distinct stacks that were taken with their native frames.
    #[serde(skip_serializing_if = "is_zero")]
    pub native_stacks: u64,
    /// Of these, cut short: the code does not tell who called it.
    #[serde(skip_serializing_if = "is_zero")]
    pub native_cut: u64,
}

/// Counters that came later are left out where there is nothing to count, as in the files before them.
#[allow(clippy::trivially_copy_pass_by_ref)] // serde calls it with a reference
fn is_zero(count: &u64) -> bool {
    *count == 0
}
