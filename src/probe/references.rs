//! Whether the application keeps the address of a thunk: somebody who wrapped CPython's allocators while they led through
//! us (tracemalloc, another profiler) saved what it found in the tables, and calls it for as long as it lives.
//!
//! Nobody else has such an address, so it is looked for as a word in all writable memory. More than can
//! be looked at in the time that a process may be stopped counts as kept.

use super::error::ProbeError;
use crate::addr::RemoteAddr;
use crate::inferior::error::TraceError;
use crate::inferior::{Inferior, maps};
use crate::mapping::Mapping;
use crate::memory::RemoteMemory;

/// Why a region stays, in words for the user.
pub const WHY: &str =
    "the application wrapped CPython's allocators meanwhile (as tracemalloc does) and calls through them";
/// Bytes looked at: about half a second.
const SCAN_LIMIT: u64 = 2 << 30;
const CHUNK: u64 = 1 << 20;
/// Below a stack pointer and the ABI's red zone nothing lives; so far down calls and signal frames left words lately.
const DEAD: u64 = 64 << 10;
const RED_ZONE: u64 = 128;
const PAGE: u64 = 4096;

/// Whether writable memory of the stopped process holds one of `addresses` as an aligned word.
pub fn any(inferior: &Inferior, addresses: &[u64]) -> Result<bool, ProbeError> {
    if addresses.is_empty() {
        return Ok(false);
    }
    let pid = inferior.pid();
    let maps = maps::mappings(pid).map_err(|e| TraceError::Proc {
        path: format!("/proc/{pid}/maps"),
        source: std::io::Error::other(e),
    })?;
    // Shared memory is no place for a function's address.
    let writable: Vec<&Mapping> =
        maps.iter().filter(|m| m.perms.write && m.perms.read && !m.perms.shared).collect();
    if writable.iter().map(|m| m.len()).sum::<u64>() > SCAN_LIMIT {
        return Ok(true);
    }
    let mut stacks: Vec<RemoteAddr> = Vec::new();
    for tid in inferior.tids() {
        match inferior.registers(tid) {
            Ok(regs) => stacks.push(RemoteAddr(regs.rsp)),
            Err(TraceError::Gone { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let holds = |m: &&Mapping| {
        let mut from = m.start;
        let mut inside: Vec<_> = stacks.iter().filter(|rsp| m.contains(**rsp)).collect();
        inside.sort();
        inside.into_iter().any(|rsp| {
            let dead = RemoteAddr(rsp.0.saturating_sub(DEAD).max(from.0));
            let found = holds(inferior.memory(), from, dead, addresses);
            from = RemoteAddr((rsp.0 - RED_ZONE).max(from.0) & !7);
            found
        }) || holds(inferior.memory(), from, m.end, addresses)
    };
    Ok(writable.iter().any(holds))
}

fn holds(memory: &dyn RemoteMemory, from: RemoteAddr, to: RemoteAddr, addresses: &[u64]) -> bool {
    let mut at = from;
    while at < to {
        let len = CHUNK.min(to.0 - at.0);
        let found = match memory.read_vec(at, len as usize) {
            Ok(bytes) => has_word(&bytes, addresses),
            // A page that can't be read, the application can't read either: glibc 2.43 makes the guard pages of
            // stacks so (MADV_GUARD_INSTALL), within a mapping that is readable by its rights.
            Err(_) => pages(at, len)
                .any(|(at, len)| memory.read_vec(at, len).is_ok_and(|bytes| has_word(&bytes, addresses))),
        };
        if found {
            return true;
        }
        at = at.offset(len);
    }
    false
}

fn pages(from: RemoteAddr, len: u64) -> impl Iterator<Item = (RemoteAddr, usize)> {
    let end = from.0 + len;
    let mut at = from.0;
    std::iter::from_fn(move || {
        let len = (PAGE - at % PAGE).min(end - at);
        let page = (RemoteAddr(at), len as usize);
        at += len;
        (len > 0).then_some(page)
    })
}

fn has_word(bytes: &[u8], addresses: &[u64]) -> bool {
    let mut words = bytes.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().unwrap_or_default()));
    words.any(|word| addresses.contains(&word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::BytesMemory;

    #[test]
    fn a_word_is_found_beside_a_page_that_cannot_be_read() {
        let mut bytes = vec![0; PAGE as usize];
        bytes[64..72].copy_from_slice(&77_u64.to_le_bytes());
        let mut memory = BytesMemory::new();
        memory.map(RemoteAddr(0x10000), vec![0; PAGE as usize]);
        memory.map(RemoteAddr(0x12000), bytes);
        let search = |to, addresses: &[u64]| holds(&memory, RemoteAddr(0x10000), RemoteAddr(to), addresses);
        assert!(search(0x13000, &[5, 77]));
        assert!(!search(0x13000, &[76]));
        assert!(!search(0x12000 + 64, &[77]), "behind the end");
    }
}
