//! A fixture program running on one interpreter: started, driven over its two pipes, killed by pid and reaped.
//!
//! The pipes are the program's stdin and stdout, so that no descriptor has to be inherited by number (which would
//! leak into whatever another test thread starts at that moment). What the program says is in `fixtures/programs/driver.py`.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::Python;

/// How long anything a fixture does may take, tracing included.
const PATIENCE: Duration = Duration::from_secs(120);

/// Where the fixture programs are.
pub fn programs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/programs")
}

/// How to start a fixture; `start` does it.
pub struct TargetBuilder<'a> {
    python: &'a Python,
    program: String,
    under: Vec<String>,
    before: Vec<String>,
    arguments: Vec<String>,
    settings: Vec<(String, String)>,
}

impl<'a> TargetBuilder<'a> {
    /// Adds an argument of the program.
    pub fn arg(mut self, argument: &str) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Starts the interpreter by another program, whose last descendant it becomes: `["unshare", "--pid", …]`.
    pub fn under(mut self, command: &[&str]) -> Self {
        self.under = command.iter().map(|&word| word.into()).collect();
        self
    }

    /// Adds arguments before the program: `["-m", "memray", "run", …]`.
    pub fn interpreter_args(mut self, arguments: &[&str]) -> Self {
        self.before.extend(arguments.iter().map(|&argument| argument.into()));
        self
    }

    /// Sets an environment variable of the program.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.into(), value.into()));
        self
    }

    /// Preloads a shared library (a path as the interpreter sees it).
    pub fn preload(self, library: &str) -> Self {
        let name = if self.python.command.ends_with("run") { "HEAPTAP_PRELOAD" } else { "LD_PRELOAD" };
        self.env(name, library)
    }

    /// Starts the program and waits until it says that it is ready.
    pub fn start(self) -> Target {
        let folder = self.python.root.as_deref().map(copy_into_root);
        let program = match &folder {
            Some(folder) => {
                format!("/tmp/{}/{}", folder.path().file_name().unwrap().to_str().unwrap(), self.program)
            }
            None => programs().join(&self.program).to_str().expect("the repository's path is text").into(),
        };
        let complaints = tempfile::tempfile().expect("a temporary file");
        let mut command = command_under(&self.under, self.python.command());
        command.args(&self.before).arg(program).args(&self.arguments);
        command.env("HEAPTAP_GO_FD", "0").env("HEAPTAP_READY_FD", "1").envs(self.settings);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(complaints.try_clone().expect("a second handle"));
        let mut child =
            command.spawn().unwrap_or_else(|error| panic!("cannot start {}: {error}", self.python));
        let go = child.stdin.take().expect("stdin was piped");
        let said = listen(child.stdout.take().expect("stdout was piped"));
        let pid = i32::try_from(child.id()).expect("a pid is positive");
        let mut target =
            Target { child, pid, go, said, complaints, folder, status: None, name: self.program };
        let ready = target.expect("ready");
        if self.under.is_empty() {
            assert_eq!(ready["pid"], pid, "the interpreter is not the process that was started");
        } else {
            target.pid = last_descendant(pid);
        }
        target
    }
}

/// A running fixture program. Dropping it kills and reaps it.
pub struct Target {
    child: Child,
    pid: i32,
    go: ChildStdin,
    said: Receiver<String>,
    complaints: fs::File,
    folder: Option<tempfile::TempDir>,
    status: Option<ExitStatus>,
    name: String,
}

/// `inner` with its settings, as the last words of the command `outer`.
fn command_under(outer: &[String], inner: Command) -> Command {
    let Some((program, words)) = outer.split_first() else { return inner };
    let mut command = Command::new(program);
    command.args(words).arg(inner.get_program());
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}

/// The process that a chain of commands came to; the process itself where it started none.
pub fn last_descendant(mut pid: i32) -> i32 {
    loop {
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        match children.split_ascii_whitespace().next() {
            Some(child) => pid = child.parse().expect("a pid"),
            None => return pid,
        }
    }
}

