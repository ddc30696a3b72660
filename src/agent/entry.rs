//! Where the thunks lead: registers in, registers out. Everything here is assembly because a hook may only change what the
//! hooked function may, and must leave by a jump where it leaves no return address.
//!
//! All are entered with the hooked function's arguments in place and the [`Descriptor`]'s address in r11. rax, r10 and r11 are
//! free at a function's entry (System V ABI); rcx and rdx too where the function has no such argument.

use crate::abi::{
    Descriptor, FILTER_HASH, FILTER_LOG2, SLOT_HASH, SLOTS_LOG2, Slot, State,
};
use crate::exact::{free_exact, malloc_exact};
use crate::hooks::{Call, enter, leave};
use crate::python::forget_code;
use core::arch::naked_asm;
use core::mem::offset_of;

/// Any function: asks [`enter`], and if that says so runs the function inside a call of ours, of which [`leave`] is told.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn heaptap_any() {
    naked_asm!(
        "push rbp",
        "mov rbp, rsp",
        "sub rsp, {size}",
        "mov [rsp + {args}], rdi",
        "mov [rsp + {args} + 8], rsi",
        "mov [rsp + {args} + 16], rdx",
        "mov [rsp + {args} + 24], rcx",
        "mov [rsp + {args} + 32], r8",
        "mov [rsp + {args} + 40], r9",
        "mov [rsp + {descriptor}], r11",
        "mov rax, [rbp + 8]",
        "mov [rsp + {caller}], rax",
        "mov rdi, rsp",
        "call {enter}",
        "mov rdi, [rsp + {args}]",
        "mov rsi, [rsp + {args} + 8]",
        "mov rdx, [rsp + {args} + 16]",
        "mov rcx, [rsp + {args} + 24]",
        "mov r8, [rsp + {args} + 32]",
        "mov r9, [rsp + {args} + 40]",
        "mov r11, [rsp + {descriptor}]",
        "test eax, eax",
        "jz 2f",
        "call [r11 + {original}]",
        "mov [rsp + {result}], rax",
        "mov rdi, rsp",
        "call {leave}",
        "mov rax, [rsp + {result}]",
        "leave",
        "ret",
        "2:",
        "leave",
        "jmp [r11 + {original}]",
        size = const size_of::<Call>(),
        args = const offset_of!(Call, args),
        descriptor = const offset_of!(Call, descriptor),
        caller = const offset_of!(Call, caller),
        result = const offset_of!(Call, result),
        original = const offset_of!(Descriptor, original),
        enter = sym enter,
        leave = sym leave,
    )
}

/// malloc, every one. Runs the function from here whatever comes; switched off, passes it on by a jump.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn heaptap_malloc_exact() {
    naked_asm!(
        "mov rax, [r11 + {state}]",
        "cmp dword ptr [rax + {enabled}], 0",
        "je 2f",
        "mov rsi, r11",
        "mov rdx, rsp",
        "jmp {malloc}",
        "2:",
        "jmp [r11 + {original}]",
        state = const offset_of!(Descriptor, state),
        original = const offset_of!(Descriptor, original),
        enabled = const offset_of!(State, enabled),
        malloc = sym malloc_exact,
    )
}

/// free, every one: told, then passed on by a jump.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn heaptap_free_exact() {
    naked_asm!(
        "mov rax, [r11 + {state}]",
        "cmp dword ptr [rax + {enabled}], 0",
        "je 2f",
        "test rdi, rdi",
        "je 2f",
        "mov rdx, rsp",
        "push rdi",
        "push r11",
        "sub rsp, 8",
        "mov rsi, r11",
        "call {free}",
        "add rsp, 8",
        "pop r11",
        "pop rdi",
        "2:",
        "jmp [r11 + {original}]",
        state = const offset_of!(Descriptor, state),
        original = const offset_of!(Descriptor, original),
        enabled = const offset_of!(State, enabled),
        free = sym free_exact,
    )
}

/// malloc, sampled: nearly always no more than a subtraction.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn heaptap_malloc_sampled() {
    naked_asm!(
        "mov rax, [r11 + {state}]",
        "cmp dword ptr [rax + {enabled}], 0",
        "je 2f",
        // A size that is negative as a signed number would be added.
        "test rdi, rdi",
        "js 3f",
        "mov rcx, fs:[0]",
        "imul r10d, ecx, {hash}",
        "shr r10d, {shift}",
        "shl r10d, 7",
        "cmp [rax + r10 + {key}], rcx",
        "jne 3f",
        "sub [rax + r10 + {until}], rdi",
        "js 4f",
        "2:",
        "jmp [r11 + {original}]",
        "4:",
        // `enter` does the subtraction itself.
        "add [rax + r10 + {until}], rdi",
        "3:",
        "jmp {any}",
        state = const offset_of!(Descriptor, state),
        original = const offset_of!(Descriptor, original),
        enabled = const offset_of!(State, enabled),
        hash = const SLOT_HASH,
        shift = const 32 - SLOTS_LOG2,
        key = const offset_of!(State, slots) + offset_of!(Slot, key),
        until = const offset_of!(State, slots) + offset_of!(Slot, until),
        any = sym heaptap_any,
    )
}

