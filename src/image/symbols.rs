//! Symbol tables: from their bytes to [`Symbol`]s. The tables are untrusted; what makes no sense is left out.

use super::elf::{CTX, c_str};
use crate::addr::ImageAddr;
use goblin::elf::{Symtab, section_header, sym};
use std::collections::HashMap;

/// Bytes of an entry (`Elf64_Sym`).
const SYMBOL_SIZE: usize = 24;

/// What a symbol names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SymbolKind {
    /// Code.
    Function,
    /// Code that chooses the code (`STT_GNU_IFUNC`).
    IndirectFunction,
    /// Data.
    Object,
    /// Thread-local data: the value is an offset in the module's TLS block.
    Tls,
    /// Anything else.
    Other,
}

/// A defined symbol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Symbol {
    /// Where (for [`SymbolKind::Tls`]: offset in the TLS block).
    pub addr: ImageAddr,
    /// Bytes; 0 where the file doesn't say.
    pub size: u64,
    /// What it names.
    pub kind: SymbolKind,
    /// From `.dynsym`: other modules can bind to it.
    pub exported: bool,
}

impl Symbol {
    /// True for code.
    pub fn is_function(&self) -> bool {
        matches!(self.kind, SymbolKind::Function | SymbolKind::IndirectFunction)
    }
}

/// All by name. `versions`: of each, where there are any; of several with one name the default is taken.
pub(super) fn collect_symbols(
    table: &[u8],
    names: &[u8],
    versions: Option<&[u8]>,
    exported: bool,
) -> Option<HashMap<Box<str>, Symbol>> {
    let count = table.len() / SYMBOL_SIZE;
    let mut found = HashMap::with_capacity(count.min(1 << 16));
    let mut hidden = HashMap::new();
    each_symbol(table, names, exported, |index, name, symbol| {
        let old = versions.and_then(|v| v.get(index * 2 + 1)).is_some_and(|high| high & 0x80 != 0);
        let into = if old { &mut hidden } else { &mut found };
        into.entry(Box::from(name)).or_insert(symbol);
    })?;
    for (name, symbol) in hidden {
        found.entry(name).or_insert(symbol);
    }
    Some(found)
}

/// Tells of every defined symbol that has a name. `None` where there is no table.
pub(super) fn each_symbol(
    table: &[u8],
    names: &[u8],
    exported: bool,
    mut see: impl FnMut(usize, &str, Symbol),
) -> Option<()> {
    let count = table.len() / SYMBOL_SIZE;
    if count == 0 {
        return None;
    }
    for (index, symbol) in Symtab::parse(table, 0, count, CTX).ok()?.iter().enumerate() {
        // SHN_UNDEF: imported, defined elsewhere. SHN_ABS: a version name or a constant.
        if symbol.st_shndx == 0 || symbol.st_shndx == section_header::SHN_ABS as usize {
            continue;
        }
        let name = u32::try_from(symbol.st_name).ok().and_then(|n| c_str(names, n as usize));
        if let Some(name) = name.filter(|name| !name.is_empty()) {
            let (addr, size) = (ImageAddr(symbol.st_value), symbol.st_size);
            see(index, name, Symbol { addr, size, kind: kind_of(symbol.st_type()), exported });
        }
    }
    Some(())
}

fn kind_of(st_type: u8) -> SymbolKind {
    match st_type {
        sym::STT_FUNC => SymbolKind::Function,
        sym::STT_GNU_IFUNC => SymbolKind::IndirectFunction,
        sym::STT_OBJECT => SymbolKind::Object,
        sym::STT_TLS => SymbolKind::Tls,
        _ => SymbolKind::Other,
    }
}
