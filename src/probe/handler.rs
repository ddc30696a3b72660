//! The code of the SIGTRAP handler: void handler(int, siginfo_t *, ucontext_t *). Pure: assembles bytes.
//!
//! It runs when no tracer takes the trap: heaptap was killed. See [`super::region`] for what it finds where. It calls
//! nothing, uses four words of stack, and may be interrupted and entered again at any instruction.

use super::region::{HEADER_LEN, ORIGINAL_ACTION, PATCH_LEN, TRAPS_AT};
use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, eax, edi, edx, esi, qword_ptr, r8, r10, rax, rbp, rbx, rcx, rdi, rdx, rsi,
};

/// `offsetof(ucontext_t, uc_mcontext.gregs[REG_RIP])` on x86_64 (sys/ucontext.h).
const UCONTEXT_RIP: i32 = 40 + 16 * 8;
const SIGSET_LEN: u64 = 8;

/// What the handler works with.
pub(super) struct Tables {
    /// The region it is in.
    pub base: u64,
    /// Address of the path of the process's own memory.
    pub path: u64,
    /// Number of patches.
    pub patches: usize,
    /// Number of traps.
    pub traps: usize,
    /// Whether it may make system calls to take the patches back.
    pub may_heal: bool,
}

/// The handler, to run at `at`.
pub(super) fn assemble(at: u64, tables: &Tables) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    send_on(&mut a, tables)?;
    // System calls leave rbx and rbp alone; rsi says whether the trap was ours.
    a.push(rbx)?;
    a.push(rbp)?;
    a.push(rsi)?;
    if tables.may_heal {
        heal(&mut a, tables)?;
    }
    a.pop(rsi)?;
    a.pop(rbp)?;
    a.pop(rbx)?;
    let mut foreign = a.create_label();
    a.test(esi, esi)?;
    a.je(foreign)?;
    a.ret()?;
    a.set_label(&mut foreign)?;
    give_back(&mut a, tables)?;
    a.ret()?;
    a.assemble(at)
}

/// Looks the trap up and makes the thread go on where the table says; leaves 1 in rsi if it was there, else 0.
fn send_on(a: &mut CodeAssembler, tables: &Tables) -> Result<(), IcedError> {
    let (mut next, mut found, mut end) = (a.create_label(), a.create_label(), a.create_label());
    // rax: where the trap was; rcx: the table; r8: traps left.
    a.mov(rax, qword_ptr(rdx + UCONTEXT_RIP))?;
    a.mov(rcx, tables.base + TRAPS_AT as u64)?;
    a.mov(r8, tables.traps as u64)?;
    a.xor(esi, esi)?;
    a.set_label(&mut next)?;
    a.test(r8, r8)?;
    a.je(end)?;
    a.cmp(rax, qword_ptr(rcx))?;
    a.je(found)?;
    a.add(rcx, 16)?;
    a.dec(r8)?;
    a.jmp(next)?;
    a.set_label(&mut found)?;
    a.mov(rax, qword_ptr(rcx + 8))?;
    a.mov(qword_ptr(rdx + UCONTEXT_RIP), rax)?;
    a.mov(esi, 1)?;
    a.set_label(&mut end)?;
    // A label needs an instruction.
    a.nop()
}

/// Writes what was before every patch back, through the thread's own memory file.
fn heal(a: &mut CodeAssembler, tables: &Tables) -> Result<(), IcedError> {
    let (mut next, mut close, mut done) = (a.create_label(), a.create_label(), a.create_label());
    let first = tables.base + HEADER_LEN as u64;
    a.mov(rdi, tables.path)?;
    a.mov(esi, libc::O_RDWR | libc::O_CLOEXEC)?;
    a.mov(eax, libc::SYS_open as i32)?;
    a.syscall()?;
    a.test(rax, rax)?;
    a.js(done)?;
    a.mov(rbx, rax)?;
    a.mov(rbp, first)?;
    a.set_label(&mut next)?;
    a.mov(rcx, first + (tables.patches * PATCH_LEN) as u64)?;
    a.cmp(rbp, rcx)?;
    a.jae(close)?;
    a.mov(rdi, rbx)?;
    a.lea(rsi, qword_ptr(rbp + 16))?;
    a.mov(rdx, qword_ptr(rbp + 8))?;
    a.mov(r10, qword_ptr(rbp))?;
    a.mov(eax, libc::SYS_pwrite64 as i32)?;
    a.syscall()?;
    a.add(rbp, PATCH_LEN as i32)?;
    a.jmp(next)?;
    a.set_label(&mut close)?;
    a.mov(rdi, rbx)?;
    a.mov(eax, libc::SYS_close as i32)?;
    a.syscall()?;
    a.set_label(&mut done)?;
    a.nop()
}

/// Not a breakpoint of ours: the disposition that the process had gets the signal.
fn give_back(a: &mut CodeAssembler, tables: &Tables) -> Result<(), IcedError> {
    a.mov(edi, libc::SIGTRAP)?;
    a.mov(rsi, tables.base + ORIGINAL_ACTION)?;
    a.xor(edx, edx)?;
    a.mov(r10, SIGSET_LEN)?;
    a.mov(eax, libc::SYS_rt_sigaction as i32)?;
    a.syscall()?;
    a.mov(eax, libc::SYS_gettid as i32)?;
    a.syscall()?;
    a.push(rax)?;
    a.mov(eax, libc::SYS_getpid as i32)?;
    a.syscall()?;
    a.mov(edi, eax)?;
    a.pop(rsi)?;
    a.mov(edx, libc::SIGTRAP)?;
    a.mov(eax, libc::SYS_tgkill as i32)?;
    a.syscall()
}
