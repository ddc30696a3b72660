//! `heaptap attach` as a recorder of one process of a tree: started by another heaptap, with its command line and a task
//! added to it, telling on its standard output in lines of JSON.

use super::attach::AttachArgs;
use crate::error::Error;
use crate::recorder::examine::Examined;
use crate::recorder::record::{Observer, Progress};
use crate::tree::one::{record_one, recording};
use crate::tree::supervisor::Task;
use crate::tree::told::Told;
use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

/// The task. Whatever else is on the command line is the supervisor's.
#[derive(Debug, clap::Args)]
pub struct WorkerArgs {
    /// The heaptap that started this one
    #[arg(long, hide = true, requires_all = ["worker_pid", "worker_capture"])]
    worker_of: Option<i32>,
    /// The process to record
    #[arg(long, hide = true, requires = "worker_of")]
    worker_pid: Option<i32>,
    /// The capture to write
    #[arg(long, hide = true, requires = "worker_of")]
    worker_capture: Option<PathBuf>,
    /// When to stop
    #[arg(long, hide = true, requires = "worker_of")]
    worker_milliseconds: Option<u64>,
}

/// A task and who gave it.
pub(super) struct Given {
    supervisor: i32,
    task: Task,
}

impl WorkerArgs {
    /// The task, if there is one.
    pub(super) fn task(&self) -> Option<Given> {
        let task = Task {
            pid: self.worker_pid?,
            capture: self.worker_capture.clone()?,
            duration: self.worker_milliseconds.map(Duration::from_millis),
        };
        Some(Given { supervisor: self.worker_of?, task })
    }
}

/// Our own command line with `task` added.
pub(super) fn arguments(task: &Task) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let us = std::process::id().to_string();
    let pid = task.pid.to_string();
    arguments.extend(["--worker-of", &us, "--worker-pid", &pid, "--worker-capture"].map(OsString::from));
    arguments.push(task.capture.clone().into());
    if let Some(duration) = task.duration {
        arguments.extend(["--worker-milliseconds".into(), duration.as_millis().to_string().into()]);
    }
    arguments
}

/// Does the task. How it went is told, not returned: a process that is refused is no failure.
pub(super) fn run(args: &AttachArgs, given: &Given) -> Result<(), Error> {
    let Task { pid, capture, duration } = &given.task;
    let options = args.options(*pid, capture.clone(), *duration);
    let said = record_one(&options, given.supervisor, &mut Teller);
    say(&said);
    Ok(())
}

struct Teller;

impl Observer for Teller {
    fn recording(&mut self, examined: &Examined) {
        say(&recording(examined.pid, examined.python.version.to_string()));
    }

    fn progress(&mut self, _: Progress) {}
}

/// A supervisor that has gone does not listen; its end ends us by a signal.
fn say(told: &Told) {
    if let Ok(mut line) = serde_json::to_vec(told) {
        line.push(b'\n');
        let mut out = io::stdout().lock();
        let _ = out.write_all(&line).and_then(|()| out.flush());
    }
}
