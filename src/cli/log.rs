//! What heaptap logs to stderr, how much of it, and in which form. Nothing that is written there can fail: a terminal that has
//! gone, or a closed pipe, is no reason to end what is being done.

use clap::Args;
use std::io;
use std::sync::OnceLock;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::Directive;

/// Target of the events in [`super::events`].
pub(super) const EVENTS: &str = "heaptap::events";

static FORMAT: OnceLock<Format> = OnceLock::new();

/// The form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Lines to be read
    Text,
    /// One JSON object in a line; what a recording tells (that it began, its progress, why it ended) among them
    Json,
}

/// Options of every verb.
#[derive(Debug, Args)]
pub struct LogArgs {
    /// Tell more on stderr: -v what is done, -vv also how, -vvv everything (HEAPTAP_LOG=FILTER is finer)
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// The form of what is logged to stderr
    #[arg(long, value_name = "FORM", global = true, default_value = "text")]
    pub log_format: Format,
}

/// Whether the log is JSON.
pub(super) fn is_json() -> bool {
    FORMAT.get() == Some(&Format::Json)
}

/// Begins to log.
pub(super) fn start(args: &LogArgs) {
    let format = *FORMAT.get_or_init(|| args.log_format);
    let level = match args.verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_env("HEAPTAP_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let log = tracing_subscriber::fmt()
        .with_writer(io::stderr)
        // It would be told by `eprintln!`, which panics where stderr is what failed.
        .log_internal_errors(false);
    let _ = match format {
        Format::Json => {
            let told: Option<Directive> = format!("{EVENTS}=info").parse().ok();
            let filter = told.into_iter().fold(filter, EnvFilter::add_directive);
            log.with_env_filter(filter).json().flatten_event(true).with_current_span(false).try_init()
        }
        // Whoever asks for more wants to know when.
        Format::Text if args.verbose > 0 => log.with_env_filter(filter).try_init(),
        Format::Text => log.with_env_filter(filter).without_time().try_init(),
    };
}
