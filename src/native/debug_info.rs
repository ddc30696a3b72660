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
    /// That of a file; `None` where it has none, or none that makes sense.
    pub fn of(file: &ElfFile) -> Option<Self> {
        file.section(".debug_info")?;
        let section = |id: SectionId| -> Result<Bytes, gimli::Error> {
            let bytes = file.content(id.name()).unwrap_or_default();
            Ok(EndianArcSlice::new(Arc::from(bytes), LittleEndian))
        };
        let context = Context::from_dwarf(Dwarf::load(section).ok()?);
        Some(Self { context: context.ok()? })
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
