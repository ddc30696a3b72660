//! Facts read out of a few instructions of exported functions, where a process offers no symbol or table.
//!
//! Decoding only; each answer is checked by its user against memory.

use crate::addr::RemoteAddr;
use crate::memory::RemoteMemory;
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

/// Instructions looked at from a function's entry.
const MAX_INSTRUCTIONS: usize = 24;

/// The first instructions of the function at `addr`.
pub fn instructions(memory: &dyn RemoteMemory, addr: RemoteAddr, max_bytes: usize) -> Vec<Instruction> {
    let mut decoded = decoded(memory, addr, max_bytes);
    decoded.truncate(MAX_INSTRUCTIONS);
    decoded
}

fn decoded(memory: &dyn RemoteMemory, addr: RemoteAddr, max_bytes: usize) -> Vec<Instruction> {
    // Never past the end of the mapping: shorten until it can be read.
    let bytes =
        (1..=max_bytes).rev().step_by(16).find_map(|len| memory.read_vec(addr, len).ok()).unwrap_or_default();
    let decoder = Decoder::with_ip(64, &bytes, addr.0, DecoderOptions::NONE);
    decoder.into_iter().take_while(|i| !i.is_invalid()).collect()
}

/// What the function at `addr` loads from addresses relative to its instructions, and how many bytes of it: among `max_bytes` of
/// code.
pub fn loads(memory: &dyn RemoteMemory, addr: RemoteAddr, max_bytes: usize) -> Vec<(RemoteAddr, usize)> {
    let relative = |i: &Instruction| {
        i.mnemonic() == Mnemonic::Mov && i.op1_kind() == OpKind::Memory && i.is_ip_rel_memory_operand()
    };
    let loads = decoded(memory, addr, max_bytes).into_iter().filter(relative);
    loads.map(|i| (RemoteAddr(i.ip_rel_memory_address()), i.memory_size().size())).collect()
}

/// How a function gets at a thread-local variable that it returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadLocal {
    /// At a constant distance from the thread pointer.
    FromThreadPointer(i64),
    /// Offset in the TLS block of a module: {module, offset} stand at this address (`tls_index`).
    Dynamic(RemoteAddr),
}

/// The thread-local variable that the function at `addr` loads first: `mov %fs:disp,reg`; the same through the global offset
/// table (initial-exec); or a call of `__tls_get_addr` (general-dynamic).
pub fn thread_local_returned(memory: &dyn RemoteMemory, addr: RemoteAddr) -> Option<ThreadLocal> {
    let mut from_table: Option<(Register, RemoteAddr)> = None;
    let mut index = None;
    for i in instructions(memory, addr, 96) {
        let memory_load = i.mnemonic() == Mnemonic::Mov && i.op1_kind() == OpKind::Memory;
        if memory_load && i.segment_prefix() == Register::FS {
            return match (i.memory_base(), i.memory_index()) {
                (Register::None, Register::None) => {
                    Some(ThreadLocal::FromThreadPointer(i64::from(i.memory_displacement64() as u32 as i32)))
                }
                (base, Register::None) => {
                    let (_, slot) = from_table.filter(|(register, _)| *register == base)?;
                    Some(ThreadLocal::FromThreadPointer(memory.read_u64(slot).ok()? as i64))
                }
                _ => None,
            };
        }
        if memory_load && i.is_ip_rel_memory_operand() {
            from_table = Some((i.op0_register(), RemoteAddr(i.ip_rel_memory_address())));
        }
        if i.mnemonic() == Mnemonic::Lea && i.op0_register() == Register::RDI && i.is_ip_rel_memory_operand()
        {
            index = Some(RemoteAddr(i.ip_rel_memory_address()));
        }
        if i.mnemonic() == Mnemonic::Call {
            return index.map(ThreadLocal::Dynamic);
        }
        if matches!(i.mnemonic(), Mnemonic::Ret | Mnemonic::Jmp) {
            return None;
        }
    }
    None
}

/// musl's `pthread_getspecific` is `self->tsd[key]`: the offset of `tsd` in the thread's control block.
pub fn musl_tsd_offset(memory: &dyn RemoteMemory, getspecific: RemoteAddr) -> Option<u64> {
    let mut pointer = Register::None;
    for i in instructions(memory, getspecific, 48) {
        if i.mnemonic() != Mnemonic::Mov || i.op1_kind() != OpKind::Memory {
            continue;
        }
        if i.segment_prefix() == Register::FS && i.memory_displacement64() == 0 {
            pointer = i.op0_register();
        } else if i.memory_base() == pointer
            && pointer != Register::None
            && i.memory_index() == Register::None
        {
            return Some(i.memory_displacement64()).filter(|offset| *offset < 4096 && offset % 8 == 0);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::BytesMemory;

    const AT: RemoteAddr = RemoteAddr(0x40_0000);

    fn code(bytes: &[u8]) -> BytesMemory {
        let mut memory = BytesMemory::new();
        memory.map(AT, [bytes, &[0x90; 64][..]].concat());
        memory
    }

    #[test]
    fn the_three_ways_to_a_thread_local() {
        // endbr64; mov %fs:-8,%rax; ret
        let local =
            code(&[0xf3, 0x0f, 0x1e, 0xfa, 0x64, 0x48, 0x8b, 0x04, 0x25, 0xf8, 0xff, 0xff, 0xff, 0xc3]);
        assert_eq!(thread_local_returned(&local, AT), Some(ThreadLocal::FromThreadPointer(-8)));
        // mov 0x1000(%rip),%rax; mov %fs:(%rax),%rax; ret
        let mut initial = code(&[0x48, 0x8b, 0x05, 0, 0x10, 0, 0, 0x64, 0x48, 0x8b, 0x00, 0xc3]);
        initial.map(AT.offset(0x1007), (-24_i64).to_le_bytes().to_vec());
        assert_eq!(thread_local_returned(&initial, AT), Some(ThreadLocal::FromThreadPointer(-24)));
        // push %rbx; data16 lea 0x1000(%rip),%rdi; data16 data16 rex.W call …
        let dynamic =
            code(&[0x53, 0x66, 0x48, 0x8d, 0x3d, 0, 0x10, 0, 0, 0x66, 0x66, 0x48, 0xe8, 0, 0, 0, 0, 0xc3]);
        assert_eq!(thread_local_returned(&dynamic, AT), Some(ThreadLocal::Dynamic(AT.offset(0x1009))));
        assert_eq!(thread_local_returned(&code(&[0x31, 0xc0, 0xc3]), AT), None);
    }

    #[test]
    fn musls_getspecific_gives_the_offset_of_tsd() {
        // mov %fs:0,%rax; mov 0x80(%rax),%rax; mov %edi,%edi; mov (%rax,%rdi,8),%rax; ret
        let bytes = [
            0x64, 0x48, 0x8b, 0x04, 0x25, 0, 0, 0, 0, 0x48, 0x8b, 0x80, 0x80, 0, 0, 0, 0x89, 0xff, 0x48,
            0x8b, 0x04, 0xf8, 0xc3,
        ];
        assert_eq!(musl_tsd_offset(&code(&bytes), AT), Some(0x80));
        assert_eq!(musl_tsd_offset(&code(&[0xc3]), AT), None);
    }
}