/// calloc(count, size), sampled, where it calls no other hooked function: as malloc.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn heaptap_calloc_sampled() {
    naked_asm!(
        "mov rax, [r11 + {state}]",
        "cmp dword ptr [rax + {enabled}], 0",
        "je 2f",
        // A product that can't be negative as a signed number, nor wrap.
        "mov rdx, rdi",
        "or rdx, rsi",
        "shr rdx, 31",
        "jnz 3f",
        "mov rcx, fs:[0]",
        "imul r10d, ecx, {hash}",
        "shr r10d, {shift}",
        "shl r10d, 7",
        "cmp [rax + r10 + {key}], rcx",
        "jne 3f",
        "mov rdx, rdi",
        "imul rdx, rsi",
        "sub [rax + r10 + {until}], rdx",
        "js 4f",
        "2:",
        "jmp [r11 + {original}]",
        "4:",
        "add [rax + r10 + {until}], rdx",
        "3:",
        "jmp {any}",
        state = const offset_of!(Descriptor, state),
        original = const offset_of!(Descriptor, original),
        enabled = const offset_of!(State, enabled),
        hash = const SLOT_HASH,
        shift = const 32 - SLOTS_LOG2,
        key = const offset_of!(State, slots) + offset_of!(Slot, key),
        until = const offset_of!(State, slots) + offset_of!(Slot, until),
        any = sym heaptap_any,
    )
}

/// A table's malloc(ctx, size), sampled. Sizes that CPython hands on to another domain go the long way, lest they be counted
/// twice (pymalloc: above 512; PYTHONMALLOC=debug asks for up to 32 bytes more).
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn heaptap_table_malloc_sampled() {
    naked_asm!(
        "mov rax, [r11 + {state}]",
        "cmp dword ptr [rax + {enabled}], 0",
        "je 2f",
        "cmp rsi, 448",
        "ja 3f",
        "mov rcx, fs:[0]",
        "imul r10d, ecx, {hash}",
        "shr r10d, {shift}",
        "shl r10d, 7",
        "cmp [rax + r10 + {key}], rcx",
        "jne 3f",
        "sub [rax + r10 + {until}], rsi",
        "js 4f",
        "2:",
        "jmp [r11 + {original}]",
        "4:",
        "add [rax + r10 + {until}], rsi",
        "3:",
        "jmp {any}",
        state = const offset_of!(Descriptor, state),
        original = const offset_of!(Descriptor, original),
        enabled = const offset_of!(State, enabled),
        hash = const SLOT_HASH,
        shift = const 32 - SLOTS_LOG2,
        key = const offset_of!(State, slots) + offset_of!(Slot, key),
        until = const offset_of!(State, slots) + offset_of!(Slot, until),
        any = sym heaptap_any,
    )
}

/// free(block), sampled: a load where no sampled block hashes alike.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn heaptap_free_sampled() {
    naked_asm!(
        "mov rax, [r11 + {state}]",
        "mov r10d, edi",
        "shr r10d, 4",
        "imul r10d, r10d, {hash}",
        "shr r10d, {shift}",
        "cmp byte ptr [rax + r10 + {filter}], 0",
        "jne 3f",
        "jmp [r11 + {original}]",
        "3:",
        "jmp {any}",
        state = const offset_of!(Descriptor, state),
        original = const offset_of!(Descriptor, original),
        hash = const FILTER_HASH as u32 as i32,
        shift = const 32 - FILTER_LOG2,
        filter = const offset_of!(State, filter),
        any = sym heaptap_any,
    )
}

/// A table's free(ctx, block), sampled.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn heaptap_table_free_sampled() {
    naked_asm!(
        "mov rax, [r11 + {state}]",
        "mov r10d, esi",
        "shr r10d, 4",
        "imul r10d, r10d, {hash}",
        "shr r10d, {shift}",
        "cmp byte ptr [rax + r10 + {filter}], 0",
        "jne 3f",
        "jmp [r11 + {original}]",
        "3:",
        "jmp {any}",
        state = const offset_of!(Descriptor, state),
        original = const offset_of!(Descriptor, original),
        hash = const FILTER_HASH as u32 as i32,
        shift = const 32 - FILTER_LOG2,
        filter = const offset_of!(State, filter),
        any = sym heaptap_any,
    )
}

/// `PyCode_Type.tp_dealloc(code)`: what was told of this code object is not true of the next one at its address.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn heaptap_code_dealloc() {
    naked_asm!(
        "mov rax, [r11 + {state}]",
        "cmp dword ptr [rax + {enabled}], 0",
        "je 2f",
        "push rdi",
        "push r11",
        "sub rsp, 8",
        "mov rsi, rdi",
        "mov rdi, rax",
        "call {forget}",
        "add rsp, 8",
        "pop r11",
        "pop rdi",
        "2:",
        "jmp [r11 + {original}]",
        state = const offset_of!(Descriptor, state),
        original = const offset_of!(Descriptor, original),
        enabled = const offset_of!(State, enabled),
        forget = sym forget,
    )
}

unsafe extern "C" fn forget(state: *mut State, code: u64) {
    forget_code(state, code);
}
