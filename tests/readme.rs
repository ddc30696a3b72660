//! The README's table of versions is made from `cpython-layouts`, never by hand.
//!
//! `HEAPTAP_BLESS=1 cargo test --test readme` writes it.

use heaptap::cpython::Flavour;
use heaptap::cpython::layout::catalog;
use std::fmt::Write;
use std::path::Path;

const BEGIN: &str = "<!-- versions: begin";
const END: &str = "<!-- versions: end -->";

fn table() -> String {
    let mut out = String::from(
        "| CPython | Build | `stacks` | `attach` | Layout measured on |\n|---|---|---|---|---|\n",
    );
    for file in catalog::files().unwrap() {
        let attach = if file.flavour == Flavour::FreeThreaded { "no" } else { "yes" };
        let on: Vec<&str> = file.measured.iter().map(|m| m.version.as_str()).collect();
        writeln!(out, "| {} | {} | yes | {attach} | {} |", file.minor, file.flavour, on.join(", ")).unwrap();
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
