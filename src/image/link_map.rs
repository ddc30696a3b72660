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
/// Bytes of `struct link_map` {addr, name, ld, next, prev}.
const NODE: usize = 40;

/// The list at one moment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LinkMap {
    /// Where the word lies that leads to the first object.
    head: RemoteAddr,
    /// Where each object's node lies, and what is in it.
    nodes: Vec<(RemoteAddr, [u8; NODE])>,
}

impl LinkMap {
    /// The list, given the dynamic section of the executable (its `DT_DEBUG` leads there). `None` if there is none, or none yet.
    pub fn from_dynamic(memory: &dyn RemoteMemory, dynamic: RemoteAddr, len: u64) -> Option<Self> {
        let bytes = memory.read_vec(dynamic, len.min(1 << 16) as usize).ok()?;
        for entry in bytes.chunks_exact(16) {
            match word(entry, 0) {
                DT_NULL => return None,
                DT_DEBUG if word(entry, 8) != 0 => {
                    return Self::from_r_debug(memory, RemoteAddr(word(entry, 8)));
                }
                _ => {}
            }
        }
        None
    }

    /// The same, given the address of `struct r_debug` {int version; link_map *map; …}.
    pub fn from_r_debug(memory: &dyn RemoteMemory, r_debug: RemoteAddr) -> Option<Self> {
        if memory.read_u32(r_debug).ok()? == 0 {
            return None;
        }
        let head = r_debug.offset(8);
        let mut nodes = Vec::new();
        let mut at = memory.read_ptr(head).ok()?;
        while !at.is_null() && nodes.len() < MAX_OBJECTS {
            let mut node = [0; NODE];
            memory.read(at, &mut node).ok()?;
            nodes.push((at, node));
            at = RemoteAddr(word(&node, 24));
        }
        if nodes.is_empty() || !at.is_null() { None } else { Some(Self { head, nodes }) }
    }

    /// Where each object's dynamic section lies, which identifies it whatever its name.
    pub fn dynamics(&self) -> Vec<RemoteAddr> {
        self.nodes.iter().map(|(_, node)| RemoteAddr(word(node, 16))).collect()
    }

    /// Whether the list is another by now: objects were loaded or unloaded.
    pub fn has_changed(&self, memory: &dyn RemoteMemory) -> bool {
        let mut first = [0; 8];
        let mut now = vec![[0; NODE]; self.nodes.len()];
        let mut wanted: Vec<(RemoteAddr, &mut [u8])> = vec![(self.head, &mut first)];
        wanted.extend(self.nodes.iter().zip(&mut now).map(|((at, _), now)| (*at, &mut now[..])));
        let are_read = memory.read_many(&mut wanted).into_iter().all(|is_read| is_read);
        let is_first = self.nodes.first().is_some_and(|(at, _)| at.0 == u64::from_le_bytes(first));
        !are_read || !is_first || self.nodes.iter().zip(&now).any(|((_, before), now)| before != now)
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
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
        let found = LinkMap::from_dynamic(&memory, RemoteAddr(0x1000), 48).unwrap();
        assert_eq!(found.dynamics(), [RemoteAddr(0x10), RemoteAddr(0x20)]);
        assert!(!found.has_changed(&memory));
        // One more; another in the same place; another first; no list.
        for (at, words_now) in [
            (0x3100, [0, 0, 0x20, 0x3200, 0x3000]),
            (0x3100, [0, 0, 0x28, 0, 0x3000]),
            (0x2000, [1, 0x3100, 0, 0, 0]),
        ] {
            let mut later = memory.clone();
            later.map(RemoteAddr(at), words(&words_now));
            assert!(found.has_changed(&later));
        }
        assert!(found.has_changed(&BytesMemory::new()));
    }

    #[test]
    fn a_list_that_loops_or_is_broken_is_no_answer() {
        let mut memory = BytesMemory::new();
        memory.map(RemoteAddr(0x2000), words(&[1, 0x3000]));
        memory.map(RemoteAddr(0x3000), words(&[0, 0, 0x10, 0x3000, 0]));
        assert_eq!(LinkMap::from_r_debug(&memory, RemoteAddr(0x2000)), None);
        memory.map(RemoteAddr(0x3000), words(&[0, 0, 0x10, 0x9999, 0]));
        assert_eq!(LinkMap::from_r_debug(&memory, RemoteAddr(0x2000)), None);
    }
}
