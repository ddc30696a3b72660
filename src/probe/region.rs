//! What heaptap writes into the target: one region of thunks per patched module, built here byte by byte. Pure.
//!
//! A region is mapped near its module, written while it is readable and executable but never writable, and
//! holds, in this order (all words little-endian):
//!
//! | offset | what |
//! |--:|---|
//! | 0 | magic, ends in the version of this layout |
//! | 8 | u32 length of the region, u32 number of patches |
//! | 16 | u64 pid, u64 start time (proc_pid_stat(5), clock ticks) of the controller |
//! | 32 | `struct sigaction` of the kernel that we set for SIGTRAP: handler, flags, restorer, mask |
//! | 64 | the same, as it was before |
//! | 96 | u64: 1 when our SIGTRAP handler is installed |
//! | 104 | 8 × u64: addresses of the other regions, 0 for none |
//! | 256 | patches: {u64 address, u64 length, 8 bytes before, 8 bytes planted} |
//! | … | traps: {u64 instruction pointer at which SIGTRAP may come, u64 where execution goes on} |
//! | … | code: SIGTRAP handler, restorer, thunks |
//!
//! Patches, traps and handler are in the first region alone. The handler runs only when no tracer takes the
//! trap: when heaptap was killed. It writes every patch back through /proc/thread-self/mem, so that the
//! target returns to full speed by its first hit, and sends the thread on. Where the target may not make
//! these system calls (seccomp) it only sends it on.
//!
//! SIGTRAP comes where an int3 was executed, and also where heaptap had sent the stopped thread already when it
//! was killed, before it could take the signal back: at the first instruction of a thunk or of the function.
//!
//! A thunk of a function at A, whose first instruction I is L bytes long:
//!
//! ```text
//! bypass: I (relocated); jmp A+L
//! record: sub rsp, 8; call bypass; RETURN: int3; mov qword [rsp-8], 0; add rsp, 8; ret   when the answer has to be seen
//! record: sub rsp, 8; call bypass; mov qword [rsp-8], 0; add rsp, 8; ret                 when not
//! ```
//!
//! The stack stays aligned as the ABI wants it (rsp ≡ 8 mod 16 at a function's entry), and none of these
//! functions takes arguments on the stack. The zero overwrites the return address just used, so that a later look
//! at that slot tells whether the call is still under way, and no dead word on a stack looks like a way back. A
//! table's word points to `entry: int3; bypass: jmp [old]` instead.

use super::error::ProbeError;
use super::function::Function;
use super::handler;
use super::plan::{EntryPoint, TableWord};
use crate::addr::RemoteAddr;
use iced_x86::code_asm::{CodeAssembler, eax, qword_ptr, rsp};
use iced_x86::{BlockEncoder, BlockEncoderOptions, Decoder, DecoderOptions, IcedError, InstructionBlock};
use std::collections::HashSet;

/// Magic of a region; the last byte is the version of its layout.
pub const MAGIC: [u8; 8] = *b"heaptap\x01";
/// Length of a region.
pub const REGION_LEN: usize = 16 << 10;
/// Bytes of header before the patches.
pub const HEADER_LEN: usize = 256;
/// Where the sigaction that we set lies, and where the one before ours.
pub const OUR_ACTION: u64 = 32;
/// See [`OUR_ACTION`].
pub const ORIGINAL_ACTION: u64 = 64;
/// Where the word lies that says whether our SIGTRAP handler is installed.
pub const HANDLER_INSTALLED: u64 = 96;
/// Bytes of the kernel's `struct sigaction` on x86_64.
pub const ACTION_LEN: usize = 32;
/// The breakpoint instruction.
pub const INT3: u8 = 0xcc;
/// In place of an int3 that must do nothing any more.
pub const NOP: u8 = 0x90;
/// Bytes of one patch in the table.
pub const PATCH_LEN: usize = 32;
const MAX_PATCHES: usize = 64;
const MAX_TRAPS: usize = 256;
pub(super) const TRAPS_AT: usize = HEADER_LEN + MAX_PATCHES * PATCH_LEN;
const CODE_AT: usize = TRAPS_AT + MAX_TRAPS * 16;
const SA_SIGINFO: u64 = 4;
const SA_RESTORER: u64 = 0x0400_0000;
const SA_RESTART: u64 = 0x1000_0000;
/// Our handler may itself be interrupted by a handler that allocates: its int3 must find us unblocked.
const SA_NODEFER: u64 = 0x4000_0000;

