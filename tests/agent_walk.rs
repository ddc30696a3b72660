//! The agent's walker inside real interpreters: what it sees from every kind of frame equals what the process itself says.
//!
//! The walker's sources are built into an image of their own, which `fixtures/stacks/in_target_walk.py` loads and calls. Names
//! and lines are decoded here as the controller does it.

mod common;
mod support;

use common::for_each_python;
use heaptap::agent_abi::part;
use heaptap::cpython::line_table::line_at;
use heaptap::cpython::text::decode;
use heaptap::cpython::{Python, RawFrame};
use heaptap::image::modules;
use heaptap::inferior::maps;
use heaptap::inferior::memory::ProcessMemory;
use heaptap::probe::agent_facts::python_facts;
use heaptap::python_binary::binaries;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use support::Program;

/// Characters of a name that are shown.
const MAX_NAME: usize = 4096;

/// The image, built once for all tests of this binary.
fn image() -> &'static Path {
    static IMAGE: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = IMAGE.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("walk.so");
        // As build.rs builds the agent.
        let output = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
            .args([
                "--edition",
                "2024",
                "--crate-name",
                "walk",
                "--crate-type",
                "cdylib",
                "--cap-lints",
                "warn",
            ])
            .args(["-C", "opt-level=3", "-C", "panic=abort", "-C", "codegen-units=1"])
            .args(["-C", "overflow-checks=off", "-C", "debug-assertions=off"])
            .args(["-C", "no-vectorize-loops", "-C", "no-vectorize-slp", "-C", "target-feature=-sse,-sse2"])
            .args(["-C", "link-arg=-nostdlib", "-C", "link-arg=-nostartfiles", "-C", "link-arg=-Wl,-z,defs"])
            .arg("-o")
            .arg(&path)
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/agent_walk/image.rs"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        (folder, path)
    });
    path
}

/// The image where the interpreter can open it.
struct Placed {
    seen_as: PathBuf,
    copy: Option<PathBuf>,
}

impl Placed {
    fn new(root: Option<&Path>) -> Self {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let Some(root) = root else { return Self { seen_as: image().to_owned(), copy: None } };
        let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let inside = format!("tmp/heaptap-walk-{}-{number}.so", std::process::id());
        std::fs::create_dir_all(root.join("tmp")).unwrap();
        std::fs::copy(image(), root.join(&inside)).unwrap();
        Self { seen_as: Path::new("/").join(&inside), copy: Some(root.join(inside)) }
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        if let Some(copy) = &self.copy {
            // Does not matter: the next run makes its own.
            let _ = std::fs::remove_file(copy);
        }
    }
}

