//! The layout files: complete, of the right shape, and true: equal to what the debug information of each interpreter present says.

mod common;
mod support;

use heaptap::cpython::layout::catalog;
use heaptap::cpython::version::PythonVersion;
use std::path::Path;
use std::process::Command;
use support::interpreters;

fn folder(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

#[test]
fn every_file_of_the_folder_is_built_in() {
    let mut there: Vec<String> = std::fs::read_dir(folder("cpython-layouts"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".toml"))
        .collect();
    let mut built_in: Vec<String> = catalog::FILES.iter().map(|(name, _)| (*name).to_owned()).collect();
    there.sort();
    built_in.sort();
    assert_eq!(there, built_in);
}

#[test]
fn every_file_is_for_what_its_name_says_and_measured_at_both_ends() {
    for file in catalog::files().unwrap() {
        let suffix = file.name.trim_end_matches(".toml").trim_start_matches(&file.minor);
        let flavour = match suffix {
            "" => "default build",
            "d" => "debug build",
            "t" => "free-threaded build",
            other => panic!("{}: {other:?}", file.name),
        };
        assert_eq!(file.flavour.to_string(), flavour, "{}", file.name);
        for end in [file.patches.0, file.patches.1] {
            let version = format!("{}.{end}", file.minor);
            assert!(
                file.measured.iter().any(|m| m.version == version),
                "{}: {version} was not measured",
                file.name
            );
        }
        let version = PythonVersion::parse(&format!("{}.{}", file.minor, file.patches.0)).unwrap();
        let publishes = version.minor >= 13;
        assert_eq!(file.debug_offsets.is_some(), publishes, "{}", file.name);
        if let Some(shape) = &file.debug_offsets {
            assert_eq!(shape.size, shape.fields.len() as u64 * 8, "{}", file.name);
            assert_eq!(shape.fields[..3], ["cookie", "version", "free_threaded"], "{}", file.name);
            // What the process says is not said twice.
            let twice = shape
                .fields
                .iter()
                .filter_map(|f| f.split_once('.'))
                .find(|(table, key)| file.tables.get(*table).is_some_and(|keys| keys.contains_key(*key)));
            assert_eq!(twice, None, "{}", file.name);
        } else {
            // Complete by itself: the shape is checked as it is built.
            file.build(version, None).unwrap_or_else(|e| panic!("{e}"));
        }
    }
}

#[test]
fn every_file_equals_the_debug_information_of_the_interpreters() {
    if Command::new("gdb").arg("--version").output().is_err() {
        eprintln!("SKIPPED: no gdb, the layout files are not compared with debug information");
        assert!(std::env::var_os("HEAPTAP_REQUIRE_PYTHONS").is_none(), "gdb is missing");
        return;
    }
    let (mut compared, mut skipped, mut wrong) = (0, 0, Vec::new());
    for interpreter in interpreters() {
        let mut command = Command::new(folder("scripts/extract-layout"));
        command.arg("--check").arg(&interpreter.binary);
        if let Some(dir) = &interpreter.debug_dir {
            command.arg("--debug-dir").arg(dir);
        }
        if interpreter.flavour == common::pythons::Flavour::Debug {
            command.args(["--flavour", "debug"]);
        }
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            compared += 1;
        } else if text.contains("no debug information") || text.contains("found no types") {
            eprintln!("SKIPPED: {} has no debug information", interpreter.name);
            skipped += 1;
        } else {
            wrong.push(format!("{}: {text}", interpreter.name));
        }
    }
    eprintln!("{compared} interpreters agree with their layout file, {skipped} have no debug information");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(compared > 0 || skipped > 0);
}
