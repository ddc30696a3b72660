//! C stacks through libraries of every kind: stripped, deleted, without unwind data, with damaged unwind data, code that no file holds.

mod common;
mod support;

use common::{Python, Snapshot, pythons};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::Program;

/// `fixtures/native/calls_back.c`.
fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/native/calls_back.c")
}

/// It, compiled so.
fn library(folder: &Path, flags: &[&str]) -> PathBuf {
    let library = folder.join("calls_back.so");
    compile(&source(), &library, flags);
    library
}

fn compile(source: &Path, library: &Path, flags: &[&str]) {
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC"]).args(flags).arg("-o").args([library, source]);
    assert!(compiler.status().expect("cc is needed").success());
}

fn interpreter() -> &'static Python {
    let usual =
        |python: &&Python| python.name.starts_with("pyenv-3.11") || python.name.starts_with("pyenv-3.13");
    pythons().iter().find(usual).unwrap_or(&pythons()[0])
}

/// Where it waits, called back through `function` of the library.
fn waiting(library: &Path, function: &str) -> Program {
    let library = library.to_str().unwrap();
    let settings = [("HEAPTAP_NATIVE", library), ("HEAPTAP_FUNCTION", function)];
    let mut program = Program::start_with(interpreter(), "calls_back.py", &settings);
    program.line();
    program
}

/// The main thread's merged stack.
fn merged(program: &Program) -> Value {
    let pid = program.pid().to_string();
    let before = Snapshot::take(program.pid());
    let arguments = ["stacks", "--json", "--native", "--pid", &pid];
    let said = common::heaptap::heaptap_says(0, &arguments);
    assert_eq!(before.differences(program.pid()), Vec::<String>::new(), "a trace was left");
    let look: Value = serde_json::from_slice(&said.stdout).unwrap();
    look["threads"][0]["native"].clone()
}

/// Of each of its frames the name, whether it was cut short, and how many were guessed.
fn look(program: &Program) -> (Vec<String>, bool, u64) {
    let native = merged(program);
    let name = |frame: &Value| match (&frame["kind"], &frame["function"], &frame["module"]) {
        (Value::String(kind), Value::String(function), _) if kind == "python" => format!("python {function}"),
        (_, Value::String(function), _) => function.clone(),
        (_, _, Value::String(module)) => format!("? in {}", module.rsplit('/').next().unwrap()),
        _ => "? in no file".to_owned(),
    };
    let frames = native["frames"].as_array().unwrap().iter().map(name).collect();
    (frames, native["cut"].as_bool().unwrap(), native["guessed"].as_u64().unwrap())
}

/// The frames between Python's two functions, without those of libffi and ctypes.
fn between(frames: &[String]) -> Vec<&str> {
    let at =
        |name: &str| frames.iter().position(|frame| frame == name).unwrap_or_else(|| panic!("{frames:#?}"));
    let (waits, calls) = (at("python waits"), at("python calls"));
    assert!(waits < calls, "{frames:#?}");
    let foreign = |frame: &&str| {
        !(frame.contains("ffi")
            || frame.contains("ctypes")
            || frame.contains("CFuncPtr")
            || frame.contains("closure_fcn")
            || *frame == "_CallPythonObject"
            || *frame == "_call_function_pointer")
    };
    frames[waits + 1..calls].iter().map(String::as_str).filter(foreign).collect()
}

#[test]
fn functions_of_a_library_lie_between_pythons() {
    let folder = tempfile::tempdir().unwrap();
    for flags in [&["-O2"][..], &["-O0"], &["-O2", "-fomit-frame-pointer", "-g"]] {
        let library = library(folder.path(), flags);
        for function in ["plain", "aligned"] {
            let program = waiting(&library, function);
            let (frames, cut, guessed) = look(&program);
            assert_eq!(between(&frames), ["inner", "middle", function], "{flags:?}: {frames:#?}");
            assert!(!cut && guessed == 0, "{flags:?} {function}");
        }
    }
}

