//! What `diff` and `leaks` share: which allocations to look at.

use crate::analysis::{Filter, Pattern, Subject};

/// Patterns to look at or to leave out.
#[derive(clap::Args)]
pub(super) struct FilterArgs {
    /// Look only at allocations that match: FILE, or function=NAME, module=NAME, thread=NAME, with * and ?.
    #[arg(long, value_name = "PATTERN", value_parser = parse_pattern)]
    include: Vec<Pattern>,

    /// Leave out allocations that match.
    #[arg(long, value_name = "PATTERN", value_parser = parse_pattern)]
    exclude: Vec<Pattern>,

    /// Hold patterns against every frame of a stack, not only the innermost.
    #[arg(long)]
    all_frames: bool,
}

impl FilterArgs {
    pub(super) fn filter(&self) -> Filter {
        let Self { include, exclude, all_frames } = self;
        Filter { include: include.clone(), exclude: exclude.clone(), all_frames: *all_frames }
    }
}

/// Reads `*/shop/*.py`, `function=Shop.*`, `module=django`, `thread=worker-*`.
fn parse_pattern(text: &str) -> Result<Pattern, String> {
    let known = [
        ("file=", Subject::File),
        ("function=", Subject::Function),
        ("module=", Subject::Module),
        ("thread=", Subject::Thread),
    ];
    let given = known.into_iter().find_map(|(prefix, subject)| Some((subject, text.strip_prefix(prefix)?)));
    let (subject, pattern) = given.unwrap_or((Subject::File, text));
    let glob = glob::Pattern::new(pattern).map_err(|error| format!("`{pattern}` is no pattern: {error}"))?;
    Ok(Pattern { subject, glob })
}
