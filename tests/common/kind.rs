//! The two kinds of breakpoints, and running a test with both.

use std::env;
use std::fmt;

use super::Python;
use super::pythons::{for_each, pythons};

/// A kind of breakpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Jumps to the agent in the target; every event is recorded.
    Jump,
    /// Traps and stops.
    Trap,
}

impl Kind {
    /// Both, or the one that `HEAPTAP_TEST_KIND` names.
    pub fn all() -> Vec<Kind> {
        match env::var("HEAPTAP_TEST_KIND").as_deref() {
            Ok("jump") => vec![Kind::Jump],
            Ok("trap") => vec![Kind::Trap],
            Ok(other) if !other.is_empty() => panic!("HEAPTAP_TEST_KIND={other} is neither jump nor trap"),
            _ => vec![Kind::Jump, Kind::Trap],
        }
    }

    /// The arguments of `heaptap attach` for this kind, and `others`.
    pub fn with<'a>(self, others: &[&'a str]) -> Vec<&'a str> {
        let own: &[&str] = match self {
            Kind::Jump => &["--breakpoints", "jump", "--exact"],
            // It has no samples: nothing to be asked for.
            Kind::Trap => &["--breakpoints", "trap"],
        };
        own.iter().chain(others).copied().collect()
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Kind::Jump => "jump",
            Kind::Trap => "trap",
        })
    }
}

/// An interpreter and a kind of breakpoint.
struct Pair(&'static Python, Kind);

impl fmt::Display for Pair {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}, {} breakpoints", self.0, self.1)
    }
}

/// Runs `body` on every interpreter and with every kind of breakpoint that `filter` takes; a failure of one does not
/// hide the others.
pub fn for_each_kind(filter: impl Fn(&Python, Kind) -> bool, body: impl Fn(&Python, Kind) + Sync) {
    let pairs =
        pythons().iter().flat_map(|python| Kind::all().into_iter().map(move |kind| Pair(python, kind)));
    let chosen = pairs.filter(|Pair(python, kind)| filter(python, *kind)).collect();
    for_each(chosen, |Pair(python, kind)| body(python, *kind));
}
