//! The command line: verbs, their arguments, what is printed when they fail. The only place that knows clap.

pub mod attach;
pub mod detach;
pub mod doctor;
pub mod format;
pub mod stacks;

use crate::error::Error;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Something failed.
pub const EXIT_FAILED: u8 = 1;
/// The target was refused, and nothing was done to it.
pub const EXIT_REFUSED: u8 = 3;

/// Attach to a running CPython process and see where its memory is allocated
#[derive(Debug, Parser)]
#[command(name = "heaptap", version, help_expected = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Record where a running process allocates memory
    Attach(attach::AttachArgs),
    /// Remove what a killed heaptap left in a process
    Detach(detach::DetachArgs),
    /// Tell whether and how a process can be attached to, without touching it
    Doctor(doctor::DoctorArgs),
    /// Show the Python stack of every thread, once
    Stacks(stacks::Args),
}

/// Parses the arguments and does what they say.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    log();
    match run(cli.verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report(&error),
    }
}

fn run(verb: Verb) -> Result<(), Error> {
    match verb {
        Verb::Attach(args) => attach::run(&args),
        Verb::Detach(args) => detach::run(&args),
        Verb::Doctor(args) => doctor::run(&args),
        Verb::Stacks(args) => Ok(stacks::run(&args)?),
    }
}

/// What went wrong, why, and what to do. A reader that closed its end of a pipe has what it wanted.
fn report(error: &Error) -> ExitCode {
    if matches!(error, Error::Output(e) if e.kind() == std::io::ErrorKind::BrokenPipe) {
        return ExitCode::SUCCESS;
    }
    eprintln!("heaptap: error: {error}");
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        eprintln!("  because: {cause}");
        source = cause.source();
    }
    if let Some(hint) = error.hint() {
        eprintln!("  hint: {hint}");
    }
    ExitCode::from(error.exit_code())
}

/// Logs to stderr: warnings, and more where HEAPTAP_LOG asks for it (`HEAPTAP_LOG=debug`).
fn log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("HEAPTAP_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .without_time()
        .try_init();
}
