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
/// rsp is saved right before it.
const RSP_AT: u64 = RIP_AT - 8;
/// Stacks of one thread that are searched: a handler on an alternate stack may have interrupted one on the thread's own.
const STACKS: usize = 4;

/// Instruction pointers saved on the stacks of the stopped thread `tid` by signals whose handlers return through
/// `restorer`. `maps` tells where a stack ends.
pub fn interrupted_at(
    inferior: &Inferior,
    tid: i32,
    restorer: RemoteAddr,
    maps: &[Mapping],
) -> Result<Vec<RemoteAddr>, TraceError> {
    let mut found = Vec::new();
    let mut searched: Vec<RemoteAddr> = Vec::new();
    let mut to_search = vec![RemoteAddr(inferior.registers(tid)?.rsp & !7)];
    while let Some(from) = to_search.pop() {
        let Some(stack) = maps.iter().find(|m| m.contains(from)) else { continue };
        if searched.contains(&stack.start) || searched.len() == STACKS {
            continue;
        }
        searched.push(stack.start);
        let len = (stack.end.since(from) as usize).min(SCAN);
        let Ok(words) = inferior.memory().read_vec(from, len) else { continue };
        for (i, word) in words.chunks_exact(8).enumerate() {
            if word != restorer.0.to_le_bytes() {
                continue;
            }
            let frame = from.offset(8 * i as u64);
            found.extend(inferior.memory().read_ptr(frame.offset(RIP_AT)));
            to_search
                .extend(inferior.memory().read_u64(frame.offset(RSP_AT)).map(|rsp| RemoteAddr(rsp & !7)));
        }
    }
    Ok(found)
}
