//! The frames of a thread, innermost first.
//!
//! Follows pointers only; names and lines are [`super::code`]'s. The target's thread must stand still (or the caller must
//! expect a torn chain): a chain that loops or leads nowhere is an error, never a wrong stack.

use super::layout::{FrameChain, Layout, StackRefs};
use super::page_cache::PageCache;
use super::text::word;
use crate::addr::RemoteAddr;
use crate::memory::{ReadError, RemoteMemory};

/// A frame as found: not yet looked into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RawFrame {
    /// The code object.
    pub code: RemoteAddr,
    /// Byte offset of the instruction being executed; negative if not started, [`RawFrame::NO_LASTI`] if unknown.
    pub lasti: i32,
    /// A call of the interpreter's C loop began with it: what called it is C code, or the frame before it in another call. False, too,
    /// where that is not known.
    pub entry: bool,
}

impl RawFrame {
    /// The instruction pointer lies outside any bytecode.
    pub const NO_LASTI: i32 = i32::MAX;
}

/// How a walk ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Walk {
    /// Frames appended.
    pub frames: usize,
    /// There were more than the caller wanted.
    pub truncated: bool,
}

/// A chain of frames that could not be followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WalkError {
    /// A link leads to memory that cannot be read.
    #[error("frame {depth} of the thread state at {tstate} cannot be read")]
    Broken {
        /// The thread state.
        tstate: RemoteAddr,
        /// Frames before it.
        depth: usize,
        /// The read.
        #[source]
        source: ReadError,
    },
    /// A link leads back.
    #[error("the frames of the thread state at {tstate} lead back to {at} after {depth}")]
    Loop {
        /// The thread state.
        tstate: RemoteAddr,
        /// The frame met again.
        at: RemoteAddr,
        /// Frames before it.
        depth: usize,
    },
}

/// One link of the chain.
struct Link {
    /// `None` for a frame that runs no Python code.
    frame: Option<RawFrame>,
    /// It stands for a call of the interpreter's loop (3.12+).
    is_shim: bool,
    previous: RemoteAddr,
}

impl Link {
    fn to(previous: RemoteAddr) -> Self {
        Self { frame: None, is_shim: false, previous }
    }
}

/// Appends the frames of `tstate` to `out`, innermost first, at most `max_depth`.
pub fn walk(
    memory: &dyn RemoteMemory,
    layout: &Layout,
    tstate: RemoteAddr,
    out: &mut Vec<RawFrame>,
    max_depth: usize,
) -> Result<Walk, WalkError> {
    let pages = PageCache::new(memory);
    let from = out.len();
    let broken = |depth: usize| move |source: ReadError| WalkError::Broken { tstate, depth, source };
    let mut at = first_frame(&pages, layout, tstate).map_err(broken(0))?;
    // Brent's: compare with a frame that is moved up at every power of two.
    let (mut links, mut mark, mut mark_at) = (0_u64, at, 1_u64);
    while !at.is_null() {
        let depth = out.len() - from;
        let link = read_link(&pages, layout, at).map_err(broken(depth))?;
        if let Some(frame) = link.frame {
            if depth >= max_depth {
                return Ok(Walk { frames: depth, truncated: true });
            }
            out.push(frame);
        }
        at = link.previous;
        if (link.is_shim || at.is_null())
            && let Some(entry) = out[from..].last_mut()
        {
            entry.entry = true;
        }
        links += 1;
        if !at.is_null() && at == mark {
            return Err(WalkError::Loop { tstate, at, depth: out.len() - from });
        }
        if links == mark_at {
            (mark, mark_at) = (at, mark_at * 2);
        }
    }
    Ok(Walk { frames: out.len() - from, truncated: false })
}

fn first_frame(
    memory: &dyn RemoteMemory,
    layout: &Layout,
    tstate: RemoteAddr,
) -> Result<RemoteAddr, ReadError> {
    let thread = &layout.thread_state;
    match (layout.meaning.frame_chain, &layout.cframe) {
        (FrameChain::FrameObject, _) => memory.read_ptr(tstate.offset(thread.frame.unwrap_or(0))),
        (FrameChain::CurrentFrame, _) => memory.read_ptr(tstate.offset(thread.current_frame.unwrap_or(0))),
        (FrameChain::Cframe, cframe) => {
            let at = memory.read_ptr(tstate.offset(thread.cframe.unwrap_or(0)))?;
            memory.read_ptr(at.offset(cframe.map_or(0, |c| c.current_frame)))
        }
    }
}

fn read_link(memory: &dyn RemoteMemory, layout: &Layout, at: RemoteAddr) -> Result<Link, ReadError> {
    match (&layout.frame_object, &layout.interpreter_frame) {
        (Some(_), None) => frame_object(memory, layout, at),
        _ => interpreter_frame(memory, layout, at),
    }
}

/// `PyFrameObject` (to 3.10).
fn frame_object(memory: &dyn RemoteMemory, layout: &Layout, at: RemoteAddr) -> Result<Link, ReadError> {
    let Some(fields) = &layout.frame_object else {
        return Ok(Link::to(RemoteAddr::NULL));
    };
    let mut bytes = [0; 512];
    let len = (fields.f_lasti + 4).max(fields.f_code + 8).max(fields.f_back + 8) as usize;
    let bytes = &mut bytes[..len.min(512)];
    memory.read(at, bytes)?;
    let field = |at, width| word(bytes, at, width).unwrap_or(0);
    let unit = layout.meaning.lasti_unit.unwrap_or(1) as i32;
    let lasti = (field(fields.f_lasti, 4) as u32 as i32).checked_mul(unit).unwrap_or(RawFrame::NO_LASTI);
    let code = RemoteAddr(field(fields.f_code, 8));
    let frame = Some(RawFrame { code, lasti, entry: true });
    Ok(Link { frame, ..Link::to(RemoteAddr(field(fields.f_back, 8))) })
}

