//! One ELF file on disk: headers, sections, symbols, build id, bytes.
//!
//! Read by `pread`, piece by piece and when first asked for; never mapped, so a file that is truncated under us
//! is an error and not a SIGBUS. The file is untrusted: every size is bounded by the file's length. Knows
//! nothing of processes.

use super::symbols::{Symbol, collect_symbols, each_symbol};
use crate::addr::ImageAddr;
use flate2::read::ZlibDecoder;
use goblin::container::{Container, Ctx, Endian};
use goblin::elf::{Header, ProgramHeader, SectionHeader, dynamic, header, program_header, section_header};
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

pub(super) const CTX: Ctx = Ctx { container: Container::Big, le: Endian::Little };
/// No table of an ELF file read at once is larger; a hostile size field is refused here.
const MAX_TABLE: u64 = 256 << 20;
/// The same of a section that is unpacked.
const MAX_UNPACKED: u64 = 1 << 30;

/// An ELF file that could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file could not be opened.
    #[error("cannot open {path} (mapped in process {pid})")]
    Open {
        /// The process that maps it.
        pid: i32,
        /// Path as the process's memory map shows it.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The files that could be opened are not the one that is mapped.
    #[error(
        "{path} is not the file that process {pid} has mapped: it was replaced after the process started, and the mapped one can be \
         opened by root alone (CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE)"
    )]
    Replaced {
        /// The process.
        pid: i32,
        /// Path as the process's memory map shows it.
        path: PathBuf,
    },
    /// Reading failed.
    #[error("cannot read {len} bytes at offset {offset:#x} of {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Offset in the file.
        offset: u64,
        /// Bytes wanted.
        len: u64,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Not an ELF file.
    #[error("{path} is not an ELF file")]
    NotElf {
        /// The file.
        path: PathBuf,
    },
    /// An ELF file for another architecture.
    #[error("{path} is {found}; only 64-bit x86-64 processes are supported")]
    Architecture {
        /// The file.
        path: PathBuf,
        /// Its class and machine in words.
        found: String,
    },
    /// A table that contradicts itself or the file's length.
    #[error("{path} is damaged: {what}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Which part.
        what: String,
    },
}

/// A section by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Name.
    pub name: String,
    /// Where it is loaded; 0 if it isn't.
    pub addr: ImageAddr,
    /// Offset in the file.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// False for `SHT_NOBITS`: the file holds nothing of it.
    pub in_file: bool,
    /// What the file holds of it is compressed (`SHF_COMPRESSED`).
    pub compressed: bool,
}

/// A loadable segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First address.
    pub addr: ImageAddr,
    /// Bytes in memory.
    pub mem_size: u64,
    /// Offset in the file.
    pub offset: u64,
    /// Bytes in the file; the rest is zero.
    pub file_size: u64,
    /// Loaded writable (some of it may be made read-only after relocation).
    pub writable: bool,
    /// Loaded executable.
    pub executable: bool,
}

/// An opened ELF file.
#[derive(Debug)]
pub struct ElfFile {
    path: PathBuf,
    file: File,
    len: u64,
    header: Header,
    program_headers: Vec<ProgramHeader>,
    sections: OnceLock<Vec<Section>>,
    section_headers: OnceLock<Vec<SectionHeader>>,
    exported: OnceLock<HashMap<Box<str>, Symbol>>,
    all: OnceLock<HashMap<Box<str>, Symbol>>,
}

/// Bytes of a symbol table, of its names, and of the versions of its symbols.
type SymbolTable = (Vec<u8>, Vec<u8>, Option<Vec<u8>>);

impl ElfFile {
    /// Reads the headers of `file`; `path` is for messages.
    pub fn new(file: File, path: &Path) -> Result<Self, ImageError> {
        let len = file.metadata().map_err(|source| read_error(path, 0, 0, source))?.len();
        let mut this = Self {
            path: path.to_owned(),
            file,
            len,
            header: Header::new(CTX),
            program_headers: Vec::new(),
            sections: OnceLock::new(),
            section_headers: OnceLock::new(),
            exported: OnceLock::new(),
            all: OnceLock::new(),
        };
        this.header = this.parse_header()?;
        let (offset, count) = (this.header.e_phoff, usize::from(this.header.e_phnum));
        let bytes = this.read(offset, count as u64 * 56)?;
        this.program_headers = ProgramHeader::parse(&bytes, 0, count, CTX)
            .map_err(|e| this.malformed(format!("program headers: {e}")))?;
        Ok(this)
    }

