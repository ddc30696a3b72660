//! Where a region can be mapped: a free range near the module whose functions it serves. Pure.

use crate::addr::RemoteAddr;
use crate::mapping::{Backing, Mapping};

/// How far a region may be from its module: a rel32 displacement reaches 2 GiB; the module's own size and the
/// region's are well inside the margin.
const REACH: u64 = (2 << 30) - (64 << 20);
/// Below this nothing may be mapped (`vm.mmap_min_addr` is at most this by default).
const LOWEST: u64 = 1 << 20;
/// Room left under a stack, which grows down into the range below it.
const STACK_ROOM: u64 = 512 << 20;

/// Free places of `len` bytes within reach of `near`, nearest first. A place lies at the upper end of its
/// range, so that the heap (brk grows up) and the kernel's own choice of places below it keep their room.
pub fn places(maps: &[Mapping], near: RemoteAddr, len: u64) -> Vec<RemoteAddr> {
    let mut found = Vec::new();
    let mut free_from = LOWEST;
    for map in maps {
        let is_stack = matches!(&map.backing, Backing::Named(name) if name.starts_with("[stack"));
        let until = if is_stack { map.start.0.saturating_sub(STACK_ROOM) } else { map.start.0 };
        if until >= free_from.saturating_add(len) {
            let at = until - len;
            if at.abs_diff(near.0) < REACH {
                found.push(RemoteAddr(at));
            } else if at > near.0 && free_from.abs_diff(near.0) < REACH {
                // A wide range whose upper end is out of reach: as high in it as reach allows.
                found.push(RemoteAddr((near.0 + REACH - len) & !0xfff));
            }
        }
        free_from = free_from.max(map.end.0);
    }
    found.sort_by_key(|at| at.0.abs_diff(near.0));
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::Perms;

    fn map(start: u64, end: u64, backing: Backing) -> Mapping {
        Mapping {
            start: RemoteAddr(start),
            end: RemoteAddr(end),
            perms: Perms::default(),
            offset: 0,
            device: (0, 0),
            inode: 0,
            backing,
        }
    }

    #[test]
    fn the_nearest_hole_comes_first_and_is_used_from_its_top() {
        let maps = [
            map(0x7f00_0000_0000, 0x7f00_0010_0000, Backing::Anonymous),
            map(0x7f00_0020_0000, 0x7f00_0030_0000, Backing::Anonymous),
        ];
        let places = places(&maps, RemoteAddr(0x7f00_0020_0000), 0x1000);
        assert_eq!(places[0], RemoteAddr(0x7f00_001f_f000));
    }

    #[test]
    fn a_hole_out_of_reach_is_none() {
        let maps = [map(0x7f00_0000_0000, 0x7f10_0000_0000, Backing::Anonymous)];
        assert!(places(&maps, RemoteAddr(0x7f08_0000_0000), 0x1000).is_empty());
    }

    #[test]
    fn room_is_left_under_the_stack() {
        let maps = [
            map(0x7fff_0000_0000, 0x7fff_0001_0000, Backing::Anonymous),
            map(0x7fff_1000_0000, 0x7fff_1001_0000, Backing::Named("[stack]".into())),
        ];
        // The hole is 256 MiB: all of it is the stack's.
        let found = places(&maps, RemoteAddr(0x7fff_0000_0000), 0x1000);
        assert!(found.iter().all(|p| p.0 < 0x7fff_0000_0000), "{found:?}");
    }
}
