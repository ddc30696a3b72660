//! Functions with a jump in them are called, and trampolines of libc's own functions.
#![allow(unsafe_code, reason = "code that was just assembled can only be called so")]

mod common;
mod support;

use heaptap::addr::RemoteAddr;
use heaptap::inferior::maps::mappings;
use heaptap::probe::detour::{Detour, Undo};
use heaptap::probe::function::Function;
use heaptap::probe::head::Head;
use heaptap::probe::place::places;
use heaptap::probe::plan::EntryPoint;
use iced_x86::code_asm::*;
use iced_x86::{Code, IcedError, Instruction, MemoryOperand, Register};
use std::collections::HashMap;
use support::library_files::own_libc;

const LEN: usize = 4096;
const DATA: u64 = 3072;
const THUNK: u64 = 1024;
const TRAMPOLINE: u64 = 2048;

/// A page that can be written and executed.
struct Page(*mut u8);

impl Page {
    fn near(place: Option<RemoteAddr>) -> Option<Self> {
        let hint = place.unwrap_or(RemoteAddr::NULL).0 as *mut libc::c_void;
        let fixed = if place.is_some() { libc::MAP_FIXED_NOREPLACE } else { 0 };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed;
        let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        // SAFETY: a new mapping, that replaces none.
        let at = unsafe { libc::mmap(hint, LEN, all, flags, -1, 0) };
        (at != libc::MAP_FAILED).then_some(Self(at.cast()))
    }

    fn at(&self, offset: u64) -> RemoteAddr {
        RemoteAddr(self.0 as u64 + offset)
    }

    fn put(&self, at: RemoteAddr, bytes: &[u8]) {
        let offset = at.since(self.at(0)) as usize;
        assert!(offset + bytes.len() <= LEN);
        // SAFETY: inside the mapping, which lives as long as `self`, and which nothing refers to.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.add(offset), bytes.len()) }
    }

    fn word(&self, offset: u64) -> u64 {
        // SAFETY: an aligned word inside the mapping; code changes it only while it is called.
        unsafe { self.0.add(offset as usize).cast::<u64>().read_volatile() }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: our mapping; no code of it runs any more.
        unsafe { libc::munmap(self.0.cast(), LEN) };
    }
}

/// Calls the function at `at` with three arguments.
fn call(at: RemoteAddr, a: u64, b: u64, c: u64) -> u64 {
    // SAFETY: at `at` stands a function of this signature and the C calling convention: assembled here, or libc's.
    let function: extern "C" fn(u64, u64, u64) -> u64 = unsafe { std::mem::transmute(at.0 as *const ()) };
    function(a, b, c)
}

/// Counts in the word at [`DATA`], and leaves nothing in the registers that a function may not look at.
fn thunk(page: &Page, undo: Option<Undo>) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    if undo == Some(Undo::Pop) {
        a.lea(rsp, qword_ptr(rsp + 8))?;
        // What was pushed is gone, as if a signal had come.
        a.mov(qword_ptr(rsp - 8), -1)?;
    }
    a.mov(r11, page.at(DATA).0)?;
    a.inc(qword_ptr(r11))?;
    a.mov(r10, -1_i64)?;
    a.mov(r11, -1_i64)?;
    a.mov(rax, -1_i64)?;
    a.jmp(page.at(TRAMPOLINE).0)?;
    a.assemble(page.at(THUNK).0)
}

fn entry_of(at: RemoteAddr, bytes: &[u8]) -> EntryPoint {
    let read = |from: RemoteAddr, len: usize| {
        let offset = from.since(at) as usize;
        bytes.get(offset..offset.checked_add(len)?).map(<[u8]>::to_vec)
    };
    EntryPoint {
        function: Function::Malloc,
        names: vec!["assembled"],
        address: at,
        module: "test".into(),
        file_bytes: bytes.to_vec(),
        head: Head::read(at, bytes.len() as u64, None, &read),
    }
}