    fn parse_header(&self) -> Result<Header, ImageError> {
        let not_elf = || ImageError::NotElf { path: self.path.clone() };
        let ident = self.read(0, 20.min(self.len))?;
        if ident.len() < 20 || &ident[..4] != header::ELFMAG {
            return Err(not_elf());
        }
        let machine = u16::from_le_bytes([ident[18], ident[19]]);
        let (class, data) = (ident[header::EI_CLASS], ident[header::EI_DATA]);
        if class != header::ELFCLASS64 || data != header::ELFDATA2LSB || machine != header::EM_X86_64 {
            let bits = if class == header::ELFCLASS32 { "32-bit" } else { "64-bit" };
            let found = format!("{bits} {}", header::machine_to_str(machine));
            return Err(ImageError::Architecture { path: self.path.clone(), found });
        }
        let bytes = self.read(0, 64)?;
        goblin::elf::Elf::parse_header(&bytes).map_err(|e| self.malformed(format!("header: {e}")))
    }

    /// Path the file was opened for, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// True for `ET_EXEC`: loaded where it says, bias 0.
    pub fn is_fixed(&self) -> bool {
        self.header.e_type == header::ET_EXEC
    }

    /// The entry point, as the file states it.
    pub fn entry(&self) -> ImageAddr {
        ImageAddr(self.header.e_entry)
    }

