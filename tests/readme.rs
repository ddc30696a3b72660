//! The README's table of versions is made from `cpython-layouts` and from what the live tests hold, never by hand: a cell says "yes" where
//! `tests/attach_records.rs`, `tests/attach_flavours.rs` and the other live tests record.
//!
//! `HEAPTAP_BLESS=1 cargo test --test readme` writes it.

mod common;

use common::Kind;
use common::pythons::promised;
use heaptap::cpython::Flavour;
use heaptap::cpython::layout::catalog;
use std::fmt::Write;
use std::path::Path;

const BEGIN: &str = "<!-- versions: begin";
const END: &str = "<!-- versions: end -->";

fn table() -> String {
    let mut out = String::from(
        "| CPython | Build | `stacks` | `attach`, sampled and `--exact` | `--python-allocators` | `--breakpoints trap` | Layout measured on |\n\
         |---|---|---|---|---|---|---|\n",
    );
    for file in catalog::files().unwrap() {
        let flavour = match file.flavour {
            Flavour::Default => common::Flavour::Default,
            Flavour::FreeThreaded => common::Flavour::FreeThreaded,
            Flavour::Debug => common::Flavour::Debug,
        };
        let records = |kind| match (promised(flavour, "glibc", kind), promised(flavour, "musl", kind)) {
            (true, true) => "yes",
            (true, false) => "glibc",
            _ => "no",
        };
        let jump = records(Kind::Jump);
        let tables = if file.flavour == Flavour::FreeThreaded { "always" } else { jump };
        let trap = records(Kind::Trap);
        let on: Vec<&str> = file.measured.iter().map(|m| m.version.as_str()).collect();
        writeln!(
            out,
            "| {} | {} | yes | {jump} | {tables} | {trap} | {} |",
            file.minor,
            file.flavour,
            on.join(", ")
        )
        .unwrap();
    }
    out
}

#[test]
fn the_table_of_versions_is_that_of_the_layouts() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = std::fs::read_to_string(&path).unwrap();
    let begin = readme.find(BEGIN).expect("the mark is there");
    let from = begin + readme[begin..].find('\n').unwrap() + 1;
    let to = readme.find(END).expect("the mark is there");
    let wanted = table();
    if std::env::var_os("HEAPTAP_BLESS").is_some() {
        std::fs::write(&path, format!("{}{wanted}{}", &readme[..from], &readme[to..])).unwrap();
        return;
    }
    assert_eq!(&readme[from..to], wanted, "run HEAPTAP_BLESS=1 cargo test --test readme");
}
