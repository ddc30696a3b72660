//! Where in a function the 5-byte jump of the jump kind goes, and the code that runs the function as if it were not there. Pure.
//!
//! ```text
//! entry      kept instruction          left in place where it may run twice: see [`Keep`]
//! patch_at   jmp rel32 → thunk         over the covered instructions, of which the last may reach farther
//!            …
//! rest       the function goes on
//!
//! trampoline: kept; covered (both relocated); jmp [rip+0]; rest
//! ```
//!
//! A uprobe puts an int3 on the entry, runs the file's first instruction elsewhere and goes on behind it. With the first
//! instruction kept, that is at our jump; with a jump at the entry it would be in the middle of one. An `endbr64`
//! is kept for the same reason that it is there.

use super::error::ProbeError;
use super::head::{Head, target};
use super::plan::EntryPoint;
use super::region::Patch;
use crate::addr::RemoteAddr;
use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, FlowControl, IcedError, Instruction, Mnemonic, OpKind, Register,
};

/// Bytes of `jmp rel32`.
pub const JUMP_LEN: usize = 5;
const JUMP: u8 = 0xe9;
const PAGE: u64 = 4096;

/// What a thunk has to take back before it goes on, because the kept instruction will run again in the trampoline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Undo {
    /// A register was pushed: `lea rsp, [rsp+8]`.
    Pop,
}

/// Why a function can't take a jump.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    /// Not code, or not known to the decoder.
    #[error("the bytes {0} behind its entry are no instruction that can be decoded")]
    NotCode(usize),
    /// It, or all of it that is known, is over before five bytes are free.
    #[error("it ends {0} bytes behind its entry, which leaves no room")]
    Ends(usize),
    /// The return address of the call would lie inside the jump, or in a trampoline that can't be unmapped then.
    #[error("it calls another function {0} bytes behind its entry: a return address can't be moved")]
    Calls(usize),
    /// An int3, a ud2 or the like in the file itself.
    #[error("there is an interrupt or trap instruction {0} bytes behind its entry")]
    Traps(usize),
    /// The function jumps to what would be the inside of the jump.
    #[error("it jumps to {0} bytes behind its own entry, into the jump")]
    JumpedInto(usize),
    /// The kernel writes page by page, and looks in between whether the writer was killed: half a jump would be left.
    #[error("a jump {0} bytes behind its entry would lie across two pages")]
    CrossesPage(usize),
    /// `loop`, `jrcxz`, `xbegin`: no form of them reaches as far as the trampoline is away.
    #[error("its instruction {0} bytes behind the entry can't be executed elsewhere")]
    NotMovable(usize),
}

/// A planned jump.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Detour {
    /// The function.
    pub entry: EntryPoint,
    /// Bytes of the kept first instruction; 0 where the jump is at the entry.
    pub kept_len: usize,
    /// Bytes of the whole instructions that the jump overwrites, at least partly.
    pub covered_len: usize,
    /// What the thunk takes back.
    pub undo: Option<Undo>,
}

/// Code that runs a function as if it had no jump.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trampoline {
    /// Where it (is to be) lies.
    pub at: RemoteAddr,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// For each instruction of the function up to the rest, and the rest: address there, address here.
    instructions: Vec<(RemoteAddr, RemoteAddr)>,
}

impl Trampoline {
    /// Where a thread goes on here that stands at `rip` in the function. `None` where no instruction of those moved begins.
    pub fn moved(&self, rip: RemoteAddr) -> Option<RemoteAddr> {
        let (_, moved) = self.instructions.split_last()?;
        moved.iter().find(|(there, _)| *there == rip).map(|(_, here)| *here)
    }

    /// The jump to the rest.
    pub fn rest(&self) -> Option<RemoteAddr> {
        self.instructions.last().map(|(_, here)| *here)
    }

    /// Where a thread goes on in the function that stands at `rip` here, the jump to the rest included.
    pub fn moved_back(&self, rip: RemoteAddr) -> Option<RemoteAddr> {
        self.instructions.iter().find(|(_, here)| *here == rip).map(|(there, _)| *there)
    }
}

