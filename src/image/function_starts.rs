//! Where the functions of a file begin, local ones too and in a stripped file: the unwinder's search table, `.eh_frame_hdr`.
//!
//! Layout: Linux Standard Base, Core, "Exception Frames". Every linker writes the one encoding that is read here.

use super::elf::ElfFile;
use crate::addr::ImageAddr;
use goblin::elf::program_header::PT_GNU_EH_FRAME;

const VERSION: u8 = 1;
/// `DW_EH_PE_udata4`: the count.
const UDATA4: u8 = 0x03;
/// `DW_EH_PE_datarel | DW_EH_PE_sdata4`: the table, pairs of (function, its unwind entry), relative to the header.
const DATAREL_SDATA4: u8 = 0x3b;
/// `DW_EH_PE_absptr`: the word before the count has 8 bytes, else 4.
const ABSPTR: u8 = 0x00;
const MAX_FUNCTIONS: u32 = 1 << 22;

/// Ascending; empty where there is no such table. Parts of functions that were moved away (`.cold`) are told like functions.
pub fn function_starts(file: &ElfFile) -> Vec<ImageAddr> {
    starts(file).unwrap_or_default()
}

fn starts(file: &ElfFile) -> Option<Vec<ImageAddr>> {
    let (addr, len) = file.part(PT_GNU_EH_FRAME)?;
    let head = file.bytes_at(addr, 4)?;
    let [VERSION, frame_encoding, UDATA4, DATAREL_SDATA4] = head[..] else { return None };
    let count_at = if frame_encoding & 0x0f == ABSPTR { 12 } else { 8 };
    let count = file.bytes_at(ImageAddr(addr.0 + count_at), 4)?;
    let count = u32::from_le_bytes(count.try_into().ok()?);
    if count > MAX_FUNCTIONS || count_at + 4 + u64::from(count) * 8 > len {
        return None;
    }
    let table = file.bytes_at(ImageAddr(addr.0 + count_at + 4), count as usize * 8)?;
    let relative = |entry: &[u8]| i32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
    let mut starts: Vec<_> =
        table.chunks_exact(8).map(|e| ImageAddr(addr.0.wrapping_add_signed(relative(e).into()))).collect();
    starts.sort();
    Some(starts)
}