/// A thing changed in the target's memory, and what undoes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patch {
    /// Where.
    pub address: RemoteAddr,
    /// How many bytes, 1 to 8.
    pub len: usize,
    /// What was there.
    pub before: [u8; 8],
    /// What is planted.
    pub planted: [u8; 8],
}

/// Bytes of the pages of code that these change: the kernel gives the process a copy of its own of each.
pub fn copied_code<'a>(patches: impl IntoIterator<Item = &'a Patch>) -> u64 {
    const PAGE: u64 = 4096;
    // Eight bytes are a pointer in data, which is the process's own already.
    let code = patches.into_iter().filter(|patch| patch.len < 8);
    let pages: HashSet<u64> = code.map(|patch| patch.address.0 / PAGE).collect();
    pages.len() as u64 * PAGE
}

/// The code behind one observed function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thunk {
    /// What it stands for.
    pub function: Function,
    /// What an int3 at the entry reports as instruction pointer.
    pub entry_trap: RemoteAddr,
    /// First instruction of the function, when the breakpoint is there (not for a table's word).
    pub entry: Option<RemoteAddr>,
    /// Runs the function as if there were no breakpoint.
    pub bypass: RemoteAddr,
    /// Runs it so that its return is seen, or at least can be told.
    pub record: RemoteAddr,
    /// The return address that a call through `record` has on the stack. For a function with an answer it is the
    /// int3, which reports this address + 1.
    pub return_address: RemoteAddr,
}

impl Thunk {
    /// Where SIGTRAP may find a thread because of this thunk, and where the thread then goes on.
    pub fn traps(&self) -> Vec<(RemoteAddr, RemoteAddr)> {
        let mut traps =
            vec![(self.entry_trap, self.bypass), (self.bypass, self.bypass), (self.record, self.record)];
        traps.extend(self.entry.map(|entry| (entry, entry)));
        if self.function.has_answer() {
            let behind = self.return_address.offset(1);
            traps.push((behind, behind));
        }
        traps
    }
}

/// A region, ready to be written.
#[derive(Debug, Clone)]
pub struct Region {
    /// Where it is (to be) mapped.
    pub base: RemoteAddr,
    /// Its bytes, [`REGION_LEN`] of them.
    pub bytes: Vec<u8>,
    /// Its thunks.
    pub thunks: Vec<Thunk>,
}

