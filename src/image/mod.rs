//! Mapped ELF files of a process.
//!
//! [`modules`] turns a memory map into [`Module`]s in the dynamic linker's lookup order, so that "the first that
//! defines `malloc`" is the one the process calls. Knows files and mappings; knows nothing of ptrace or Python.

pub mod elf;
pub mod function_starts;
pub mod libc;
mod link_map;
mod mapped_file;
mod symbols;
mod unwind_rows;

pub use elf::{ImageError, Section, Segment};
pub use libc::{Libc, LibcKind, libc_of};
pub use link_map::LinkMap;
pub use symbols::{Symbol, SymbolKind};
pub use unwind_rows::UnwindRows;

use crate::addr::{Bias, ImageAddr, RemoteAddr};
use crate::mapping::{Backing, Mapping, Perms};
use crate::memory::RemoteMemory;
use elf::ElfFile;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::io::Write;
use std::path::{Path, PathBuf};

const PAGE: u64 = 4096;
/// Bytes of a vdso at most; it has two pages.
const MOST_VDSO: usize = 1 << 20;

/// A mapped part of a [`Module`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MappedRange {
    /// First byte.
    pub start: RemoteAddr,
    /// One past the last byte.
    pub end: RemoteAddr,
    /// Access rights now.
    pub perms: Perms,
    /// Offset of `start` in the file.
    pub offset: u64,
}

/// One ELF file mapped into a process.
#[derive(Debug)]
pub struct Module {
    path: PathBuf,
    deleted: bool,
    bias: Bias,
    ranges: Vec<MappedRange>,
    file: ElfFile,
}

impl Module {
    /// Path as the process's memory map shows it (of the target's world, perhaps not of ours).
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Last part of the path.
    pub fn name(&self) -> &str {
        self.path.file_name().and_then(|n| n.to_str()).unwrap_or_default()
    }

    /// The file has no directory entry any more.
    pub fn is_deleted(&self) -> bool {
        self.deleted
    }

    /// What to add to the file's addresses.
    pub fn bias(&self) -> Bias {
        self.bias
    }

    /// The mapped parts that the file backs, by ascending address.
    pub fn ranges(&self) -> &[MappedRange] {
        &self.ranges
    }

    /// The file.
    pub fn file(&self) -> &ElfFile {
        &self.file
    }

    /// Build id, lower-case hexadecimal.
    pub fn build_id(&self) -> Option<String> {
        self.file.build_id()
    }

    /// True if `addr` lies in a loaded segment (zero-initialised data included).
    pub fn contains(&self, addr: RemoteAddr) -> bool {
        let image = self.bias.to_image(addr);
        self.file.segments().any(|s| image.0.wrapping_sub(s.addr.0) < s.mem_size)
    }

    /// A defined symbol, `.dynsym` before `.symtab`.
    pub fn symbol(&self, name: &str) -> Option<Symbol> {
        self.file.symbol(name)
    }

    /// The address of a defined symbol that is not thread-local.
    pub fn symbol_addr(&self, name: &str) -> Option<RemoteAddr> {
        let symbol = self.file.symbol(name).filter(|s| s.kind != SymbolKind::Tls)?;
        Some(self.bias.to_remote(symbol.addr))
    }

    /// A symbol that other modules can bind to (defined in `.dynsym`).
    pub fn exported_symbol(&self, name: &str) -> Option<Symbol> {
        self.file.exported_symbols().get(name).copied()
    }

    /// Where its functions begin, ascending, as far as the unwinder's table says.
    pub fn function_starts(&self) -> Vec<RemoteAddr> {
        let starts = function_starts::function_starts(&self.file);
        starts.into_iter().map(|start| self.bias.to_remote(start)).collect()
    }

