//! Unwind data of real libraries, as it is and damaged.

mod random;

use heaptap::image::UnwindRows;
use heaptap::image::elf::ElfFile;
use heaptap::unwind_abi::{Cfa, Rule};
use random::Random;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The C library and the other libraries that this test itself has mapped.
fn libraries() -> Vec<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mut paths: Vec<PathBuf> =
        maps.lines().filter_map(|line| Some(PathBuf::from(line.split_whitespace().nth(5)?))).collect();
    paths.retain(|path| path.to_string_lossy().contains(".so"));
    paths.sort();
    paths.dedup();
    assert!(paths.len() >= 3, "{paths:?}");
    paths
}

fn open(path: &Path) -> ElfFile {
    ElfFile::new(File::open(path).unwrap(), path).unwrap()
}

#[test]
fn nearly_all_code_of_a_library_has_a_rule() {
    for path in libraries() {
        let file = open(&path);
        let rows = UnwindRows::of(&file);
        assert!(rows.len() > 100, "{}: {} rows", path.display(), rows.len());
        // What needs more than rules can say is a handful: `__tls_get_addr`'s slow path, string functions by hand.
        assert!(rows.beyond() * 100 < rows.len(), "{}: {} of {}", path.display(), rows.beyond(), rows.len());
        let functions = file.functions();
        let sized: Vec<_> = functions.iter().filter(|(symbol, _)| symbol.size > 16).collect();
        let known = sized.iter().filter(|(symbol, _)| rows.at(symbol.addr.0).cfa() != Cfa::Unknown).count();
        assert!(known * 100 >= sized.len() * 98, "{}: {known} of {} functions", path.display(), sized.len());
        // At its first instruction a function has nothing on the stack but its return address.
        let entries = sized.iter().filter(|(symbol, _)| rows.at(symbol.addr.0).cfa() == Cfa::Sp(8)).count();
        assert!(entries * 100 >= known * 98, "{}: {entries} of {known}", path.display());
    }
}

#[test]
fn damaged_unwind_data_is_survived() {
    let path = libraries().into_iter().find(|path| path.to_string_lossy().contains("libc.so")).unwrap();
    let (file, whole) = (open(&path), std::fs::read(&path).unwrap());
    let section = file.section(".eh_frame").unwrap();
    let range = section.offset as usize..(section.offset + section.size) as usize;
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("damaged.so");
    for seed in 0..40 {
        let (mut random, mut bytes) = (Random(seed), whole.clone());
        for _ in 0..1 << random.below(14) {
            let at = range.start + random.below(range.len());
            bytes[at] = if seed % 2 == 0 { random.next() as u8 } else { bytes[at] ^ 1 << random.below(8) };
        }
        File::create(&copy).unwrap().write_all(&bytes).unwrap();
        let rows = UnwindRows::of(&open(&copy));
        for _ in 0..1000 {
            let _ = rows.at(random.next() % (bytes.len() as u64 * 2));
        }
    }
}

#[test]
fn a_file_without_unwind_data_has_no_rows() {
    let path = std::env::current_exe().unwrap();
    let mut bytes = std::fs::read(path).unwrap();
    // No section has a name any more.
    let name = bytes.windows(10).rposition(|at| at == b".eh_frame\0").unwrap();
    bytes[name..name + 9].copy_from_slice(b".nothing_");
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("without");
    std::fs::write(&copy, bytes).unwrap();
    let rows = UnwindRows::of(&open(&copy));
    assert!(rows.is_empty() && rows.at(0x1000) == Rule::UNKNOWN);
}