    /// `len` bytes at `offset` of the file.
    pub fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, ImageError> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len);
        if !inside || len > MAX_TABLE {
            return Err(self.malformed(format!(
                "{len} bytes at offset {offset:#x} are wanted, the file has {:#x}",
                self.len
            )));
        }
        let mut bytes = vec![0; len as usize];
        self.file.read_exact_at(&mut bytes, offset).map_err(|e| read_error(&self.path, offset, len, e))?;
        Ok(bytes)
    }

    /// The loadable segments, in the file's order.
    pub fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        self.program_headers.iter().filter(|p| p.p_type == program_header::PT_LOAD).map(|p| Segment {
            addr: ImageAddr(p.p_vaddr),
            mem_size: p.p_memsz,
            offset: p.p_offset,
            file_size: p.p_filesz,
            writable: p.is_write(),
            executable: p.is_executable(),
        })
    }

    /// The dynamic section: address and bytes.
    pub fn dynamic(&self) -> Option<(ImageAddr, u64)> {
        self.part(program_header::PT_DYNAMIC)
    }

    /// The part that the program header of this kind names: address and bytes.
    pub fn part(&self, kind: u32) -> Option<(ImageAddr, u64)> {
        self.header_of(kind).map(|p| (ImageAddr(p.p_vaddr), p.p_memsz))
    }

    /// The thread-local template: address, bytes in memory, alignment.
    pub fn tls(&self) -> Option<(ImageAddr, u64, u64)> {
        self.header_of(program_header::PT_TLS).map(|p| (ImageAddr(p.p_vaddr), p.p_memsz, p.p_align))
    }

    fn header_of(&self, kind: u32) -> Option<&ProgramHeader> {
        self.program_headers.iter().find(|p| p.p_type == kind)
    }

    /// What the file holds at `addr`, as loaded; zeroes past the end of a segment's file part. `None` if no
    /// segment covers the whole range.
    pub fn bytes_at(&self, addr: ImageAddr, len: usize) -> Option<Vec<u8>> {
        let len = len as u64;
        let segment = self.segments().find(|s| {
            let from = addr.0.wrapping_sub(s.addr.0);
            from.checked_add(len).is_some_and(|to| to <= s.mem_size)
        })?;
        let from = addr.0 - segment.addr.0;
        let in_file = segment.file_size.saturating_sub(from).min(len);
        let mut bytes = if in_file == 0 {
            Vec::new()
        } else {
            self.read(segment.offset.checked_add(from)?, in_file).ok()?
        };
        if len > MAX_TABLE {
            return None;
        }
        bytes.resize(len as usize, 0);
        Some(bytes)
    }

    /// The build id (`NT_GNU_BUILD_ID`), lower-case hexadecimal.
    pub fn build_id(&self) -> Option<String> {
        self.notes_with_build_id().map(|(_, id)| id).or_else(|| {
            // A file with debugging information alone need not have segments.
            let notes = self.section(".note.gnu.build-id").filter(|section| section.in_file)?;
            build_id_in(&self.read(notes.offset, notes.size.min(1 << 16)).ok()?)
        })
    }

    /// Where the notes lie that have the build id among them: offset and bytes.
    pub fn build_id_part(&self) -> Option<(u64, u64)> {
        self.notes_with_build_id().map(|(part, _)| part)
    }

    fn notes_with_build_id(&self) -> Option<((u64, u64), String)> {
        self.program_headers.iter().filter(|p| p.p_type == program_header::PT_NOTE).find_map(|p| {
            let part = (p.p_offset, p.p_filesz.min(1 << 16));
            Some((part, build_id_in(&self.read(part.0, part.1).ok()?)?))
        })
    }

    /// Where the file's own header and its program headers lie: offset and bytes of each.
    pub fn header_parts(&self) -> [(u64, u64); 2] {
        [(0, 64), (self.header.e_phoff, u64::from(self.header.e_phnum) * 56)]
    }

    /// Bytes of the file.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True for a file of no bytes (none is ELF).
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its inode number, as its file system shows it.
    pub fn inode(&self) -> Option<u64> {
        use std::os::unix::fs::MetadataExt;
        self.file.metadata().ok().map(|m| m.ino())
    }

    /// The sections, in the file's order; empty if it has none or they are damaged.
    pub fn sections(&self) -> &[Section] {
        self.sections.get_or_init(|| self.read_sections().unwrap_or_default())
    }

    /// A section by name.
    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections().iter().find(|s| s.name == name)
    }

    fn headers_of_sections(&self) -> &[SectionHeader] {
        self.section_headers.get_or_init(|| {
            let count = usize::from(self.header.e_shnum);
            let Ok(bytes) = self.read(self.header.e_shoff, count as u64 * 64) else { return Vec::new() };
            if count == 0 {
                Vec::new()
            } else {
                SectionHeader::parse_from(&bytes, 0, count, CTX).unwrap_or_default()
            }
        })
    }

    fn read_sections(&self) -> Option<Vec<Section>> {
        let headers = self.headers_of_sections();
        let names = headers.get(usize::from(self.header.e_shstrndx))?;
        let names = self.read(names.sh_offset, names.sh_size).ok()?;
        let section = |h: &SectionHeader| Section {
            name: c_str(&names, h.sh_name).unwrap_or_default().to_owned(),
            addr: ImageAddr(h.sh_addr),
            offset: h.sh_offset,
            size: h.sh_size,
            in_file: h.sh_type != section_header::SHT_NOBITS,
            compressed: h.sh_flags & u64::from(section_header::SHF_COMPRESSED) != 0,
        };
        Some(headers.iter().map(section).collect())
    }

    /// What a section holds, unpacked. `None` where there is none in this file, or it can't be unpacked.
    pub fn content(&self, name: &str) -> Option<Vec<u8>> {
        let section = self.section(name).filter(|section| section.in_file)?;
        let bytes = self.read(section.offset, section.size).ok()?;
        if section.compressed { unpacked(&bytes) } else { Some(bytes) }
    }

    /// All functions with their names, also local ones that share a name, of both tables.
    pub fn functions(&self) -> Vec<(Symbol, Box<str>)> {
        let tables = [(section_header::SHT_DYNSYM, true), (section_header::SHT_SYMTAB, false)];
        let mut found = Vec::new();
        for (kind, exported) in tables {
            if let Some((table, names, _)) = self.symbol_table(kind) {
                each_symbol(&table, &names, exported, |_, name, symbol| {
                    if symbol.is_function() {
                        found.push((symbol, Box::from(name)));
                    }
                });
            }
        }
        found
    }

    /// A defined symbol: from `.dynsym`, else from `.symtab`. Local names that occur twice give the first.
    pub fn symbol(&self, name: &str) -> Option<Symbol> {
        self.exported_symbols().get(name).or_else(|| self.all_symbols().get(name)).copied()
    }

    /// The defined symbols of `.dynsym` by name (the default version where there are several).
    pub fn exported_symbols(&self) -> &HashMap<Box<str>, Symbol> {
        self.exported.get_or_init(|| {
            self.read_symbols(section_header::SHT_DYNSYM, true)
                .or_else(|| self.symbols_from_dynamic())
                .unwrap_or_default()
        })
    }

    /// The defined symbols of `.symtab` by name; empty in a stripped file.
    pub fn all_symbols(&self) -> &HashMap<Box<str>, Symbol> {
        self.all.get_or_init(|| self.read_symbols(section_header::SHT_SYMTAB, false).unwrap_or_default())
    }

    fn read_symbols(&self, kind: u32, exported: bool) -> Option<HashMap<Box<str>, Symbol>> {
        let (table, names, versions) = self.symbol_table(kind)?;
        collect_symbols(&table, &names, versions.as_deref(), exported)
    }

    /// A symbol table, its names, and the version of each symbol, where there are any.
    fn symbol_table(&self, kind: u32) -> Option<SymbolTable> {
        let headers = self.headers_of_sections();
        let (index, table) = headers.iter().enumerate().find(|(_, h)| h.sh_type == kind)?;
        let names = headers.get(table.sh_link as usize)?;
        // The version of each symbol; bit 15 marks those that are not the default (`elf(5)`: VERSYM_HIDDEN).
        let versions = headers
            .iter()
            .find(|h| h.sh_type == section_header::SHT_GNU_VERSYM && h.sh_link as usize == index)
            .and_then(|h| self.read(h.sh_offset, h.sh_size).ok());
        let table = self.read(table.sh_offset, table.sh_size).ok()?;
        Some((table, self.read(names.sh_offset, names.sh_size).ok()?, versions))
    }

    /// `.dynsym` of a file whose section headers were removed: from the dynamic section, which the loader
    /// needs and no tool strips. The count comes from the string table that by custom follows.
    fn symbols_from_dynamic(&self) -> Option<HashMap<Box<str>, Symbol>> {
        let (addr, len) = self.dynamic()?;
        let bytes = self.bytes_at(addr, len.min(1 << 16) as usize)?;
        let entry = |tag: u64| {
            bytes.chunks_exact(16).map(|e| (le64(&e[..8]), le64(&e[8..]))).find(|e| e.0 == tag).map(|e| e.1)
        };
        let (symtab, strtab) = (entry(dynamic::DT_SYMTAB)?, entry(dynamic::DT_STRTAB)?);
        let table = self.bytes_at(ImageAddr(symtab), usize::try_from(strtab.checked_sub(symtab)?).ok()?)?;
        let names = self.bytes_at(ImageAddr(strtab), usize::try_from(entry(dynamic::DT_STRSZ)?).ok()?)?;
        collect_symbols(&table, &names, None, true)
    }

    fn malformed(&self, what: String) -> ImageError {
        ImageError::Malformed { path: self.path.clone(), what }
    }
}

