//! `heaptap stacks`: prints one look at the Python stack of every thread.

use crate::error::Error;
use crate::recorder::look::{Look, MAX_DEPTH, inspect};
use crate::report::ReportError;
use crate::report::text::escaped as printable;
use std::io::{self, Write};

/// Show the Python stack of every thread, once.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The process is stopped while it is looked at, some milliseconds. Nothing is written into it.

Examples:
  heaptap stacks --pid 4242
  heaptap stacks --pid 4242 --json | jq '.threads[].name'")]
pub struct Args {
    /// The process to look at
    #[arg(long, short, value_name = "PID", value_parser = super::parse::parse_pid, allow_negative_numbers = true)]
    pub pid: i32,
    /// Don't stop it: read each thread until two readings agree
    #[arg(long)]
    pub nonblocking: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Does what `args` say.
pub fn run(args: &Args) -> Result<(), Error> {
    let look = inspect(args.pid, args.nonblocking)?;
    let mut out = io::stdout().lock();
    let printed = if args.json {
        serde_json::to_writer_pretty(&mut out, &look).map_err(io::Error::from).and_then(|()| writeln!(out))
    } else {
        print(&mut out, &look)
    };
    Ok(printed.and_then(|()| out.flush()).map_err(ReportError::Write)?)
}

fn print(out: &mut impl Write, look: &Look) -> io::Result<()> {
    let finalizing = if look.finalizing { ", finalizing" } else { "" };
    writeln!(
        out,
        "process {}: CPython {} ({}{finalizing}), layout {}",
        look.pid, look.python, look.flavour, look.layout
    )?;
    for thread in &look.threads {
        write!(out, "\nthread {}", thread.tid)?;
        if let Some(name) = &thread.os_name {
            write!(out, " ({})", printable(name))?;
        }
        if let Some(name) = &thread.name {
            write!(out, " \"{}\"", printable(name))?;
        }
        match (thread.python, thread.frames.is_empty()) {
            (false, _) => write!(out, ": no Python state")?,
            (true, true) => write!(out, ": no Python frames")?,
            (true, false) => {}
        }
        writeln!(out, "{}", if thread.moving { " (moved while it was read)" } else { "" })?;
        for frame in &thread.frames {
            let line = frame.line.map_or_else(|| "?".to_owned(), |line| line.to_string());
            writeln!(out, "    {} ({}:{line})", printable(&frame.function), printable(&frame.file))?;
        }
        if thread.truncated {
            writeln!(out, "    … more than {MAX_DEPTH} frames")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder::look::ThreadLook;

    #[test]
    fn a_thread_without_python_says_so() {
        let thread = |python| ThreadLook {
            tid: 7,
            os_name: Some("io".into()),
            name: None,
            python,
            moving: false,
            truncated: false,
            frames: Vec::new(),
        };
        let look = Look {
            pid: 1,
            python: "3.11.7".into(),
            flavour: "default build".into(),
            layout: "x".into(),
            finalizing: false,
            threads: vec![thread(false), thread(true)],
        };
        let mut out = Vec::new();
        print(&mut out, &look).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(
            text.contains("thread 7 (io): no Python state\n")
                && text.contains("thread 7 (io): no Python frames\n")
        );
    }
}