impl Detour {
    /// Decides where the jump goes: behind the first instruction where that may be kept and there is room, else at the entry.
    pub fn plan(entry: &EntryPoint) -> Result<Self, ProbeError> {
        let at =
            |kept_len: usize, undo, covered_len| Self { entry: entry.clone(), kept_len, covered_len, undo };
        let refused = |obstacle| ProbeError::NoDetour {
            function: entry.names.first().copied().unwrap_or(entry.function.name()),
            addr: entry.address,
            module: entry.module.clone(),
            obstacle,
        };
        let first = decode(entry, 0).map_err(refused)?;
        if let Some(keep) = Keep::of(&first)
            && let Ok(covered_len) = covered(entry, first.len())
        {
            let undo = match keep {
                Keep::AsItIs => None,
                Keep::Undone(undo) => Some(undo),
            };
            return Ok(at(first.len(), undo, covered_len));
        }
        covered(entry, 0).map(|covered_len| at(0, None, covered_len)).map_err(refused)
    }

    /// Where the jump is written.
    pub fn patch_at(&self) -> RemoteAddr {
        self.entry.address.offset(self.kept_len as u64)
    }

    /// The first byte that is executed in place again: behind the covered instructions.
    pub fn rest(&self) -> RemoteAddr {
        self.patch_at().offset(self.covered_len as u64)
    }

    /// The file's bytes of everything that was decoded for the trampoline, from the entry on: memory must be equal to them.
    pub fn file_bytes(&self) -> &[u8] {
        &self.entry.head.bytes[..self.kept_len + self.covered_len]
    }

    /// The code, to lie at `at`, that executes the function from its entry on. `at` must be within 2 GiB of whatever the first
    /// instructions refer to.
    pub fn trampoline(&self, at: RemoteAddr) -> Result<Trampoline, ProbeError> {
        let mut trampoline = Trampoline { at, bytes: Vec::new(), instructions: Vec::new() };
        let rest = self.kept_len + self.covered_len;
        let mut offset = 0;
        while offset < rest {
            let instruction = decode(&self.entry, offset).map_err(|o| self.cannot(o.to_string()))?;
            let here = at.offset(trampoline.bytes.len() as u64);
            let bytes = &self.entry.head.bytes[offset..offset + instruction.len()];
            let moved = relocate(&instruction, bytes, here).map_err(|e| self.cannot(e.to_string()))?;
            trampoline.instructions.push((RemoteAddr(instruction.ip()), here));
            trampoline.bytes.extend(moved);
            offset += instruction.len();
        }
        trampoline.instructions.push((self.rest(), at.offset(trampoline.bytes.len() as u64)));
        trampoline.bytes.extend([0xff, 0x25, 0, 0, 0, 0]);
        trampoline.bytes.extend(self.rest().0.to_le_bytes());
        Ok(trampoline)
    }

    /// The jump to `thunk`. Of the covered bytes only the jump's own change.
    pub fn patch(&self, thunk: RemoteAddr) -> Result<Patch, ProbeError> {
        let next = self.patch_at().offset(JUMP_LEN as u64);
        let displacement = i32::try_from(thunk.0.wrapping_sub(next.0) as i64)
            .map_err(|_| self.cannot(format!("its thunk at {thunk} is more than 2 GiB away")))?;
        let mut patch = Patch { address: self.patch_at(), len: JUMP_LEN, before: [0; 8], planted: [0; 8] };
        patch.before[..JUMP_LEN].copy_from_slice(&self.entry.head.bytes[self.kept_len..][..JUMP_LEN]);
        patch.planted[0] = JUMP;
        patch.planted[1..JUMP_LEN].copy_from_slice(&displacement.to_le_bytes());
        Ok(patch)
    }

    fn cannot(&self, why: String) -> ProbeError {
        ProbeError::NotRelocatable { function: self.entry.function.name(), addr: self.entry.address, why }
    }
}

