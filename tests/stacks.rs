//! What `heaptap stacks` says of threads blocked in every kind of frame equals what the process itself says, on every interpreter.

mod common;
mod support;

use common::Python as Interpreter;
use heaptap::addr::RemoteAddr;
use heaptap::cpython::thread_state::OwnState;
use heaptap::cpython::{AllocatorTable, Binary, Domain, Python, Span};
use heaptap::image::{Module, modules};
use heaptap::inferior::maps;
use heaptap::inferior::memory::ProcessMemory;
use heaptap::memory::RemoteMemory;
use heaptap::python_binary::binaries;
use serde_json::{Value, json};
use std::sync::atomic::{AtomicUsize, Ordering};
use support::{Program, interpreters};

/// What depends on the interpreter is run for each; all failures are told, not only the first.
fn on_every_interpreter(test: impl Fn(&Interpreter) + std::panic::RefUnwindSafe) {
    let all = interpreters();
    let failed: Vec<_> = all
        .iter()
        .filter(|i| {
            eprintln!("--- {}", i.name);
            std::panic::catch_unwind(|| test(i)).is_err()
        })
        .map(|i| i.name.clone())
        .collect();
    assert!(failed.is_empty(), "failed on {} of {}: {failed:?}", failed.len(), all.len());
}

fn locate(pid: i32) -> (ProcessMemory, Python) {
    let memory = ProcessMemory::new(pid);
    let modules = modules(pid, &maps::mappings(pid).unwrap(), &memory).unwrap();
    let python = Python::locate(&memory, &binaries(&modules)).unwrap_or_else(|e| panic!("{e}"));
    (memory, python)
}

#[test]
fn stacks_equal_what_the_process_says() {
    on_every_interpreter(|interpreter| {
        let mut program = Program::start(interpreter, "every_kind_of_frame.py");
        let own: Value = serde_json::from_str(&program.line()).unwrap();
        let before = common::Snapshot::take(program.pid());
        let output = assert_cmd::Command::cargo_bin("heaptap")
            .unwrap()
            .args(["stacks", "--json", "--pid", &program.pid().to_string()])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let seen: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(seen["python"], own["version"]);
        let threads = seen["threads"].as_array().unwrap();
        let expected = own["threads"].as_array().unwrap();
        assert_eq!(expected.len(), 10);
        for thread in expected {
            let found: Vec<_> = match thread["tid"].as_i64() {
                Some(tid) => threads.iter().filter(|t| t["tid"] == tid).collect(),
                // `threading` does not know it: a name neither.
                None => threads.iter().filter(|t| t["python"] == true && t["name"].is_null()).collect(),
            };
            assert_eq!(found.len(), 1, "thread {}", thread["name"]);
            assert_eq!(found[0]["name"], thread["name"]);
            assert_eq!((&found[0]["moving"], &found[0]["truncated"]), (&json!(false), &json!(false)));
            let frames: Vec<Value> = found[0]["frames"]
                .as_array()
                .unwrap()
                .iter()
                .map(|f| json!([f["function"], f["file"], f["line"]]))
                .collect();
            assert_eq!(&json!(frames), &thread["frames"], "thread {}", thread["name"]);
        }
        let without: Vec<_> = threads.iter().filter(|t| t["python"] == false).collect();
        let raw = own["raw_thread"].as_u64().unwrap();
        assert_eq!(without.len(), usize::from(raw != 0), "threads without a Python state");
        assert!(without.iter().all(|t| t["frames"] == json!([])));
        assert_eq!(before.differences(program.pid()), Vec::<String>::new(), "a trace was left");
    });
}

#[test]
fn each_thread_pointer_leads_to_the_threads_own_state() {
    on_every_interpreter(|interpreter| {
        let mut program = Program::start(interpreter, "every_kind_of_frame.py");
        let own: Value = serde_json::from_str(&program.line()).unwrap();
        let (memory, python) = locate(program.pid());
        assert_ne!(python.own_state, OwnState::Lists, "{:?}", python.evidence);
        let threads = python.threads(&memory).unwrap();
        for thread in &threads {
            let tid = thread.tid.expect("every thread has an id");
            let state = python.thread_state_of(&memory, tid, thread.ident).unwrap();
            assert_eq!(state, Some(thread.tstate), "{:?}", thread.name);
            // The slow way must agree.
            let slow = Python { own_state: OwnState::Lists, ..python.clone() };
            assert_eq!(slow.thread_state_of(&memory, tid, thread.ident).unwrap(), state);
        }
        let raw = own["raw_thread"].as_u64().unwrap();
        if raw != 0 {
            assert_eq!(python.thread_state_of(&memory, 0, raw).unwrap(), None, "a thread without Python");
        }
        // A thread pointer that is none.
        assert_eq!(python.thread_state_of(&memory, 0, 0).unwrap(), None);
        assert_eq!(python.thread_state_of(&memory, 0, python.runtime.0).unwrap_or(None), None);
        let tids: Vec<i32> = maps::namespaced_tasks(program.pid()).unwrap().iter().map(|t| t.1).collect();
        let report = python.self_test(&memory, &tids).unwrap();
        assert_eq!(report.threads, threads.len());
        assert!(report.frames > 600);
        assert!(python.self_test(&memory, &[1]).is_err(), "ids of another process must not pass");
    });
}

