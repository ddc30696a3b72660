//! The binary under test: as a plain command, and as a recording that is started, awaited and ended by SIGINT.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Target;
use super::dump::Dump;
use super::target::{last_descendant, listen};

/// How long attaching, and ending a recording, may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// The binary that cargo built for this test run.
pub fn heaptap() -> Command {
    Command::new(assert_cmd::cargo::cargo_bin!("heaptap"))
}

/// Runs the binary and returns what it said; panics unless it ended with `code`.
pub fn heaptap_says(code: i32, arguments: &[&str]) -> Output {
    let output = heaptap().args(arguments).output().expect("heaptap starts");
    assert_eq!(
        output.status.code(),
        Some(code),
        "heaptap {arguments:?}:\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// `heaptap attach` at work on a target. Dropping it kills the recorder, not the target.
pub struct Recording {
    child: Child,
    stderr: Receiver<String>,
    heard: Vec<String>,
    path: PathBuf,
    folder: tempfile::TempDir,
}

/// A finished recording.
pub struct Capture {
    /// The capture file; gone when this is dropped.
    pub path: PathBuf,
    /// How `heaptap attach` ended.
    pub status: ExitStatus,
    /// What it wrote to stderr.
    pub stderr: String,
    _folder: tempfile::TempDir,
}

impl Recording {
    /// Attaches by pid and returns once the breakpoints are in. Where the arguments say neither a kind of breakpoint nor how
    /// to sample: by jumps, and every event.
    pub fn attach(target: &Target, arguments: &[&str]) -> Recording {
        Recording::try_attach(target.pid(), arguments).unwrap_or_else(|refusal| panic!("attach: {refusal}"))
    }

    /// The same; an attach that ends before it records returns its exit status and what it said.
    pub fn try_attach(pid: i32, arguments: &[&str]) -> Result<Recording, String> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("capture.heaptap");
        Recording::try_attach_into(heaptap(), pid, path, folder, arguments)
    }

    /// Attaches by a heaptap that another program becomes: `["nohup"]`.
    pub fn attach_under(outer: &[&str], target: &Target, arguments: &[&str]) -> Recording {
        Recording::try_attach_under(outer, target.pid(), arguments)
            .unwrap_or_else(|refusal| panic!("attach: {refusal}"))
    }

    /// The same, for a heaptap to which the target may have another pid than to us.
    pub fn try_attach_under(outer: &[&str], pid: i32, arguments: &[&str]) -> Result<Recording, String> {
        let mut command = Command::new(outer[0]);
        command.args(&outer[1..]).arg(heaptap().get_program());
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("capture.heaptap");
        Recording::try_attach_into(command, pid, path, folder, arguments)
    }

    /// By a command of the caller's that ends with a heaptap, into a file of the caller's.
    pub fn try_attach_by(
        command: Command,
        pid: i32,
        path: &Path,
        arguments: &[&str],
    ) -> Result<Recording, String> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Recording::try_attach_into(command, pid, path.to_owned(), folder, arguments)
    }

    /// Attaches by a heaptap that tells what it does (`HEAPTAP_LOG=debug`): in [`Capture::stderr`] in the end.
    pub fn attach_logging(target: &Target, arguments: &[&str]) -> Recording {
        let mut command = heaptap();
        command.env("HEAPTAP_LOG", "debug");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("capture.heaptap");
        Recording::try_attach_into(command, target.pid(), path, folder, arguments)
            .unwrap_or_else(|refusal| panic!("attach: {refusal}"))
    }

    /// [`Recording::try_attach`] into a file of the caller's choice.
    pub fn try_attach_to(pid: i32, path: &Path, arguments: &[&str]) -> Result<Recording, String> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Recording::try_attach_into(heaptap(), pid, path.to_owned(), folder, arguments)
    }

    fn try_attach_into(
        mut command: Command,
        pid: i32,
        path: PathBuf,
        folder: tempfile::TempDir,
        arguments: &[&str],
    ) -> Result<Recording, String> {
        command.args(["attach", "--pid", &pid.to_string(), "-o"]).arg(&path).args(arguments);
        // A capture that is held against the truth has every event.
        if !arguments.iter().any(|a| ["--exact", "--sample", "--breakpoints"].contains(a)) {
            command.arg("--exact");
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("heaptap starts");
        // The line may come on either; both are read to their end so that the recorder never blocks on them.
        let stderr = child.stderr.take().expect("stderr was piped");
        let stdout = child.stdout.take().expect("stdout was piped");
        let (sender, receiver) = std::sync::mpsc::channel();
        for stream in [Box::new(stdout) as Box<dyn Read + Send>, Box::new(stderr)] {
            let (lines, sender) = (listen(stream), sender.clone());
            std::thread::spawn(move || lines.into_iter().try_for_each(|line| sender.send(line)));
        }
        drop(sender);
        let mut recording = Recording { child, stderr: receiver, heard: Vec::new(), path, folder };
        recording.wait_until_recording()?;
        Ok(recording)
    }

    fn wait_until_recording(&mut self) -> Result<(), String> {
        loop {
            match self.stderr.recv_timeout(PATIENCE) {
                Ok(line) => {
                    self.heard.push(line.clone());
                    if line.starts_with("recording") {
                        return Ok(());
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    return Err(format!("silent for {PATIENCE:?}: {:?}", self.heard));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.wait();
                    return Err(format!("{status}: {}", self.heard.join("\n")));
                }
            }
        }
    }

    /// The recorder's own pid.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid is positive")
    }

    /// SIGKILL: the recorder gets no chance to clean up.
    pub fn kill(mut self) {
        self.child.kill().expect("the recorder is ours");
        self.child.wait().expect("the recorder is ours");
    }

    /// Ends the recording as Ctrl-C does.
    pub fn stop(self) -> Capture {
        self.stop_by(Signal::SIGINT)
    }

    /// Sends the recorder (what was started may only have started it) a signal that is a request to end.
    pub fn stop_by(self, signal: Signal) -> Capture {
        kill(Pid::from_raw(last_descendant(self.pid())), signal).expect("the recorder is ours");
        self.finish()
    }

    /// Waits for a recording that ends by itself (its duration, or the target's end).
    pub fn finish(mut self) -> Capture {
        let status = self.wait();
        self.heard.extend(self.stderr.iter());
        let stderr = self.heard.join("\n");
        let path = self.path.clone();
        let folder = std::mem::replace(&mut self.folder, tempfile::tempdir().expect("a temporary folder"));
        Capture { path, status, stderr, _folder: folder }
    }

    fn wait(&mut self) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("the recorder is ours") {
                return status;
            }
            assert!(started.elapsed() < PATIENCE, "heaptap attach (pid {}) does not end", self.pid());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

impl Capture {
    /// Panics unless `heaptap attach` ended with this exit code.
    pub fn assert_code(&self, code: i32) -> &Capture {
        assert_eq!(self.status.code(), Some(code), "heaptap attach said:\n{}", self.stderr);
        self
    }

    /// Events that the last words of `heaptap attach` tell as dropped.
    pub fn drops(&self) -> usize {
        let before = self.stderr.split(" drop").next().unwrap_or_default();
        let number = before.rsplit([' ', '\n']).next().unwrap_or_default().replace(',', "");
        number.parse().unwrap_or_else(|_| panic!("no number of drops in: {}", self.stderr))
    }

    /// Every record, by `heaptap dump --json`.
    pub fn dump(&self) -> Dump {
        Dump::parse(&self.report("dump", &["--json"]))
    }

    /// What a report verb prints about this capture.
    pub fn report(&self, verb: &str, arguments: &[&str]) -> String {
        report(&self.path, verb, arguments)
    }
}

/// What a report verb prints about a capture file; panics unless it succeeds.
pub fn report(path: &Path, verb: &str, arguments: &[&str]) -> String {
    let mut words = vec![verb];
    words.extend(arguments);
    words.push(path.to_str().expect("a temporary path is text"));
    String::from_utf8(heaptap_says(0, &words).stdout).expect("reports are UTF-8")
}

/// `heaptap detach` of what a killed heaptap left. Nobody knows then which words on the stacks are ways back: a dead one may
/// put the removal off.
pub fn detach_in_the_end(pid: i32) {
    let started = Instant::now();
    loop {
        let output = heaptap().args(["detach", "--pid", &pid.to_string()]).output().expect("heaptap starts");
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(output.status.success(), "{said}");
        if said.contains("removed") || said.contains("holds nothing") {
            return;
        }
        assert!(said.contains("stay for now") && started.elapsed() < Duration::from_secs(30), "{said}");
    }
}
