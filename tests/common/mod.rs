//! What the tests on live processes share: the interpreters found on this machine, fixture programs driven over
//! pipes, a look at a process from outside before and after, and the comparison of a recording with the truth.
//!
//! Nothing here uses the heaptap library: the binary under test is only ever run as a command, so that a mistake in
//! the library cannot hide itself in the check.
#![allow(dead_code, unused_imports, reason = "every test binary compiles this module and uses a part of it")]

pub mod dump;
pub mod family;
pub mod heaptap;
pub mod kind;
pub mod native;
pub mod pointers;
pub mod pythons;
pub mod sites;
pub mod snapshot;
pub mod target;
pub mod truth;

pub use family::{Family, FamilyRecording};
pub use heaptap::{Recording, heaptap};
pub use kind::{Kind, for_each_kind};
pub use pythons::{Flavour, Python, environment, for_each_python, pythons};
pub use snapshot::Snapshot;
pub use target::Target;

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};

static SKIPPED: AtomicUsize = AtomicUsize::new(0);

/// True when a missing interpreter or tool must fail the test instead of skipping it.
pub fn everything_required() -> bool {
    std::env::var_os("HEAPTAP_REQUIRE_PYTHONS").is_some_and(|value| !value.is_empty() && value != "0")
}

/// Says loudly that something which could be installed is not there. Panics when `HEAPTAP_REQUIRE_PYTHONS` is set.
pub fn missing(what: &str) {
    assert!(!everything_required(), "HEAPTAP_REQUIRE_PYTHONS is set, and this is missing: {what}");
    skipped(what);
}

/// Says loudly that this machine cannot show something (a kernel without 32-bit programs, say), and counts it.
///
/// Written to the real stderr: the test runner swallows what `eprintln!` prints in a test that passes.
pub fn skipped(what: &str) {
    let count = SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
    let _ = writeln!(std::io::stderr(), "SKIPPED: {what} ({count} so far in this test binary)");
}

/// Copies a program that is going to be run. Another process does: while this one has the copy open for writing, so has, for a moment, a child
/// that another test forks, and "text file busy" is what running it comes to.
pub fn copy_program(from: impl AsRef<std::ffi::OsStr>, to: &std::path::Path) {
    let copied = std::process::Command::new("cp").arg(from).arg(to).status();
    assert!(copied.expect("cp").success());
}

/// Long soaks run only when asked for by `HEAPTAP_SOAK=1`.
pub fn soak() -> bool {
    std::env::var_os("HEAPTAP_SOAK").is_some_and(|value| !value.is_empty() && value != "0")
}
