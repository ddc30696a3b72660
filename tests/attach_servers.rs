//! Web applications that answer requests while they are recorded: every answer is right, every record, and nothing stays.
//! Frameworks from PyPI, in throwaway environments.

mod common;

use common::snapshot::assert_left_no_trace;
use common::truth::Truth;
use common::{Python, Recording, Snapshot, Target, for_each_python, skipped};
use std::path::{Path, PathBuf};
use std::process::Command;

fn environment(python: &Python, packages: &[&str]) -> Result<PathBuf, String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/test-environment");
    let output =
        Command::new(script).arg(&python.command).args(packages).output().map_err(|e| e.to_string())?;
    if output.status.success() {
        Ok(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
    } else {
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }
}

fn serves(framework: &str, packages: &[&str]) {
    let has_wheels =
        |python: &Python| python.name.starts_with("pyenv-") && [11, 13].contains(&python.minor());
    for_each_python(has_wheels, |python| {
        let command = match environment(python, packages) {
            Ok(command) => command,
            Err(why) => return skipped(&format!("{framework} on {python}: {why}")),
        };
        let python = Python { command, ..python.clone() };
        let mut target = Target::builder(&python, "serving.py").arg(framework).start();
        let kinds: [&[&str]; 4] = [
            &["--exact", "--max-wait", "20s"],
            &["--exact", "--max-wait", "20s", "--python-allocators"],
            &["--sample", "8KiB"],
            &["--sample", "8KiB", "--python-allocators"],
        ];
        for arguments in kinds {
            let before = Snapshot::take(target.pid());
            let recording = Recording::attach(&target, arguments);
            let truth = Truth::from_json(target.go());
            let capture = recording.stop();
            assert_left_no_trace(&before, &mut target);
            let dump = capture.assert_code(0).dump();
            if arguments.contains(&"--exact") {
                truth.assert_matches(&dump);
            } else {
                truth.assert_estimated(&dump, capture.drops());
            }
        }
        target.go();
    });
}

#[test]
fn uvicorn_answers() {
    serves("uvicorn", &["uvicorn==0.32.1", "h11==0.14.0"]);
}

#[test]
fn flask_answers() {
    serves("flask", &["flask==3.1.0"]);
}

#[test]
fn django_answers() {
    serves("django", &["django==4.2.17"]);
}
