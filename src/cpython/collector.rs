//! How often the garbage collector of an interpreter has run: `gc.get_stats()`'s collections, from outside.
//!
//! Words of the collector's state (`struct gc_generation_stats`, Include/internal/pycore_gc.h). Since 3.15 they are kept
//! otherwise, and are unknown.

use super::Python;
use crate::addr::RemoteAddr;
use crate::memory::{ReadError, RemoteMemory};

/// Generations.
const GENERATIONS: u64 = 3;

/// Where the numbers of the main interpreter are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Collections {
    first: RemoteAddr,
    step: u64,
}

impl Collections {
    /// See [`Python::collections`].
    pub(super) fn find(memory: &dyn RemoteMemory, python: &Python) -> Result<Option<Self>, ReadError> {
        let layout = &python.layout;
        let Some(collector) = layout.collector else { return Ok(None) };
        // Where the process says something else of its collector's state than what was measured, it is of another shape.
        if layout.gc.is_some_and(|published| published.collecting != collector.collecting) {
            return Ok(None);
        }
        let state = match (layout.interpreter_state.gc, layout.runtime_state.gc) {
            (Some(gc), _) => python.main_interpreter(memory)?.offset(gc),
            (None, Some(gc)) => python.runtime.offset(gc),
            (None, None) => return Ok(None),
        };
        Ok(Some(Self { first: state.offset(collector.collections), step: collector.stats_size }))
    }

    /// Collections so far, of the youngest generation first.
    pub fn read(&self, memory: &dyn RemoteMemory) -> Result<[u64; 3], ReadError> {
        let mut counts = [0; GENERATIONS as usize];
        for (count, generation) in counts.iter_mut().zip(0..) {
            *count = memory.read_u64(self.first.offset(generation * self.step))?;
        }
        Ok(counts)
    }
}
