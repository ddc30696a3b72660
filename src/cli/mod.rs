//! The command line: verbs, their arguments, exit codes. The only place that knows clap.

pub mod stacks;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Exit codes: 0 done, 1 failed, 2 usage (clap's), 3 target refused or unsupported.
pub const EXIT_FAILED: u8 = 1;
/// The target cannot be handled, and nothing was done to it.
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
    /// Show the Python stack of every thread, once
    Stacks(stacks::Args),
}

/// Parses the arguments and does what they say.
pub fn main() -> ExitCode {
    let outcome = match Cli::parse().verb {
        Verb::Stacks(args) => stacks::run(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("heaptap: {failure}");
            let mut source = std::error::Error::source(&failure);
            while let Some(cause) = source {
                eprintln!("  because: {cause}");
                source = cause.source();
            }
            ExitCode::from(failure.exit_code())
        }
    }
}
