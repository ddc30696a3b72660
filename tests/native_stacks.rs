//! C stacks: every frame is where gdb finds it, and Python's frames lie where its loop ran them.
//!
//! gdb is the oracle: `gdb -batch` walks the same threads, which stand still in every kind of frame, by its own reading of the unwind
//! data. Frames that were inlined, or left by a tail call, have no place on the stack: gdb makes them up, and they are left out there.

mod common;
mod random;
mod support;

use common::{Python, Snapshot, for_each_python, missing};
use heaptap::addr::RemoteAddr;
use heaptap::image::{modules, vdso};
use heaptap::inferior::memory::ProcessMemory;
use heaptap::inferior::{Inferior, maps};
use heaptap::native::{Ended, Stack, Tables, walk};
use heaptap::unwind_abi::Registers;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use random::Random;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::process::Command;
use std::time::Duration;
use support::Program;

/// The C stacks of all threads, while they stand.
fn stacks(pid: i32) -> BTreeMap<i32, Stack> {
    let memory = ProcessMemory::new(pid);
    let maps = maps::mappings(pid).unwrap();
    let mut modules = modules(pid, &maps, &memory).unwrap();
    modules.extend(vdso(&maps, &memory));
    let tables = Tables::of(modules);
    let mut inferior = Inferior::seize(pid).unwrap();
    inferior.stop_to_attach().unwrap();
    let mut found = BTreeMap::new();
    for tid in inferior.tids() {
        let registers = inferior.registers(tid).unwrap();
        let (pc, sp, bp) = (registers.rip, registers.rsp, Some(registers.rbp));
        found.insert(tid, walk(&tables, &memory, Registers { pc, sp, bp, is_return: false }));
    }
    inferior.detach().unwrap();
    found
}

const GDB: &str = r#"
import gdb, json
gdb.execute("set backtrace past-main on")
gdb.execute("set backtrace past-entry on")
stacks = {}
for thread in gdb.selected_inferior().threads():
    thread.switch()
    frame, stack, called = gdb.newest_frame(), [], False
    while frame is not None and frame.pc() > 0:
        if frame.type() not in (gdb.INLINE_FRAME, gdb.TAILCALL_FRAME):
            # Of a frame that has called, an address within its call; one that a signal came to has not.
            stack.append(frame.pc() - called)
            called = frame.type() != gdb.SIGTRAMP_FRAME
        frame = frame.older()
    stacks[thread.ptid[1]] = stack
print("STACKS " + json.dumps(stacks))
"#;

/// What gdb says of them; `None` where there is no gdb.
fn gdbs_stacks(pid: i32) -> Option<BTreeMap<i32, Vec<u64>>> {
    let mut gdb = Command::new("gdb");
    gdb.args(["-batch", "-nx", "-q", "-iex", "set auto-load no", "-iex", "set debuginfod enabled off"]);
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("stacks.py");
    std::fs::write(&script, GDB).unwrap();
    let output = gdb.args(["-p", &pid.to_string(), "-x"]).arg(&script).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find_map(|line| line.strip_prefix("STACKS "));
    let line = line.unwrap_or_else(|| panic!("gdb said: {text}{}", String::from_utf8_lossy(&output.stderr)));
    let stacks: HashMap<String, Vec<u64>> = serde_json::from_str(line).unwrap();
    Some(stacks.into_iter().map(|(tid, stack)| (tid.parse().unwrap(), stack)).collect())
}

/// gdb 13 loses its way in the stripped libraries of another root.
fn is_gdbs(python: &Python) -> bool {
    python.libc == "glibc" && python.root.is_none() && !python.name.starts_with("embed")
}

/// Compares the stacks of a process that does not run. How many there are, and how many of them are cut short in their first frame.
fn compare(interpreter: &Python, pid: i32) -> (usize, usize) {
    let ours = stacks(pid);
    let Some(gdbs) = gdbs_stacks(pid) else {
        missing("gdb");
        return (0, 0);
    };
    let mut cut = 0;
    assert_eq!(ours.keys().collect::<Vec<_>>(), gdbs.keys().collect::<Vec<_>>());
    for (tid, expected) in &gdbs {
        let expected: Vec<RemoteAddr> = expected.iter().map(|pc| RemoteAddr(*pc)).collect();
        let found = &ours[tid];
        // Assembly without unwind data that a thread stands in: gdb guesses that its caller is what the stack pointer points to.
        if found.ended == Ended::Cut && found.frames == expected[..1] {
            cut += 1;
            continue;
        }
        assert_eq!(found.frames, expected, "{}: thread {tid}, {:?}", interpreter.name, found.ended);
        assert_eq!(found.ended, Ended::Whole, "{}: thread {tid}", interpreter.name);
    }
    (gdbs.len(), cut)
}

