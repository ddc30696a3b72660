//! Where threads will go on when the signal handlers that they are in return: the kernel keeps it on their stacks.
//!
//! A frame of rt_sigreturn(2) on x86-64 (arch/x86/include/asm/sigframe.h, `struct rt_sigframe`) begins with the address of
//! the restorer, followed by `struct ucontext`; the interrupted instruction pointer is at a fixed distance.

use crate::addr::RemoteAddr;
use crate::inferior::Inferior;
use crate::inferior::error::TraceError;
use crate::mapping::Mapping;
use crate::memory::RemoteMemory;

/// Bytes of a stack that are searched.
const SCAN: usize = 256 << 10;
/// From the restorer's address to the saved rip: pretcode, uc_flags, uc_link, uc_stack, then 16 registers.
const RIP_AT: u64 = 8 + 8 + 8 + 24 + 16 * 8;

/// Instruction pointers saved on the stack of the stopped thread `tid` by signals whose handlers return through
/// `restorer`. `maps` tells where the stack ends.
pub fn interrupted_at(
    inferior: &Inferior,
    tid: i32,
    restorer: RemoteAddr,
    maps: &[Mapping],
) -> Result<Vec<RemoteAddr>, TraceError> {
    let from = RemoteAddr(inferior.registers(tid)?.rsp & !7);
    let Some(stack) = maps.iter().find(|m| m.contains(from)) else { return Ok(Vec::new()) };
    let len = (stack.end.since(from) as usize).min(SCAN);
    let Ok(words) = inferior.memory().read_vec(from, len) else { return Ok(Vec::new()) };
    let frames = words
        .chunks_exact(8)
        .enumerate()
        .filter(|(_, word)| **word == restorer.0.to_le_bytes())
        .map(|(i, _)| from.offset(8 * i as u64));
    Ok(frames.filter_map(|frame| inferior.memory().read_ptr(frame.offset(RIP_AT)).ok()).collect())
}
