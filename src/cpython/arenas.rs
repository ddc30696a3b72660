//! Where pymalloc gets its arenas from: `PyObjectArenaAllocator` {ctx, alloc, free} (`Objects/obmalloc.c`).
//!
//! Since 3.12 it is a part of `_PyRuntime`, before a static variable; `PyObject_GetArenaAllocator`, exported by all, copies it. It
//! is found by what that function loads, and known by its words: two functions of a mapped file.

use super::Python;
use super::binary::{Binary, Span, find_symbol};
use super::disasm::instructions;
use super::text::word;
use crate::addr::RemoteAddr;
use crate::memory::RemoteMemory;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use std::collections::HashMap;

const GETTER: &str = "PyObject_GetArenaAllocator";
/// Bytes of the getter that are decoded: since 3.12 it takes a lock first.
const GETTER_BYTES: usize = 160;

/// Where arenas come from, and go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArenaAllocator {
    /// Address of the first of the three words.
    pub address: RemoteAddr,
    /// `alloc(ctx, size)`.
    pub alloc: RemoteAddr,
    /// `free(ctx, arena, size)`.
    pub free: RemoteAddr,
}

/// It was not found: the getter loads nothing like it, or the application has set functions of its own.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "CPython's arena allocator was not found in {binary}: {GETTER} loads no two functions of a mapped file"
)]
pub struct NoArenaAllocator {
    /// The binary of the runtime.
    pub binary: String,
}

/// See [`Python::arena_allocator`].
pub fn find(
    memory: &dyn RemoteMemory,
    binaries: &[&dyn Binary],
    python: &Python,
) -> Result<ArenaAllocator, NoArenaAllocator> {
    let code: Vec<Span> = binaries.iter().flat_map(|b| b.executable()).collect();
    let getter = find_symbol(binaries, GETTER).map(|(_, at)| at);
    let loads = getter.map(|at| loads(memory, &instructions(memory, at, GETTER_BYTES))).unwrap_or_default();
    let found = loads.into_iter().find_map(|at| read(memory, &code, at));
    found.ok_or_else(|| NoArenaAllocator { binary: python.binary.clone() })
}

/// Addresses that the instructions load from: relative to themselves, or to a word of the global offset table.
fn loads(memory: &dyn RemoteMemory, instructions: &[Instruction]) -> Vec<RemoteAddr> {
    let mut known: HashMap<Register, RemoteAddr> = HashMap::new();
    let mut found = Vec::new();
    for i in instructions {
        if i.op_count() < 2 || i.op1_kind() != OpKind::Memory {
            continue;
        }
        let base = known.get(&i.memory_base()).filter(|_| i.memory_index() == Register::None);
        let at = if i.is_ip_rel_memory_operand() {
            RemoteAddr(i.ip_rel_memory_address())
        } else if let Some(base) = base {
            base.offset(i.memory_displacement64())
        } else {
            continue;
        };
        match i.mnemonic() {
            Mnemonic::Lea => {
                known.insert(i.op0_register(), at);
            }
            _ => {
                found.push(at);
                if let (Mnemonic::Mov, true, Ok(word)) =
                    (i.mnemonic(), i.is_ip_rel_memory_operand(), memory.read_ptr(at))
                {
                    known.insert(i.op0_register(), word);
                }
            }
        }
    }
    found
}

fn read(memory: &dyn RemoteMemory, code: &[Span], address: RemoteAddr) -> Option<ArenaAllocator> {
    let bytes = memory.read_vec(address, 24).ok()?;
    let field = |i: u64| word(&bytes, 8 * i, 8).map(RemoteAddr);
    let (alloc, free) = (field(1)?, field(2)?);
    let is_code = |at: RemoteAddr| code.iter().any(|span| span.contains(at));
    (is_code(alloc) && is_code(free)).then_some(ArenaAllocator { address, alloc, free })
}