/// `_PyInterpreterFrame` (3.11+).
fn interpreter_frame(memory: &dyn RemoteMemory, layout: &Layout, at: RemoteAddr) -> Result<Link, ReadError> {
    let Some(fields) = &layout.interpreter_frame else {
        return Ok(Link::to(RemoteAddr::NULL));
    };
    let mut bytes = [0; 512];
    let bytes = &mut bytes[..(fields.size as usize).min(512)];
    memory.read(at, bytes)?;
    let field = |at, width| word(bytes, at, width).unwrap_or(0);
    let previous = RemoteAddr(field(fields.previous, 8));
    let owner = field(fields.owner, 1) as u8;
    if layout.meaning.shim_owner.is_some_and(|shim| owner >= shim) {
        return Ok(Link { is_shim: true, ..Link::to(previous) });
    }
    let mut code = RemoteAddr(field(fields.executable, 8));
    if layout.meaning.stack_refs == StackRefs::Tagged {
        code = RemoteAddr(code.0 & !7);
    }
    if code.is_null() {
        return Ok(Link::to(previous));
    }
    // Free-threaded 3.14+: each thread may run a copy of the bytecode (`_PyCode_GetTLBCArray`): {size, pointers…}.
    let start = match (layout.code_object.co_tlbc, fields.tlbc_index) {
        (Some(co_tlbc), Some(index)) => {
            let array = memory.read_ptr(code.offset(co_tlbc))?;
            let index = field(index, 4) as u32 as i32;
            let index = u64::try_from(index).ok().filter(|i| *i < 1 << 20);
            index.map_or(Ok(RemoteAddr::NULL), |i| memory.read_ptr(array.offset(8 + 8 * i)))?
        }
        _ => code.offset(layout.code_object.co_code_adaptive.unwrap_or(0)),
    };
    let lasti = RemoteAddr(field(fields.instr_ptr, 8)).since(start) as i64;
    // One unit before the start: pushed, nothing executed (3.11, 3.12).
    let lasti = if (-2..1 << 30).contains(&lasti) { lasti as i32 } else { RawFrame::NO_LASTI };
    let entry = fields.is_entry.is_some_and(|at| field(at, 1) != 0);
    Ok(Link { frame: Some(RawFrame { code, lasti, entry }), ..Link::to(previous) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpython::layout::catalog;
    use crate::cpython::version::{Flavour, PythonVersion};
    use crate::memory::BytesMemory;

    fn layout(version: &str) -> Layout {
        let version = PythonVersion::parse(version).unwrap();
        catalog::find(version, Flavour::Default).unwrap().build(version, None).unwrap()
    }

    fn put(bytes: &mut [u8], at: u64, value: u64) {
        bytes[at as usize..at as usize + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// A thread state at 0x1000 whose frames are at 0x2000, 0x2100, …, each leading to `next` of its index.
    fn chain(layout: &Layout, count: u64, next: impl Fn(u64) -> u64) -> BytesMemory {
        let fields = layout.frame_object.as_ref().unwrap();
        let mut memory = BytesMemory::new();
        let mut tstate = vec![0; 64];
        put(&mut tstate, layout.thread_state.frame.unwrap(), 0x2000);
        memory.map(RemoteAddr(0x1000), tstate);
        for i in 0..count {
            let mut frame = vec![0; 0x100];
            put(&mut frame, fields.f_code, 0x9000 + i);
            put(&mut frame, fields.f_lasti, i);
            put(&mut frame, fields.f_back, next(i));
            memory.map(RemoteAddr(0x2000 + 0x100 * i), frame);
        }
        memory
    }

    #[test]
    fn frames_come_innermost_first_and_lasti_in_bytes() {
        let layout = layout("3.10.13");
        let memory = chain(&layout, 3, |i| if i < 2 { 0x2100 + 0x100 * i } else { 0 });
        let mut frames = Vec::new();
        let end = walk(&memory, &layout, RemoteAddr(0x1000), &mut frames, 100).unwrap();
        assert_eq!(end, Walk { frames: 3, truncated: false });
        let expected = [(0x9000, 0), (0x9001, 2), (0x9002, 4)].map(|(c, lasti)| RawFrame {
            code: RemoteAddr(c),
            lasti,
            entry: true,
        });
        assert_eq!(frames, expected);
        frames.clear();
        let end = walk(&memory, &layout, RemoteAddr(0x1000), &mut frames, 2).unwrap();
        assert_eq!((end, frames.len()), (Walk { frames: 2, truncated: true }, 2));
    }

    #[test]
    fn loops_and_wild_links_are_errors() {
        let layout = layout("3.10.13");
        let mut frames = Vec::new();
        for back_to in 0..5 {
            let memory =
                chain(&layout, 5, |i| if i < 4 { 0x2100 + 0x100 * i } else { 0x2000 + 0x100 * back_to });
            let end = walk(&memory, &layout, RemoteAddr(0x1000), &mut frames, usize::MAX);
            assert!(matches!(end, Err(WalkError::Loop { .. })), "{back_to}: {end:?}");
        }
        let memory = chain(&layout, 1, |_| 0xdead_0000);
        let end = walk(&memory, &layout, RemoteAddr(0x1000), &mut frames, 10);
        assert!(matches!(end, Err(WalkError::Broken { depth: 1, .. })));
    }
}
