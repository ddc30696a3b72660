//! `heaptap demo`: a newcomer's first minute. Starts a leaking program, attaches to it by pid as to any other,
//! reports on what it saw.

use super::attach::Console;
use super::view::{print, to_stdout};
use crate::analysis::{View, analyse};
use crate::capture::CaptureReader;
use crate::error::Error;
use crate::recorder::plant::JumpOptions;
use crate::recorder::record::{RecordOptions, record};
use crate::report::{FlameGraph, Format, Report, ReportError, Summary, SummaryOrder, text};
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const PROGRAM: &str = include_str!("demo.py");
/// Interpreters that are tried where none is named.
const PYTHONS: [&str; 10] = [
    "python3",
    "python3.15",
    "python3.14",
    "python3.13",
    "python3.12",
    "python3.11",
    "python3.10",
    "python3.9",
    "python3.8",
    "python",
];
/// Succeeds on a CPython that heaptap records.
const SUPPORTED: &str = "import platform, sys; sys.exit(not (platform.python_implementation() == 'CPython' \
                         and (3, 8) <= sys.version_info[:2] <= (3, 15)))";

/// See a leak found: start a small leaking program, attach to it, report.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The program, the capture and the flame graph are kept in a new directory, which is printed.

Examples:
  heaptap demo
  heaptap demo --python python3.12 --duration 10s")]
pub struct DemoArgs {
    /// The interpreter to run the program with [default: the first CPython 3.8 to 3.15 on PATH]
    #[arg(long, value_name = "PYTHON")]
    pub python: Option<String>,
    /// How long to record
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = super::parse::parse_duration)]
    pub duration: Duration,
    /// Keep the files here [default: a new directory for temporary files]
    #[arg(long, short, value_name = "DIR")]
    pub output: Option<PathBuf>,
}

/// Runs the verb.
pub fn run(args: &DemoArgs) -> Result<(), Error> {
    let folder = folder(args)?;
    let program = folder.join("demo.py");
    std::fs::write(&program, PROGRAM).map_err(|source| Error::Output { path: program.clone(), source })?;
    let target = Target::start(args.python.as_deref(), &program)?;
    say(format_args!("started {} {} as process {}", target.python, program.display(), target.child.id()))?;
    let capture = folder.join("demo.heaptap");
    let options = RecordOptions {
        pid: target.child.id() as i32,
        output: capture.clone(),
        force: true,
        duration: Some(args.duration),
        python_allocators: false,
        native: false,
        bundle_symbols: true,
        unsafe_trap: false,
        jump: Some(JumpOptions::every_event()),
        snapshots: None,
    };
    let mut console = Console::new(&options, false);
    let recorded = record(&options, &mut console)?;
    console.finish();
    drop(target);
    if let Some(message) = recorded.failed {
        return Err(Error::RecordingFailed { message, capture });
    }
    let flames = folder.join("demo.svg");
    report(&capture, &flames)?;
    let (flames, capture) = (flames.display(), capture.display());
    say(format_args!(
        "\nthe leak is Session.__init__: sessions are kept for ever by Shop.remember\n  \
         the flame graph   {flames}\n  \
         the capture       {capture}\n\
         look further, for example:\n  \
         heaptap tree --leaks {capture}\n  \
         heaptap attach --pid PID     (a process of your own)"
    ))
}

fn say(text: std::fmt::Arguments) -> Result<(), Error> {
    to_stdout(|out, _| Ok(writeln!(out, "{text}").map_err(ReportError::from)?))
}

fn folder(args: &DemoArgs) -> Result<PathBuf, Error> {
    if let Some(folder) = &args.output {
        std::fs::create_dir_all(folder).map_err(|source| Error::Output { path: folder.clone(), source })?;
        return Ok(folder.clone());
    }
    let made = tempfile::Builder::new().prefix("heaptap-demo-").tempdir();
    Ok(made.map_err(|source| Error::Output { path: std::env::temp_dir(), source })?.keep())
}

fn report(capture: &Path, flames: &Path) -> Result<(), Error> {
    let findings = analyse(CaptureReader::open(capture)?, View::Leaks)?;
    say(format_args!(""))?;
    print(&Summary { order: SummaryOrder::Own, max_rows: 0 }, &findings, false)?;
    let output = |source| Error::Output { path: flames.to_owned(), source };
    let mut out = BufWriter::new(File::create(flames).map_err(output)?);
    FlameGraph { inverted: false, icicle: false }.write(&findings, Format::default(), &mut out)?;
    out.flush().map_err(output)
}

/// The demo's program, which ends with us.
struct Target {
    child: Child,
    python: String,
}

impl Target {
    fn start(python: Option<&str>, program: &Path) -> Result<Self, Error> {
        let python = match python {
            Some(python) => python.to_owned(),
            None => find_python()?,
        };
        let failed = |source| Error::Demo { program: text::escaped(&python).into_owned(), source };
        let child = Command::new(&python)
            .arg(program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let mut target = Self { child, python: python.clone() };
        let mut line = String::new();
        if let Some(stdout) = target.child.stdout.take() {
            BufReader::new(stdout).read_line(&mut line).map_err(failed)?;
        }
        match line.trim() {
            "ready" => Ok(target),
            _ => Err(failed(std::io::Error::other("it ended before it was ready"))),
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // The end of its input ends it; it is killed should it not see that.
        drop(self.child.stdin.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn find_python() -> Result<String, Error> {
    let fits = |python: &&&str| {
        let run = Command::new(python)
            .args(["-c", SUPPORTED])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        run.is_ok_and(|status| status.success())
    };
    PYTHONS.iter().find(fits).map(|p| (*p).to_owned()).ok_or_else(|| Error::Demo {
        program: "python3".into(),
        source: std::io::Error::other("no CPython 3.8 to 3.15 is on PATH"),
    })
}