#[test]
fn the_allocator_tables_are_found() {
    on_every_interpreter(|interpreter| {
        let mut program = Program::start(interpreter, "every_kind_of_frame.py");
        program.line();
        let pid = program.pid();
        let memory = ProcessMemory::new(pid);
        let modules = modules(pid, &maps::mappings(pid).unwrap(), &memory).unwrap();
        let binaries = binaries(&modules);
        let python = Python::locate(&memory, &binaries).unwrap();
        let tables = python.allocators(&memory, &binaries).unwrap();
        assert_eq!(tables.map(|t| t.domain), Domain::ALL);
        let [raw, mem, object] = tables;
        assert!(raw.address != mem.address && mem.address != object.address);
        for table in tables {
            let mut functions = vec![table.malloc, table.calloc, table.realloc, table.free];
            functions.sort();
            functions.dedup();
            assert_eq!(functions.len(), 4, "{table:?}");
        }
        // Raw never is pymalloc; mem and object are the same allocator in default builds.
        if interpreter.flavour == common::pythons::Flavour::Default {
            assert_eq!((mem.malloc, mem.free), (object.malloc, object.free));
            assert_ne!(raw.malloc, object.malloc);
            assert!(tables.iter().all(|t| t.ctx.is_null()));
        }
    });
}

#[test]
fn code_objects_are_freed_through_a_word_of_their_type() {
    let with_symbols = AtomicUsize::new(0);
    on_every_interpreter(|interpreter| {
        let mut program = Program::start(interpreter, "every_kind_of_frame.py");
        program.line();
        let pid = program.pid();
        let memory = ProcessMemory::new(pid);
        let modules = modules(pid, &maps::mappings(pid).unwrap(), &memory).unwrap();
        let binaries = binaries(&modules);
        let python = Python::locate(&memory, &binaries).unwrap();
        let (word, value) = python.code_dealloc_word(&memory, &binaries).unwrap();
        assert_eq!(memory.read_ptr(word).unwrap(), value);
        let home = modules.iter().find(|m| Binary::path(*m) == python.binary).unwrap();
        assert!(
            home.executable().iter().any(|span| span.contains(value)),
            "{value} is no code of the runtime"
        );
        // What a code object really is freed by, where the names of local functions are left.
        if let Some(function) = home.symbol_addr("code_dealloc") {
            assert_eq!(value, function);
            with_symbols.fetch_add(1, Ordering::Relaxed);
        }
        // The word holds no other type's: a function and a dict are freed by others.
        for other in ["PyFunction_Type", "PyDict_Type"] {
            let other = home.symbol_addr(other).unwrap().offset(word.since(python.code_type.unwrap()));
            assert_ne!(memory.read_ptr(other).unwrap(), value);
        }
    });
    assert!(with_symbols.into_inner() > 0, "no interpreter has the symbol to compare with");
}

/// A file that has lost the symbols and sections of which the name begins so.
struct Without<'a>(&'a Module, &'a [&'a str]);

impl Without<'_> {
    fn kept(&self, name: &str) -> bool {
        !self.1.iter().any(|lost| name.starts_with(lost))
    }
}

impl Binary for Without<'_> {
    fn path(&self) -> String {
        Binary::path(self.0)
    }
    fn symbol(&self, name: &str) -> Option<RemoteAddr> {
        self.0.symbol_addr(name).filter(|_| self.kept(name))
    }
    fn section(&self, name: &str) -> Option<Span> {
        Binary::section(self.0, name).filter(|_| self.kept(name))
    }
    fn writable(&self) -> Vec<Span> {
        self.0.writable()
    }
    fn executable(&self) -> Vec<Span> {
        self.0.executable()
    }
    fn read_only(&self) -> Vec<Span> {
        self.0.read_only()
    }
}

