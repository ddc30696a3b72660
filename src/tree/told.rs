//! What a recorder of one process tells its supervisor: JSON lines on its standard output.

use crate::capture::{EndReason, NotRecordedKind};
use serde::{Deserialize, Serialize};

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "told", rename_all = "snake_case")]
pub enum Told {
    /// The breakpoints are in.
    Recording {
        /// When: wall clock, nanoseconds since 1970 UTC.
        unix_ns: u64,
        /// What is recorded now: a process may have executed another program since it was found.
        command_line: Vec<String>,
        /// Its executable.
        executable: String,
        /// Its CPython.
        python: String,
    },
    /// The capture is written and the process let go.
    Ended(Ended),
    /// No recording was made.
    NotRecorded {
        /// For programs.
        kind: NotRecordedKind,
        /// For people.
        why: String,
    },
}

/// A recording that ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// When.
    pub unix_ns: u64,
    /// Why.
    pub reason: EndReason,
    /// How long it recorded, in nanoseconds.
    pub duration_ns: u64,
    /// Allocations written.
    pub allocations: u64,
    /// Frees written.
    pub frees: u64,
    /// Events known to be missing.
    pub drops: u64,
    /// Most bytes live at once.
    pub peak_live_bytes: u64,
    /// Bytes live at the end.
    pub live_bytes: u64,
    /// Blocks live at the end.
    pub live_blocks: u64,
    /// Bytes of the capture.
    pub file_bytes: u64,
    /// The error that ended it early.
    pub error: Option<String>,
    /// Why something of ours is left in the process.
    pub left: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_understood() {
        let lines = [
            Told::Recording {
                unix_ns: 7,
                command_line: vec!["python3".into(), "a\nb".into()],
                executable: "/usr/bin/python3".into(),
                python: "3.11.2".into(),
            },
            Told::Ended(Ended { reason: EndReason::TargetExited { code: 3 }, ..Ended::default() }),
            Told::NotRecorded { kind: NotRecordedKind::NotPython, why: "no CPython".into() },
        ];
        for line in lines {
            let text = serde_json::to_string(&line).unwrap();
            assert!(!text.contains('\n'), "{text}");
            assert_eq!(serde_json::from_str::<Told>(&text).unwrap(), line);
        }
    }
}
