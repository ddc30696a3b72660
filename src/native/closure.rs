//! [`caller`]: out of the trampolines by which libffi gives C a function of Python's (ctypes and cffi callbacks).
//!
//! They lie in memory of no file, where no unwind data tells of them, but they are few and always the same: a register or two is loaded
//! and the code of libffi jumped to. The stack stays as it was at the call. Only what is one of them byte for byte is believed.

use crate::addr::RemoteAddr;
use crate::memory::RemoteMemory;
use crate::unwind_abi::Registers;

/// An instruction's bytes, those that every closure has in its own way left out behind them.
struct Instruction(&'static [u8], usize);

/// The trampolines of libffi's versions (src/x86/ffi64.c, `trampoline`; ffi.c, `FFI_INIT_TRAMPOLINE_UNIX64`).
const TRAMPOLINES: [&[Instruction]; 3] = [
    // movabs $code, %r11; movabs $closure, %r10; clc or stc; jmp *%r11
    &[
        Instruction(&[0x49, 0xbb], 8),
        Instruction(&[0x49, 0xba], 8),
        Instruction(&[], 1),
        Instruction(&[0x49, 0xff, 0xe3], 0),
    ],
    // lea -7(%rip), %r10; jmp *3(%rip)
    &[Instruction(&[0x4c, 0x8d, 0x15, 0xf9, 0xff, 0xff, 0xff], 0), Instruction(&[0xff, 0x25, 3, 0, 0, 0], 0)],
    // endbr64; lea -11(%rip), %r10; jmp *7(%rip)
    &[
        Instruction(&[0xf3, 0x0f, 0x1e, 0xfa], 0),
        Instruction(&[0x4c, 0x8d, 0x15, 0xf5, 0xff, 0xff, 0xff], 0),
        Instruction(&[0xff, 0x25, 7, 0, 0, 0], 0),
    ],
];

/// Who called, if the thread stands in such a trampoline.
pub fn caller(memory: &dyn RemoteMemory, frame: &Registers) -> Option<Registers> {
    if frame.is_return || !TRAMPOLINES.iter().any(|trampoline| stands_in(memory, frame.pc, trampoline)) {
        return None;
    }
    let pc = memory.read_u64(RemoteAddr(frame.sp)).ok()?;
    Some(Registers { pc, sp: frame.sp.checked_add(8)?, bp: frame.bp, is_return: true })
}

/// Whether an instruction of the trampoline begins at `pc`.
fn stands_in(memory: &dyn RemoteMemory, pc: u64, trampoline: &[Instruction]) -> bool {
    let mut before = 0;
    trampoline.iter().any(|instruction| {
        let begins = pc.checked_sub(before).is_some_and(|start| lies_at(memory, start, trampoline));
        before += (instruction.0.len() + instruction.1) as u64;
        begins
    })
}

fn lies_at(memory: &dyn RemoteMemory, start: u64, trampoline: &[Instruction]) -> bool {
    let mut at = start;
    trampoline.iter().all(|Instruction(fixed, own)| {
        let mut bytes = [0; 8];
        let bytes = &mut bytes[..fixed.len()];
        let is_same = memory.read(RemoteAddr(at), bytes).is_ok() && bytes == *fixed;
        at = at.saturating_add((fixed.len() + own) as u64);
        is_same
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::BytesMemory;

    /// As libffi 3.2 and 3.4 make them, and a stack behind them.
    const OLD: &str = "49bb4e5fc054857f000049ba10502b55857f0000f849ffe3";
    const NEW: &str = "f30f1efa4c8d15f5ffffffff25070000000f1f8000000000";

    fn at(code: &str, offset: u64) -> Option<u64> {
        let byte = |at: usize| u8::from_str_radix(&code[at..at + 2], 16).unwrap();
        let mut bytes: Vec<u8> = (0..code.len()).step_by(2).map(byte).collect();
        bytes.resize(32, 0);
        bytes.extend(0xabc_u64.to_le_bytes());
        let mut memory = BytesMemory::new();
        memory.map(RemoteAddr(0x1000), bytes);
        let frame = Registers { pc: 0x1000 + offset, sp: 0x1020, bp: None, is_return: false };
        assert_eq!(caller(&memory, &Registers { is_return: true, ..frame }), None);
        caller(&memory, &frame).map(|caller| caller.pc)
    }

    #[test]
    fn the_caller_of_a_closure_is_found_from_each_of_its_instructions() {
        let begins = |code, len: u64| -> Vec<u64> {
            (0..len).filter(|at_byte| at(code, *at_byte) == Some(0xabc)).collect()
        };
        assert_eq!(begins(OLD, 24), [0, 10, 20, 21]);
        assert_eq!(begins(NEW, 24), [0, 4, 11]);
        assert_eq!(begins(&NEW[8..], 20), [] as [u64; 0], "of another version's lea");
    }
}
