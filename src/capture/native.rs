//! Native code in stacks: files that are mapped, places in them, and what these are called.
//!
//! Knows what a capture says of them, not how anybody found it out.

/// A file with code that the target has mapped, as the capture numbers them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ModuleId(pub u32);

impl ModuleId {
    /// A file that was not written, for want of room.
    pub(super) const NOT_KEPT: Self = Self(u32::MAX);
}

/// A frame of native code: where it was executing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct NativeFrame {
    /// The file; `None` for code of no file.
    pub module: Option<ModuleId>,
    /// The address in the file, as its symbols have it; in memory where there is no file.
    pub address: u64,
    /// Whether the file is the Python interpreter's own.
    pub interpreter: bool,
    /// Whether the place is guessed: the code of the frame before has no unwind data.
    pub guessed: bool,
}

impl NativeFrame {
    const INTERPRETER: u8 = 1;
    const GUESSED: u8 = 2;

    /// As the format has them.
    pub(super) fn flags(self) -> u8 {
        let interpreter = if self.interpreter { Self::INTERPRETER } else { 0 };
        interpreter | if self.guessed { Self::GUESSED } else { 0 }
    }

    /// Flags that this version does not know mean nothing to it.
    pub(super) fn new(module: Option<ModuleId>, address: u64, flags: u8) -> Self {
        let (interpreter, guessed) = (flags & Self::INTERPRETER != 0, flags & Self::GUESSED != 0);
        Self { module, address, interpreter, guessed }
    }

    /// What its names are found by.
    pub(super) fn place(self) -> (Option<ModuleId>, u64) {
        (self.module, self.address)
    }
}

/// What an address in a file is called. A frame has several where functions were inlined, innermost first.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NativePlace {
    /// The function, demangled.
    pub function: Option<String>,
    /// The source file.
    pub file: Option<String>,
    /// The line in it.
    pub line: Option<u32>,
}
