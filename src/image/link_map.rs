//! The dynamic linker's list of loaded objects (`struct r_debug`, `<link.h>`), in its lookup order.
//!
//! This is the protocol every debugger uses; glibc and musl both keep it. Read while the process runs, the list
//! may change under us: it is bounded, and a broken walk is no answer rather than a wrong one.

use crate::addr::RemoteAddr;
use crate::memory::RemoteMemory;

/// More objects than any process loads; a longer list is a loop.
const MAX_OBJECTS: usize = 16_384;
const DT_NULL: u64 = 0;
const DT_DEBUG: u64 = 21;

/// Where each loaded object's dynamic section lies, in lookup order, given the dynamic section of the executable
/// (its `DT_DEBUG` leads to the list). `None` if there is no list, or none yet.
pub fn from_dynamic(memory: &dyn RemoteMemory, dynamic: RemoteAddr, len: u64) -> Option<Vec<RemoteAddr>> {
    let bytes = memory.read_vec(dynamic, len.min(1 << 16) as usize).ok()?;
    for entry in bytes.chunks_exact(16) {
        let word = |i: usize| entry[i..i + 8].iter().rev().fold(0_u64, |n, b| n << 8 | u64::from(*b));
        match word(0) {
            DT_NULL => return None,
            DT_DEBUG if word(8) != 0 => return from_r_debug(memory, RemoteAddr(word(8))),
            _ => {}
        }
    }
    None
}

/// The same, given the address of `struct r_debug` {int version; link_map *map; …}.
pub fn from_r_debug(memory: &dyn RemoteMemory, r_debug: RemoteAddr) -> Option<Vec<RemoteAddr>> {
    if memory.read_u32(r_debug).ok()? == 0 {
        return None;
    }
    let mut found = Vec::new();
    let mut at = memory.read_ptr(r_debug.offset(8)).ok()?;
    // struct link_map {addr, name, ld, next, prev}: each object's dynamic section identifies it, whatever its name.
    while !at.is_null() && found.len() < MAX_OBJECTS {
        found.push(memory.read_ptr(at.offset(16)).ok()?);
        at = memory.read_ptr(at.offset(24)).ok()?;
    }
    if found.is_empty() || !at.is_null() { None } else { Some(found) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::BytesMemory;

    fn words(values: &[u64]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn objects_come_in_list_order() {
        let mut memory = BytesMemory::new();
        memory.map(RemoteAddr(0x1000), words(&[12, 5, DT_DEBUG, 0x2000, DT_NULL, 0]));
        memory.map(RemoteAddr(0x2000), words(&[1, 0x3000]));
        memory.map(RemoteAddr(0x3000), words(&[0, 0, 0x10, 0x3100, 0]));
        memory.map(RemoteAddr(0x3100), words(&[0, 0, 0x20, 0, 0x3000]));
        let found = from_dynamic(&memory, RemoteAddr(0x1000), 48).unwrap();
        assert_eq!(found, [RemoteAddr(0x10), RemoteAddr(0x20)]);
    }

    #[test]
    fn a_list_that_loops_or_is_broken_is_no_answer() {
        let mut memory = BytesMemory::new();
        memory.map(RemoteAddr(0x2000), words(&[1, 0x3000]));
        memory.map(RemoteAddr(0x3000), words(&[0, 0, 0x10, 0x3000, 0]));
        assert_eq!(from_r_debug(&memory, RemoteAddr(0x2000)), None);
        memory.map(RemoteAddr(0x3000), words(&[0, 0, 0x10, 0x9999, 0]));
        assert_eq!(from_r_debug(&memory, RemoteAddr(0x2000)), None);
    }
}