    /// Where the next function behind `addr` begins that has a symbol, exported or local.
    pub fn next_function(&self, addr: RemoteAddr) -> Option<RemoteAddr> {
        let from = self.bias.to_image(addr);
        let all = self.file.exported_symbols().values().chain(self.file.all_symbols().values());
        let behind = all.filter(|s| s.is_function() && s.addr > from).map(|s| s.addr).min();
        behind.map(|next| self.bias.to_remote(next))
    }

    /// Where a loaded section lies: first byte and size.
    pub fn section(&self, name: &str) -> Option<(RemoteAddr, u64)> {
        let section = self.file.section(name).filter(|s| s.addr.0 != 0)?;
        Some((self.bias.to_remote(section.addr), section.size))
    }

    /// The loaded segments: first byte, bytes in memory, and the segment.
    pub fn segments(&self) -> impl Iterator<Item = (RemoteAddr, u64, Segment)> + '_ {
        self.file.segments().map(|s| (self.bias.to_remote(s.addr), s.mem_size, s))
    }

    /// What the file holds for `len` bytes at `addr` (before any relocation). `None` if no segment covers them.
    pub fn file_bytes(&self, addr: RemoteAddr, len: usize) -> Option<Vec<u8>> {
        self.file.bytes_at(self.bias.to_image(addr), len)
    }
}

/// The modules of process `pid`, in the dynamic linker's lookup order, those it doesn't list (vdso excepted) last.
///
/// A mapped file that can't be used for a reason of its own (not ELF, damaged, vanished) is left out and logged; a
/// main executable that can't be used is an error, for then nothing is known of the process.
pub fn modules(pid: i32, maps: &[Mapping], memory: &dyn RemoteMemory) -> Result<Vec<Module>, ImageError> {
    let exe = mapped_file::executable(pid);
    let mut found = Vec::new();
    for group in groups(maps) {
        let is_exe = exe.as_ref().is_some_and(|(exe, gone)| {
            matches!(&group[0].backing, Backing::File { path, deleted } if path == exe && deleted == gone)
        });
        match open_module(pid, &group, is_exe, memory) {
            Ok(Some(module)) => found.push((module, is_exe)),
            Ok(None) => {}
            Err(error) if is_exe => return Err(error),
            // It may define an allocator function for all we know; what has no name never does.
            Err(error @ (ImageError::Open { .. } | ImageError::Replaced { .. })) if is_on_disk(group[0]) => {
                tracing::warn!("left out: {error}");
            }
            Err(error) => tracing::debug!(%error, "mapped file left out"),
        }
    }
    let order = lookup_order(&found, memory);
    if order.is_none() {
        tracing::debug!(pid, "no list of loaded objects; modules are in address order");
    }
    let order = order.unwrap_or_default();
    let rank = |module: &Module, is_exe: bool| {
        let listed = order.iter().position(|dynamic| module.contains(*dynamic));
        (listed.unwrap_or(usize::MAX), !is_exe)
    };
    found.sort_by_key(|(module, is_exe)| rank(module, *is_exe));
    Ok(found.into_iter().map(|(module, _)| module).collect())
}

/// The vdso, which the kernel maps and no file holds: code that threads stand in, too. `None` where a process has none.
pub fn vdso(maps: &[Mapping], memory: &dyn RemoteMemory) -> Option<Module> {
    let map = maps.iter().find(|map| map.backing == Backing::Named("[vdso]".into()))?;
    let bytes =
        memory.read_vec(map.start, usize::try_from(map.len()).ok().filter(|len| *len <= MOST_VDSO)?).ok()?;
    let mut file = std::fs::File::from(memfd_create(c"heaptap-vdso", MFdFlags::MFD_CLOEXEC).ok()?);
    file.write_all(&bytes).ok()?;
    let path = PathBuf::from("[vdso]");
    let file = ElfFile::new(file, &path).ok()?;
    let bias = bias_of(&file, &[map])?;
    let range = MappedRange { start: map.start, end: map.end, perms: map.perms, offset: 0 };
    Some(Module { path, deleted: false, bias, ranges: vec![range], file })
}