#[test]
fn every_frame_is_where_gdb_finds_it() {
    for_each_python(is_gdbs, |interpreter| {
        for name in ["every_kind_of_frame.py", "in_a_signal.py"] {
            let mut program = Program::start(interpreter, name);
            program.line();
            let before = Snapshot::take(program.pid());
            assert_eq!(compare(interpreter, program.pid()).1, 0, "cut short where threads wait");
            assert_eq!(before.differences(program.pid()), Vec::<String>::new(), "a trace was left");
        }
    });
}

/// Anywhere: within a function's first and last instructions, in the procedure linkage table, in code without frame pointers.
#[test]
fn threads_stopped_anywhere_have_the_frames_that_gdb_finds() {
    let a_few = |python: &Python| is_gdbs(python) && [8, 11, 13].contains(&python.minor());
    let stops = if common::soak() { 500 } else { 4 };
    for_each_python(a_few, |interpreter| {
        let mut program = Program::start(interpreter, "busy.py");
        program.line();
        let pid = Pid::from_raw(program.pid());
        let (mut random, mut before) = (Random(7), None);
        let (mut all, mut cut) = (0, 0);
        for _ in 0..stops {
            std::thread::sleep(Duration::from_micros(random.next() % 5000));
            kill(pid, Signal::SIGSTOP).unwrap();
            until_stopped(program.pid());
            let before = before.get_or_insert_with(|| Snapshot::take(program.pid()));
            let (stacks, of_them_cut) = compare(interpreter, program.pid());
            (all, cut) = (all + stacks, cut + of_them_cut);
            assert_eq!(before.differences(program.pid()), Vec::<String>::new(), "a trace was left");
            kill(pid, Signal::SIGCONT).unwrap();
        }
        println!(
            "{}: {all} stacks as gdb finds them, {cut} of them cut in their first frame",
            interpreter.name
        );
        // A thread that does nothing but compute a hash stands in such assembly most of its time.
        assert!(cut <= 2 + all / 10, "{cut} of {all}");
    });
}

/// All threads of a process that SIGSTOP was sent to.
fn until_stopped(pid: i32) {
    let states = || maps::tasks(pid).unwrap().into_iter().map(|tid| maps::status(pid, tid).map(|s| s.state));
    while !states().all(|state| matches!(state, Ok('T' | 't'))) {
        std::thread::yield_now();
    }
}

#[test]
fn pythons_frames_lie_where_its_loop_ran_them() {
    for_each_python(
        |_| true,
        |interpreter| {
            let mut program = Program::start(interpreter, "every_kind_of_frame.py");
            program.line();
            let pid = program.pid().to_string();
            let before = Snapshot::take(program.pid());
            let arguments = ["stacks", "--json", "--native", "--hide-interpreter=false", "--pid", &pid];
            let said = common::heaptap::heaptap_says(0, &arguments);
            assert_eq!(before.differences(program.pid()), Vec::<String>::new(), "a trace was left");
            let look: Value = serde_json::from_slice(&said.stdout).unwrap();
            for thread in look["threads"].as_array().unwrap() {
                let merged = thread["native"]["frames"].as_array().unwrap();
                let is = |frame: &Value, kind: &str| frame["kind"] == kind;
                let python: Vec<Value> = merged.iter().filter(|frame| is(frame, "python")).cloned().collect();
                let expected = thread["frames"].as_array().unwrap();
                assert_eq!(python.len(), expected.len(), "{thread:#}");
                for (found, expected) in python.iter().zip(expected) {
                    let place = |frame: &Value| {
                        [frame["function"].clone(), frame["file"].clone(), frame["line"].clone()]
                    };
                    assert_eq!(place(found), place(expected));
                }
                let name = |frame: &Value| frame["function"].as_str().unwrap_or_default().to_owned();
                let loops = merged.iter().filter(|frame| name(frame).starts_with("_PyEval_EvalFrameDefault"));
                assert_eq!(loops.count(), 0, "{}: {thread:#}", interpreter.name);
                // musl has no unwind data: a thread that waits in it is cut short there, and Python's frames follow.
                if interpreter.libc == "musl" {
                    assert!(thread["native"]["cut"] == true, "{thread:#}");
                } else {
                    assert!(
                        thread["native"]["cut"] == false && is(merged.last().unwrap(), "native"),
                        "{thread:#}"
                    );
                }
            }
        },
    );
}
