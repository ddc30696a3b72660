//! What a [`CaptureWriter`] writes of native code: modules, frames, and what these are called.

use super::chunk;
use super::error::CaptureError;
use super::format::{MAX_BUILD_ID_LEN, MAX_STRING_LEN, kind};
use super::intern::{Interned, cut};
use super::keeper::SYMBOLS_SHARE;
use super::native::{ModuleId, NativeFrame, NativePlace};
use super::record::FrameId;
use super::symbols;
use super::writer::CaptureWriter;

impl CaptureWriter {
    /// The id of a mapped file. An empty build id means that it has none.
    pub fn intern_module(&mut self, path: &str, build_id: &[u8]) -> Result<ModuleId, CaptureError> {
        self.require_native()?;
        let path = cut(path, MAX_STRING_LEN);
        let build_id = &build_id[..build_id.len().min(MAX_BUILD_ID_LEN)];
        if self.is_closed_to_definitions()? {
            return Ok(self.interner.known_module(&path, build_id).unwrap_or(ModuleId::NOT_KEPT));
        }
        match self.interner.module(&path, build_id) {
            Ok(Interned::Known(id)) => Ok(id),
            Ok(Interned::New(id)) => {
                self.room()?;
                self.encoder.module(id, &path, build_id);
                Ok(id)
            }
            Err(full) => Err(self.full(full)),
        }
    }

    /// The id of a native frame, for stacks as any other. Of a module that this writer did not give out, or that it had no room
    /// for, it is the frame that stands for what is not kept.
    pub fn intern_native_frame(&mut self, frame: NativeFrame) -> Result<FrameId, CaptureError> {
        self.require_native()?;
        if frame.module.is_some_and(|module| !self.interner.has_module(module)) {
            return Ok(self.frame_not_kept());
        }
        if self.is_closed_to_definitions()? {
            return Ok(self.interner.known_native_frame(frame).unwrap_or_else(|| self.frame_not_kept()));
        }
        match self.interner.native_frame(frame) {
            Ok(Interned::Known(id)) => Ok(id),
            Ok(Interned::New(id)) => {
                self.room()?;
                self.encoder.native_frame(id, frame);
                Ok(id)
            }
            Err(full) => Err(self.full(full)),
        }
    }

    /// All native frames that are defined so far, in the order they came in.
    pub fn native_frames(&self) -> Vec<NativeFrame> {
        self.interner.native_frames()
    }

    /// Writes what native frames are called: at the end of a recording, before [`finish`](Self::finish). In a file that is kept
    /// small, names that have no room are left out; who reads it looks them up.
    pub fn symbols(&mut self, named: &[(NativeFrame, Vec<NativePlace>)]) -> Result<(), CaptureError> {
        self.require_native()?;
        // The frames come first.
        self.flush()?;
        let mut left_out = 0;
        symbols::encode(named, |content| {
            let mut packed = Vec::new();
            chunk::seal(kind::SYMBOLS, content, &mut packed);
            if self.has_share_for_symbols(packed.len() as u64) && self.has_room_for(packed.len() as u64) {
                return self.output.write(&mut packed);
            }
            left_out += packed.len();
            Ok(())
        })?;
        if left_out > 0 {
            let path = self.output.path().display();
            tracing::warn!("{path} has no room for {left_out} bytes of names of native frames");
        }
        self.output.check()
    }

    /// Takes so much of the share that names have of the file, if that much is left.
    fn has_share_for_symbols(&mut self, bytes: u64) -> bool {
        let Some(keeping) = &mut self.keeping else { return true };
        let keeper = &mut keeping.keeper;
        let has = keeper.symbols_bytes + bytes <= keeper.share(SYMBOLS_SHARE);
        keeper.symbols_bytes += if has { bytes } else { 0 };
        has
    }

    fn require_native(&self) -> Result<(), CaptureError> {
        let refused = || CaptureError::NotNative { path: self.output.path().to_owned() };
        if self.native { Ok(()) } else { Err(refused()) }
    }
}
