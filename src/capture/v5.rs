//! Version 5: records of native code. All else is as in versions 3 and 4 (`v3`).
//!
//! Pure and as mistrustful as `v1`, whose ids of frames these records share.

use super::format::{MAX_BUILD_ID_LEN, control};
use super::native::{ModuleId, NativeFrame};
use super::record::FrameId;
use super::stack_table::StackTable;
use super::v1::{Broken, ChunkDecoder, ENDED, defined, text};
use super::varint::Cursor;

impl ChunkDecoder {
    /// A module or a native frame. The frame's id; a module has no record of its own.
    pub(super) fn native(
        &mut self,
        first: u8,
        cursor: &mut Cursor<'_>,
        tables: &mut StackTable,
    ) -> Result<Option<FrameId>, Broken> {
        if first == control::MODULE {
            let id = ModuleId(defined(cursor, &mut self.next_module)?);
            let path = text(cursor)?;
            let len = cursor.varint().ok_or(ENDED)?;
            let build_id = cursor.take(len).ok_or(ENDED)?;
            if build_id.len() > MAX_BUILD_ID_LEN {
                return Err("a module's build id is too long");
            }
            tables.define_module(id, path, build_id)?;
            return Ok(None);
        }
        let id = FrameId(defined(cursor, &mut self.next_frame)?);
        let module = cursor.varint_u32().ok_or(ENDED)?.checked_sub(1).map(ModuleId);
        let address = cursor.varint().ok_or(ENDED)?;
        let frame = NativeFrame::new(module, address, cursor.byte().ok_or(ENDED)?);
        tables.define_native_frame(id, frame)?;
        Ok(Some(id))
    }
}
