//! What is found of a killed heaptap, in made-up memory.

use super::*;
use crate::mapping::Perms;
use crate::memory::BytesMemory;
use crate::probe::near::NearRegion;
use crate::probe::region::{Controller, Patch, Region};

#[test]
fn a_region_written_is_a_region_found() {
    let mut region = Region::new(RemoteAddr(0x10000), Controller { pid: 77, start_time: 5, target: 0 });
    let patch = Patch {
        address: RemoteAddr(0x4000),
        len: 1,
        before: [0x55, 0, 0, 0, 0, 0, 0, 0],
        planted: [0xcc, 0, 0, 0, 0, 0, 0, 0],
    };
    region.finish_first(&[patch], &[(RemoteAddr(1), RemoteAddr(2))], &[], true).unwrap();
    region.set_original_action(&[0; 32], true);
    let stale = parse(RemoteAddr(0x10000), &region.image().unwrap()).unwrap();
    assert_eq!(stale.controller, (77, 5));
    assert!(stale.handler_installed);
    assert_eq!(stale.patches, [(RemoteAddr(0x4000), 1, patch.before, patch.planted)]);
}

fn mapping(start: u64, len: u64, rights: [bool; 3], backing: Backing) -> Mapping {
    let [write, execute, shared] = rights;
    let perms = Perms { read: true, write, execute, shared };
    let (start, end) = (RemoteAddr(start), RemoteAddr(start + len));
    Mapping { start, end, perms, offset: 0, device: (0, 0), inode: 0, backing }
}

/// What a first region names may be the application's by now: then it is left alone.
#[test]
fn only_what_looks_like_ours_is_unmapped() {
    const CODE: [bool; 3] = [false, true, false];
    const LEN: u64 = REGION_LEN as u64;
    let by = Controller { pid: 77, start_time: 5, target: 0 };
    let [first, agent_len] = [0x10_0000, 0x7000];
    let others = [0x20_0000, 0x30_0000, 0x40_0000, 0x50_0000, 0x60_0000].map(RemoteAddr);
    let [whole, half, data, file, strangers] = others;
    let mut region = NearRegion::new(RemoteAddr(first), by);
    let parts = Parts { code: (RemoteAddr(first), LEN + agent_len), ..Parts::default() };
    region.finish_first(&[], &parts, &others).unwrap();
    let mut memory = BytesMemory::new();
    memory.map(RemoteAddr(first), region.image().unwrap());
    for other in others {
        let by = if other == strangers { Controller { pid: 78, ..by } } else { by };
        memory.map(other, NearRegion::new(other, by).image().unwrap());
    }
    let path = Backing::File { path: "/usr/lib/other.so".into(), deleted: false };
    let maps = [
        mapping(first, LEN, CODE, Backing::Anonymous),
        mapping(first + LEN, agent_len, CODE, Backing::Anonymous),
        mapping(whole.0, LEN, CODE, Backing::Anonymous),
        mapping(half.0, LEN / 2, CODE, Backing::Anonymous),
        mapping(data.0, LEN, [true, false, false], Backing::Anonymous),
        mapping(file.0, LEN, CODE, path),
        mapping(strangers.0, LEN, CODE, Backing::Anonymous),
    ];
    let found = find(&memory, &maps);
    let stale = found.iter().find(|s| s.base == RemoteAddr(first)).unwrap();
    let agent = (RemoteAddr(first + LEN), agent_len);
    assert_eq!(stale.mapped(&maps, true), [(whole, LEN), agent]);
    assert_eq!(stale.mapped(&maps, false), [(whole, LEN), agent, (RemoteAddr(first), LEN)]);
    // The agent's place is another's by now.
    let maps = [mapping(first, LEN, CODE, Backing::Anonymous)];
    assert_eq!(stale.mapped(&maps, false), [(RemoteAddr(first), LEN)]);
}

