//! The in-target agent as it is mapped: the image that `build.rs` built, laid out flat, and where its entries are.

use super::error::ProbeError;
use crate::addr::RemoteAddr;
use goblin::elf::Elf;
use goblin::elf::program_header::PT_LOAD;

const FILE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/agent.so"));

/// Entries of the agent; see `src/agent/entry.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Any function.
    Any,
    /// malloc, every one.
    MallocExact,
    /// free, every one.
    FreeExact,
    /// malloc, sampled.
    MallocSampled,
    /// free, sampled.
    FreeSampled,
    /// calloc, sampled, where it calls no other hooked function.
    CallocSampled,
    /// A table's malloc, sampled.
    TableMallocSampled,
    /// A table's free, sampled.
    TableFreeSampled,
    /// `PyCode_Type.tp_dealloc`.
    CodeDealloc,
}

impl Entry {
    fn symbol(self) -> &'static str {
        match self {
            Self::Any => "heaptap_any",
            Self::MallocExact => "heaptap_malloc_exact",
            Self::FreeExact => "heaptap_free_exact",
            Self::MallocSampled => "heaptap_malloc_sampled",
            Self::FreeSampled => "heaptap_free_sampled",
            Self::CallocSampled => "heaptap_calloc_sampled",
            Self::TableMallocSampled => "heaptap_table_malloc_sampled",
            Self::TableFreeSampled => "heaptap_table_free_sampled",
            Self::CodeDealloc => "heaptap_code_dealloc",
        }
    }
}

/// The agent, to be written at one address.
#[derive(Debug, Clone)]
pub struct AgentImage {
    /// Its bytes from the first to the last segment, a whole number of pages.
    pub bytes: Vec<u8>,
    entries: Vec<(String, u64)>,
}

impl AgentImage {
    /// Lays the image out. It holds no absolute address (`build.rs` lets none but relative relocations pass, and there are none): the
    /// same bytes run anywhere.
    pub fn new() -> Result<Self, ProbeError> {
        let broken = |what: &str| ProbeError::Agent { what: what.into() };
        let elf = Elf::parse(FILE).map_err(|e| broken(&e.to_string()))?;
        let loads: Vec<_> = elf.program_headers.iter().filter(|h| h.p_type == PT_LOAD).collect();
        let end = loads.iter().map(|h| h.p_vaddr + h.p_memsz).max().ok_or_else(|| broken("no segments"))?;
        let mut bytes = vec![0; (end as usize).next_multiple_of(4096)];
        for header in loads {
            let from = FILE.get(header.file_range()).ok_or_else(|| broken("a segment outside the file"))?;
            let at = header.p_vaddr as usize;
            bytes[at..at + from.len()].copy_from_slice(from);
        }
        if elf.dynrelas.iter().chain(elf.dynrels.iter()).count() > 0 {
            return Err(broken("it has relocations"));
        }
        let named = elf.dynsyms.iter().filter(|s| s.st_value != 0);
        let entries =
            named.filter_map(|s| Some((elf.dynstrtab.get_at(s.st_name)?.to_string(), s.st_value))).collect();
        Ok(Self { bytes, entries })
    }

    /// Address of an entry when the image lies at `base`.
    pub fn entry(&self, base: RemoteAddr, entry: Entry) -> Result<RemoteAddr, ProbeError> {
        let found = self.entries.iter().find(|(name, _)| name == entry.symbol());
        found
            .map(|(_, at)| base.offset(*at))
            .ok_or_else(|| ProbeError::Agent { what: format!("it has no {}", entry.symbol()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, InstructionInfoFactory};

    #[test]
    fn every_entry_is_there_and_the_image_is_small() {
        let image = AgentImage::new().unwrap();
        for entry in [
            Entry::Any,
            Entry::MallocExact,
            Entry::FreeExact,
            Entry::MallocSampled,
            Entry::FreeSampled,
            Entry::CallocSampled,
            Entry::TableMallocSampled,
            Entry::TableFreeSampled,
            Entry::CodeDealloc,
        ] {
            assert!(image.entry(RemoteAddr(0), entry).unwrap().0 < image.bytes.len() as u64);
        }
        assert!(image.bytes.len() <= 64 << 10, "{}", image.bytes.len());
    }

    /// The hooked functions' callers may count on vector registers being kept: see src/agent/lib.rs.
    #[test]
    fn no_instruction_touches_a_vector_register() {
        let elf = Elf::parse(FILE).unwrap();
        let text = elf.section_headers.iter().find(|s| &elf.shdr_strtab[s.sh_name] == ".text").unwrap();
        let bytes = &FILE[text.file_range().unwrap()];
        let decoder = Decoder::with_ip(64, bytes, text.sh_addr, DecoderOptions::NONE);
        let mut factory = InstructionInfoFactory::new();
        let mut count = 0;
        for instruction in decoder {
            assert!(!instruction.is_invalid(), "{:#x}", instruction.ip());
            count += 1;
            for used in factory.info(&instruction).used_registers() {
                let register = used.register();
                assert!(
                    !register.is_vector_register() && !register.is_mm() && !register.is_st(),
                    "{:#x} {:?} uses {register:?}",
                    instruction.ip(),
                    instruction.mnemonic()
                );
            }
        }
        assert!(count > 500, "{count} instructions");
    }
}
