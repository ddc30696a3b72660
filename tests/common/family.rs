//! `fixtures/programs/family.py` and a recording of all of it: a process whose members are given orders one by one.

use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::dump::Dump;
use super::heaptap::report;
use super::target::listen;
use super::truth::Truth;
use super::{Python, Target, heaptap};

/// How long anything may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// The family: its root and the members that were told to be born. Dropping it kills them all.
pub struct Family {
    pub root: Target,
    folder: tempfile::TempDir,
    members: Vec<i32>,
}

impl Family {
    /// A word of every member's command line that no other process's has, but for multiprocessing's.
    pub fn folder_name(&self) -> String {
        self.folder.path().file_name().expect("a name").to_string_lossy().into_owned()
    }

    /// The root alone.
    pub fn start(python: &Python) -> Family {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().to_str().expect("a temporary path is text").to_owned();
        let root = Target::builder(python, "family.py").arg(&path).start();
        Family { root, folder, members: Vec::new() }
    }

    /// Has the root start a child, and answers the pid of the new member.
    pub fn child(&mut self, how: &str) -> i32 {
        self.root.send(&format!("start {how}"));
        self.born()
    }

    /// Has a member start a child.
    pub fn grandchild(&mut self, member: i32, how: &str) -> i32 {
        self.order(member, &format!("start {how}"));
        self.born()
    }

    /// The next member to be born.
    pub fn born(&mut self) -> i32 {
        let pid = self.root.expect("born")["pid"].as_i64().expect("a pid") as i32;
        self.members.push(pid);
        pid
    }

    /// Gives a member an order.
    pub fn order(&self, member: i32, order: &str) {
        std::fs::write(self.folder.path().join(member.to_string()), order).expect("a member's FIFO");
    }

    /// Has a member allocate, and answers its truth.
    pub fn work(&mut self, member: i32, count: u32) -> Truth {
        if member == self.root.pid() {
            self.root.send(&format!("work {count}"));
        } else {
            self.order(member, &format!("work {count}"));
        }
        let mut worked = self.root.expect("worked");
        assert_eq!(worked["pid"], member, "{worked}");
        Truth::from_json(worked["truth"].take())
    }
}

impl Drop for Family {
    fn drop(&mut self) {
        for member in &self.members {
            // Only what is still a member: a pid may have been given out again.
            let command = std::fs::read(format!("/proc/{member}/cmdline")).unwrap_or_default();
            let folder = self.folder.path().to_string_lossy().into_owned();
            let spawned = String::from_utf8_lossy(&command).contains("multiprocessing");
            if spawned || String::from_utf8_lossy(&command).contains(&folder) {
                let _ = kill(Pid::from_raw(*member), Signal::SIGKILL);
            }
        }
    }
}

/// `heaptap attach` at work on several processes. Dropping it ends it by SIGTERM.
pub struct FamilyRecording {
    child: Child,
    lines: Receiver<String>,
    said: Vec<String>,
    folder: PathBuf,
    place: tempfile::TempDir,
}

/// What it left.
pub struct FamilyCaptures {
    /// The folder of captures.
    pub folder: PathBuf,
    /// Its index.
    pub index: Value,
    /// How `heaptap attach` ended.
    pub status: ExitStatus,
    /// What it said.
    pub said: String,
    _place: tempfile::TempDir,
}