/// Notes are {name size, descriptor size, type, name, descriptor}, each part padded to 4 bytes.
fn build_id_in(mut notes: &[u8]) -> Option<String> {
    const NT_GNU_BUILD_ID: u32 = 3;
    while notes.len() >= 12 {
        let word = |i: usize| u32::from_le_bytes([notes[i], notes[i + 1], notes[i + 2], notes[i + 3]]);
        let (name_len, desc_len, kind) = (word(0) as usize, word(4) as usize, word(8));
        let desc_at = 12_usize.checked_add(name_len.checked_next_multiple_of(4)?)?;
        let desc = notes.get(desc_at..desc_at.checked_add(desc_len)?)?;
        if kind == NT_GNU_BUILD_ID && notes.get(12..16) == Some(b"GNU\0") {
            return Some(desc.iter().map(|b| format!("{b:02x}")).collect());
        }
        notes = notes.get(desc_at.checked_add(desc_len.checked_next_multiple_of(4)?)?..)?;
    }
    None
}

pub(super) fn c_str(table: &[u8], at: usize) -> Option<&str> {
    let rest = table.get(at..)?;
    std::str::from_utf8(&rest[..rest.iter().position(|b| *b == 0)?]).ok()
}

/// A compressed section: `Elf64_Chdr` {type u32, reserved u32, size u64, alignment u64}, then a zlib stream (type 1, that of all tools unless
/// they are asked for another).
fn unpacked(bytes: &[u8]) -> Option<Vec<u8>> {
    const ELFCOMPRESS_ZLIB: u64 = 1;
    let (kind, size) = (le64(bytes.get(..4)?), le64(bytes.get(8..16)?));
    if kind != ELFCOMPRESS_ZLIB || size > MAX_UNPACKED {
        return None;
    }
    let mut content = Vec::new();
    ZlibDecoder::new(bytes.get(24..)?).take(size).read_to_end(&mut content).ok()?;
    (content.len() as u64 == size).then_some(content)
}

fn le64(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
}

fn read_error(path: &Path, offset: u64, len: u64, source: std::io::Error) -> ImageError {
    ImageError::Read { path: path.to_owned(), offset, len, source }
}
