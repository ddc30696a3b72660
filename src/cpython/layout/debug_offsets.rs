//! The process's own table of offsets, `_Py_DebugOffsets` at the start of `_PyRuntime` (3.13+).
//!
//! Reference: `Include/internal/pycore_debug_offsets.h`. Which fields, in which order, is data (`[debug_offsets]` of the
//! layout files); here they are read and named.

use super::LayoutError;
use super::file::LayoutFile;
use super::tables::Tables;
use crate::addr::RemoteAddr;
use crate::cpython::version::PythonVersion;
use crate::memory::{ReadError, RemoteMemory};

/// First eight bytes of the table.
pub const COOKIE: &[u8; 8] = b"xdebugpy";
/// No structure of CPython's is larger.
const MAX_SIZE: u64 = 1 << 20;

/// The first three words of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// The version the process is.
    pub version: PythonVersion,
    /// A free-threaded build.
    pub free_threaded: bool,
}

/// The head of the table at `runtime`; `None` if there is no table there (before 3.13).
pub fn head(memory: &dyn RemoteMemory, runtime: RemoteAddr) -> Result<Option<Head>, ReadError> {
    let bytes = memory.read_vec(runtime, 24)?;
    if &bytes[..8] != COOKIE {
        return Ok(None);
    }
    let word = |at: usize| bytes[at..at + 8].iter().rev().fold(0_u64, |n, b| n << 8 | u64::from(*b));
    Ok(Some(Head { version: PythonVersion::from_hex(word(8) as u32), free_threaded: word(16) != 0 }))
}

/// The table at `runtime`, read as `file` says. Fails where a value cannot be: the table is then another one.
pub fn read(
    memory: &dyn RemoteMemory,
    runtime: RemoteAddr,
    file: &LayoutFile,
    version: PythonVersion,
) -> Result<Tables, LayoutError> {
    let wrong = |what: String| LayoutError::DebugOffsets { version, file: file.name.clone(), what };
    let shape = file.debug_offsets.as_ref().ok_or_else(|| wrong("the file lists no fields".into()))?;
    if shape.size != shape.fields.len() as u64 * 8 {
        return Err(wrong(format!("{} fields are not {} bytes", shape.fields.len(), shape.size)));
    }
    let bytes = memory.read_vec(runtime, shape.fields.len() * 8)?;
    let mut tables = Tables::new();
    for (name, word) in shape.fields.iter().zip(bytes.chunks_exact(8)) {
        let Some((table, key)) = name.split_once('.') else { continue };
        let value = word.iter().rev().fold(0_u64, |n, b| n << 8 | u64::from(*b));
        if value > MAX_SIZE {
            return Err(wrong(format!("{name} is {value:#x}")));
        }
        tables.entry(table.to_owned()).or_default().insert(key.to_owned(), value);
    }
    // 0 where a build has no such field (`_Py_DebugOffsets` has no way to say "absent").
    for (table, key) in [("interpreter_frame", "tlbc_index"), ("code_object", "co_tlbc")] {
        if let Some(keys) = tables.get_mut(table)
            && keys.get(key) == Some(&0)
        {
            keys.remove(key);
        }
    }
    Ok(tables)
}
