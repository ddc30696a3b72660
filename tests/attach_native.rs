//! Native frames of recorded allocations: those that gdb finds at the same allocations, whatever allocates, with either kind of
//! breakpoint; Python's frames in their places; libraries that come and go while recording.

mod common;
mod support;

use common::dump::Dump;
use common::heaptap::{Recording, detach_in_the_end};
use common::snapshot::assert_left_no_trace;
use common::truth::Truth;
use common::{Kind, Python, Snapshot, Target, environment, for_each_kind, for_each_python, missing, skipped};
use heaptap::capture::{CaptureReader, FrameKind, FrameView, Record};
use heaptap::image::modules;
use heaptap::inferior::maps;
use heaptap::inferior::memory::ProcessMemory;
use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use support::Program;

/// Stops where memory is asked for, now and then; asks for so much instead that the allocation can be told from all others; and
/// prints the addresses of the frames that called.
const GDB: &str = r#"
import gdb, json, random
random.seed(SEED)
gdb.execute("set backtrace past-main on")
gdb.execute("set backtrace past-entry on")
gdb.execute("set backtrace limit 4000")
breakpoint = gdb.Breakpoint("*MALLOC")
stacks = []
for stop in range(STOPS):
    breakpoint.ignore_count = random.randrange(8)
    gdb.execute("continue", to_string=True)
    size = FIRST + 16 * stop
    if int(gdb.parse_and_eval("$rdi")) > FIRST:
        continue
    gdb.execute("set $rdi = %d" % size)
    frame, stack, called = gdb.newest_frame().older(), [], True
    while frame is not None and frame.pc() > 0:
        if frame.type() not in (gdb.INLINE_FRAME, gdb.TAILCALL_FRAME):
            is_loop = (frame.name() or "").startswith("_PyEval_EvalFrameDefault")
            stack.append([frame.pc() - called, is_loop])
            called = frame.type() != gdb.SIGTRAMP_FRAME
        frame = frame.older()
    stacks.append([size, stack])
breakpoint.delete()
print("STACKS " + json.dumps(stacks))
"#;
/// Sizes that no program here asks for by itself.
const FIRST: u64 = (1 << 20) + 8;

/// A frame's address, within the call, and whether it is one of CPython's loop.
type GdbFrame = (u64, bool);

/// The stacks that gdb finds at `stops` allocations, by size.
fn gdbs_stacks(pid: i32, malloc: u64, stops: usize) -> Option<Vec<(u64, Vec<GdbFrame>)>> {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("stacks.py");
    let text = GDB.replace("MALLOC", &malloc.to_string()).replace("STOPS", &stops.to_string());
    std::fs::write(&script, text.replace("FIRST", &FIRST.to_string()).replace("SEED", "7")).unwrap();
    let mut gdb = Command::new("gdb");
    gdb.args(["-batch", "-nx", "-q", "-iex", "set auto-load no", "-iex", "set debuginfod enabled off"]);
    let output = gdb.args(["-p", &pid.to_string(), "-x"]).arg(&script).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find_map(|line| line.strip_prefix("STACKS "));
    let line = line.unwrap_or_else(|| panic!("gdb said: {text}{}", String::from_utf8_lossy(&output.stderr)));
    Some(serde_json::from_str(line).unwrap())
}

/// Of each allocation of a size that gdb asked for the frames, innermost first: file and address in it, [`PYTHON`] for one or more of Python's.
fn recorded(capture: &Path) -> HashMap<u64, Vec<String>> {
    let view = FrameView { python: true, native: true, interpreter: true };
    let mut reader = CaptureReader::open_with(capture, &view.into()).unwrap();
    let (mut stacks, mut names) = (HashMap::new(), HashMap::new());
    while let Some(record) = reader.next().map(Result::unwrap) {
        if let Record::Allocation(allocation) = record
            && allocation.size >= FIRST
        {
            stacks.insert(allocation.size, allocation.stack);
        }
    }
    let table = reader.stacks();
    for (size, stack) in stacks {
        let frames = table.frames(stack).map(|frame| match table.frame(frame) {
            text if text.kind == FrameKind::Python => PYTHON.to_owned(),
            text => text.function.to_owned(),
        });
        let mut frames: Vec<String> = frames.collect();
        frames.dedup_by(|next, before| next == PYTHON && before == PYTHON);
        names.insert(size, frames);
    }
    names
}

