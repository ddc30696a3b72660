//! Mapped files of real processes, in the order the dynamic linker looks them up; and files that lie about themselves.

mod common;
mod support;

use heaptap::image::elf::ElfFile;
use heaptap::image::{ImageError, LibcKind, Module, SymbolKind, libc_of, modules};
use heaptap::inferior::maps;
use heaptap::inferior::memory::ProcessMemory;
use heaptap::memory::RemoteMemory;
use proptest::prelude::*;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

const LINKER: &str = "/lib64/ld-linux-x86-64.so.2";

fn modules_of(pid: i32) -> Vec<Module> {
    modules(pid, &maps::mappings(pid).unwrap(), &ProcessMemory::new(pid)).unwrap()
}

fn names(modules: &[Module]) -> Vec<&str> {
    modules.iter().map(Module::name).collect()
}

/// `cat` that has echoed a line: it is up. Killed when dropped.
struct Cat(Child);

impl Cat {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        writeln!(child.stdin.as_mut().unwrap(), "up").unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "up\n");
        Self(child)
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }
}

impl Drop for Cat {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn own_modules_begin_with_the_executable_and_have_libc() {
    let modules = modules_of(std::process::id() as i32);
    assert_eq!(modules[0].path(), std::env::current_exe().unwrap());
    let libc = libc_of(&modules).unwrap();
    assert_eq!(libc.kind, LibcKind::Glibc);
    assert!(libc.version.unwrap().starts_with("2."));
    assert_eq!(libc.malloc, Some(libc.module));
    // Where the symbol says `getpid` is, it is; and the file's bytes there are the memory's.
    let module = &modules[libc.module];
    let symbol = module.symbol("getpid").unwrap();
    assert!(symbol.is_function() && symbol.size > 0 && symbol.exported);
    let addr = module.symbol_addr("getpid").unwrap();
    assert_eq!(addr.0, libc::getpid as *const () as u64);
    let memory = ProcessMemory::new(std::process::id() as i32);
    assert_eq!(module.file_bytes(addr, 16).unwrap(), memory.read_vec(addr, 16).unwrap());
    assert!(module.contains(addr) && !modules[0].contains(addr));
    assert_eq!(module.file().symbol("errno").map(|s| s.kind), Some(SymbolKind::Tls));
    assert_eq!(module.symbol_addr("errno"), None, "a thread-local symbol has no one address");
    assert_eq!(module.build_id().unwrap().len(), 40);
    let (start, len) = module.section(".text").unwrap();
    assert!(addr >= start && addr.since(start) < len);
    // This test has its symbol table: a local function is in it, and not exported.
    let own = here as *const () as u64;
    let symbols = modules[0].file().all_symbols();
    assert!(symbols.values().any(|s| modules[0].bias().to_remote(s.addr).0 == own && s.is_function()));
}

fn here() {
    std::hint::black_box(());
}

#[test]
fn exported_symbols_are_read_without_section_headers_too() {
    let libc =
        modules_of(std::process::id() as i32).into_iter().find(|m| m.name().starts_with("libc.so")).unwrap();
    let mut bytes = std::fs::read(libc.path()).unwrap();
    // e_shoff, e_shnum, e_shstrndx.
    bytes[40..48].fill(0);
    bytes[60..64].fill(0);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&bytes).unwrap();
    let bare = ElfFile::new(file, Path::new("bare")).unwrap();
    assert!(bare.sections().is_empty() && !libc.file().sections().is_empty());
    let names =
        |elf: &ElfFile| elf.exported_symbols().keys().cloned().collect::<std::collections::BTreeSet<_>>();
    assert!(names(&bare).len() > 1000);
    assert_eq!(names(&bare), names(libc.file()));
}

#[test]
fn a_program_started_through_the_linker_has_its_modules_in_order() {
    let cat = Cat::start(Command::new(LINKER).arg("/bin/cat"));
    let modules = modules_of(cat.pid());
    let names = names(&modules);
    let at = |name: &str| {
        names.iter().position(|n| n.starts_with(name)).unwrap_or_else(|| panic!("{name} in {names:?}"))
    };
    assert_eq!(at("cat"), 0);
    assert!(at("libc.so") < at("ld-linux"), "{names:?}");
}

