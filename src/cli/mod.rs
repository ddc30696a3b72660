//! The command line: one file per verb. The only place that knows clap.
//!
//! Nothing here uses `println!`: it panics where the reader of our output has gone, and a verb may at that moment
//! have a process stopped or breakpoints planted.

#![deny(clippy::print_stdout, clippy::print_stderr)]

mod attach;
mod attach_tree;
mod attach_worker;
mod demo;
mod detach;
mod diff;
mod doctor;
mod dump;
mod events;
mod flamegraph;
mod frames;
mod gauges;
mod leaks;
mod log;
mod parse;
mod pattern;
mod snapshot;
mod stacks;
mod stats;
mod summary;
mod table;
mod tree;
mod view;
mod when;

use crate::error::{Error, Exit};
use crate::report::text;
use clap::{Parser, Subcommand};
use std::io::Write;
use std::process::ExitCode;

const EXAMPLES: &str = "\
Examples:
  heaptap demo                           a leaking program, found: your first minute
  heaptap doctor --pid 1234              can this process be attached to, and how?
  heaptap attach --pid 1234 -o app.heaptap --duration 30s
  heaptap summary app.heaptap            what was live at the high-water mark, per function
  heaptap tree --leaks app.heaptap       who allocated what was never freed
  heaptap leaks app.heaptap              which lines leak, and how fast
  heaptap flamegraph app.heaptap         write app.svg

Exit codes: 0 done, 1 failed, 2 usage, 3 the target was refused.";

/// Attach to a running CPython process, record where its memory is allocated, and let go without a trace.
#[derive(Parser)]
#[command(name = "heaptap", version, after_help = EXAMPLES, help_expected = true, max_term_width = 110)]
pub struct Cli {
    #[command(flatten)]
    log: log::LogArgs,
    #[command(subcommand)]
    verb: Verb,
}

/// What to do. One line per verb, here and in [`Cli::run`].
#[derive(Subcommand)]
enum Verb {
    Demo(demo::DemoArgs),
    Attach(attach::AttachArgs),
    Snapshot(snapshot::Args),
    Detach(detach::DetachArgs),
    Doctor(doctor::DoctorArgs),
    Stacks(stacks::Args),
    Summary(summary::Args),
    Table(table::Args),
    Tree(tree::Args),
    Stats(stats::Args),
    Diff(diff::Args),
    Leaks(leaks::Args),
    Flamegraph(flamegraph::Args),
    Gauges(gauges::Args),
    Dump(dump::Args),
}

impl Cli {
    fn run(self) -> Result<(), Error> {
        match self.verb {
            Verb::Demo(args) => demo::run(&args),
            Verb::Attach(args) => attach::run(&args),
            Verb::Snapshot(args) => snapshot::run(&args),
            Verb::Detach(args) => detach::run(&args),
            Verb::Doctor(args) => doctor::run(&args),
            Verb::Stacks(args) => stacks::run(&args),
            Verb::Summary(args) => args.run(),
            Verb::Table(args) => args.run(),
            Verb::Tree(args) => args.run(),
            Verb::Stats(args) => args.run(),
            Verb::Diff(args) => args.run(),
            Verb::Leaks(args) => args.run(),
            Verb::Flamegraph(args) => args.run(),
            Verb::Gauges(args) => args.run(),
            Verb::Dump(args) => args.run(),
        }
    }
}

/// Parses the command line, runs the verb, prints an error and its hint.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    log::start(&cli.log);
    let exit = match cli.run() {
        Ok(()) => Exit::Done,
        Err(error) if error.is_broken_pipe() => Exit::Done,
        Err(error) if log::is_json() => {
            events::failed(&error, &causes(&error));
            error.exit()
        }
        Err(error) => {
            // If stderr is gone too there is nobody left to tell.
            let mut stderr = std::io::stderr().lock();
            let _ = writeln!(stderr, "heaptap: error: {}", text::escaped(&error.to_string()));
            for cause in causes(&error) {
                let _ = writeln!(stderr, "because: {}", text::escaped(&cause));
            }
            if let Some(hint) = error.hint() {
                let _ = writeln!(stderr, "hint: {}", text::escaped(&hint));
            }
            error.exit()
        }
    };
    exit.into()
}

/// What an error was caused by, outermost first; what its message says already is left out.
fn causes(error: &Error) -> Vec<String> {
    let mut causes = Vec::new();
    let mut told = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        // Many messages end with their cause.
        let text = cause.to_string();
        if !told.ends_with(&text) {
            causes.push(text.clone());
        }
        told = text;
        source = cause.source();
    }
    causes
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed_and_every_verb_has_examples() {
        let command = Cli::command();
        command.clone().debug_assert();
        for verb in command.get_subcommands() {
            let help = verb.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Examples:"), "{} has no examples", verb.get_name());
            assert!(verb.get_about().is_some(), "{} is not described", verb.get_name());
        }
    }
}
