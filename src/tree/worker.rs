//! [`Worker`]: a heaptap of ours that records one process, as its supervisor sees it.

use super::told::Told;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::Sender;

/// Stack of the thread that listens to one worker: it holds one line.
const STACK: usize = 256 << 10;
/// The longest line that is listened to, in bytes.
const MAX_LINE: u64 = 64 << 10;

/// What a worker did, with the number it was given.
#[derive(Debug)]
pub struct Heard {
    /// The worker's number.
    pub number: usize,
    /// `None`: it has nothing more to say and ends.
    pub told: Option<Told>,
}

/// See the module. Dropping it does not end it.
pub struct Worker {
    child: Child,
}

impl Worker {
    /// Starts this executable with `arguments`; what it tells goes to `heard`, under `number`.
    ///
    /// It is in a process group of its own: the terminal's Ctrl-C reaches the supervisor alone.
    pub fn start(arguments: &[OsString], number: usize, heard: Sender<Heard>) -> io::Result<Self> {
        let mut child = Command::new("/proc/self/exe")
            .arg0("heaptap")
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let stdout = child.stdout.take().expect("its output was piped");
        let listening = std::thread::Builder::new()
            .name(format!("worker {number}"))
            .stack_size(STACK)
            .spawn(move || listen(stdout, number, &heard));
        let worker = Self { child };
        match listening {
            Ok(_) => Ok(worker),
            Err(error) => {
                worker.signal(Signal::SIGTERM);
                Err(error)
            }
        }
    }

    /// Its pid.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Signals it: to let go of its process and end, or (SIGUSR1) to take a snapshot. It may be over already.
    pub fn signal(&self, signal: Signal) {
        // Not waited for yet: the pid is its.
        let _ = kill(Pid::from_raw(self.pid()), signal);
    }

    /// Waits for its end, once it has nothing more to say.
    pub fn wait(mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }
}

fn listen(stdout: ChildStdout, number: usize, heard: &Sender<Heard>) {
    let mut reader = BufReader::new(stdout);
    let mut line = Vec::new();
    loop {
        line.clear();
        let got = io::Read::take(&mut reader, MAX_LINE).read_until(b'\n', &mut line);
        if got.is_err() || line.is_empty() {
            break;
        }
        match serde_json::from_slice(&line) {
            Ok(told) => {
                if heard.send(Heard { number, told: Some(told) }).is_err() {
                    return;
                }
            }
            Err(error) => tracing::warn!("a recorder said what is not understood: {error}"),
        }
    }
    // Nobody listens where the supervisor has ended.
    let _ = heard.send(Heard { number, told: None });
}