#[test]
fn a_region_without_a_byte_in_it_is_found_by_its_size() {
    const CODE: [bool; 3] = [false, true, false];
    let len = REGION_LEN as u64 + AgentImage::new().unwrap().bytes.len() as u64;
    let len = len.next_multiple_of(PAGE);
    let mut memory = BytesMemory::new();
    for (at, len) in [(0x10_0000, len), (0x20_0000, len), (0x30_0000, len - PAGE), (0x40_0000, len)] {
        memory.map(RemoteAddr(at), vec![0; len as usize]);
    }
    let mut others = vec![0; len as usize];
    others[len as usize - 1] = 0xc3;
    memory.map(RemoteAddr(0x50_0000), others);
    let file = Backing::File { path: "/usr/lib/other.so".into(), deleted: false };
    let maps = [
        mapping(0x10_0000, len, CODE, Backing::Anonymous),
        mapping(0x20_0000, len, [true, false, false], Backing::Anonymous),
        mapping(0x30_0000, len - PAGE, CODE, Backing::Anonymous),
        mapping(0x40_0000, len, CODE, file),
        mapping(0x50_0000, len, CODE, Backing::Anonymous),
    ];
    let found = find(&memory, &maps);
    assert_eq!(found.iter().map(|s| s.base).collect::<Vec<_>>(), [RemoteAddr(0x10_0000)]);
    assert_eq!(found[0].mapped(&maps, false).iter().map(|(_, len)| len).sum::<u64>(), len);
}

#[test]
fn hostile_bytes_are_no_region() {
    let mut bytes = vec![0xff; REGION_LEN];
    assert_eq!(parse(RemoteAddr(0), &bytes), None);
    bytes[..8].copy_from_slice(&MAGIC);
    assert_eq!(parse(RemoteAddr(0), &bytes), None);
}

/// The state's place is noted before it is mapped.
#[test]
fn a_state_that_was_noted_is_ours_only_if_it_came() {
    let (first, at, len) = (0x10_0000, 0x7f00_0000_1000, size_of::<State>() as u64);
    let mut region = NearRegion::new(RemoteAddr(first), Controller { pid: 77, start_time: 5, target: 0 });
    let state = (RemoteAddr(at), len | near::COMING);
    region.locate(&Parts { code: (RemoteAddr(first), REGION_LEN as u64), state, ..Parts::default() });
    let mut memory = BytesMemory::new();
    memory.map(RemoteAddr(first), region.image().unwrap());
    let code = mapping(first, REGION_LEN as u64, [false, true, false], Backing::Anonymous);
    let pages = len.next_multiple_of(PAGE);
    let unmapped = |data: Vec<Mapping>| {
        let maps = [vec![code.clone()], data].concat();
        let found = find(&memory, &maps);
        found[0].mapped(&maps, false).iter().any(|(there, _)| *there == RemoteAddr(at))
    };
    let data = |start, len| vec![mapping(start, len, [true, false, false], Backing::Anonymous)];
    assert!(unmapped(data(at, pages)));
    // Nothing came, or something of the application's.
    assert!(
        !unmapped(vec![]) && !unmapped(data(at, pages + PAGE)) && !unmapped(data(at - PAGE, pages + PAGE))
    );
}

/// A child that was forked before all of it was written has the number of the one that it was written for.
#[test]
fn what_was_written_into_the_parent_is_inherited_however_little_of_it_is_there() {
    let us = std::process::id() as i32;
    let len = REGION_LEN as u64;
    let maps = [mapping(0x10_0000, len, [false, true, false], Backing::Anonymous)];
    let lives = |target: u64| {
        let by = Controller { target, ..crate::probe::install::myself(us).unwrap() };
        let mut region = NearRegion::new(RemoteAddr(0x10_0000), by);
        region.locate(&Parts { code: (RemoteAddr(0x10_0000), len), ..Parts::default() });
        let mut memory = BytesMemory::new();
        memory.map(RemoteAddr(0x10_0000), region.image().unwrap());
        find_in(us, &memory, &maps)[0].controller_lives()
    };
    let own = maps::own_pid(us).unwrap() as u64;
    // A heaptap that does not tell whom it records is believed.
    assert_eq!((lives(own), lives(0), lives(own + 1)), (true, true, false));
}
