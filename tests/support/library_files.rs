//! The C libraries and allocators on this machine, as files: the host's, those of fetched interpreters' roots, jemalloc, tcmalloc.

use crate::common::pythons::cache;
use crate::common::{missing, pythons};
use heaptap::addr::{ImageAddr, RemoteAddr};
use heaptap::image::elf::ElfFile;
use heaptap::probe::plan::{Definitions, EntryPoint, plan};
use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};

/// A file, as if it were mapped where it says, or with another bias.
pub struct LibraryFile {
    pub path: String,
    pub elf: ElfFile,
    pub bias: u64,
    pub is_libc: bool,
}

impl LibraryFile {
    pub fn open(path: &Path) -> Self {
        let elf = ElfFile::new(File::open(path).unwrap(), path).unwrap();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let is_libc = name.starts_with("libc.so") || name.starts_with("ld-musl");
        Self { path: path.display().to_string(), elf, bias: 0, is_libc }
    }

    /// Everything in it that would be observed.
    pub fn entries(&self) -> Vec<EntryPoint> {
        plan(0, &[self], vec![]).unwrap().entries
    }

    fn image(&self, addr: RemoteAddr) -> ImageAddr {
        ImageAddr(addr.0.wrapping_sub(self.bias))
    }
}

impl Definitions for &LibraryFile {
    fn path(&self) -> &str {
        &self.path
    }

    fn function(&self, name: &str) -> Option<(RemoteAddr, u64)> {
        let symbol = self.elf.exported_symbols().get(name).filter(|s| s.is_function())?;
        Some((RemoteAddr(symbol.addr.0 + self.bias), symbol.size))
    }

    fn next_function(&self, behind: RemoteAddr) -> Option<RemoteAddr> {
        let from = self.image(behind);
        let all = self.elf.exported_symbols().values().filter(|s| s.is_function() && s.addr > from);
        all.map(|s| s.addr).min().map(|next| RemoteAddr(next.0 + self.bias))
    }

    fn file_bytes(&self, addr: RemoteAddr, len: usize) -> Option<Vec<u8>> {
        self.elf.bytes_at(self.image(addr), len)
    }

    fn is_libc(&self) -> bool {
        self.is_libc
    }
}

/// The C library of this test, and where it is loaded.
pub fn own_libc() -> LibraryFile {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|line| line.contains("/libc.so") || line.contains("/libc-2")).unwrap();
    let path = line.split_whitespace().last().unwrap();
    let bias = u64::from_str_radix(line.split('-').next().unwrap(), 16).unwrap();
    LibraryFile { bias, is_libc: true, ..LibraryFile::open(Path::new(path)) }
}

/// All of them.
pub fn library_files() -> Vec<LibraryFile> {
    let mut paths: BTreeSet<PathBuf> = BTreeSet::from([PathBuf::from(own_libc().path)]);
    for root in pythons().iter().filter_map(|python| python.root.as_deref()) {
        let candidates = ["usr/lib/x86_64-linux-gnu/libc.so.6", "usr/lib/ld-musl-x86_64.so.1"];
        paths.extend(candidates.iter().map(|path| root.join(path)).filter(|path| path.exists()));
    }
    for name in ["libjemalloc.so.2", "libtcmalloc_minimal.so.4"] {
        let path = cache().join("allocators").join(name);
        if path.exists() {
            paths.insert(path);
        } else {
            missing(&format!("{} (scripts/fetch-interpreters)", path.display()));
        }
    }
    paths.iter().map(|path| LibraryFile::open(path)).collect()
}