/// A code object as it was told.
#[derive(Debug, Default)]
struct Told {
    first_line: i32,
    first_traceable: i32,
    name: String,
    file: String,
    lines: Vec<u8>,
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Puts the pieces of a code object's parts together; they must be whole and in order.
fn assemble(key: &str, records: &[u8]) -> Told {
    let (code, generation) = key.split_once('.').unwrap();
    let (code, generation) = (hex(code), hex(generation));
    let mut parts: BTreeMap<u32, (u64, Vec<u8>)> = BTreeMap::new();
    let (mut at, mut last) = (0, None);
    while at < records.len() {
        let [its_code, second, total, third] = [0, 8, 16, 24].map(|i| word(records, at + i));
        let (offset, len) = (third & 0xffff_ffff, (third >> 32) as usize);
        assert_eq!((its_code, second & 0xffff_ffff), (code, generation));
        assert!(len <= 8 << 10 && (len > 0 || total == 0));
        let part = parts.entry((second >> 32) as u32).or_insert((total, Vec::new()));
        assert_eq!((offset, total), (part.1.len() as u64, part.0), "pieces in order");
        part.1.extend(&records[at + 32..at + 32 + len]);
        at += 32 + len.next_multiple_of(8);
        last = Some((second >> 32) as u32);
    }
    assert_eq!(last, Some(part::LINES), "the line table comes last");
    assert!(parts.values().all(|(total, bytes)| bytes.len() as u64 == *total), "a part is cut short");
    assert_eq!(parts.len(), 4, "one of each: {:?}", parts.keys());
    let text = |one: u32| {
        let found = (0..3).find_map(|i| Some((1 << i, parts.get(&(one + i))?)));
        let (width, (_, bytes)) = found.expect("a name and a file");
        shown(&decode(bytes, width))
    };
    let numbers = &parts[&part::NUMBERS].1;
    let number = |at: usize| i32::from_le_bytes(numbers[at..at + 4].try_into().unwrap());
    Told {
        first_line: number(0),
        first_traceable: number(4),
        name: text(part::NAME_1),
        file: text(part::FILE_1),
        lines: parts[&part::LINES].1.clone(),
    }
}

/// A name as the controller keeps it.
fn shown(name: &str) -> String {
    let mut kept: String = name.chars().take(MAX_NAME).collect();
    if name.chars().count() > MAX_NAME {
        kept.push('…');
    }
    kept
}

fn hex(digits: &str) -> u64 {
    u64::from_str_radix(digits, 16).unwrap()
}

fn unhex(digits: &str) -> Vec<u8> {
    digits.as_bytes().chunks(2).map(|two| hex(std::str::from_utf8(two).unwrap()) as u8).collect()
}

/// What the process says of one frame, in the controller's words.
fn own_frame(frame: &Value) -> (String, String, Option<i32>) {
    let text = |v: &Value| shown(v.as_str().unwrap());
    (text(&frame[0]), text(&frame[1]), frame[2].as_i64().map(|line| line as i32))
}

/// What the walker saw, by the code objects told so far.
fn seen_frames(python: &Python, seen: &[Value], codes: &HashMap<String, Told>) -> Frames {
    let mut frames = Vec::new();
    for pair in seen.chunks(2) {
        let (code, packed) = (pair[0].as_u64().unwrap(), pair[1].as_u64().unwrap());
        let (lasti, generation) = (packed as u32 as i32, packed >> 32);
        let told = &codes[&format!("{code:x}.{generation:x}")];
        assert_ne!(lasti, RawFrame::NO_LASTI, "{} in {} is nowhere", told.name, told.file);
        // Pushed, not begun.
        if lasti < told.first_traceable * 2 {
            continue;
        }
        let line = line_at(python.layout.meaning.line_table, &told.lines, told.first_line, lasti);
        frames.push((told.name.clone(), told.file.clone(), line));
    }
    frames
}

type Frames = Vec<(String, String, Option<i32>)>;

/// One interpreter that runs the fixture.
struct Inside {
    program: Program,
    python: Python,
    codes: HashMap<String, Told>,
    by_hash: HashMap<u64, Frames>,
    /// Looks taken in each case.
    cases: BTreeMap<String, usize>,
    _image: Placed,
}

impl Inside {
    fn start(interpreter: &common::Python, settings: &[(&str, &str)]) -> Self {
        let mut program = Program::start_with(interpreter, "in_target_walk.py", settings);
        assert_eq!(program.line(), "ready\n");
        let pid = program.pid();
        let memory = ProcessMemory::new(pid);
        let modules = modules(pid, &maps::mappings(pid).unwrap(), &memory).unwrap();
        let python = Python::locate(&memory, &binaries(&modules)).unwrap();
        let facts = python_facts(&python).to_bytes();
        let facts: String = facts.iter().map(|b| format!("{b:02x}")).collect();
        let image = Placed::new(interpreter.root.as_deref());
        // tp_name, tp_basicsize, tp_itemsize, tp_dealloc (`Include/cpython/object.h`).
        let tp_dealloc = python.layout.type_object.tp_name + 24;
        let asked = serde_json::json!({ "image": image.seen_as, "facts": facts, "tp_dealloc": tp_dealloc });
        program.say(&asked.to_string());
        let (codes, by_hash, cases) = Default::default();
        Self { program, python, codes, by_hash, cases, _image: image }
    }

    /// Takes all that the program tells and compares; whether it said that it has a compiler at work.
    fn run(&mut self, name: &str) -> bool {
        loop {
            let found: Value = serde_json::from_str(&self.program.line()).unwrap();
            if found["end"] == true {
                return found["jit"] == true;
            }
            for (key, records) in found["codes"].as_object().into_iter().flatten() {
                self.codes.insert(key.clone(), assemble(key, &unhex(records.as_str().unwrap())));
            }
            let case = found["case"].as_str().unwrap();
            *self.cases.entry(case.to_owned()).or_default() += usize::from(found["codes"].is_null());
            if !found["ticks"].is_null() {
                eprintln!("{name}: ticks per walk at depth: {}", found["ticks"]);
            }
            if let Some(own) = found["own"].as_array() {
                self.compare(case, own.iter().map(own_frame).collect(), &found);
            }
        }
    }

    fn compare(&mut self, case: &str, mut own: Frames, found: &Value) {
        let cut = found["cut"] == 1;
        let seen = seen_frames(&self.python, found["seen"].as_array().unwrap(), &self.codes);
        assert_eq!(cut, own.len() > seen.len(), "{case}");
        own.truncate(if cut { seen.len() } else { usize::MAX });
        assert_eq!(seen, own, "{case}");
        let same = self.by_hash.entry(found["hash"].as_u64().unwrap()).or_insert_with(|| seen.clone());
        let shorter = same.len().min(seen.len());
        assert_eq!(same[..shorter], seen[..shorter], "{case}: one hash, two stacks");
    }
}

#[test]
fn the_walker_sees_what_the_process_says() {
    for_each_python(
        |_| true,
        |interpreter| {
            let mut inside = Inside::start(interpreter, &[]);
            inside.run(&interpreter.to_string());
            let cases = &inside.cases;
            assert_eq!(cases.len(), 17, "{cases:?}");
            assert!(cases["special_methods"] >= 10 && cases["threads"] >= 9, "{cases:?}");
            assert!(cases["hot_loops"] == 9 && cases["compiled_text"] == 10, "{cases:?}");
        },
    );
}

#[test]
fn the_same_with_the_jit_at_work() {
    for_each_python(
        |interpreter| interpreter.name.starts_with("debian") && interpreter.minor() >= 14,
        |interpreter| {
            let jit = Inside::start(interpreter, &[("PYTHON_JIT", "1")]).run(&format!("{interpreter}, JIT"));
            assert!(jit, "it was asked for and is not there");
        },
    );
}
