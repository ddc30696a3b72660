//! The index of a folder of captures: which processes of a tree were recorded, into which file, how that ended, and which
//! processes were not recorded and why.
//!
//! Written by whoever records a tree, anew at every change; read by the reports. Knows nothing of what the captures hold.

use super::error::CaptureError;
use super::header::clamped_arguments;
use super::trailer::EndReason;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// The index's name in its folder.
pub const INDEX_FILE: &str = "index.json";
/// The form of the index that this version writes.
const VERSION: u32 = 1;
/// The largest index that is read, in bytes.
const MAX_BYTES: u64 = 256 << 20;

/// A recorded tree. Fields that are missing in the file take their defaults, unknown ones are ignored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Index {
    /// Form of the document.
    pub version: u32,
    /// The heaptap that wrote it.
    pub heaptap_version: String,
    /// What was asked for, in words.
    pub selected: String,
    /// When it began: wall clock, nanoseconds since 1970 UTC.
    pub start_unix_ns: u64,
    /// When it ended; `None` while it goes on, and where heaptap was killed.
    pub end_unix_ns: Option<u64>,
    /// Why it ended, in words.
    pub ended: Option<String>,
    /// One entry for each program of each process, in the order in which they were found.
    pub processes: Vec<IndexEntry>,
    /// Processes not recorded that are not listed, because there were too many.
    pub not_listed: u64,
}

/// One program of one process: a process that executes another program has another entry for that.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IndexEntry {
    /// Its id as heaptap sees it.
    pub pid: u32,
    /// Its parent's id when it was found.
    pub parent_pid: u32,
    /// Its id in its own pid namespace.
    pub namespace_pid: u32,
    /// Its arguments when it was found, or began to be recorded.
    pub command_line: Vec<String>,
    /// Its executable.
    pub executable: String,
    /// When the process was born: wall clock, nanoseconds since 1970 UTC, to a hundredth of a second.
    pub born_unix_ns: u64,
    /// When it was found.
    pub found_unix_ns: u64,
    /// When its recording began.
    pub start_unix_ns: Option<u64>,
    /// When its recording ended.
    pub end_unix_ns: Option<u64>,
    /// Name of the capture in this folder.
    pub capture: Option<String>,
    /// Why its recording ended.
    pub end_reason: Option<EndReason>,
    /// An error that ended the recording early.
    pub error: Option<String>,
    /// Why it was not recorded.
    pub not_recorded: Option<NotRecorded>,
}

/// Why a process was not recorded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NotRecorded {
    /// For programs.
    pub kind: NotRecordedKind,
    /// For people.
    pub why: String,
}

/// Kinds of reasons.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NotRecordedKind {
    /// It runs no CPython.
    NotPython,
    /// It ended, or executed another program, before it could be recorded.
    Ended,
    /// Too many others were recorded at that time.
    OverLimit,
    /// It can't be recorded.
    Refused,
    /// heaptap failed.
    Failed,
    /// A reason of a later version.
    #[default]
    #[serde(other)]
    Unknown,
}

impl IndexEntry {
    /// Its command line as one text, or its executable where it has none.
    pub fn command(&self) -> String {
        if self.command_line.is_empty() { self.executable.clone() } else { self.command_line.join(" ") }
    }
}

impl Index {
    /// An index of what begins now.
    pub fn new(selected: String, start_unix_ns: u64) -> Self {
        Self {
            version: VERSION,
            heaptap_version: env!("CARGO_PKG_VERSION").to_owned(),
            selected,
            start_unix_ns,
            ..Self::default()
        }
    }

    /// Replaces the index in `folder` (mode 0600): whoever reads it finds the old or the new one, whole.
    pub fn write(&self, folder: &Path) -> Result<(), CaptureError> {
        let path = folder.join(INDEX_FILE);
        let failed = |source| CaptureError::Create { path: path.clone(), source };
        let text = serde_json::to_vec_pretty(self).map_err(|error| CaptureError::Document {
            path: path.clone(),
            what: "index",
            why: error.to_string(),
        })?;
        let mut file = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
        file.write_all(&text).map_err(failed)?;
        file.persist(&path).map_err(|error| failed(error.error))?;
        Ok(())
    }