/// How a first instruction may stay where it is although it runs again in the trampoline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keep {
    /// Once or twice is the same: it changes nothing but flags, or registers that hold nothing at an entry (r10, r11).
    AsItIs,
    /// The thunk takes it back.
    Undone(Undo),
}

impl Keep {
    fn of(first: &Instruction) -> Option<Self> {
        let register = |op: u32| first.op_kind(op) == OpKind::Register;
        match first.mnemonic() {
            Mnemonic::Endbr64 | Mnemonic::Test | Mnemonic::Cmp => Some(Self::AsItIs),
            Mnemonic::Mov if register(0) && is_free(first.op0_register()) => {
                let of_itself = match first.op1_kind() {
                    OpKind::Register => is_free(first.op1_register()),
                    OpKind::Memory => is_free(first.memory_base()) || is_free(first.memory_index()),
                    _ => false,
                };
                (!of_itself).then_some(Self::AsItIs)
            }
            _ if first.code() == Code::Push_r64 && first.op0_register() != Register::RSP => {
                Some(Self::Undone(Undo::Pop))
            }
            _ => None,
        }
    }
}

/// The psABI's registers that are neither arguments nor preserved, and that the thunk and the agent change anyway.
fn is_free(register: Register) -> bool {
    matches!(register.full_register(), Register::R10 | Register::R11)
}

fn decode(entry: &EntryPoint, offset: usize) -> Result<Instruction, Obstacle> {
    let bytes =
        entry.head.bytes.get(offset..).filter(|bytes| !bytes.is_empty()).ok_or(Obstacle::Ends(offset))?;
    let ip = entry.address.offset(offset as u64).0;
    let instruction = Decoder::with_ip(64, bytes, ip, DecoderOptions::NONE).decode();
    if instruction.is_invalid() { Err(Obstacle::NotCode(offset)) } else { Ok(instruction) }
}

/// Length of the whole instructions that a jump at `from` covers.
fn covered(entry: &EntryPoint, from: usize) -> Result<usize, Obstacle> {
    if (entry.address.0 + from as u64) % PAGE > PAGE - JUMP_LEN as u64 {
        return Err(Obstacle::CrossesPage(from));
    }
    let mut to = from;
    while to < from + JUMP_LEN {
        let instruction = decode(entry, to)?;
        let at = to;
        to += instruction.len();
        match instruction.flow_control() {
            FlowControl::Next => {}
            FlowControl::Call if instruction.mnemonic() == Mnemonic::Syscall => {}
            FlowControl::Call | FlowControl::IndirectCall => return Err(Obstacle::Calls(at)),
            FlowControl::Interrupt | FlowControl::Exception => return Err(Obstacle::Traps(at)),
            FlowControl::ConditionalBranch if instruction.is_jcc_short_or_near() => {}
            FlowControl::UnconditionalBranch | FlowControl::IndirectBranch | FlowControl::Return => {
                if to < from + JUMP_LEN {
                    return Err(Obstacle::Ends(to));
                }
            }
            FlowControl::ConditionalBranch | FlowControl::XbeginXabortXend => {
                return Err(Obstacle::NotMovable(at));
            }
        }
        // Back to the entry itself it would be a second call.
        if target(&instruction) == Some(entry.address) {
            return Err(Obstacle::JumpedInto(0));
        }
    }
    jumped_into(&entry.head, from, to).map_or(Ok(to - from), Err)
}

/// A jump back to behind a kept instruction is no call either.
fn jumped_into(head: &Head, from: usize, to: usize) -> Option<Obstacle> {
    let first = if from == 0 { 1 } else { from };
    head.targets.range(first..to).next().map(|offset| Obstacle::JumpedInto(*offset))
}

