//! One file per kind of difficulty, and what they share.

mod allocators;
mod confined;
mod containers;
mod crowds;
mod ends;
mod libraries;
mod memory_limits;
mod output;
mod places;
mod rivals;
mod unattended;
mod uprobes;

use std::process::Output;

use crate::common::{Kind, Python, Recording, Target, heaptap, soak};

/// Two interpreters stand for all where the behaviour is the kernel's rather than Python's; all of them in a soak.
pub fn a_few(python: &Python, kind: Kind) -> bool {
    let chosen = soak() || std::env::var_os("HEAPTAP_TEST_PYTHON").is_some();
    python.records_promised(kind)
        && (chosen || ["pyenv-3.11", "debian-3.14"].iter().any(|name| python.name.starts_with(name)))
}

/// True when the test may do what only root may; says so loudly otherwise.
pub fn is_root(what: &str) -> bool {
    let root = nix::unistd::Uid::effective().is_root();
    if !root {
        crate::common::skipped(&format!("{what}: needs root"));
    }
    root
}

/// A recording that must not come about; what was said, the exit status before it.
pub fn refusal(pid: i32, arguments: &[&str]) -> String {
    match Recording::try_attach(pid, arguments) {
        Ok(_) => panic!("{pid} was attached to"),
        Err(said) => said,
    }
}

/// Panics unless `said` (of [`refusal`]) is a refusal of the target that names all `words` and what to do.
pub fn assert_refused(said: &str, words: &[&str]) {
    assert!(said.contains("exit status: 3"), "{said}");
    for word in words.iter().chain(&["hint"]) {
        assert!(said.to_lowercase().contains(&word.to_lowercase()), "{word:?} is not in:\n{said}");
    }
}

/// `heaptap detach` on a target.
pub fn detach(target: &Target) -> Output {
    heaptap().args(["detach", "--pid", &target.pid().to_string()]).output().expect("heaptap starts")
}

/// What a command wrote to both streams.
pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}