fn is_on_disk(map: &Mapping) -> bool {
    matches!(&map.backing, Backing::File { path, .. } if !path.starts_with("/dev") && !path.to_string_lossy().starts_with("/memfd:"))
}

/// File mappings grouped into loaded copies: same file, ascending addresses, ascending offsets. A second mapping of
/// the same file (a reader's `mmap`, another namespace of `dlmopen`) begins anew at a lower offset.
fn groups(maps: &[Mapping]) -> Vec<Vec<&Mapping>> {
    let mut groups: Vec<Vec<&Mapping>> = Vec::new();
    for map in maps.iter().filter(|m| m.is_file() && m.inode != 0) {
        let same = |m: &Mapping| (m.device, m.inode) == (map.device, map.inode);
        let current = groups.iter_mut().rev().find(|g| same(g[0]));
        match current {
            Some(group) if group.last().is_some_and(|last| last.offset <= map.offset && map.offset != 0) => {
                group.push(map);
            }
            _ => groups.push(vec![map]),
        }
    }
    groups.retain(|group| group.iter().any(|m| m.perms.execute));
    groups
}

fn open_module(
    pid: i32,
    group: &[&Mapping],
    is_exe: bool,
    memory: &dyn RemoteMemory,
) -> Result<Option<Module>, ImageError> {
    let Backing::File { path, deleted } = &group[0].backing else { return Ok(None) };
    let file = mapped_file::open(pid, group, is_exe, memory)?;
    let Some(bias) = bias_of(&file, group) else {
        return Err(ImageError::Malformed {
            path: path.clone(),
            what: "no segment begins where it is mapped".into(),
        });
    };
    let ranges =
        group.iter().map(|m| MappedRange { start: m.start, end: m.end, perms: m.perms, offset: m.offset });
    Ok(Some(Module { path: path.clone(), deleted: *deleted, bias, ranges: ranges.collect(), file }))
}

/// The loader maps each segment from the page of its file offset to the page of its address plus the bias.
fn bias_of(file: &ElfFile, group: &[&Mapping]) -> Option<Bias> {
    let page = |n: u64| n & !(PAGE - 1);
    group.iter().find_map(|map| {
        let segment =
            file.segments().find(|s| page(s.offset) == map.offset && s.executable == map.perms.execute);
        let segment = segment.or_else(|| file.segments().find(|s| page(s.offset) == map.offset))?;
        Some(Bias::placing(ImageAddr(page(segment.addr.0)), map.start))
    })
}

/// Asks the executable's `DT_DEBUG`; where the process was started through the dynamic linker as a command, that is the
/// "executable" and has none, so its own `_r_debug` is asked. (musl has one file for both and no such symbol, but its
/// program's `DT_DEBUG` is set: every module is tried.)
fn lookup_order(found: &[(Module, bool)], memory: &dyn RemoteMemory) -> Option<Vec<RemoteAddr>> {
    let exe = found.iter().filter(|(_, is_exe)| *is_exe).map(|(module, _)| module);
    link_map(exe.chain(found.iter().map(|(module, _)| module)), memory).map(|list| list.dynamics())
}

/// The dynamic linker's list of what is loaded, as the first of these modules that knows has it.
pub fn link_map<'a>(
    modules: impl Iterator<Item = &'a Module> + Clone,
    memory: &dyn RemoteMemory,
) -> Option<LinkMap> {
    let dynamic = |module: &Module| {
        let (addr, len) = module.file.dynamic()?;
        LinkMap::from_dynamic(memory, module.bias.to_remote(addr), len)
    };
    let mut rest = modules.clone();
    rest.next()
        .and_then(dynamic)
        .or_else(|| {
            let linker = modules.clone().find_map(|module| module.symbol_addr("_r_debug"))?;
            LinkMap::from_r_debug(memory, linker)
        })
        .or_else(|| rest.find_map(dynamic))
}