const PYTHON: &str = "python";

/// Where addresses lie, in the words of a capture without names.
fn places(pid: i32, frames: &[GdbFrame]) -> Vec<(String, bool)> {
    let memory = ProcessMemory::new(pid);
    let modules = modules(pid, &maps::mappings(pid).unwrap(), &memory).unwrap();
    let place = |(address, is_loop): &GdbFrame| {
        let at = heaptap::addr::RemoteAddr(*address);
        match modules.iter().find(|module| module.contains(at)) {
            Some(module) => (format!("{:#x} in {}", module.bias().to_image(at).0, module.name()), *is_loop),
            None => (format!("{address:#x}"), *is_loop),
        }
    };
    frames.iter().map(place).collect()
}

/// Whether the frames are gdb's, with Python's in place of those of the loop. A call of the loop that has not begun to run is its own frame.
fn is_same(found: &[String], expected: &[(String, bool)]) -> bool {
    let same = |(found, (expected, is_loop)): (&String, &(String, bool))| {
        found == expected || *is_loop && found == PYTHON
    };
    found.len() == expected.len() && found.iter().zip(expected).all(same)
}

fn malloc_of(pid: i32) -> u64 {
    let memory = ProcessMemory::new(pid);
    let modules = modules(pid, &maps::mappings(pid).unwrap(), &memory).unwrap();
    let libc = modules.iter().find(|module| module.name().starts_with("libc.so")).expect("a dynamic libc");
    libc.symbol_addr("malloc").unwrap().0
}

/// Compares what is recorded of a program that allocates everywhere with gdb's stacks.
fn compare(python: &Python, libraries: &[&str], attach: &[&str], stops: usize) {
    let folder = tempfile::tempdir().unwrap();
    let library = common::native::allocates(folder.path());
    let names: Vec<&str> = libraries.iter().map(|library| library.split("==").next().unwrap()).collect();
    let settings = [("HEAPTAP_NATIVE", library.to_str().unwrap()), ("HEAPTAP_LIBRARIES", &names.join(" "))];
    let mut program = Program::start_with(python, "allocates_everywhere.py", &settings);
    program.line();
    let pid = program.pid();
    let before = Snapshot::take(pid);
    let recording = Recording::try_attach(pid, &[attach, &["--native", "--bundle-symbols=false"]].concat());
    let recording = recording.unwrap_or_else(|refusal| panic!("{python}: {refusal}"));
    let Some(gdbs) = gdbs_stacks(pid, malloc_of(pid), stops) else { return missing("gdb") };
    let expected: HashMap<u64, Vec<(String, bool)>> =
        gdbs.into_iter().map(|(size, stack)| (size, places(pid, &stack))).collect();
    let capture = recording.stop();
    capture.assert_code(0);
    assert_eq!(before.differences(pid), Vec::<String>::new(), "a trace was left");
    let found = recorded(&capture.path);
    let mut compared = 0;
    for (size, expected) in &expected {
        // Asked for while the thread was inside another call, or as the recording ended.
        let Some(found) = found.get(size) else { continue };
        assert!(
            is_same(found, expected),
            "{python}: {size} bytes by\n{found:#?}\ngdb:\n{expected:#?}\n{}",
            capture.stderr
        );
        compared += 1;
    }
    println!("{python}: {compared} of {} stacks compared, all as gdb finds them", expected.len());
    assert!(compared * 10 >= expected.len() * 5, "{compared} of {}", expected.len());
}

fn stops() -> usize {
    if common::soak() { 500 } else { 20 }
}

#[test]
fn native_frames_are_those_that_gdb_finds_at_allocations() {
    let some = |python: &Python| {
        python.libc == "glibc"
            && python.name.starts_with("pyenv-")
            && ([8, 13].contains(&python.minor()) || common::soak())
    };
    for_each_python(some, |python| compare(python, &[], &["--exact", "--max-wait", "20s"], stops()));
}

#[test]
fn native_frames_of_extensions_are_those_that_gdb_finds() {
    let some = |python: &Python| python.name.starts_with("pyenv-3.11");
    for_each_python(some, |python| {
        let libraries = ["numpy==2.1.3", "lxml==5.3.0", "rpds-py==0.20.0"];
        match environment(python, &libraries) {
            Ok(command) => {
                let python = Python { command, ..python.clone() };
                compare(&python, &libraries, &["--exact", "--max-wait", "20s"], stops());
            }
            Err(why) => skipped(&format!("extensions on {python}: {why}")),
        }
    });
}

