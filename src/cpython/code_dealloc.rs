//! The word through which every code object is freed: `PyCode_Type.tp_dealloc`.
//!
//! `PyTypeObject` has begun with the same words since Python 2: `tp_name`, `tp_basicsize`, `tp_itemsize`, `tp_dealloc`
//! (`Include/cpython/object.h`). The type is static, and one for all interpreters of a process.

use super::Python;
use super::binary::{Binary, Span};
use super::thread_state;
use crate::addr::RemoteAddr;
use crate::memory::{ReadError, RemoteMemory};

/// Bytes from `tp_name` to `tp_dealloc`.
const NAME_TO_DEALLOC: u64 = 24;
/// Frames of each thread that are looked at for a code object.
const FRAMES: usize = 16;

/// A word that could not be found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodeDeallocError {
    /// No symbol, and no thread executes anything.
    #[error(
        "the type of code objects was not found in {binary} (no symbol PyCode_Type, and no thread has a frame)"
    )]
    NotFound {
        /// The binary of the runtime.
        binary: String,
    },
    /// Something else is there.
    #[error("the type at {address} is not that of code objects: {what}")]
    NotTheType {
        /// Its first byte.
        address: RemoteAddr,
        /// Why.
        what: String,
    },
    /// Memory could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// See [`Python::code_dealloc_word`].
pub fn find(
    memory: &dyn RemoteMemory,
    binaries: &[&dyn Binary],
    python: &Python,
) -> Result<(RemoteAddr, RemoteAddr), CodeDeallocError> {
    let address = match python.code_type {
        Some(address) => address,
        None => of_a_frame(memory, python)?
            .ok_or_else(|| CodeDeallocError::NotFound { binary: python.binary.clone() })?,
    };
    let not = |what: String| CodeDeallocError::NotTheType { address, what };
    let home = binaries.iter().find(|b| b.path() == python.binary);
    let data: Vec<Span> = home.map(|b| b.writable()).unwrap_or_default();
    if !data.iter().any(|span| span.contains(address)) {
        return Err(not(format!("it is not in the data of {}", python.binary)));
    }
    let name_at = address.offset(python.layout.type_object.tp_name);
    let name = memory.read_c_string(memory.read_ptr(name_at)?, 16)?;
    if name != "code" {
        return Err(not(format!("its name is {name:?}")));
    }
    // Not compared with known code: a hook of a heaptap that was killed may be there still.
    let word = name_at.offset(NAME_TO_DEALLOC);
    let value = memory.read_ptr(word)?;
    if value.is_null() { Err(not("it frees nothing".into())) } else { Ok((word, value)) }
}

/// The type of the first code object that a thread executes.
fn of_a_frame(memory: &dyn RemoteMemory, python: &Python) -> Result<Option<RemoteAddr>, ReadError> {
    for state in thread_state::all(memory, &python.layout, python.runtime)? {
        let mut frames = Vec::new();
        // A thread that runs on may tear its chain: what was found before is as good, and the type's name is checked.
        if let Err(error) = python.walk(memory, state.addr, &mut frames, FRAMES) {
            tracing::debug!(%error, "a stack is passed over");
        }
        let of = |code: RemoteAddr| memory.read_ptr(code.offset(python.layout.pyobject.ob_type)).ok();
        if let Some(found) = frames.iter().find_map(|frame| of(frame.code)) {
            return Ok(Some(found));
        }
    }
    Ok(None)
}
