//! Which calls of mmap, munmap and mremap are an allocator's own: found in every C library and CPython here, compared with the
//! debug information and with what really happens.

mod common;
mod support;

use common::{Flavour, Python as Interpreter, Recording, pythons, skipped};
use heaptap::addr::RemoteAddr;
use heaptap::cpython::Binary;
use heaptap::image::{Module, libc_of};
use heaptap::inferior::memory::ProcessMemory;
use heaptap::memory::RemoteMemory;
use heaptap::probe::function::Function;
use heaptap::probe::internal_callers::{InternalCallers, of_process};
use heaptap::python_binary::binaries;
use heaptap::recorder::examine::{Examined, Kind, examine};
use iced_x86::{Decoder, DecoderOptions, FlowControl};
use std::collections::{BTreeSet, HashSet};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use support::interpreters;

/// `fixtures/programs/mapping_for_all.py`, up and waiting. Killed when dropped.
struct Mapper {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Mapper {
    fn start(interpreter: &Interpreter, preload: Option<&std::path::Path>) -> Self {
        let text = include_str!("../fixtures/programs/mapping_for_all.py");
        let mut command = interpreter.command();
        if let Some(library) = preload {
            command.env("LD_PRELOAD", library);
        }
        let mut child =
            command.args(["-c", text]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut mapper = Self { child, stdin, stdout: BufReader::new(stdout) };
        mapper.expect("up\n");
        mapper
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    fn expect(&mut self, wanted: &str) {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        assert_eq!(line, wanted);
    }

    /// Its own calls as the jump kind would have them.
    fn examined(&self, tables: bool) -> (Examined, InternalCallers) {
        let examined = examine(self.pid(), Kind::Jump, tables).unwrap();
        let memory = ProcessMemory::new(self.pid());
        let mut of_python: Vec<_> = examined.plan.words.iter().map(|word| word.value).collect();
        if tables {
            let arenas = examined.python.arena_allocator(&memory, &binaries(&examined.modules)).unwrap();
            of_python.extend([arenas.alloc, arenas.free]);
        } else {
            of_python.clear();
        }
        let found = of_process(&memory, &examined.modules, &examined.plan, &of_python);
        (examined, found.unwrap())
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ends_of(found: &InternalCallers) -> Vec<u64> {
    found.ranges.iter().map(|[first, last]| (first == last).then_some(*first).expect("one address")).collect()
}

fn libc_module(examined: &Examined) -> &Module {
    &examined.modules[libc_of(&examined.modules).unwrap().module]
}

/// Whether a call instruction ends at `at`.
fn is_behind_a_call(memory: &ProcessMemory, at: u64) -> bool {
    [5, 6, 7].into_iter().any(|len| {
        let start = RemoteAddr(at - len);
        let bytes = memory.read_vec(start, len as usize).unwrap();
        let i = Decoder::with_ip(64, &bytes, start.0, DecoderOptions::NONE).decode();
        let calls = matches!(i.flow_control(), FlowControl::Call | FlowControl::IndirectCall);
        calls && i.len() == len as usize
    })
}

#[test]
fn every_interpreters_allocators_have_calls_of_their_own() {
    for interpreter in interpreters() {
        let mapper = Mapper::start(&interpreter, None);
        let memory = ProcessMemory::new(mapper.pid());
        let (examined, of_libc) = mapper.examined(false);
        let (_, with_tables) = mapper.examined(true);
        let libc = libc_module(&examined);
        let ends = ends_of(&of_libc);
        println!(
            "{interpreter}: {} and {}, exposed {:?}",
            ends.len(),
            with_tables.ranges.len(),
            with_tables.exposed
        );
        assert!(ends.len() >= 5 && ends.iter().all(|at| libc.contains(RemoteAddr(*at))), "{ends:x?}");
        assert!(ends.iter().all(|at| is_behind_a_call(&memory, *at)));
        // CPython's own: the arenas' mmap at least, and that in its own code.
        let arenas = examined.python.arena_allocator(&memory, &binaries(&examined.modules)).unwrap();
        let own: Vec<_> = ends_of(&with_tables).into_iter().filter(|at| !ends.contains(at)).collect();
        assert!(own.iter().any(|at| (arenas.alloc.0..arenas.alloc.0 + 128).contains(at)), "{own:x?}");
        let home = examined.modules.iter().find(|m| Binary::path(*m) == examined.python.binary).unwrap();
        assert!(own.iter().all(|at| home.contains(RemoteAddr(*at)) && is_behind_a_call(&memory, *at)));
        // mimalloc maps memory in two places, plain and aligned.
        assert!(interpreter.flavour != Flavour::FreeThreaded || own.len() >= 3, "{own:x?}");
        for found in [&of_libc, &with_tables] {
            assert!(found.exposed.iter().all(|f| *f == Function::Munmap));
        }
    }
}

#[test]
fn the_arena_allocator_is_what_its_symbols_say() {
    let mut compared = 0;
    for interpreter in interpreters() {
        let mapper = Mapper::start(&interpreter, None);
        let memory = ProcessMemory::new(mapper.pid());
        let (examined, _) = mapper.examined(false);
        let found = examined.python.arena_allocator(&memory, &binaries(&examined.modules)).unwrap();
        let home = examined.modules.iter().find(|m| Binary::path(*m) == examined.python.binary).unwrap();
        let names = [("_PyObject_ArenaMmap", found.alloc), ("_PyObject_ArenaMunmap", found.free)]
            .into_iter()
            .chain([("_PyMem_ArenaAlloc", found.alloc), ("_PyMem_ArenaFree", found.free)])
            .chain([("_PyObject_Arena", found.address)]);
        for (name, found) in names {
            if let Some(symbol) = home.symbol_addr(name) {
                assert_eq!(found, symbol, "{name} of {interpreter}");
                compared += 1;
            }
        }
        // Since 3.12 behind the tables of the three domains and those of their debugging.
        if let Some(raw) = examined.python.layout.runtime_state.allocators_raw {
            let behind = found.address.since(examined.python.runtime.offset(raw));
            assert_eq!(behind, if examined.python.version.minor == 12 { 264 } else { 272 });
        }
    }
    assert!(compared > 0, "no interpreter has symbols to compare with");
}

#[test]
fn every_call_of_a_library_that_only_allocates_is_its_own() {
    let interpreter = &pythons()[0];
    for name in ["libjemalloc.so.2", "libtcmalloc_minimal.so.4"] {
        let library = common::pythons::cache().join("allocators").join(name);
        if !library.exists() {
            common::missing(&format!("{} (scripts/fetch-interpreters)", library.display()));
            continue;
        }
        let mapper = Mapper::start(interpreter, Some(&library));
        let (examined, found) = mapper.examined(false);
        let module = examined.modules.iter().find(|m| m.name() == name).unwrap();
        let malloc = examined.plan.entries.iter().find(|e| e.function == Function::Malloc).unwrap();
        assert!(module.contains(malloc.address));
        let covered =
            |at: RemoteAddr| found.ranges.iter().any(|[first, last]| (*first..=*last).contains(&at.0));
        assert!(covered(malloc.address.offset(1)));
        let entries = examined.plan.entries.iter().filter(|e| !module.contains(e.address));
        assert!(entries.clone().count() > 0 && entries.clone().all(|e| !covered(e.address.offset(1))));
    }
}

/// Return addresses of all direct calls in `module` to one of `to`, found by decoding all of it.
fn all_calls(module: &Module, to: &HashSet<u64>) -> BTreeSet<u64> {
    let mut found = BTreeSet::new();
    let starts = module.function_starts();
    for (i, start) in starts.iter().enumerate() {
        let end = starts.get(i + 1).map_or(start.offset(64), |next| *next);
        let Some(bytes) = module.file_bytes(*start, end.since(*start) as usize) else { continue };
        let decoder = Decoder::with_ip(64, &bytes, start.0, DecoderOptions::NONE);
        let calls = decoder.into_iter().filter(|i| i.is_call_near() && to.contains(&i.near_branch_target()));
        found.extend(calls.map(|i| i.next_ip()));
    }
    found
}

/// The source file of each address, where the debug information has it.
fn source_files(module: &Module, addresses: &BTreeSet<u64>) -> Option<Vec<(u64, String)>> {
    let mut gdb = Command::new("gdb");
    gdb.args(["-batch", "-nx"]);
    for at in addresses {
        // Within the call, not behind it.
        let image = module.bias().to_image(RemoteAddr(at - 1));
        gdb.args(["-ex", &format!("info line *{:#x}", image.0)]);
    }
    let output = gdb.arg(module.path()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let files =
        text.lines().filter_map(|line| Some(line.strip_prefix("Line ")?.split('"').nth(1)?.to_owned()));
    let files: Vec<String> = files.collect();
    (files.len() == addresses.len()).then(|| addresses.iter().copied().zip(files).collect())
}

#[test]
fn in_glibc_they_are_all_calls_of_mallocs_own_source_and_no_other() {
    let interpreter = pythons().iter().find(|p| p.libc == "glibc" && p.root.is_none()).unwrap();
    let mapper = Mapper::start(interpreter, None);
    let (examined, found) = mapper.examined(false);
    let libc = libc_module(&examined);
    let bodies = examined.plan.entries.iter().filter(|e| e.function.is_mapping()).map(|e| e.address.0);
    let direct = all_calls(libc, &bodies.collect());
    let ends: BTreeSet<u64> = ends_of(&found).into_iter().collect();
    let Some(files) = source_files(libc, &direct.union(&ends).copied().collect()) else {
        return skipped(
            "gdb and the debug information of libc (libc6-dbg): calls of mmap compared with the source",
        );
    };
    let is_malloc = |file: &str| file.ends_with("malloc/malloc.c") || file.ends_with("malloc/arena.c");
    let wrong: Vec<_> =
        files.iter().filter(|(at, file)| ends.contains(at) != is_malloc(file)).map(|(_, f)| f).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
    assert!(files.iter().filter(|(at, file)| direct.contains(at) && is_malloc(file)).count() >= 8);
    // Those that are not malloc's are many: thread stacks, locales, stdio.
    assert!(files.iter().any(|(_, file)| file.ends_with("allocatestack.c")));
}

/// What gdb saw of one call: which function, its return address, and whether it was made by libc with no function on the stack
/// that libc exports but an allocator's. (malloc itself need not be there: since glibc 2.42 it jumps to its slow part.)
struct Seen {
    function: Function,
    caller: u64,
    inside: bool,
}

/// Stops at every call of the mapping functions and looks at the stack.
const SCRIPT: &str = r#"
import gdb
out = open(OUT, "w")
class Mapping(gdb.Breakpoint):
    def stop(self):
        caller = int(gdb.parse_and_eval("*(unsigned long *)$rsp"))
        inside, frame = LIBC[0] <= caller < LIBC[1], gdb.newest_frame().older()
        while inside and frame is not None and LIBC[0] <= frame.pc() < LIBC[1]:
            inside = not any(start <= frame.pc() < end for start, end in OTHERS)
            frame = frame.older()
        print(self.location, hex(caller), int(inside), file=out, flush=True)
        return False
for at in MAPPINGS:
    Mapping("*%d" % at, internal=True)
print("ready", file=out, flush=True)
gdb.execute("continue")
"#;

/// Lets `mapper` map, under gdb.
fn observe(mapper: &mut Mapper, interpreter: &Interpreter, examined: &Examined) -> Option<Vec<Seen>> {
    let (mappings, allocators): (Vec<_>, Vec<_>) =
        examined.plan.entries.iter().partition(|e| e.function.is_mapping());
    let libc = libc_module(examined);
    let exported = libc.file().exported_symbols().values().filter(|s| s.is_function());
    let extents = exported.map(|s| (libc.bias().to_remote(s.addr).0, s.size));
    let others = extents.filter(|(start, _)| allocators.iter().all(|e| e.address.0 != *start));
    let others: Vec<_> = others.map(|(start, size)| (start, start + size)).collect();
    let text = libc.segments().find(|(_, _, s)| s.executable).map(|(start, len, _)| (start.0, start.0 + len));
    let folder = tempfile::tempdir().unwrap();
    let (script, out) = (folder.path().join("script.py"), folder.path().join("out"));
    let addresses: Vec<_> = mappings.iter().map(|e| e.address.0).collect();
    let libc = text.unwrap();
    let head = format!("OUT = {out:?}\nLIBC = {libc:?}\nOTHERS = {others:?}\nMAPPINGS = {addresses:?}\n");
    std::fs::write(&script, head + SCRIPT).unwrap();
    let mut gdb = Command::new("gdb");
    gdb.args(["-batch", "-nx", "-ex", "set pagination off", "-ex", "set auto-solib-add on"]);
    if let Some(root) = &interpreter.root {
        gdb.arg("-ex").arg(format!("set sysroot {}", root.display()));
    }
    gdb.args(["-p", &mapper.pid().to_string()]).arg("-x").arg(&script);
    let mut gdb = gdb.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().ok()?;
    let seen = || std::fs::read_to_string(&out).unwrap_or_default();
    while !seen().contains("ready\n") {
        if gdb.try_wait().unwrap().is_some() {
            return None;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    writeln!(mapper.stdin, "go").unwrap();
    mapper.expect("done\n");
    let lines = seen();
    // Ends the program, and gdb with it.
    writeln!(mapper.stdin).unwrap();
    gdb.wait().unwrap();
    let parse = |line: &str| {
        let words: Vec<_> = line.split(' ').collect();
        let at: u64 = words[0].strip_prefix('*').unwrap().parse().unwrap();
        Seen {
            function: mappings.iter().find(|e| e.address.0 == at).unwrap().function,
            caller: u64::from_str_radix(words[1].strip_prefix("0x").unwrap(), 16).unwrap(),
            inside: words[2] == "1",
        }
    };
    Some(lines.lines().filter(|line| *line != "ready").map(parse).collect())
}

#[test]
fn what_glibc_really_maps_for_itself_is_told_from_the_rest() {
    let mut libraries = HashSet::new();
    for interpreter in interpreters().iter().filter(|i| i.libc == "glibc" && i.flavour == Flavour::Default) {
        let mut mapper = Mapper::start(interpreter, None);
        let (examined, found) = mapper.examined(false);
        if !libraries.insert(libc_module(&examined).build_id()) {
            continue;
        }
        let Some(seen) = observe(&mut mapper, interpreter, &examined) else {
            return common::missing("gdb");
        };
        let ends = ends_of(&found);
        let is_own = |seen: &Seen| ends.contains(&seen.caller);
        // An entry that jumps to munmap is not on the stack, and neither then is anything of libc.
        let wrong: Vec<_> = seen.iter().filter(|s| is_own(s) != s.inside).collect();
        let told: Vec<_> =
            wrong.iter().map(|s| format!("{} from {:#x}", s.function.name(), s.caller)).collect();
        assert!(wrong.is_empty(), "{interpreter}: {told:?}");
        for function in [Function::Mmap, Function::Munmap, Function::Mremap] {
            let own = seen.iter().filter(|s| s.function == function && is_own(s)).count();
            let other = seen.iter().filter(|s| s.function == function && !is_own(s)).count();
            println!("{interpreter}: {} {own} times its own, {other} times not", function.name());
            assert!(own > 0 || found.exposed.contains(&function), "{interpreter}: {}", function.name());
            assert!(other > 0 || function == Function::Mremap, "{interpreter}: {}", function.name());
        }
    }
    assert!(libraries.len() > 1 || common::pythons().len() < 5);
}

/// Bytes of each mapping that a recording of `mapper`'s work holds.
fn recorded(mapper: &mut Mapper, arguments: &[&str]) -> Vec<u64> {
    let recording = Recording::try_attach(mapper.pid(), arguments).unwrap();
    writeln!(mapper.stdin, "go").unwrap();
    mapper.expect("done\n");
    let capture = recording.stop();
    let dump = capture.assert_code(0).dump();
    let mapped = dump.allocations.iter().filter(|a| a.allocator == "mmap");
    mapped.map(|a| a.size).collect()
}

#[test]
fn recordings_hold_no_mappings_of_an_allocators_own() {
    const MIB: u64 = 1 << 20;
    // The program's own, a thread's stack (musl's are small) and its frames' stack: nothing else that it maps is its own.
    let is_its_own = |bytes: u64| bytes == MIB || (8 * MIB..9 * MIB).contains(&bytes) || bytes <= 256 << 10;
    let chosen = |name: &str| pythons().iter().find(|i| i.name.starts_with(name));
    let libraries = ["libjemalloc.so.2", "libtcmalloc_minimal.so.4"];
    let libraries = libraries.map(|name| common::pythons::cache().join("allocators").join(name));
    let preloaded =
        libraries.iter().filter(|path| path.exists()).map(|path| ("pyenv-3.12", Some(path.as_path())));
    let plain = ["pyenv-3.12", "debian-3.9", "debian-3.13", "debian-3.14", "freeze-3.13t", "musl-3.14"];
    let plain = plain.map(|name| (name, None));
    let modes: [&[&str]; 4] =
        [&[], &["--python-allocators"], &["--exact"], &["--exact", "--python-allocators"]];
    for (name, preload) in plain.into_iter().chain(preloaded) {
        let Some(interpreter) = chosen(name) else { continue };
        // Every event has the calls under way on the stack: tried on one, with and without the tables.
        let modes = if (name, preload) == plain[0] { &modes[..] } else { &modes[..2] };
        for mode in modes {
            let mut mapper = Mapper::start(interpreter, preload);
            let mapped = recorded(&mut mapper, mode);
            let others: Vec<_> = mapped.iter().filter(|bytes| !is_its_own(**bytes)).collect();
            assert!(others.is_empty(), "{interpreter}, {preload:?}, {mode:?}: {others:?}");
            assert_eq!(mapped.iter().filter(|bytes| **bytes == MIB).count(), 1, "{interpreter}, {mode:?}");
        }
    }
}