fn copy_into_root(root: &Path) -> tempfile::TempDir {
    let folder =
        tempfile::Builder::new().prefix("heaptap-fixtures-").tempdir_in(root.join("tmp")).expect("ROOT/tmp");
    for entry in programs().read_dir().expect("fixtures/programs").flatten() {
        if entry.path().extension().is_some_and(|extension| extension == "py") {
            fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("a copy of a fixture");
        }
    }
    folder
}

/// Reads lines on a thread of its own, so that waiting for one can time out.
pub fn listen(stream: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines() {
            let Ok(line) = line else { return };
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

impl Target {
    /// Starts `program` (a file of `fixtures/programs`) on `python`.
    pub fn start(python: &Python, program: &str) -> Target {
        Target::builder(python, program).start()
    }

    /// The same with arguments and settings.
    pub fn builder<'a>(python: &'a Python, program: &str) -> TargetBuilder<'a> {
        let program = program.to_owned();
        let (under, before, arguments, settings) = Default::default();
        TargetBuilder { python, program, under, before, arguments, settings }
    }

    /// The process id; also the thread id of its main thread.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Writes one command line.
    pub fn send(&mut self, command: &str) {
        if let Err(error) = self.go.write_all(format!("{command}\n").as_bytes()) {
            panic!("{}: cannot say {command:?}: {error}{}", self.name, self.complaints());
        }
    }

    /// Waits for the next thing the program says, which must be this event.
    pub fn expect(&mut self, event: &str) -> Value {
        let line = match self.said.recv_timeout(PATIENCE) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => {
                panic!("{}: no {event:?} in {PATIENCE:?}{}", self.name, self.complaints())
            }
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.wait();
                panic!("{}: ended ({status}) before {event:?}{}", self.name, self.complaints())
            }
        };
        let said: Value = serde_json::from_str(&line)
            .unwrap_or_else(|error| panic!("{}: {error} in {line:?}{}", self.name, self.complaints()));
        assert_eq!(said["event"], event, "{}: {said}", self.name);
        said
    }

    /// Has the work done and returns the program's truth about it.
    pub fn go(&mut self) -> Value {
        self.send("go");
        self.expect("done")["truth"].take()
    }

    /// Makes the program compute something, and checks the answer.
    pub fn ping(&mut self) {
        let number = 4321_u64;
        self.send(&format!("ping {number}"));
        let right = (0..number).map(|i| i * i).sum::<u64>() % 1_000_003;
        assert_eq!(self.expect("pong")["answer"], right, "{} no longer computes", self.name);
    }

    /// Asks the program to end, and waits until it has.
    pub fn exit(mut self) -> ExitStatus {
        self.send("exit");
        self.wait()
    }

    /// Waits for the end of the process.
    pub fn wait(&mut self) -> ExitStatus {
        if let Some(status) = self.status {
            return status;
        }
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("the child is ours") {
                self.status = Some(status);
                return status;
            }
            assert!(started.elapsed() < PATIENCE, "{} (pid {}) does not end", self.name, self.pid());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Panics with the exit status or signal if the process has ended.
    pub fn assert_alive(&mut self) {
        if let Some(status) = self.child.try_wait().expect("the child is ours") {
            self.status = Some(status);
            panic!("{} is dead: {status}, signal {:?}{}", self.name, status.signal(), self.complaints());
        }
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).expect("the child is ours");
    }

    /// What the program wrote to stderr, ready to be appended to a message.
    pub fn complaints(&self) -> String {
        // Read by position: the file offset is shared with the program, which goes on writing at it.
        let mut bytes = vec![0_u8; 64 * 1024];
        let length = self.complaints.read_at(&mut bytes, 0).unwrap_or(0);
        let text = String::from_utf8_lossy(&bytes[..length]);
        if text.is_empty() { String::new() } else { format!("\n--- stderr of {}:\n{text}", self.name) }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if self.status.is_none() {
            // A descendant first: it may outlive what started it.
            if self.pid.unsigned_abs() != self.child.id() {
                let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
