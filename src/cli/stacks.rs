//! `heaptap stacks`: prints one look at the Python stack of every thread.

use super::frames::FrameArgs;
use crate::capture::FrameView;
use crate::error::Error;
use crate::recorder::look::{FrameLook, Look, MAX_DEPTH, Manner, inspect};
use crate::recorder::look_native::{MergedLook, NativeFrame, NativeLook};
use crate::report::ReportError;
use crate::report::text::escaped as printable;
use std::io::{self, Write};

/// Show the Python stack of every thread, once.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The process is stopped while it is looked at, some milliseconds. Nothing is written into it.

Examples:
  heaptap stacks --pid 4242
  heaptap stacks --pid 4242 --native
  heaptap stacks --pid 4242 --native --hide-interpreter=false
  heaptap stacks --pid 4242 --json | jq '.threads[].name'")]
pub struct Args {
    /// The process to look at
    #[arg(long, short, value_name = "PID", value_parser = super::parse::parse_pid, allow_negative_numbers = true)]
    pub pid: i32,
    /// Don't stop it: read each thread until two readings agree
    #[arg(long)]
    pub nonblocking: bool,
    /// Show C frames, too, with the Python ones in their places
    #[arg(long, conflicts_with = "nonblocking")]
    pub native: bool,
    #[command(flatten)]
    pub frames: FrameArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Does what `args` say.
pub fn run(args: &Args) -> Result<(), Error> {
    if args.frames.only.is_some() && !args.native {
        return Err(Error::Usage("--only goes with --native"));
    }
    let manner = match (args.nonblocking, args.native) {
        (true, _) => Manner::Running,
        (_, true) => Manner::Native,
        _ => Manner::Stopped,
    };
    let mut look = inspect(args.pid, manner)?;
    let view = args.frames.view();
    look.threads.iter_mut().filter_map(|thread| thread.native.as_mut()).for_each(|native| show(native, view));
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
        match &thread.native {
            Some(native) => print_native(out, native)?,
            None => thread.frames.iter().try_for_each(|frame| print_frame(out, frame))?,
        }
        if thread.truncated {
            writeln!(out, "    … more than {MAX_DEPTH} frames")?;
        }
    }
    Ok(())
}

fn print_frame(out: &mut impl Write, frame: &FrameLook) -> io::Result<()> {
    let line = frame.line.map_or_else(|| "?".to_owned(), |line| line.to_string());
    writeln!(out, "    {} ({}:{line})", printable(&frame.function), printable(&frame.file))
}

fn print_native(out: &mut impl Write, native: &NativeLook) -> io::Result<()> {
    for frame in &native.frames {
        match frame {
            MergedLook::Python(frame) => print_frame(out, frame)?,
            MergedLook::Native(frame) => writeln!(out, "    {}", native_text(frame))?,
        }
    }
    if native.guessed > 0 {
        writeln!(
            out,
            "    (no unwind data: {} of the frames are found by frame pointers, some may be missing)",
            native.guessed
        )?;
    }
    if native.cut {
        writeln!(out, "    … cut short: the code does not tell who called it")?;
    }
    Ok(())
}

/// `malloc [libc.so.6]`, `spin at solver.c:17 [_solver.so]`.
fn native_text(frame: &NativeFrame) -> String {
    let address = format!("{:#x}", frame.address);
    let function = frame.function.as_deref().unwrap_or(&address);
    let mut text = printable(function).into_owned();
    if let Some(file) = &frame.file {
        let name = file.rsplit('/').next().unwrap_or(file);
        text += &format!(" at {}", printable(name));
        text += &frame.line.map(|line| format!(":{line}")).unwrap_or_default();
    }
    let module = frame.module.as_deref().map(|path| path.rsplit('/').next().unwrap_or(path));
    let inlined = if frame.inlined { ", inlined" } else { "" };
    text + &format!(" [{}{inlined}]", printable(module.unwrap_or("no file")))
}

/// Leaves the frames that a view shows.
fn show(native: &mut NativeLook, view: FrameView) {
    native.frames.retain(|frame| match frame {
        MergedLook::Python(_) => view.python,
        MergedLook::Native(frame) => view.native && (view.interpreter || !frame.interpreter),
    });
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
            native: None,
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