/// What a thunk stands for.
#[derive(Debug, Clone, Copy)]
pub enum Observed<'a> {
    /// A function with a breakpoint on its first instruction.
    Entry(&'a EntryPoint),
    /// A word of a table.
    Word(&'a TableWord),
}

/// Who plants, and where, for the header.
#[derive(Debug, Clone, Copy, Default)]
pub struct Controller {
    /// Our pid.
    pub pid: u64,
    /// When we started, in clock ticks since boot.
    pub start_time: u64,
    /// The process that is planted into, by the number that its own pid namespace gives it; 0: not known.
    pub target: u64,
}

fn asm(bits: Result<CodeAssembler, IcedError>, what: &str) -> Result<CodeAssembler, ProbeError> {
    bits.map_err(|e| encoding(what, e))
}

fn encoding(what: &str, error: IcedError) -> ProbeError {
    ProbeError::NotRelocatable { function: "thunk", addr: RemoteAddr::NULL, why: format!("{what}: {error}") }
}

impl Region {
    /// An empty region at `base`: header and no thunk.
    pub fn new(base: RemoteAddr, controller: Controller) -> Self {
        let mut region = Self { base, bytes: vec![0; CODE_AT], thunks: Vec::new() };
        region.bytes[..8].copy_from_slice(&MAGIC);
        region.put(8, REGION_LEN as u64 & 0xffff_ffff);
        region.put(16, controller.pid);
        region.put(24, controller.start_time);
        region
    }

    fn put(&mut self, at: usize, value: u64) {
        self.bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    fn here(&self) -> u64 {
        self.base.0 + self.bytes.len() as u64
    }

    /// Appends the thunk of `observed`.
    pub fn add(&mut self, observed: Observed<'_>) -> Result<Thunk, ProbeError> {
        while !self.bytes.len().is_multiple_of(16) {
            self.bytes.push(INT3);
        }
        let (function, entry, entry_trap, bypass) = match observed {
            Observed::Entry(e) => {
                let bypass = RemoteAddr(self.here());
                let moved = relocate_first(e, bypass)?;
                self.bytes.extend(moved);
                (e.function, Some(e.address), e.address.offset(1), bypass)
            }
            Observed::Word(w) => {
                self.bytes.push(INT3);
                let bypass = RemoteAddr(self.here());
                self.bytes.extend(jump_far(w.value));
                (w.function(), None, bypass, bypass)
            }
        };
        let record = RemoteAddr(self.here());
        let return_address = self.add_record(function, bypass)?;
        let thunk = Thunk { function, entry_trap, entry, bypass, record, return_address };
        self.thunks.push(thunk);
        Ok(thunk)
    }

    fn add_record(&mut self, function: Function, bypass: RemoteAddr) -> Result<RemoteAddr, ProbeError> {
        let here = self.here();
        let mut a = asm(CodeAssembler::new(64), "assembler")?;
        let build = |a: &mut CodeAssembler| -> Result<usize, IcedError> {
            a.sub(rsp, 8)?;
            a.call(bypass.0)?;
            let before_return = a.instructions().len();
            if function.has_answer() {
                a.int3()?;
            }
            a.mov(qword_ptr(rsp - 8), 0)?;
            a.add(rsp, 8)?;
            a.ret()?;
            Ok(before_return)
        };
        let return_index = build(&mut a).map_err(|e| encoding("record thunk", e))?;
        let encoded = a
            .assemble_options(here, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)
            .map_err(|e| encoding("record thunk", e))?;
        let offset = encoded.inner.new_instruction_offsets[return_index];
        self.bytes.extend(encoded.inner.code_buffer);
        Ok(RemoteAddr(here + u64::from(offset)))
    }

    /// Completes the first region: the patches of all regions, the traps, the handler.
    pub fn finish_first(
        &mut self,
        patches: &[Patch],
        traps: &[(RemoteAddr, RemoteAddr)],
        others: &[RemoteAddr],
        may_heal: bool,
    ) -> Result<(), ProbeError> {
        if patches.len() > MAX_PATCHES || traps.len() > MAX_TRAPS || others.len() > 8 {
            return Err(ProbeError::NotRelocatable {
                function: "thunk",
                addr: self.base,
                why: "more entry points than a region has room for".into(),
            });
        }
        self.bytes[12..16].copy_from_slice(&(patches.len() as u32).to_le_bytes());
        for (i, patch) in patches.iter().enumerate() {
            let at = HEADER_LEN + i * PATCH_LEN;
            self.put(at, patch.address.0);
            self.put(at + 8, patch.len as u64);
            self.bytes[at + 16..at + 24].copy_from_slice(&patch.before);
            self.bytes[at + 24..at + 32].copy_from_slice(&patch.planted);
        }
        for (i, (trap, to)) in traps.iter().enumerate() {
            self.put(TRAPS_AT + i * 16, trap.0);
            self.put(TRAPS_AT + i * 16 + 8, to.0);
        }
        for (i, other) in others.iter().enumerate() {
            self.put(104 + i * 8, other.0);
        }
        let (handler, restorer) = self.add_handler(patches.len(), traps.len(), may_heal)?;
        let flags = SA_SIGINFO | SA_RESTORER | SA_RESTART | SA_NODEFER;
        for (i, word) in [handler, flags, restorer, 0].into_iter().enumerate() {
            self.put(OUR_ACTION as usize + i * 8, word);
        }
        Ok(())
    }

    /// The sigaction that was in force before ours, and whether ours replaces it.
    pub fn set_original_action(&mut self, action: &[u8; ACTION_LEN], ours_installed: bool) {
        let at = ORIGINAL_ACTION as usize;
        self.bytes[at..at + ACTION_LEN].copy_from_slice(action);
        self.put(96, u64::from(ours_installed));
    }

    fn add_handler(
        &mut self,
        patches: usize,
        traps: usize,
        may_heal: bool,
    ) -> Result<(u64, u64), ProbeError> {
        while !self.bytes.len().is_multiple_of(16) {
            self.bytes.push(INT3);
        }
        let path_at = self.here();
        self.bytes.extend(b"/proc/thread-self/mem\0\0\0");
        let handler = self.here();
        let base = self.base.0;
        let tables = handler::Tables { base, path: path_at, patches, traps, may_heal };
        let code = handler::assemble(handler, &tables).map_err(|e| encoding("handler", e))?;
        self.bytes.extend(code);
        let restorer = self.here();
        let mut a = asm(CodeAssembler::new(64), "assembler")?;
        let build = |a: &mut CodeAssembler| -> Result<Vec<u8>, IcedError> {
            a.mov(eax, libc::SYS_rt_sigreturn as i32)?;
            a.syscall()?;
            a.assemble(restorer)
        };
        self.bytes.extend(build(&mut a).map_err(|e| encoding("restorer", e))?);
        Ok((handler, restorer))
    }

    /// The bytes to be written, padded with int3 to the region's length.
    pub fn image(&self) -> Result<Vec<u8>, ProbeError> {
        if self.bytes.len() > REGION_LEN {
            return Err(ProbeError::NotRelocatable {
                function: "thunk",
                addr: self.base,
                why: format!("thunks of {} bytes do not fit a region", self.bytes.len()),
            });
        }
        let mut image = self.bytes.clone();
        image.resize(REGION_LEN, INT3);
        Ok(image)
    }
}

/// The entry's first instruction, made to run at `to`, and a jump to the second.
fn relocate_first(entry: &EntryPoint, to: RemoteAddr) -> Result<Vec<u8>, ProbeError> {
    let name = entry.function.name();
    let cannot = |why: String| ProbeError::NotRelocatable { function: name, addr: entry.address, why };
    let mut decoder = Decoder::with_ip(64, &entry.file_bytes, entry.address.0, DecoderOptions::NONE);
    let first = decoder.decode();
    if first.is_invalid() {
        return Err(cannot("it does not decode".into()));
    }
    let block = InstructionBlock::new(std::slice::from_ref(&first), to.0);
    let moved =
        BlockEncoder::encode(64, block, BlockEncoderOptions::NONE).map_err(|e| cannot(e.to_string()))?;
    let mut bytes = moved.code_buffer;
    bytes.extend(jump_far(RemoteAddr(first.next_ip())));
    Ok(bytes)
}

/// `jmp [rip+0]` and the address: reaches anywhere, changes no register.
fn jump_far(to: RemoteAddr) -> Vec<u8> {
    let mut bytes = vec![0xff, 0x25, 0, 0, 0, 0];
    bytes.extend(to.0.to_le_bytes());
    bytes
}

/// One byte, an int3, in place of `before`.
pub fn breakpoint_patch(address: RemoteAddr, before: u8) -> Patch {
    let pad = |b: u8| [b, 0, 0, 0, 0, 0, 0, 0];
    Patch { address, len: 1, before: pad(before), planted: pad(INT3) }
}

/// A word of a table, made to point to its thunk.
pub fn word_patch(word: &TableWord, thunk: &Thunk) -> Patch {
    Patch {
        address: word.word,
        len: 8,
        before: word.value.0.to_le_bytes(),
        // The int3 stands right before the bypass.
        planted: thunk.bypass.back(1).0.to_le_bytes(),
    }
}