impl FamilyRecording {
    /// Attaches to what `selection` says, every event recorded unless the arguments say how to sample.
    pub fn start(selection: &[&str]) -> FamilyRecording {
        let place = tempfile::tempdir().expect("a temporary folder");
        let folder = place.path().join("captures");
        let mut command = heaptap();
        command.arg("attach").args(selection).arg("-o").arg(&folder);
        if !selection.contains(&"--sample") {
            command.arg("--exact");
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("heaptap starts");
        let (sender, lines) = std::sync::mpsc::channel();
        let stdout = listen(child.stdout.take().expect("stdout was piped"));
        let stderr = listen(child.stderr.take().expect("stderr was piped"));
        for stream in [stdout, stderr] {
            let sender = sender.clone();
            std::thread::spawn(move || stream.into_iter().try_for_each(|line| sender.send(line)));
        }
        FamilyRecording { child, lines, said: Vec::new(), folder, place }
    }

    /// Of the whole family below `root`.
    pub fn of(root: &Target, arguments: &[&str]) -> FamilyRecording {
        let pid = root.pid().to_string();
        FamilyRecording::start(&[&["--pid", &pid][..], arguments].concat())
    }

    /// The supervisor's pid.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// The folder of captures.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What it said until now.
    pub fn said(&self) -> &[String] {
        &self.said
    }

    /// Waits until each of these processes is recorded.
    pub fn wait_for(&mut self, pids: &[i32]) {
        for pid in pids {
            self.wait_for_line(&format!("recording process {pid}:"), 1);
        }
    }

    /// Waits until so many lines begin with this.
    pub fn wait_for_line(&mut self, begin: &str, count: usize) {
        let started = Instant::now();
        while self.said.iter().filter(|line| line.starts_with(begin)).count() < count {
            let left = PATIENCE.saturating_sub(started.elapsed());
            match self.lines.recv_timeout(left) {
                Ok(line) => self.said.push(line),
                Err(error) => panic!("no {begin:?} ({error}) in:\n{}", self.said.join("\n")),
            }
        }
    }

    /// Ends it as Ctrl-C does.
    pub fn stop(self) -> FamilyCaptures {
        self.stop_by(Signal::SIGINT)
    }

    /// Ends it by a signal.
    pub fn stop_by(self, signal: Signal) -> FamilyCaptures {
        kill(Pid::from_raw(self.pid()), signal).expect("the recording is ours");
        self.finish()
    }

    /// Waits for the end.
    pub fn finish(mut self) -> FamilyCaptures {
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("the recording is ours") {
                break status;
            }
            while let Ok(line) = self.lines.try_recv() {
                self.said.push(line);
            }
            assert!(started.elapsed() < PATIENCE, "it does not end:\n{}", self.said.join("\n"));
            std::thread::sleep(Duration::from_millis(5));
        };
        while let Ok(line) = self.lines.recv_timeout(Duration::from_secs(5)) {
            self.said.push(line);
        }
        let index = std::fs::read(self.folder.join("index.json")).unwrap_or_default();
        let place = std::mem::replace(&mut self.place, tempfile::tempdir().expect("a temporary folder"));
        FamilyCaptures {
            folder: self.folder.clone(),
            index: serde_json::from_slice(&index).unwrap_or(Value::Null),
            status,
            said: self.said.join("\n"),
            _place: place,
        }
    }
}

impl Drop for FamilyRecording {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = kill(Pid::from_raw(self.pid()), Signal::SIGTERM);
            let _ = self.child.wait();
        }
    }
}

impl FamilyCaptures {
    /// Panics unless `heaptap attach` ended with this exit code.
    pub fn assert_code(&self, code: i32) -> &FamilyCaptures {
        assert_eq!(self.status.code(), Some(code), "heaptap attach said:\n{}", self.said);
        self
    }

    /// The entries of a process, one for each of its programs.
    pub fn entries(&self, pid: i32) -> Vec<&Value> {
        let all = self.index["processes"].as_array().unwrap_or_else(|| panic!("no index: {}", self.said));
        all.iter().filter(|entry| entry["pid"] == pid).collect()
    }

    /// The only entry of a process.
    pub fn entry(&self, pid: i32) -> &Value {
        let entries = self.entries(pid);
        assert_eq!(entries.len(), 1, "process {pid} in {:#}\n{}", self.index, self.said);
        entries[0]
    }

    /// The capture that an entry names.
    pub fn capture(&self, entry: &Value) -> PathBuf {
        let name =
            entry["capture"].as_str().unwrap_or_else(|| panic!("no capture: {entry:#}\n{}", self.said));
        self.folder.join(name)
    }

    /// Every record of an entry's capture.
    pub fn dump(&self, entry: &Value) -> Dump {
        Dump::parse(&report(&self.capture(entry), "dump", &["--json"]))
    }

    /// What a report verb prints about the folder.
    pub fn report(&self, verb: &str, arguments: &[&str]) -> String {
        report(Path::new(&self.folder), verb, arguments)
    }
}
