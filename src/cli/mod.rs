//! The command line: one file per verb. The only place that knows clap.

mod dump;
mod flamegraph;
mod stats;
mod summary;
mod table;
mod tree;
mod view;

use crate::error::{Error, Exit};
use crate::report::text;
use clap::{Parser, Subcommand};
use std::io::Write;
use std::process::ExitCode;

const EXAMPLES: &str = "\
Examples:
  heaptap summary app.heaptap            what was live at the high-water mark, per function
  heaptap tree --leaks app.heaptap       who allocated what was never freed
  heaptap flamegraph app.heaptap         write app.svg

Exit codes: 0 done, 1 failed, 2 usage, 3 the target was refused.";

/// Attach to a running CPython process, record where its memory is allocated, and let go without a trace.
#[derive(Parser)]
#[command(name = "heaptap", version, after_help = EXAMPLES, help_expected = true, max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

/// What to do. One line per verb, here and in [`Cli::run`].
#[derive(Subcommand)]
enum Verb {
    Summary(summary::Args),
    Table(table::Args),
    Tree(tree::Args),
    Stats(stats::Args),
    Flamegraph(flamegraph::Args),
    Dump(dump::Args),
}

impl Cli {
    fn run(self) -> Result<(), Error> {
        match self.verb {
            Verb::Summary(args) => args.run(),
            Verb::Table(args) => args.run(),
            Verb::Tree(args) => args.run(),
            Verb::Stats(args) => args.run(),
            Verb::Flamegraph(args) => args.run(),
            Verb::Dump(args) => args.run(),
        }
    }
}

/// Parses the command line, runs the verb, prints an error and its hint.
pub fn run() -> ExitCode {
    let exit = match Cli::parse().run() {
        Ok(()) => Exit::Done,
        Err(error) if error.is_broken_pipe() => Exit::Done,
        Err(error) => {
            // If stderr is gone too there is nobody left to tell.
            let mut stderr = std::io::stderr().lock();
            let _ = writeln!(stderr, "heaptap: error: {}", text::escaped(&error.to_string()));
            if let Some(hint) = error.hint() {
                let _ = writeln!(stderr, "hint: {}", text::escaped(&hint));
            }
            error.exit()
        }
    };
    exit.into()
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