#[test]
fn the_same_is_found_without_symbols() {
    on_every_interpreter(|interpreter| {
        let mut program = Program::start(interpreter, "every_kind_of_frame.py");
        program.line();
        let pid = program.pid();
        let memory = ProcessMemory::new(pid);
        let modules = modules(pid, &maps::mappings(pid).unwrap(), &memory).unwrap();
        let python = Python::locate(&memory, &binaries(&modules)).unwrap();
        let tables = python.allocators(&memory, &binaries(&modules)).unwrap();
        let code_dealloc = python.code_dealloc_word(&memory, &binaries(&modules)).unwrap();
        let steps: &[(u8, &[&str], &str)] = &[
            // Static variables, the C library's descriptors, types: gone in a stripped file or foreign library.
            (8, &["_PyObject", "_PyMem", "_thread_db_", "PyCode_Type"], "symbol _PyRuntime"),
            (10, &["_PyRuntime"], "section .PyRuntime"),
            (13, &["_PyRuntime", ".PyRuntime"], "search for the cookie xdebugpy"),
        ];
        for (since, lost, how) in steps.iter().filter(|(since, _, _)| python.version.minor >= *since) {
            let stripped: Vec<_> = modules.iter().map(|m| Without(m, lost)).collect();
            let stripped: Vec<&dyn Binary> = stripped.iter().map(|b| b as &dyn Binary).collect();
            let found = Python::locate(&memory, &stripped).unwrap_or_else(|e| panic!("since 3.{since}: {e}"));
            assert_eq!(found.evidence[0].source, *how);
            assert_eq!(
                (found.runtime, found.version, found.flavour),
                (python.runtime, python.version, python.flavour)
            );
            assert_eq!((found.own_state, found.pthread), (python.own_state, python.pthread));
            let words = |t: AllocatorTable| (t.address, t.malloc, t.free);
            assert_eq!(found.allocators(&memory, &stripped).unwrap().map(words), tables.map(words));
            assert_eq!(found.code_dealloc_word(&memory, &stripped).unwrap(), code_dealloc);
            let tids: Vec<i32> = maps::namespaced_tasks(pid).unwrap().iter().map(|t| t.1).collect();
            assert_eq!(found.self_test(&memory, &tids).unwrap(), python.self_test(&memory, &tids).unwrap());
        }
        // Without any of it there is no guess.
        let nothing: Vec<_> = modules.iter().map(|m| Without(m, &[""])).collect();
        let nothing: Vec<&dyn Binary> = nothing.iter().map(|b| b as &dyn Binary).collect();
        let found = Python::locate(&memory, &nothing);
        assert_eq!(found.is_ok(), python.version.minor >= 13, "only the cookie needs no name");
    });
}

#[test]
fn code_whose_address_is_used_again_is_not_mistaken() {
    on_every_interpreter(|interpreter| {
        let mut program = Program::start(interpreter, "code_reuse.py");
        program.line();
        let (memory, python) = locate(program.pid());
        let mut codes = python.code_table();
        let mut addresses = Vec::new();
        for number in 1..=60 {
            program.say(&number.to_string());
            program.line();
            let thread = &python.threads(&memory).unwrap()[0];
            let (mut frames, mut locations) = (Vec::new(), Vec::new());
            python.walk(&memory, thread.tstate, &mut frames, 100).unwrap();
            codes.resolve(&memory, &frames, &mut locations);
            let (function, file) = (format!("made_{number}"), format!("part-{number}.py"));
            let made = &locations[1];
            assert_eq!((&*made.function, made.line), (&*function, Some(number % 50 + 2)));
            assert!(made.file.ends_with(&format!("/{file}")), "{} is not {file}", made.file);
            assert_eq!(&*locations[2].function, "<module>");
            assert_eq!(locations[2].file, made.file);
            addresses.push(frames[1].code);
        }
        let all = addresses.len();
        addresses.sort();
        addresses.dedup();
        assert!(addresses.len() < all, "no address was used twice: this proved nothing");
        program.say("");
    });
}

#[test]
fn what_is_no_supported_python_is_refused() {
    let mut child = std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
    // It is cat once it has executed: until then it is still this test.
    let exe = format!("/proc/{}/exe", child.id());
    while std::fs::read_link(&exe).is_ok_and(|path| path == std::env::current_exe().unwrap()) {
        std::thread::yield_now();
    }
    let assert = assert_cmd::Command::cargo_bin("heaptap")
        .unwrap()
        .args(["stacks", "--pid", &child.id().to_string()])
        .assert();
    child.kill().unwrap();
    child.wait().unwrap();
    let output = assert.code(3).get_output().clone();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("no CPython was found"), "{text}");
}