    /// Reads the index of `folder`.
    pub fn read(folder: &Path) -> Result<Self, CaptureError> {
        let path = folder.join(INDEX_FILE);
        let file = File::open(&path);
        let file = match file {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(CaptureError::NoIndex { folder: folder.to_owned() });
            }
            Err(source) => return Err(CaptureError::Open { path, source }),
        };
        let mut text = Vec::new();
        file.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(|source| CaptureError::Read {
            path: path.clone(),
            offset: 0,
            source,
        })?;
        let bad = |why: String| CaptureError::BadIndex { path: path.clone(), why };
        if text.len() as u64 > MAX_BYTES {
            return Err(bad(format!("it has more than {MAX_BYTES} bytes")));
        }
        let index: Self = serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))?;
        match index.version {
            VERSION => Ok(index),
            other => Err(bad(format!("it is of form {other}; this heaptap reads form {VERSION}"))),
        }
    }

    /// How many processes were found and not recorded.
    pub fn not_recorded(&self) -> u64 {
        let listed = self.processes.iter().filter(|entry| entry.not_recorded.is_some()).count();
        self.not_listed.saturating_add(listed as u64)
    }

    /// The captures in `folder`, with what the index says of them. Names that lead out of the folder are none.
    pub fn captures<'a>(&'a self, folder: &'a Path) -> impl Iterator<Item = (PathBuf, &'a IndexEntry)> {
        self.processes.iter().filter_map(move |entry| {
            let name = Path::new(entry.capture.as_deref()?);
            let plain = name.file_name() == Some(name.as_os_str());
            plain.then(|| (folder.join(name), entry))
        })
    }
}

/// Makes the folder for a recorded tree (mode 0700), or takes one that is there: an empty one, or with `force` any.
pub fn prepare_folder(folder: &Path, force: bool) -> Result<(), CaptureError> {
    use std::os::unix::fs::DirBuilderExt;
    let failed = |source| CaptureError::Create { path: folder.to_owned(), source };
    match fs::DirBuilder::new().mode(0o700).create(folder) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            let empty = fs::read_dir(folder).map_err(failed)?.next().is_none();
            if empty || force { Ok(()) } else { Err(CaptureError::Exists { path: folder.to_owned() }) }
        }
        Err(source) => Err(failed(source)),
    }
}

/// A command line as an index keeps it.
pub fn short_command_line(arguments: &[String]) -> Vec<String> {
    clamped_arguments(arguments, 512, 2 << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index() -> Index {
        let entry = |pid, capture: Option<&str>| IndexEntry {
            pid,
            capture: capture.map(str::to_owned),
            ..IndexEntry::default()
        };
        let mut index = Index::new("process 1 and its children".into(), 5);
        index.processes = vec![
            entry(1, Some("1.heaptap")),
            entry(2, Some("../2.heaptap")),
            entry(3, Some("/etc/passwd")),
            entry(4, Some("..")),
            entry(5, None),
        ];
        index.processes[4].not_recorded = Some(NotRecorded { kind: NotRecordedKind::Ended, why: "x".into() });
        index
    }

    #[test]
    fn what_was_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        index().write(folder.path()).unwrap();
        assert_eq!(Index::read(folder.path()).unwrap(), index());
        let mut later = index();
        later.ended = Some("all ended".into());
        later.write(folder.path()).unwrap();
        assert_eq!(Index::read(folder.path()).unwrap(), later);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_capture_is_a_file_of_the_folder() {
        let index = index();
        let found: Vec<_> = index.captures(Path::new("/x")).map(|(path, entry)| (path, entry.pid)).collect();
        assert_eq!(found, [(PathBuf::from("/x/1.heaptap"), 1)]);
    }

    #[test]
    fn what_is_no_index_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(Index::read(folder.path()), Err(CaptureError::NoIndex { .. })));
        for bad in ["", "{", "[]", "{\"version\": 7}", "{\"version\": 1, \"processes\": 3}"] {
            fs::write(folder.path().join(INDEX_FILE), bad).unwrap();
            assert!(matches!(Index::read(folder.path()), Err(CaptureError::BadIndex { .. })), "{bad}");
        }
        fs::write(
            folder.path().join(INDEX_FILE),
            "{\"version\": 1, \"later\": [], \"processes\": [{\"pid\": 3}]}",
        )
        .unwrap();
        assert_eq!(Index::read(folder.path()).unwrap().processes[0].pid, 3);
    }

    #[test]
    fn a_folder_with_something_in_it_is_taken_by_force_alone() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("tree");
        prepare_folder(&folder, false).unwrap();
        prepare_folder(&folder, false).unwrap();
        fs::write(folder.join("file"), "precious").unwrap();
        assert!(matches!(prepare_folder(&folder, false), Err(CaptureError::Exists { .. })));
        prepare_folder(&folder, true).unwrap();
        assert_eq!(fs::read(folder.join("file")).unwrap(), b"precious");
        assert!(prepare_folder(&folder.join("file"), true).is_err());
    }
}
