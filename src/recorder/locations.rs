//! [`Locations`]: from stacks of locations to the capture's stack ids.
//!
//! For sources that read whole stacks. A location is known by the identity of its strings, which are kept alive for it.

use super::RecordError;
use crate::capture::{CaptureWriter, FrameId, StackId};
use crate::cpython::Location;
use std::collections::HashMap;
use std::sync::Arc;

/// Distinct locations remembered before the memory of them starts anew.
const MAX_LOCATIONS: usize = 1 << 20;

/// A location by the identity of its parts; the parts are kept, so that an address stays theirs.
type Key = (usize, usize, u32);

/// The locations that the writer knows.
#[derive(Debug, Default)]
pub struct Locations {
    known: HashMap<Key, (Arc<str>, Arc<str>, FrameId)>,
    frames: Vec<FrameId>,
}

impl Locations {
    /// The id of a stack, given innermost first.
    pub fn intern(&mut self, stack: &[Location], writer: &mut CaptureWriter) -> Result<StackId, RecordError> {
        let frames = self.frames(stack, writer)?;
        Ok(writer.intern_stack(frames)?)
    }

    /// The ids of these locations.
    pub fn frames(
        &mut self,
        stack: &[Location],
        writer: &mut CaptureWriter,
    ) -> Result<&[FrameId], RecordError> {
        if self.known.len() > MAX_LOCATIONS {
            self.known.clear();
        }
        self.frames.clear();
        for location in stack {
            let line = location.line.unwrap_or(0);
            let key = (location.function.as_ptr() as usize, location.file.as_ptr() as usize, line);
            let id = match self.known.get(&key) {
                Some((_, _, id)) => *id,
                None => {
                    let id = writer.intern_frame(&location.function, &location.file, line)?;
                    self.known.insert(key, (location.function.clone(), location.file.clone(), id));
                    id
                }
            };
            self.frames.push(id);
        }
        Ok(&self.frames)
    }
}
