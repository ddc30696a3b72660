//! [`DebugInfo`]: lines and inlined functions from a file's DWARF, by the addr2line crate.

use super::names::Place;
use crate::image::elf::ElfFile;
use addr2line::Context;
use gimli::{Dwarf, EndianArcSlice, LittleEndian, SectionId};
use std::sync::Arc;

type Bytes = EndianArcSlice<LittleEndian>;

/// Debugging information of one file.
pub struct DebugInfo {
    context: Context<Bytes>,
}

impl DebugInfo {
    /// That of a file; `None` where it has none, or none that makes sense. `other` finds the file with a build id: `dwz` puts into it
    /// what several share.
    pub fn of(file: &ElfFile, other: impl Fn(&str) -> Option<ElfFile>) -> Option<Self> {
        file.section(".debug_info").filter(|section| section.in_file)?;
        let mut dwarf = Dwarf::load(|id| section(file, id)).ok()?;
        if let Some(other) = shared(file).and_then(|build_id| other(&build_id)) {
            dwarf.load_sup(|id| section(&other, id)).ok()?;
        }
        Some(Self { context: Context::from_dwarf(dwarf).ok()? })
    }

    /// The functions at an address of the file, the innermost inlined one first; empty where nothing is told.
    pub fn places(&self, at: u64) -> Vec<Place> {
        let mut places = Vec::new();
        let Ok(mut frames) = self.context.find_frames(at).skip_all_loads() else { return places };
        while let Ok(Some(frame)) = frames.next() {
            let location = frame.location.as_ref();
            places.push(Place {
                function: frame
                    .function
                    .as_ref()
                    .and_then(|name| name.demangle().ok())
                    .map(|name| name.into_owned()),
                file: location.and_then(|location| location.file).map(str::to_owned),
                line: location.and_then(|location| location.line).filter(|line| *line > 0),
            });
        }
        places
    }
}

fn section(file: &ElfFile, id: SectionId) -> Result<Bytes, gimli::Error> {
    let bytes = file.content(id.name()).unwrap_or_default();
    Ok(EndianArcSlice::new(Arc::from(bytes), LittleEndian))
}

/// The build id of the file with what several share (`dwz(1)`: `.gnu_debugaltlink` is its path, a zero, its build id).
fn shared(file: &ElfFile) -> Option<String> {
    let link = file.content(".gnu_debugaltlink")?;
    let path = link.iter().position(|byte| *byte == 0)?;
    Some(hex(&link[path + 1..])).filter(|id| !id.is_empty())
}

/// A build id as it is written.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