#[test]
fn a_preloaded_allocator_serves_malloc_before_libc() {
    // Any library that the program doesn't use itself will do: what counts is the order.
    let preloaded = "libm.so.6";
    let cat = Cat::start(Command::new("/bin/cat").env("LD_PRELOAD", preloaded));
    let modules = modules_of(cat.pid());
    let names = names(&modules);
    let at = |name: &str| names.iter().position(|n| n.starts_with(name)).unwrap();
    assert!(at("cat") < at("libm.so") && at("libm.so") < at("libc.so"), "{names:?}");
}

#[test]
fn an_executable_that_was_deleted_or_replaced_is_the_mapped_one() {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("cat copy");
    common::copy_program("/bin/cat", &copy);
    let cat = Cat::start(&mut Command::new(&copy));
    std::fs::remove_file(&copy).unwrap();
    std::fs::write(&copy, "another file of that name").unwrap();
    let modules = modules_of(cat.pid());
    assert_eq!((modules[0].path(), modules[0].is_deleted()), (copy.as_path(), true));
    let text = modules[0].ranges().iter().find(|r| r.perms.execute).unwrap();
    let memory = ProcessMemory::new(cat.pid());
    assert_eq!(modules[0].file_bytes(text.start, 256).unwrap(), memory.read_vec(text.start, 256).unwrap());
}

#[test]
fn a_python_started_through_the_linker_is_read() {
    let Some(python) =
        support::interpreters().into_iter().find(|i| i.root.is_none() && i.name.starts_with("pyenv-"))
    else {
        eprintln!("SKIPPED: no pyenv interpreter");
        return;
    };
    let mut real = std::fs::canonicalize(&python.command).unwrap();
    if real.file_name().is_none() {
        real = python.command;
    }
    let code = "import sys\ndef waiting(): print('up', flush=True); sys.stdin.read()\nwaiting()";
    let library = python.binary.parent().unwrap();
    let mut child = Command::new(LINKER)
        .arg("--library-path")
        .arg(library)
        .arg(&real)
        .args(["-c", code])
        .env("PYTHONHOME", library.parent().unwrap())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut byte = [0; 3];
    let up = child.stdout.as_mut().unwrap().read_exact(&mut byte);
    let look = heaptap::recorder::look::inspect(child.id() as i32, heaptap::recorder::look::Manner::Stopped);
    child.kill().unwrap();
    child.wait().unwrap();
    up.unwrap();
    let look = look.unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(look.threads[0].frames[0].function, "waiting");
}

fn parse(bytes: &[u8]) -> Result<(), ImageError> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    let elf = ElfFile::new(file, Path::new("hostile"))?;
    elf.segments().count();
    elf.sections();
    elf.build_id();
    elf.dynamic();
    elf.tls();
    elf.symbol("main");
    elf.exported_symbols();
    for segment in elf.segments() {
        elf.bytes_at(segment.addr, 4096);
    }
    Ok(())
}

#[test]
fn a_file_of_another_machine_is_named() {
    let mut bytes = std::fs::read("/bin/cat").unwrap();
    bytes[18] = 183;
    let error = parse(&bytes).unwrap_err().to_string();
    assert!(error.contains("64-bit") && error.contains("AARCH64"), "{error}");
    bytes[4] = 1;
    assert!(parse(&bytes).unwrap_err().to_string().contains("32-bit"));
    assert!(matches!(parse(b"#!/bin/sh\n"), Err(ImageError::NotElf { .. })));
    assert!(matches!(parse(b""), Err(ImageError::NotElf { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn hostile_files_are_errors_and_not_panics(
        cut in 0.0..1.0_f64,
        changes in proptest::collection::vec((any::<u16>(), any::<u8>()), 0..20),
        whole: bool,
    ) {
        let mut bytes = std::fs::read("/bin/cat").unwrap();
        if !whole {
            bytes.truncate((bytes.len() as f64 * cut) as usize);
        }
        let len = bytes.len();
        for (i, (at, value)) in changes.into_iter().enumerate() {
            // Headers at both ends are where the lies matter most.
            let at = if i % 2 == 0 { usize::from(at) % 1024 } else { len.saturating_sub(1 + usize::from(at) % 2048) };
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        let _ = parse(&bytes);
    }
}