/// Assembles a function, calls it, diverts it, calls it again: the same, and each call is counted. Answers the bytes kept.
fn diverted(build: impl Fn(&mut CodeAssembler, u64) -> Result<(), IcedError>) -> usize {
    let page = Page::near(None).unwrap();
    let mut a = CodeAssembler::new(64).unwrap();
    build(&mut a, page.at(DATA).0).unwrap();
    let bytes = a.assemble(page.at(0).0).unwrap();
    page.put(page.at(0), &bytes);
    page.put(page.at(DATA + 8), &1234_u64.to_le_bytes());
    let arguments = [(0, 0, 0), (1, 2, 3), (77, u64::MAX, 5), (1 << 63, 9, 0)];
    let results = || arguments.map(|(a, b, c)| call(page.at(0), a, b, c));
    let before = results();
    let detour = Detour::plan(&entry_of(page.at(0), &bytes)).unwrap();
    page.put(page.at(TRAMPOLINE), &detour.trampoline(page.at(TRAMPOLINE)).unwrap().bytes);
    page.put(page.at(THUNK), &thunk(&page, detour.undo).unwrap());
    assert_eq!(arguments.map(|(a, b, c)| call(page.at(TRAMPOLINE), a, b, c)), before, "the trampoline alone");
    let patch = detour.patch(page.at(THUNK)).unwrap();
    page.put(patch.address, &patch.planted[..patch.len]);
    assert_eq!(page.word(DATA), 0);
    assert_eq!(results(), before);
    assert_eq!(page.word(DATA), arguments.len() as u64, "each call came by once");
    page.put(patch.address, &patch.before[..patch.len]);
    assert_eq!(results(), before);
    assert_eq!(page.word(DATA), arguments.len() as u64);
    detour.kept_len
}

#[test]
fn endbr64_is_kept() {
    let kept = diverted(|a, _| {
        a.endbr64()?;
        a.lea(rax, qword_ptr(rdi + rsi))?;
        a.ret()
    });
    assert_eq!(kept, 4);
}

#[test]
fn a_test_is_kept_and_decides_again() {
    let kept = diverted(|a, _| {
        let mut nothing = a.create_label();
        a.test(rdi, rdi)?;
        a.je(nothing)?;
        a.lea(rax, qword_ptr(rdi + rdx * 2))?;
        a.ret()?;
        a.set_label(&mut nothing)?;
        a.mov(eax, 42)?;
        a.ret()
    });
    assert_eq!(kept, 3);
}

#[test]
fn a_comparison_with_data_is_kept() {
    let kept = diverted(|a, data| {
        a.add_instruction(Instruction::with2(Code::Cmp_rm64_imm32, word_at(data), 1234)?)?;
        a.setne(al)?;
        a.movzx(eax, al)?;
        a.add(rax, rdi)?;
        a.ret()
    });
    assert!(kept > 5);
}

#[test]
fn a_free_register_set_is_kept_unless_it_depends_on_itself() {
    let kept = diverted(|a, _| {
        a.mov(r10, rsi)?;
        a.lea(rax, qword_ptr(r10 + rdi))?;
        a.lea(rax, qword_ptr(rax + rdx))?;
        a.ret()
    });
    assert_eq!(kept, 3);
    let loaded = diverted(|a, data| {
        a.add_instruction(Instruction::with2(Code::Mov_r64_rm64, Register::R11, word_at(data))?)?;
        a.lea(rax, qword_ptr(r11 + rdi))?;
        a.ret()
    });
    assert_eq!(loaded, 7);
    let itself = diverted(|a, _| {
        a.mov(r10, r11)?;
        a.mov(rax, rdi)?;
        a.ret()
    });
    assert_eq!(itself, 0);
}

#[test]
fn a_push_is_kept_and_undone() {
    for (register, len) in [(rbx, 1), (rbp, 1), (r12, 2), (r15, 2)] {
        let kept = diverted(|a, _| {
            a.push(register)?;
            a.mov(register, rdi)?;
            a.add(register, rsi)?;
            a.mov(rax, register)?;
            a.pop(register)?;
            a.ret()
        });
        assert_eq!(kept, len);
    }
    // An argument that is pushed is read again.
    let argument = diverted(|a, _| {
        a.push(rdi)?;
        a.mov(rdi, rsi)?;
        a.add(rdi, rdx)?;
        a.pop(rax)?;
        a.ret()
    });
    assert_eq!(argument, 1);
}

#[test]
fn other_beginnings_take_the_jump_at_the_entry() {
    let kept = [
        diverted(|a, _| {
            a.sub(rsp, 24)?;
            a.mov(qword_ptr(rsp), rdi)?;
            a.pop(rax)?;
            a.add(rsp, 16)?;
            a.ret()
        }),
        diverted(|a, data| {
            // Relative to rip: read from the trampoline, too.
            a.add_instruction(Instruction::with2(Code::Mov_r64_rm64, Register::RAX, word_at(data))?)?;
            a.add(rax, rdi)?;
            a.ret()
        }),
        diverted(|a, data| {
            let mut elsewhere = a.create_label();
            // Five bytes, all of the function; what follows is another.
            a.jmp(elsewhere)?;
            a.db(&[0xcc; 200])?;
            a.set_label(&mut elsewhere)?;
            a.add_instruction(Instruction::with2(Code::Mov_r64_rm64, Register::RAX, word_at(data))?)?;
            a.ret()
        }),
        diverted(|a, _| {
            // Behind the comparison a call is in the way.
            let mut local = a.create_label();
            a.cmp(rdi, 7)?;
            a.nop()?;
            a.call(local)?;
            a.ret()?;
            a.set_label(&mut local)?;
            a.mov(rax, rdi)?;
            a.ret()
        }),
    ];
    assert_eq!(kept, [0; 4]);
}

