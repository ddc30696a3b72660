//! Jumps planned on real libraries' functions, and trampolines executed.

mod common;
mod support;

use heaptap::addr::RemoteAddr;
use heaptap::probe::detour::{Detour, JUMP_LEN, Trampoline, Undo};
use heaptap::probe::function::{Function, SYMBOLS};
use heaptap::probe::head::Head;
use heaptap::probe::plan::{Definitions, ENTRY_BYTES, EntryPoint};
use iced_x86::{Decoder, DecoderOptions, Instruction};
use proptest::prelude::*;
use std::sync::OnceLock;
use support::library_files::{LibraryFile, library_files, own_libc};

fn decode(bytes: &[u8], at: RemoteAddr) -> Vec<Instruction> {
    Decoder::with_ip(64, bytes, at.0, DecoderOptions::NONE).into_iter().collect()
}

/// The trampoline is the function's first instructions, each referring to what it referred to before, and a jump to the rest.
fn assert_equivalent(detour: &Detour, trampoline: &Trampoline) {
    let (jump, rest) = trampoline.bytes.split_at(trampoline.bytes.len() - 14).1.split_at(6);
    assert_eq!(jump, [0xff, 0x25, 0, 0, 0, 0]);
    assert_eq!(u64::from_le_bytes(rest.try_into().unwrap()), detour.rest().0);
    let moved = decode(&trampoline.bytes[..trampoline.bytes.len() - 14], trampoline.at);
    let original = decode(detour.file_bytes(), detour.entry.address);
    assert_eq!(moved.len(), original.len());
    for (before, after) in original.iter().zip(&moved) {
        let mut before_near = *before;
        before_near.as_near_branch();
        // Compares operands, with targets of branches and rip-relative operands as addresses.
        assert_eq!(before_near, *after, "{before:?} {after:?}");
        let (there, here) = (RemoteAddr(before.ip()), RemoteAddr(after.ip()));
        assert_eq!(trampoline.moved(there), Some(here));
        assert_eq!(trampoline.moved_back(here), Some(there));
    }
    let jump = trampoline.at.offset((trampoline.bytes.len() - 14) as u64);
    assert_eq!(trampoline.moved_back(jump), Some(detour.rest()));
    assert_eq!(trampoline.moved(detour.rest()), None, "the rest stays where it is");
    let starts = original.iter().map(|i| i.ip()).collect::<Vec<_>>();
    let inside = detour.entry.address.0..detour.rest().0;
    assert!(inside.filter(|at| !starts.contains(at)).all(|at| trampoline.moved(RemoteAddr(at)).is_none()));
}

#[test]
fn every_allocator_function_of_every_library_takes_a_jump() {
    for library in library_files() {
        println!("{}", library.path);
        let entries = library.entries();
        for entry in &entries {
            let detour = Detour::plan(entry).unwrap_or_else(|e| panic!("{e}"));
            let trampoline = detour.trampoline(RemoteAddr(entry.address.0 + (1 << 30))).unwrap();
            assert_equivalent(&detour, &trampoline);
            let kept = decode(&detour.file_bytes()[..detour.kept_len], entry.address);
            let kept = kept.first().map_or("-".into(), |i| format!("{:?}", i.code()));
            let (names, at) = (entry.names.join("/"), entry.address);
            let undo = if detour.undo.is_some() { ", undone" } else { "" };
            println!(
                "  {names:28} {at:>10} +{:<2} covers {:2}  kept: {kept}{undo}",
                detour.kept_len, detour.covered_len
            );
        }
        let named: Vec<_> = entries.iter().flat_map(|e| e.names.clone()).collect();
        for (name, _) in SYMBOLS {
            assert_eq!((&library).function(name).is_some(), named.contains(name), "{name}");
        }
        assert!(["malloc", "calloc", "realloc", "free"].iter().all(|name| named.contains(name)));
    }
}

#[test]
fn where_it_matters_the_first_instruction_is_kept() {
    // What probes are put on most: malloc and free of the current glibcs, and everything built for CET.
    for library in library_files().into_iter().filter(|l| l.is_libc) {
        for entry in library.entries() {
            let detour = Detour::plan(&entry).unwrap();
            let endbr64 = entry.head.bytes.starts_with(&[0xf3, 0x0f, 0x1e, 0xfa]);
            let test = entry.head.bytes.starts_with(&[0x48, 0x85, 0xff]);
            assert!(!(endbr64 || test) || detour.kept_len > 0, "{} of {}", entry.names[0], library.path);
            assert_eq!(detour.undo == Some(Undo::Pop), detour.kept_len == 1 || detour.kept_len == 2);
        }
    }
}

/// Every function that libc exports.
fn libc_functions() -> &'static [EntryPoint] {
    static ALL: OnceLock<Vec<EntryPoint>> = OnceLock::new();
    ALL.get_or_init(|| {
        let libc = own_libc();
        let functions = libc.elf.exported_symbols().values().filter(|s| s.is_function());
        let mut found: Vec<_> = functions.map(|s| entry(&libc, s.addr.0 + libc.bias, s.size)).collect();
        found.sort_by_key(|e| e.address);
        found.dedup_by_key(|e| e.address);
        found
    })
}

fn entry(library: &LibraryFile, address: u64, size: u64) -> EntryPoint {
    let address = RemoteAddr(address);
    let head =
        Head::read(address, size, library.next_function(address), &|at, len| library.file_bytes(at, len));
    EntryPoint {
        function: Function::Malloc,
        names: vec![],
        address,
        module: library.path.clone(),
        file_bytes: library.file_bytes(address, ENTRY_BYTES).unwrap(),
        head,
    }
}

#[test]
fn nearly_every_function_of_libc_takes_a_jump() {
    let all = libc_functions();
    let mut refused = Vec::new();
    for entry in all {
        match Detour::plan(entry) {
            Ok(detour) => {
                assert!(detour.covered_len >= JUMP_LEN);
                let near = entry.address.back(1 << 30);
                assert_equivalent(&detour, &detour.trampoline(near).unwrap());
            }
            Err(error) => refused.push(error.to_string()),
        }
    }
    println!("{} of {} are refused:\n{}", refused.len(), all.len(), refused.join("\n"));
    assert!(all.len() > 1000 && refused.len() * 30 < all.len());
}

proptest! {
    /// Code of every shape: any instruction of any function as if it were an entry.
    #[test]
    fn any_code_of_libc_moves_or_is_refused(which: prop::sample::Index, skip in 0_usize..12, distance in -0x5fff_ffff_i64..0x5fff_ffff) {
        let libc = own_libc();
        let start = which.get(libc_functions());
        let body = decode(&start.head.bytes, start.address);
        let at = body.get(skip).filter(|i| !i.is_invalid()).map_or(start.address.0, |i| i.ip());
        let entry = entry(&libc, at, 0);
        if let Ok(detour) = Detour::plan(&entry) {
            let near = RemoteAddr(at.wrapping_add_signed(distance));
            // Within what a jump reaches, but perhaps not what the code refers to.
            if let Ok(trampoline) = detour.trampoline(near) {
                assert_equivalent(&detour, &trampoline);
            }
            let patch = detour.patch(near).unwrap();
            let jump = decode(&patch.planted[..patch.len], patch.address);
            prop_assert_eq!(jump.len(), 1);
            prop_assert_eq!(jump[0].near_branch_target(), near.0);
            prop_assert_eq!(&patch.before[..patch.len], &detour.file_bytes()[detour.kept_len..][..JUMP_LEN]);
        }
    }
}
