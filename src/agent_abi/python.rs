//! What the agent's walker has to know of a CPython: [`PythonFacts`].

/// How a thread's own state is found: [`PythonFacts::own_state`].
pub mod own_state {
    /// There is no way: no stacks.
    pub const NONE: u32 = 0;
    /// glibc: `a` = key, `b` = offset of `specific` in `struct pthread`.
    pub const GLIBC: u32 = 1;
    /// musl: `a` = key, `b` = offset of `tsd`.
    pub const MUSL: u32 = 2;
    /// `a` = distance from the thread pointer (signed).
    pub const THREAD_LOCAL: u32 = 3;
    /// `a` = module, `b` = offset in its block, `c` = bytes of an entry of the vector.
    pub const DYNAMIC: u32 = 4;
}

/// How frames hang together: [`PythonFacts::chain`]. A call of the interpreter's loop is one frame object, or all frames up to one that
/// says so ([`PythonFacts::is_entry`]) or to a shim.
pub mod chain {
    /// `tstate.frame`, then `f_back`.
    pub const FRAME_OBJECT: u32 = 0;
    /// `tstate.cframe->current_frame`, then `previous`.
    pub const CFRAME: u32 = 1;
    /// `tstate.current_frame`, then `previous`.
    pub const CURRENT_FRAME: u32 = 2;
}

/// An offset that does not exist.
pub const ABSENT: u32 = u32::MAX;

/// Everything that the walker has to know of this CPython. Offsets in bytes; [`ABSENT`] where there is no such field.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PythonFacts {
    /// One of [`own_state`].
    pub own_state: u32,
    /// One of [`chain`].
    pub chain: u32,
    /// See [`own_state`].
    pub a: u64,
    /// See [`own_state`].
    pub b: u64,
    /// See [`own_state`].
    pub c: u64,
    /// Address of the word that names the thread state that finalizes the runtime.
    pub finalizing: u64,
    /// Address of `PyCode_Type`; 0 where it is not known.
    pub code_type: u64,
    /// Of `PyThreadState`: the thread pointer of its thread.
    pub thread_id: u32,
    /// Of `PyThreadState`: first frame, or the `_PyCFrame`.
    pub first_frame: u32,
    /// Of `_PyCFrame`: the first frame.
    pub cframe_frame: u32,
    /// Of a frame: the caller.
    pub previous: u32,
    /// Of a frame: the code object.
    pub code: u32,
    /// Of a frame: `f_lasti` (i32) or the pointer to the instruction.
    pub instruction: u32,
    /// `f_lasti` is multiplied by this.
    pub lasti_unit: u32,
    /// Of a frame: one byte, who owns it.
    pub owner: u32,
    /// Owners from this on run no Python code; 256 for none.
    pub shim_owner: u32,
    /// Of a frame: one byte, not 0 where a call of the interpreter's loop began with it. Without: see [`chain`].
    pub is_entry: u32,
    /// Bits that are masked off a frame's pointer to its code.
    pub code_mask: u32,
    /// Of any object: its type.
    pub ob_type: u32,
    /// Of a code object: its bytecode.
    pub bytecode: u32,
    /// Of a code object: the array of copies of it (free-threaded).
    pub co_tlbc: u32,
    /// Of a frame: which copy (u32).
    pub tlbc_index: u32,
    /// Of a code object: `str`, qualified name or name.
    pub co_name: u32,
    /// Of a code object: `str`.
    pub co_filename: u32,
    /// Of a code object: `bytes`.
    pub co_linetable: u32,
    /// Of a code object: i32.
    pub co_firstlineno: u32,
    /// Of a code object: i32.
    pub co_firsttraceable: u32,
    /// Of `bytes`: its length.
    pub bytes_size: u32,
    /// Of `bytes`: the first.
    pub bytes_data: u32,
    /// Of `str`: flags (u32).
    pub str_state: u32,
    /// Of `str`: characters (u64).
    pub str_length: u32,
    /// Of `str`: data of a compact ASCII one.
    pub str_ascii_data: u32,
    /// Of `str`: data of another compact one.
    pub str_compact_data: u32,
    /// Of `str`: pointer to the data of one that is not compact.
    pub str_data: u32,
    /// First of the 3 bits of `str_state` that give the bytes per character.
    pub str_kind_bit: u32,
    /// Bit of `str_state`: compact.
    pub str_compact_bit: u32,
    /// Bit of `str_state`: ASCII.
    pub str_ascii_bit: u32,
}