/// The word behind the counter, relative to rip.
fn word_at(data: u64) -> MemoryOperand {
    MemoryOperand::with_base_displ(Register::RIP, (data + 8) as i64)
}

/// A page near libc with the trampolines of its allocator functions, by name.
fn trampolines_of_libc() -> (Page, HashMap<&'static str, RemoteAddr>) {
    let libc = own_libc();
    let entries = libc.entries();
    let maps = mappings(std::process::id() as i32).unwrap();
    let places = places(&maps, entries[0].address, LEN as u64);
    let page = places.into_iter().find_map(|place| Page::near(Some(place))).unwrap();
    let (mut at, mut named) = (page.at(0), HashMap::new());
    for entry in &entries {
        let trampoline = Detour::plan(entry).unwrap().trampoline(at).unwrap();
        page.put(at, &trampoline.bytes);
        named.extend(entry.names.iter().map(|name| (*name, at)));
        at = at.offset((trampoline.bytes.len() as u64).next_multiple_of(16));
    }
    (page, named)
}

#[test]
fn trampolines_of_libcs_functions_are_these_functions() {
    let (_page, named) = trampolines_of_libc();
    let run = |name: &str, a, b, c| call(named[name], a, b, c);
    let fill = |block: u64, byte: u8, len: usize| {
        // SAFETY: a block of at least `len` bytes that was just handed out.
        unsafe { std::slice::from_raw_parts_mut(block as *mut u8, len) }.fill(byte);
    };
    let first = |block: u64| {
        // SAFETY: a live block of at least 8 bytes that was filled.
        unsafe { (block as *const u64).read() }
    };
    for size in [1, 24, 100, 5000, 1 << 20] {
        let mut block = run("malloc", size.max(8), 0, 0);
        assert!(block != 0 && block.is_multiple_of(16));
        fill(block, 0xab, size as usize);
        for grown in [size * 2 + 8, size * 3 + 8, size + 8] {
            block = run("realloc", block, grown, 0);
            fill(block, 0xcd, grown as usize);
            assert_eq!(first(block), 0xcdcd_cdcd_cdcd_cdcd);
        }
        run("free", block, 0, 0);
        let zeroed = run("calloc", size, 8, 0);
        assert_eq!(first(zeroed), 0);
        // Handed out by the trampoline, given back by libc itself, and the other way round.
        // SAFETY: a live block of libc's malloc.
        unsafe { libc::free(zeroed as *mut libc::c_void) };
        // SAFETY: any size may be asked for.
        run("free", unsafe { libc::malloc(size as usize) } as u64, 0, 0);
    }
    run("free", 0, 0, 0);
    for name in ["aligned_alloc", "memalign"] {
        let block = run(name, 256, 1000, 0);
        assert!(block.is_multiple_of(256));
        run("free", block, 0, 0);
    }
    let mut out = 0_u64;
    assert_eq!(run("posix_memalign", (&raw mut out) as u64, 64, 100), 0);
    assert!(out != 0 && out.is_multiple_of(64));
    run("free", out, 0, 0);
    assert_eq!(run("posix_memalign", (&raw mut out) as u64, 3, 100), libc::EINVAL as u64);
}

#[test]
fn trampolines_of_libcs_mapping_functions_are_these_functions() {
    let (_page, named) = trampolines_of_libc();
    // SAFETY: the address of libc's mmap in another place, and its signature.
    let mmap: extern "C" fn(u64, u64, i32, i32, i32, i64) -> u64 =
        unsafe { std::mem::transmute(named["mmap"].0 as *const ()) };
    // SAFETY: the same, of mremap; variadic as libc's is.
    let mremap: unsafe extern "C" fn(u64, u64, u64, i32, ...) -> u64 =
        unsafe { std::mem::transmute(named["mremap"].0 as *const ()) };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let at = mmap(0, 8192, libc::PROT_READ, flags, -1, 0);
    assert!(at.is_multiple_of(4096) && at != u64::MAX);
    // SAFETY: our own mapping, of this length.
    let moved = unsafe { mremap(at, 8192, 65536, libc::MREMAP_MAYMOVE) };
    assert!(moved.is_multiple_of(4096));
    assert_eq!(call(named["munmap"], moved, 65536, 0), 0);
    // SAFETY: the page is not mapped any more; nothing is read.
    assert_eq!(unsafe { libc::msync(moved as *mut libc::c_void, 4096, libc::MS_ASYNC) }, -1);
    // The way of an error: an offset that is no multiple of a page.
    assert_eq!(mmap(0, 4096, libc::PROT_READ, flags, -1, 1), u64::MAX);
    assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EINVAL));
}