#[test]
fn a_stripped_library_has_the_names_it_exports_and_a_deleted_one_all() {
    let folder = tempfile::tempdir().unwrap();
    let library = library(folder.path(), &["-O2"]);
    let program = waiting(&library, "plain");
    // As an upgrade does under a running server: another file of this name.
    std::fs::remove_file(&library).unwrap();
    std::fs::write(&library, "another").unwrap();
    let (frames, cut, _) = look(&program);
    assert_eq!(between(&frames), ["inner", "middle", "plain"], "{frames:#?}");
    assert!(!cut);
    drop(program);

    let source = std::fs::read_to_string(source()).unwrap();
    let (visible, stripped) = (folder.path().join("visible.c"), folder.path().join("stripped.so"));
    let plain = "__attribute__((noinline)) int plain";
    assert!(source.contains(plain));
    std::fs::write(
        &visible,
        source.replace(plain, "__attribute__((noinline, visibility(\"default\"))) int plain"),
    )
    .unwrap();
    compile(&visible, &stripped, &["-O2", "-fvisibility=hidden", "-s"]);
    let (frames, cut, _) = look(&waiting(&stripped, "plain"));
    assert_eq!(between(&frames), ["? in stripped.so", "? in stripped.so", "plain"], "{frames:#?}");
    assert!(!cut);
}

#[test]
fn without_unwind_data_frame_pointers_are_followed_and_that_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let none = ["-fno-asynchronous-unwind-tables", "-fno-unwind-tables"];
    // The linker's table for its own procedure linkage counts as unwind data.
    let library = library(
        folder.path(),
        &[
            &none[..],
            &["-O1", "-fno-omit-frame-pointer", "-Wl,--no-ld-generated-unwind-info", "-nostartfiles"],
        ]
        .concat(),
    );
    let (frames, cut, guessed) = look(&waiting(&library, "plain"));
    assert_eq!(between(&frames), ["inner", "middle", "plain"], "{frames:#?}");
    assert!(!cut && guessed > 0, "{frames:#?}");
}

#[test]
fn code_that_no_file_holds_and_damaged_unwind_data_end_the_stack_and_pythons_frames_follow() {
    let folder = tempfile::tempdir().unwrap();
    let library = library(folder.path(), &["-O2"]);
    let (frames, cut, _) = look(&waiting(&library, "generated"));
    assert!(cut, "{frames:#?}");
    let python: Vec<&String> = frames.iter().filter(|frame| frame.starts_with("python ")).collect();
    assert_eq!(python, ["python waits", "python calls", "python <module>"], "{frames:#?}");
    assert_eq!(frames.last().unwrap(), "python <module>", "{frames:#?}");

    let mut bytes = std::fs::read(&library).unwrap();
    let file = heaptap::image::elf::ElfFile::new(std::fs::File::open(&library).unwrap(), &library).unwrap();
    let section = file.section(".eh_frame").unwrap();
    bytes[section.offset as usize..][..section.size as usize].fill(0xab);
    let damaged = folder.path().join("damaged.so");
    std::fs::write(&damaged, bytes).unwrap();
    let (frames, _, _) = look(&waiting(&damaged, "plain"));
    let python: Vec<&String> = frames.iter().filter(|frame| frame.starts_with("python ")).collect();
    assert_eq!(python, ["python waits", "python calls", "python <module>"], "{frames:#?}");
}

#[test]
fn lines_are_told_by_debugging_information_also_where_it_is_compressed() {
    let folder = tempfile::tempdir().unwrap();
    let source = include_str!("../fixtures/native/calls_back.c");
    let line = 1 + source.lines().position(|line| line.contains("return back(kept) + kept;")).unwrap();
    for flags in [&["-O1", "-g"][..], &["-O1", "-g", "-gz=zlib"], &["-O1", "-g", "-gdwarf-4"]] {
        let library = library(folder.path(), flags);
        let native = merged(&waiting(&library, "plain"));
        let inner = native["frames"].as_array().unwrap().iter().find(|frame| frame["function"] == "inner");
        let inner = inner.unwrap_or_else(|| panic!("{native:#}"));
        assert!(
            inner["file"].as_str().is_some_and(|file| file.ends_with("calls_back.c")),
            "{flags:?}: {inner}"
        );
        assert_eq!(inner["line"].as_u64(), Some(line as u64), "{flags:?}");
    }
}