impl PythonFacts {
    /// As it lies in memory.
    pub fn to_bytes(&self) -> [u8; size_of::<Self>()] {
        let mut bytes = [0; size_of::<Self>()];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(core::mem::offset_of!(Self, own_state), &self.own_state.to_le_bytes());
        put(core::mem::offset_of!(Self, chain), &self.chain.to_le_bytes());
        put(core::mem::offset_of!(Self, a), &self.a.to_le_bytes());
        put(core::mem::offset_of!(Self, b), &self.b.to_le_bytes());
        put(core::mem::offset_of!(Self, c), &self.c.to_le_bytes());
        put(core::mem::offset_of!(Self, finalizing), &self.finalizing.to_le_bytes());
        put(core::mem::offset_of!(Self, code_type), &self.code_type.to_le_bytes());
        put(core::mem::offset_of!(Self, thread_id), &self.thread_id.to_le_bytes());
        put(core::mem::offset_of!(Self, first_frame), &self.first_frame.to_le_bytes());
        put(core::mem::offset_of!(Self, cframe_frame), &self.cframe_frame.to_le_bytes());
        put(core::mem::offset_of!(Self, previous), &self.previous.to_le_bytes());
        put(core::mem::offset_of!(Self, code), &self.code.to_le_bytes());
        put(core::mem::offset_of!(Self, instruction), &self.instruction.to_le_bytes());
        put(core::mem::offset_of!(Self, lasti_unit), &self.lasti_unit.to_le_bytes());
        put(core::mem::offset_of!(Self, owner), &self.owner.to_le_bytes());
        put(core::mem::offset_of!(Self, shim_owner), &self.shim_owner.to_le_bytes());
        put(core::mem::offset_of!(Self, is_entry), &self.is_entry.to_le_bytes());
        put(core::mem::offset_of!(Self, code_mask), &self.code_mask.to_le_bytes());
        put(core::mem::offset_of!(Self, ob_type), &self.ob_type.to_le_bytes());
        put(core::mem::offset_of!(Self, bytecode), &self.bytecode.to_le_bytes());
        put(core::mem::offset_of!(Self, co_tlbc), &self.co_tlbc.to_le_bytes());
        put(core::mem::offset_of!(Self, tlbc_index), &self.tlbc_index.to_le_bytes());
        put(core::mem::offset_of!(Self, co_name), &self.co_name.to_le_bytes());
        put(core::mem::offset_of!(Self, co_filename), &self.co_filename.to_le_bytes());
        put(core::mem::offset_of!(Self, co_linetable), &self.co_linetable.to_le_bytes());
        put(core::mem::offset_of!(Self, co_firstlineno), &self.co_firstlineno.to_le_bytes());
        put(core::mem::offset_of!(Self, co_firsttraceable), &self.co_firsttraceable.to_le_bytes());
        put(core::mem::offset_of!(Self, bytes_size), &self.bytes_size.to_le_bytes());
        put(core::mem::offset_of!(Self, bytes_data), &self.bytes_data.to_le_bytes());
        put(core::mem::offset_of!(Self, str_state), &self.str_state.to_le_bytes());
        put(core::mem::offset_of!(Self, str_length), &self.str_length.to_le_bytes());
        put(core::mem::offset_of!(Self, str_ascii_data), &self.str_ascii_data.to_le_bytes());
        put(core::mem::offset_of!(Self, str_compact_data), &self.str_compact_data.to_le_bytes());
        put(core::mem::offset_of!(Self, str_data), &self.str_data.to_le_bytes());
        put(core::mem::offset_of!(Self, str_kind_bit), &self.str_kind_bit.to_le_bytes());
        put(core::mem::offset_of!(Self, str_compact_bit), &self.str_compact_bit.to_le_bytes());
        put(core::mem::offset_of!(Self, str_ascii_bit), &self.str_ascii_bit.to_le_bytes());
        bytes
    }
}
