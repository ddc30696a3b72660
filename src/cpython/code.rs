//! Code objects: from raw frames to function, file and line, remembered by address and validated at every use.
//!
//! Code objects are freed and their addresses used again, so an address alone proves nothing: each use compares, in one read of
//! the whole stack, the code's header and the bytes of the strings and the line table it points to with those remembered.

use super::code_text::{CodeText, MAX_LINE_TABLE, MAX_NAME, UNKNOWN, name};
use super::frame::RawFrame;
use super::layout::Layout;
use super::text::{ObjectError, shape, word};
use crate::addr::RemoteAddr;
use crate::memory::RemoteMemory;
use std::collections::HashMap;
use std::sync::Arc;

/// Bytes of a line table that are compared at every use.
const COMPARED: usize = 512;
/// Remembered bytes at which the table starts anew.
const MAX_BYTES: usize = 64 << 20;

/// Where a frame is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Location {
    /// Qualified name (3.11+), plain name before.
    pub function: Arc<str>,
    /// `co_filename`.
    pub file: Arc<str>,
    /// Line being executed; `None` where the instruction has none, or it can't be known.
    pub line: Option<u32>,
}

/// Some bytes of the target as they were when they were read.
struct Seen {
    addr: RemoteAddr,
    bytes: Box<[u8]>,
}

struct Code {
    header: Header,
    objects: Vec<Seen>,
    text: CodeText,
    /// Lines already looked up.
    lines: HashMap<i32, Option<u32>>,
    /// The event it was last validated in.
    validated: u64,
}

/// The fields of a code object that matter here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    ob_type: RemoteAddr,
    filename: RemoteAddr,
    name: RemoteAddr,
    line_table: RemoteAddr,
    first_line: i32,
    first_traceable: i32,
}

/// The code objects of one process.
pub struct CodeTable {
    layout: Layout,
    code_type: Option<RemoteAddr>,
    header_len: usize,
    codes: HashMap<RemoteAddr, Code>,
    bytes: usize,
    event: u64,
    unknown: Arc<str>,
    scratch: Vec<u8>,
}

impl CodeTable {
    /// An empty table. `code_type` is the address of `PyCode_Type`, if known.
    pub fn new(layout: &Layout, code_type: Option<RemoteAddr>) -> Self {
        let code = &layout.code_object;
        let ends = [
            layout.pyobject.ob_type + 8,
            code.filename + 8,
            code.qualname.unwrap_or(code.name) + 8,
            code.linetable + 8,
            code.firstlineno + 4,
            code.firsttraceable.map_or(0, |at| at + 4),
        ];
        Self {
            layout: layout.clone(),
            code_type,
            header_len: ends.into_iter().max().unwrap_or(0) as usize,
            codes: HashMap::new(),
            bytes: 0,
            event: 0,
            unknown: Arc::from(UNKNOWN),
            scratch: Vec::new(),
        }
    }

    /// Code objects remembered.
    pub fn len(&self) -> usize {
        self.codes.len()
    }

    /// True if nothing is remembered.
    pub fn is_empty(&self) -> bool {
        self.codes.is_empty()
    }

    /// True for the location of a frame whose code could not be read.
    pub fn is_unknown(location: &Location) -> bool {
        &*location.function == UNKNOWN && &*location.file == UNKNOWN
    }

    /// Appends the location of each of `frames` to `out`. Frames that have been pushed but not begun (they don't show in
    /// `sys._getframe` either) are left out; a frame whose code can't be read becomes `<unknown>`.
    pub fn resolve(&mut self, memory: &dyn RemoteMemory, frames: &[RawFrame], out: &mut Vec<Location>) {
        self.event += 1;
        if self.bytes > MAX_BYTES {
            self.codes.clear();
            self.bytes = 0;
        }
        self.validate(memory, frames);
        for frame in frames {
            if self.codes.get(&frame.code).is_none_or(|code| code.validated != self.event) {
                self.learn(memory, frame.code);
            }
            match self.codes.get_mut(&frame.code).filter(|code| code.validated == self.event) {
                Some(code) if !code.text.has_begun(frame.lasti) => {}
                Some(code) => out.push(code.location(&self.layout, frame.lasti)),
                None => {
                    out.push(Location {
                        function: self.unknown.clone(),
                        file: self.unknown.clone(),
                        line: None,
                    });
                }
            }
        }
    }