/// The instruction, made to run at `here`. Its bytes stay as they are unless they say where something is relative to it.
fn relocate(instruction: &Instruction, bytes: &[u8], here: RemoteAddr) -> Result<Vec<u8>, IcedError> {
    if target(instruction).is_none() && !instruction.is_ip_rel_memory_operand() {
        return Ok(bytes.to_vec());
    }
    let mut instruction = *instruction;
    instruction.as_near_branch();
    let mut encoder = Encoder::new(64);
    encoder.encode(&instruction, here.0)?;
    Ok(encoder.take_buffer())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::function::Function;

    const AT: RemoteAddr = RemoteAddr(0x7f00_0000_1000);

    fn entry(code: &[u8], size: u64) -> EntryPoint {
        let read = |at: RemoteAddr, len: usize| {
            let from = at.since(AT) as usize;
            code.get(from..from.checked_add(len)?).map(<[u8]>::to_vec)
        };
        EntryPoint {
            function: Function::Free,
            names: vec!["free"],
            address: AT,
            module: "libc.so.6".into(),
            file_bytes: code.to_vec(),
            head: Head::read(AT, size, None, &read),
        }
    }

    /// A function of these bytes, whether its size is known or not.
    fn plan(code: &[u8]) -> Result<Detour, Obstacle> {
        let obstacle = |result: Result<Detour, ProbeError>| match result {
            Ok(detour) => Ok(detour),
            Err(ProbeError::NoDetour { function: "free", addr: AT, obstacle, .. }) => Err(obstacle),
            Err(other) => panic!("{other}"),
        };
        let known = obstacle(Detour::plan(&entry(code, code.len() as u64)));
        let unknown = obstacle(Detour::plan(&entry(code, 0)));
        assert_eq!(
            known.clone().map(|d| (d.kept_len, d.covered_len)),
            unknown.map(|d| (d.kept_len, d.covered_len))
        );
        known
    }

    fn place(code: &[u8]) -> Result<(usize, usize), Obstacle> {
        plan(code).map(|d| (d.kept_len, d.covered_len))
    }

    #[test]
    fn a_function_without_room_is_refused() {
        assert_eq!(place(&[0x31, 0xc0, 0xc3]), Err(Obstacle::Ends(3)));
        // A jump elsewhere in two bytes; a jump of five is all the room there has to be.
        assert_eq!(place(&[0xeb, 0x10, 0x90, 0x90, 0x90, 0x90]), Err(Obstacle::Ends(2)));
        assert_eq!(place(&[0xe9, 0, 1, 0, 0]), Ok((0, 5)));
        // xor eax, eax; what follows is not of this function.
        let cut = entry(&[0x31, 0xc0, 0x90, 0x90, 0x90, 0x90, 0x90], 2);
        assert!(matches!(Detour::plan(&cut), Err(ProbeError::NoDetour { obstacle: Obstacle::Ends(2), .. })));
    }

    #[test]
    fn what_cannot_be_moved_is_refused() {
        // xor eax, eax; call …
        assert_eq!(place(&[0x31, 0xc0, 0xe8, 0, 0, 0, 0, 0xc3]), Err(Obstacle::Calls(2)));
        assert_eq!(place(&[0x31, 0xc0, 0xff, 0xd0, 0xc3]), Err(Obstacle::Calls(2)));
        // Another's breakpoint, in the file.
        assert_eq!(place(&[0xcc, 0x90, 0x90, 0x90, 0x90, 0xc3]), Err(Obstacle::Traps(0)));
        assert_eq!(place(&[0x31, 0xc0, 0x0f, 0x0b, 0x90, 0xc3]), Err(Obstacle::Traps(2)));
        // jrcxz has no long form.
        assert_eq!(place(&[0xe3, 0x10, 0x90, 0x90, 0x90, 0xc3]), Err(Obstacle::NotMovable(0)));
        // push es is none in 64-bit code.
        assert_eq!(place(&[0x31, 0xc0, 0x06, 0x90, 0x90, 0xc3]), Err(Obstacle::NotCode(2)));
    }

    #[test]
    fn a_system_call_is_no_call() {
        // xor eax, eax; syscall; nop; ret
        assert_eq!(place(&[0x31, 0xc0, 0x0f, 0x05, 0x90, 0xc3]), Ok((0, 5)));
    }

    #[test]
    fn code_that_is_jumped_into_is_refused() {
        // xor eax, eax; L: inc rdi; add rax, rdi; dec rsi; jne L; ret
        let inside = [0x31, 0xc0, 0x48, 0xff, 0xc7, 0x48, 0x01, 0xf8, 0x48, 0xff, 0xce, 0x75, 0xf5, 0xc3];
        assert_eq!(place(&inside), Err(Obstacle::JumpedInto(2)));
        // test rdi, rdi; L: inc rdi (3); nop; nop; dec rsi; jne L: no call begins there, so not behind the test; nor at the entry.
        let behind = [0x48, 0x85, 0xff, 0x48, 0xff, 0xc7, 0x90, 0x90, 0x48, 0xff, 0xce, 0x75, 0xf6, 0xc3];
        assert_eq!(place(&behind), Err(Obstacle::JumpedInto(3)));
        // endbr64; nop; L: …: behind the kept one the inside is jumped into, at the entry it is not.
        let at_entry =
            [0xf3, 0x0f, 0x1e, 0xfa, 0x90, 0x48, 0xff, 0xc7, 0x90, 0x48, 0xff, 0xce, 0x75, 0xf7, 0xc3];
        assert_eq!(place(&at_entry), Ok((0, 5)));
        // xor eax, eax; je entry: it would call itself from within the trampoline.
        assert_eq!(place(&[0x31, 0xc0, 0x74, 0xfc, 0x90, 0xc3]), Err(Obstacle::JumpedInto(0)));
    }

    #[test]
    fn a_part_of_the_function_elsewhere_may_jump_into_it() {
        // xor eax, eax; inc rdi; inc rsi; test rdi, rdi; je cold; ret. cold, behind the symbol's end: jmp entry+5.
        let mut code =
            vec![0x31, 0xc0, 0x48, 0xff, 0xc7, 0x48, 0xff, 0xc6, 0x48, 0x85, 0xff, 0x74, 0x33, 0xc3];
        let size = code.len() as u64;
        code.resize(0x40, 0xcc);
        code.extend([0x90, 0xeb, 0xc0]);
        let cold = entry(&code, size);
        assert_eq!(cold.head.targets.iter().copied().collect::<Vec<_>>(), [3]);
        assert!(matches!(
            Detour::plan(&cold),
            Err(ProbeError::NoDetour { obstacle: Obstacle::JumpedInto(3), .. })
        ));
    }

    #[test]
    fn a_register_pushed_is_popped_and_the_stack_pointer_is_not() {
        // push rbx; mov rbx, rdi; add rbx, rsi; pop rbx; ret
        let pushed = plan(&[0x53, 0x48, 0x89, 0xfb, 0x48, 0x01, 0xf3, 0x5b, 0xc3]).unwrap();
        assert_eq!((pushed.kept_len, pushed.covered_len, pushed.undo), (1, 6, Some(Undo::Pop)));
        // push rsp; …
        let pointer = plan(&[0x54, 0x48, 0x89, 0xfb, 0x48, 0x01, 0xf3, 0x5b, 0xc3]).unwrap();
        assert_eq!((pointer.kept_len, pointer.undo), (0, None));
    }

    #[test]
    fn a_thunk_out_of_reach_is_an_error() {
        let detour = plan(&[0xe9, 0, 1, 0, 0]).unwrap();
        let reach = |thunk: RemoteAddr| detour.patch(thunk);
        assert_eq!(reach(AT.offset(5 + 0x7fff_ffff)).unwrap().planted[1..5], [0xff, 0xff, 0xff, 0x7f]);
        assert!(matches!(reach(AT.offset(5 + 0x8000_0000)), Err(ProbeError::NotRelocatable { .. })));
        assert_eq!(reach(AT.offset(5).back(0x8000_0000)).unwrap().planted[1..5], [0, 0, 0, 0x80]);
        // What the function jumps to is 4 GiB away from the trampoline.
        assert!(matches!(detour.trampoline(AT.offset(4 << 30)), Err(ProbeError::NotRelocatable { .. })));
    }
}
