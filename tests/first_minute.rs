//! What a newcomer runs first: `doctor` on any interpreter, and the `demo`.

mod common;

use common::snapshot::assert_left_no_trace;
use common::{Kind, Snapshot, Target, for_each_kind, heaptap};

#[test]
fn the_doctor_tells_of_every_interpreter_and_touches_none() {
    for_each_kind(
        |_, _| true,
        |python, kind| {
            let mut target = Target::start(python, "libc_blocks.py");
            let before = Snapshot::take(target.pid());
            let output = heaptap()
                .args(["doctor", "--pid", &target.pid().to_string(), "--breakpoints", &kind.to_string()])
                .output()
                .expect("heaptap starts");
            assert_left_no_trace(&before, &mut target);
            let told = String::from_utf8(output.stdout).unwrap();
            let verdict = told.lines().last().unwrap_or_default();
            for word in [format!("CPython {}", python.version), python.libc.clone(), "self-test".into()] {
                assert!(told.contains(&word), "{python}: {word:?} is not in:\n{told}");
            }
            if python.records_promised(kind) {
                assert_eq!(output.status.code(), Some(0), "{python}: {told}");
                assert!(verdict.starts_with("can attach: heaptap attach --pid"), "{python}: {verdict}");
                assert_eq!(verdict.contains("--breakpoints trap"), kind == Kind::Trap, "{python}: {verdict}");
                assert!(told.contains("malloc 0x"), "{python}: no planned breakpoint in:\n{told}");
            } else {
                assert_eq!(output.status.code(), Some(3), "{python}: {told}");
                assert!(verdict.starts_with("can't attach: "), "{python}: {verdict}");
            }
        },
    );
}

#[test]
fn the_demo_finds_its_leak() {
    let Some(python) = common::pythons().iter().find(|p| p.records_promised(Kind::Jump) && p.root.is_none())
    else {
        return common::missing("an interpreter of this machine to run the demo with");
    };
    let folder = tempfile::tempdir().unwrap();
    let output = heaptap()
        .args(["demo", "--duration", "1s", "--python"])
        .arg(&python.command)
        .arg("-o")
        .arg(folder.path())
        .output()
        .expect("heaptap starts");
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{told}{}", String::from_utf8_lossy(&output.stderr));
    // The first row of the table, ordered by what each function itself holds.
    let first = told.lines().skip_while(|line| !line.contains("---")).nth(1).unwrap_or_default();
    assert!(first.contains("__init__"), "{told}");
    let svg = std::fs::read_to_string(folder.path().join("demo.svg")).unwrap();
    assert!(svg.contains("</svg>") && svg.contains("remember"));
    assert!(folder.path().join("demo.heaptap").exists());
}

#[test]
fn the_demo_says_what_it_misses() {
    let output = heaptap().args(["demo", "--python", "/no/such/python"]).output().expect("heaptap starts");
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.contains("/no/such/python") && told.contains("hint"), "{told}");
}
