//! Any bytes as an ELF file: its unwind rows and its functions.

#![no_main]

use heaptap::image::UnwindRows;
use heaptap::image::elf::ElfFile;
use libfuzzer_sys::fuzz_target;
use std::io::Write;
use std::path::Path;

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut file) = tempfile::tempfile() else { return };
    if file.write_all(bytes).is_err() {
        return;
    }
    if let Ok(file) = ElfFile::new(file, Path::new("fuzzed")) {
        let rows = UnwindRows::of(&file);
        let _ = (rows.at(0), rows.at(u64::MAX), file.functions().len());
    }
});