/// Of the allocations of `size` bytes and one more the names of their frames, innermost first.
fn named(capture: &Path, size: u64) -> Vec<Vec<String>> {
    let mut reader = CaptureReader::open(capture).unwrap();
    let mut stacks = Vec::new();
    while let Some(record) = reader.next().map(Result::unwrap) {
        if let Record::Allocation(allocation) = record
            && (size..size + 64).contains(&allocation.size)
        {
            stacks.push(allocation.stack);
        }
    }
    let table = reader.stacks();
    let names = |stack| table.frames(stack).map(|frame| table.frame(frame).function.to_owned()).collect();
    stacks.into_iter().map(names).collect()
}

/// Libraries that come, go, and come to lie in each other's place while every allocation is recorded: a moment after each change
/// stacks lead through the new code, whole; before that they are cut short, never led elsewhere.
#[test]
fn libraries_that_come_and_go_are_followed() {
    let some =
        |python: &Python| python.name.starts_with("pyenv-3.11") || python.name.starts_with("pyenv-3.13");
    for_each_python(some, |python| {
        let folder = tempfile::tempdir().unwrap();
        let other = folder.path().join("other");
        std::fs::create_dir(&other).unwrap();
        let shallow = common::native::compile_with("cc", &["-O2", "-DSHALLOW"], "allocates_below.c", &other);
        let deeper = common::native::compile("cc", "allocates_below.c", folder.path());
        let mut program = Program::start(python, "loads_later.py");
        program.line();
        let pid = program.pid();
        let before = Snapshot::take(pid);
        let recording = Recording::try_attach(pid, &["--exact", "--native", "--max-wait", "20s"]).unwrap();
        let mut size = 2 << 20;
        let mut say = |line: &str| {
            program.say(line);
            program.line();
        };
        let mut places = Vec::new();
        let mut sizes = Vec::new();
        for round in 0..6 {
            let library = if round % 2 == 0 { &shallow } else { &deeper };
            say(&format!("load {}", library.display()));
            let mapped = maps::mappings(pid).unwrap();
            let is_it = |map: &&heaptap::mapping::Mapping| {
                map.perms.execute && format!("{:?}", map.backing).contains(library.to_str().unwrap())
            };
            places.push(mapped.iter().find(is_it).expect("mapped").start);
            for _ in 0..20 {
                say(&format!("call {size}"));
                sizes.push((round, size));
                size += 128;
            }
            // Until whoever watches has seen it: the recorder looks every 15 ms when something is recorded.
            std::thread::sleep(std::time::Duration::from_millis(300));
            for _ in 0..3 {
                say(&format!("call {size}"));
                sizes.push((round + 100, size));
                size += 128;
            }
            say("unload");
        }
        assert!(places.windows(2).any(|two| two[0].0.abs_diff(two[1].0) < 1 << 16), "{places:x?}");
        let capture = recording.stop();
        capture.assert_code(0);
        // The last library is unloaded by now.
        assert_eq!(before.differences(pid), Vec::<String>::new(), "a trace was left");
        let (mut whole, mut cut) = (0, 0);
        for (round, size) in sizes {
            let expected: &[&str] = match round % 2 {
                0 => &["innermost", "allocate_and_call"],
                _ => &["innermost", "between", "allocate_and_call"],
            };
            for stack in named(&capture.path, size) {
                let of_library = |name: &&String| expected.contains(&name.as_str());
                let at = stack.iter().position(|name| expected.contains(&name.as_str()));
                let found: Vec<&String> = stack.iter().filter(of_library).collect();
                if stack.iter().any(|name| name == "<truncated here>") {
                    assert!(round < 100, "cut short though nothing has changed: {stack:?}");
                    cut += 1;
                    continue;
                }
                whole += 1;
                let at = at.unwrap_or_else(|| panic!("not through the library: {stack:?}"));
                assert_eq!(stack[at..at + expected.len()], *expected, "{stack:?}");
                assert_eq!(found.len(), expected.len(), "{stack:?}");
                assert!(stack.iter().any(|name| name == "<module>"), "{stack:?}");
            }
        }
        println!("{python}: {whole} stacks whole, {cut} cut short");
        assert!(whole >= 6 * 3 * 2, "{whole} whole, {cut} cut");
    });
}