    /// Reads what is remembered of the codes in `frames` again, all in one call, and marks those that still are the same.
    fn validate(&mut self, memory: &dyn RemoteMemory, frames: &[RawFrame]) {
        let event = self.event;
        let mut wanted: Vec<RemoteAddr> = Vec::new();
        let mut total = 0;
        for frame in frames {
            let Some(code) = self.codes.get_mut(&frame.code).filter(|c| c.validated != event) else {
                continue;
            };
            code.validated = event;
            wanted.push(frame.code);
            total += self.header_len + code.objects.iter().map(|o| o.bytes.len()).sum::<usize>();
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.resize(scratch.len().max(total), 0);
        let mut rest = &mut scratch[..];
        let mut reads: Vec<(RemoteAddr, &mut [u8])> = Vec::new();
        for addr in &wanted {
            let code = &self.codes[addr];
            let (header, after) = rest.split_at_mut(self.header_len);
            reads.push((*addr, header));
            rest = after;
            for object in &code.objects {
                let (bytes, after) = rest.split_at_mut(object.bytes.len());
                reads.push((object.addr, bytes));
                rest = after;
            }
        }
        let filled = memory.read_many(&mut reads);
        let mut next = 0;
        for addr in &wanted {
            let code = &self.codes[addr];
            let count = 1 + code.objects.len();
            let same = filled[next..next + count].iter().all(|ok| *ok)
                && self.header(reads[next].1) == Some(code.header)
                && code.objects.iter().zip(&reads[next + 1..]).all(|(o, read)| *o.bytes == *read.1);
            next += count;
            if !same {
                self.forget(*addr);
            }
        }
        self.scratch = scratch;
    }

    fn forget(&mut self, addr: RemoteAddr) {
        if let Some(code) = self.codes.remove(&addr) {
            self.bytes = self.bytes.saturating_sub(code.weight());
        }
    }

    fn learn(&mut self, memory: &dyn RemoteMemory, addr: RemoteAddr) {
        self.forget(addr);
        match self.read_code(memory, addr) {
            Ok(code) => {
                self.bytes += code.weight();
                self.codes.insert(addr, code);
            }
            Err(error) => tracing::debug!(%addr, %error, "a frame's code cannot be read"),
        }
    }

    fn header(&self, bytes: &[u8]) -> Option<Header> {
        let fields = &self.layout.code_object;
        let ptr = |at: u64| word(bytes, at, 8).map(RemoteAddr);
        let int = |at: u64| word(bytes, at, 4).map(|n| n as u32 as i32);
        Some(Header {
            ob_type: ptr(self.layout.pyobject.ob_type)?,
            filename: ptr(fields.filename)?,
            name: ptr(fields.qualname.unwrap_or(fields.name))?,
            line_table: ptr(fields.linetable)?,
            first_line: int(fields.firstlineno)?,
            first_traceable: fields.firsttraceable.map_or(Some(0), int)?,
        })
    }

    fn read_code(&self, memory: &dyn RemoteMemory, addr: RemoteAddr) -> Result<Code, ObjectError> {
        let wrong = |what: String| ObjectError::Wrong { addr, expected: "a code object", what };
        let bytes = memory.read_vec(addr, self.header_len)?;
        let header = self.header(&bytes).ok_or_else(|| wrong("short".into()))?;
        match self.code_type {
            Some(code_type) if header.ob_type != code_type => {
                return Err(wrong(format!("its type is at {}, not {code_type}", header.ob_type)));
            }
            Some(_) => {}
            None => {
                let name = memory.read_ptr(header.ob_type.offset(self.layout.type_object.tp_name))?;
                let name = memory.read_c_string(name, 16)?;
                if name != "code" {
                    return Err(wrong(format!("its type is {name:?}")));
                }
            }
        }
        let mut objects = Vec::new();
        let function = self.text(memory, header.name, &mut objects)?;
        let file = self.text(memory, header.filename, &mut objects)?;
        let line_table = self.line_table(memory, header.line_table, &mut objects)?;
        let Header { first_line, first_traceable, .. } = header;
        let text = CodeText { function, file, first_line, first_traceable, line_table };
        let (lines, validated) = (HashMap::new(), self.event);
        Ok(Code { header, objects, text, lines, validated })
    }

    fn text(
        &self,
        memory: &dyn RemoteMemory,
        addr: RemoteAddr,
        seen: &mut Vec<Seen>,
    ) -> Result<Arc<str>, ObjectError> {
        let shape = shape(memory, &self.layout, addr)?;
        let kept = shape.length.min(MAX_NAME);
        let bytes = memory.read_vec(shape.data, (kept * shape.width) as usize)?;
        let text = name(&bytes, shape.width, shape.length);
        // The length tells two names apart of which one begins with the other.
        let length_at = addr.offset(self.layout.unicode_object.length);
        seen.push(Seen { addr: length_at, bytes: shape.length.to_le_bytes().into() });
        seen.push(Seen { addr: shape.data, bytes: bytes.into() });
        Ok(Arc::from(text))
    }

    fn line_table(
        &self,
        memory: &dyn RemoteMemory,
        addr: RemoteAddr,
        seen: &mut Vec<Seen>,
    ) -> Result<Arc<[u8]>, ObjectError> {
        let size_at = addr.offset(self.layout.bytes_object.ob_size);
        let size = memory.read_u64(size_at)?;
        let bytes = if size > MAX_LINE_TABLE {
            Vec::new()
        } else {
            memory.read_vec(addr.offset(self.layout.bytes_object.ob_sval), size as usize)?
        };
        seen.push(Seen { addr: size_at, bytes: size.to_le_bytes().into() });
        let compared = &bytes[..bytes.len().min(COMPARED)];
        seen.push(Seen { addr: addr.offset(self.layout.bytes_object.ob_sval), bytes: compared.into() });
        Ok(Arc::from(bytes))
    }
}

impl Code {
    fn location(&mut self, layout: &Layout, lasti: i32) -> Location {
        let line = match self.lines.get(&lasti) {
            Some(line) => *line,
            None => {
                let line = self.text.line(layout.meaning.line_table, lasti);
                // No more instructions than the table has bytes; else these are wild pointers.
                if self.lines.len() <= self.text.line_table.len() * 8 {
                    self.lines.insert(lasti, line);
                }
                line
            }
        };
        Location { function: self.text.function.clone(), file: self.text.file.clone(), line }
    }

    /// Bytes it is counted with.
    fn weight(&self) -> usize {
        let seen: usize = self.objects.iter().map(|o| o.bytes.len() + 32).sum();
        256 + seen + self.text.function.len() + self.text.file.len() + self.text.line_table.len() * 9
    }
}