/// With native frames recorded, what Python's frames say is what they say without: on every interpreter, by both kinds of breakpoint.
#[test]
fn pythons_frames_are_what_they_are_without_native_ones() {
    for_each_kind(Python::records_promised, |python, kind| {
        let programs: &[&str] =
            if kind == Kind::Jump { &["call_shapes.py", "threads.py"] } else { &["call_shapes.py"] };
        for program in programs {
            let mut target = Target::start(python, program);
            let before = Snapshot::take(target.pid());
            let recording = Recording::attach(&target, &kind.with(&["--native"]));
            let truth = Truth::from_json(target.go());
            let capture = recording.stop();
            capture.assert_code(0);
            assert_left_no_trace(&before, &mut target);
            let mut dump = Dump::parse(&capture.report("dump", &["--json", "--only", "python"]));
            // Where the native frames are cut short is told among them.
            dump.allocations
                .iter_mut()
                .for_each(|allocation| allocation.stack.retain(|frame| !frame.file.is_empty()));
            truth.assert_matches(&dump);
            assert!(target.exit().success(), "{program} does not end well after the detach");
        }
    });
}

/// The recorder is killed: what it left is found and removed, the native code's tables among it.
#[test]
fn what_a_killed_recorder_leaves_is_removed() {
    let some =
        |python: &Python| python.name.starts_with("pyenv-3.11") || python.name.starts_with("pyenv-3.13");
    for_each_python(some, |python| {
        let mut target = Target::start(python, "large_objects.py");
        let before = Snapshot::take(target.pid());
        Recording::attach(&target, &["--exact", "--native"]).kill();
        target.go();
        detach_in_the_end(target.pid());
        assert_left_no_trace(&before, &mut target);
    });
}

/// Calls `function` of a library, compiled so, while everything is recorded: the names of the frames of the largest allocation.
fn called(flags: &[&str], function: &str) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let library = common::native::compile_with("cc", flags, "allocates_below.c", folder.path());
    let python = common::pythons().iter().find(|python| python.name.starts_with("pyenv-3.11"));
    let Some(python) = python.or(common::pythons().first()) else { return Vec::new() };
    let mut program = Program::start(python, "loads_later.py");
    program.line();
    let say = |program: &mut Program, line: &str| {
        program.say(line);
        program.line();
    };
    say(&mut program, &format!("load {}", library.display()));
    let before = Snapshot::take(program.pid());
    let recording = Recording::try_attach(program.pid(), &["--exact", "--native"]).unwrap();
    say(&mut program, &format!("{function} {}", 2 << 20));
    let capture = recording.stop();
    capture.assert_code(0);
    assert_eq!(before.differences(program.pid()), Vec::<String>::new(), "a trace was left");
    named(&capture.path, 2 << 20).pop().expect("it is recorded")
}

/// A stack in memory of the program's own, as coroutines have them: nothing is known of it, and every word on it is tried.
#[test]
fn a_stack_of_the_programs_own_is_walked() {
    let frames = called(&["-O1"], "apart");
    let at =
        frames.iter().position(|name| name == "on_its_own_stack").unwrap_or_else(|| panic!("{frames:?}"));
    assert_eq!(
        frames[at - 3..=at],
        ["innermost", "between", "allocate_and_call", "on_its_own_stack"],
        "{frames:?}"
    );
}

#[test]
fn without_unwind_data_callers_are_guessed_and_that_is_told() {
    let none =
        ["-O1", "-g0", "-fno-asynchronous-unwind-tables", "-fno-unwind-tables", "-fcf-protection=none"];
    let pointers = called(&[&none[..], &["-fno-omit-frame-pointer"]].concat(), "call");
    let at = pointers.iter().position(|name| name == "innermost").unwrap_or_else(|| panic!("{pointers:?}"));
    let expected = ["innermost", "<callers from here on are guessed>", "between", "allocate_and_call"];
    assert_eq!(pointers[at..at + 4], expected, "{pointers:?}");
    // Nothing to go by: whatever is found, it is told that it is guessed, and the target lives.
    let nothing = called(&[&none[..], &["-fomit-frame-pointer"]].concat(), "call");
    let is_told = |name: &String| name.contains("guessed") || name.contains("truncated");
    assert!(nothing.iter().any(is_told), "{nothing:?}");
}
