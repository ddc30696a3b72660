//! Which calls to mmap, munmap and mremap are an allocator's own: told by their return address. Reads only.
//!
//! The jump kind hands malloc and free on by a jump, so nothing on the stack says that one of them is under way when it maps
//! memory for itself. [`internal_callers`] follows the code of the allocator's functions through direct calls and jumps,
//! procedure linkage tables included, and gathers where it calls a mapping function from.
//!
//! **Jumps.** A function that ends in `jmp munmap` (glibc's `munmap_chunk`) leaves the return address of its own caller: that one
//! is gathered. Where the allocator's entry itself leads there by jumps alone, it is the application's, which tells nothing:
//! [`InternalCallers::exposed`]. For munmap that does no harm: the allocator's own mapping was never recorded, so there is
//! nothing for the record to end, and the ledger drops it as a range it does not know. For mmap and mremap it would be
//! memory counted twice, and is an error; no allocator can do it, for it has to look at what mmap answers.
//!
//! **Errors.** Code from which the function never returns is not followed: an allocator that finds its heap damaged prints
//! and aborts, and what that leads through (translated messages, stdio) maps memory for the application, too. A call that the
//! compiler knows not to return is the last instruction before the next function; where those begin, the table of the
//! unwinder says (`.eh_frame_hdr`, also in stripped files).
//!
//! **Not seen:** calls through pointers, and a word of a linkage table that the loader has not filled in yet (a function that was
//! never called; of a process that runs, its allocator has mapped memory). glibc's hooks lead back into its own functions,
//! which are entries; CPython's arena functions are given as entries by the caller, because pymalloc calls them through a
//! table. What of CPython calls the arena functions for other ends (chunks of a thread's frame stack, since 3.11) can't be told
//! from pymalloc then.

use super::error::ProbeError;
use super::function::Function;
use super::head::{Read, never_goes_on, read_up_to, target};
use super::plan::Plan;
use crate::addr::RemoteAddr;
use crate::agent_abi::INTERNAL_CALLERS;
use crate::image::{Module, libc_of};
use crate::memory::RemoteMemory;
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};
use std::collections::{BTreeSet, HashMap, HashSet};

/// Instructions decoded at most. glibc takes 5,000 to 10,000.
const MAX_INSTRUCTIONS: usize = 100_000;
const PAGE: u64 = 4096;
const LONGEST: usize = 15;

/// Why the allocator's own calls can't be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CallersError {
    /// The search did not end.
    #[error("its functions lead through more than {MAX_INSTRUCTIONS} instructions")]
    TooMuchCode,
    /// The agent has no room.
    #[error("it calls mmap, munmap and mremap from {0} places, the agent can keep {INTERNAL_CALLERS}")]
    TooMany(usize),
    /// See the module's documentation.
    #[error("it jumps to {} from an entry of its own", .0.name())]
    Exposed(Function),
}

/// The code of the module that holds the allocator.
pub struct Code<'a> {
    /// Reads code as its file has it, and the rest of memory as it is now: linkage tables are filled in by the loader.
    pub read: Read<'a>,
    /// Executable ranges of the module: first byte, length. What lies outside is not followed.
    pub text: &'a [(RemoteAddr, u64)],
    /// Where its functions begin, ascending; those of the unwind table. May be incomplete, or empty.
    pub starts: &'a [RemoteAddr],
}

/// Return addresses of an allocator's own calls.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InternalCallers {
    /// [first, last], ascending.
    pub ranges: Vec<[u64; 2]>,
    /// Mapping functions that an entry leads to by jumps alone: only [`Function::Munmap`] can be here.
    pub exposed: Vec<Function>,
}

/// The allocators' own calls in a process: those of the modules whose functions `plan` observes, and those that `of_python` lead to,
/// functions of CPython's allocators.
///
/// A library that defines malloc and is neither libc nor the program (jemalloc, tcmalloc) is an allocator and no more: every call
/// that it makes is its own.
pub fn of_process(
    memory: &dyn RemoteMemory,
    modules: &[Module],
    plan: &Plan,
    of_python: &[RemoteAddr],
) -> Result<InternalCallers, ProbeError> {
    let (mappings, functions): (Vec<_>, Vec<_>) =
        plan.entries.iter().map(|e| (e.address, e.function)).partition(|(_, f)| f.is_mapping());
    let libc = libc_of(modules).map(|libc| libc.module);
    let mut all = InternalCallers::default();
    for (index, module) in modules.iter().enumerate() {
        let inside = |at: &RemoteAddr| module.contains(*at);
        let observed: Vec<_> = functions.iter().map(|(at, _)| *at).filter(inside).collect();
        let python: Vec<_> = of_python.iter().copied().filter(inside).collect();
        let is_dedicated = !observed.is_empty() && python.is_empty() && Some(index) != libc && index != 0;
        let entries = [observed, python].concat();
        if entries.is_empty() {
            continue;
        }
        let found = if is_dedicated {
            Ok(whole_module(&text_of(module)))
        } else {
            of_module(memory, module, &entries, &mappings)
        };
        let joined = found.and_then(|found| std::mem::take(&mut all).join(found));
        all = joined
            .map_err(|source| ProbeError::Callers { module: module.path().display().to_string(), source })?;
    }
    Ok(all)
}

fn of_module(
    memory: &dyn RemoteMemory,
    module: &Module,
    entries: &[RemoteAddr],
    mappings: &[(RemoteAddr, Function)],
) -> Result<InternalCallers, CallersError> {
    let text = text_of(module);
    // Code as the file has it: in memory somebody's breakpoints may be in it, or what a killed heaptap left.
    let read = |at: RemoteAddr, len: usize| {
        let is_code = text.iter().any(|(start, code)| at.since(*start) < *code);
        if is_code { module.file_bytes(at, len) } else { memory.read_vec(at, len).ok() }
    };
    internal_callers(&Code { read: &read, text: &text, starts: &module.function_starts() }, entries, mappings)
}

fn text_of(module: &Module) -> Vec<(RemoteAddr, u64)> {
    module.segments().filter(|(_, _, s)| s.executable).map(|(start, len, _)| (start, len)).collect()
}

impl InternalCallers {
    /// Both.
    pub fn join(mut self, other: Self) -> Result<Self, CallersError> {
        self.ranges.extend(other.ranges);
        self.ranges.sort();
        self.ranges.dedup();
        self.exposed.extend(other.exposed);
        self.exposed.sort();
        self.exposed.dedup();
        if self.ranges.len() > INTERNAL_CALLERS {
            Err(CallersError::TooMany(self.ranges.len()))
        } else {
            Ok(self)
        }
    }
}

/// Every call in these ranges is the allocator's own: a library that is nothing but an allocator.
pub fn whole_module(text: &[(RemoteAddr, u64)]) -> InternalCallers {
    // The return address of a call that ends a range is one past it.
    let ranges = text.iter().map(|(start, len)| [start.0 + 1, start.0 + len]).collect();
    InternalCallers { ranges, exposed: vec![] }
}

/// The calls that lead from `entries` to `mappings`, the bodies of the mapping functions.
pub fn internal_callers(
    code: &Code<'_>,
    entries: &[RemoteAddr],
    mappings: &[(RemoteAddr, Function)],
) -> Result<InternalCallers, CallersError> {
    let mut search = Search { code, mappings, pages: HashMap::new(), decoded: 0, returns: HashMap::new() };
    let mut bodies: HashMap<u64, Body> = HashMap::new();
    let mut pending: Vec<u64> = entries.iter().map(|entry| entry.0).collect();
    while let Some(function) = pending.pop() {
        if bodies.contains_key(&function) || search.mapping(function).is_some() {
            continue;
        }
        let body = search.body(function, true)?;
        pending.extend(body.calls.iter().map(|call| call.callee));
        bodies.insert(function, body);
    }
    let maps = |callee: u64| {
        search.mapping(callee).is_some() || bodies.get(&callee).is_some_and(|body| !body.jumps_to.is_empty())
    };
    let calls = bodies.values().flat_map(|body| &body.calls).filter(|call| maps(call.callee));
    let found: BTreeSet<u64> = calls.map(|call| call.returns_to).collect();
    let exposed: BTreeSet<Function> =
        entries.iter().filter_map(|e| bodies.get(&e.0)).flat_map(|body| &body.jumps_to).copied().collect();
    if let Some(function) = exposed.iter().find(|function| **function != Function::Munmap) {
        return Err(CallersError::Exposed(*function));
    }
    let ranges = found.into_iter().map(|at| [at, at]).collect();
    InternalCallers { ranges, exposed: exposed.into_iter().collect() }.join(InternalCallers::default())
}

/// A function: all that is reached from its entry by jumps and branches, so the functions that it jumps to, too.
#[derive(Default)]
struct Body {
    calls: Vec<Call>,
    /// Mapping functions that it jumps to.
    jumps_to: BTreeSet<Function>,
    returns: bool,
}

#[derive(Clone, Copy)]
struct Call {
    returns_to: u64,
    callee: u64,
}

/// Where control goes from an instruction.
#[derive(Default)]
struct Step {
    next: Option<u64>,
    jump: Option<u64>,
    /// Back to the caller, at once or by a jump into another module.
    leaves: bool,
    call: Option<Call>,
    maps: Option<Function>,
}

struct Search<'a> {
    code: &'a Code<'a>,
    mappings: &'a [(RemoteAddr, Function)],
    pages: HashMap<u64, Vec<u8>>,
    decoded: usize,
    /// Whether a function may return, its callees taken to return.
    returns: HashMap<u64, bool>,
}

impl Search<'_> {
    fn mapping(&self, at: u64) -> Option<Function> {
        self.mappings.iter().find(|(body, _)| body.0 == at).map(|(_, function)| *function)
    }

    fn is_text(&self, at: u64) -> bool {
        self.code.text.iter().any(|(start, len)| at.wrapping_sub(start.0) < *len)
    }

    /// Decodes a function. `callees`: whether those are looked at, to know which of them return.
    fn body(&mut self, function: u64, callees: bool) -> Result<Body, CallersError> {
        let mut steps: HashMap<u64, Step> = HashMap::new();
        let mut pending = vec![function];
        while let Some(at) = pending.pop() {
            if steps.contains_key(&at) {
                continue;
            }
            let mut step = self.step(at)?;
            if callees
                && let Some(call) = step.call
                && !self.may_return(call.callee)?
            {
                step.next = None;
            }
            pending.extend(step.next.iter().chain(&step.jump));
            steps.insert(at, step);
        }
        Ok(summary(function, &steps))
    }

    fn may_return(&mut self, function: u64) -> Result<bool, CallersError> {
        if self.mapping(function).is_some() {
            return Ok(true);
        }
        if let Some(known) = self.returns.get(&function) {
            return Ok(*known);
        }
        let returns = self.body(function, false)?.returns;
        self.returns.insert(function, returns);
        Ok(returns)
    }

    fn step(&mut self, at: u64) -> Result<Step, CallersError> {
        self.decoded += 1;
        if self.decoded > MAX_INSTRUCTIONS {
            return Err(CallersError::TooMuchCode);
        }
        let Some(instruction) = self.decode(at) else { return Ok(Step::default()) };
        let next = instruction.next_ip();
        // Control does not run on into another function: the call before does not return.
        let next = self.code.starts.binary_search(&RemoteAddr(next)).is_err().then_some(next);
        let leads_to = self.leads_to(&instruction);
        let step = match instruction.flow_control() {
            FlowControl::Return => Step { leaves: true, ..Step::default() },
            FlowControl::ConditionalBranch => Step { next, ..self.jump(leads_to) },
            FlowControl::UnconditionalBranch | FlowControl::IndirectBranch => self.jump(leads_to),
            FlowControl::Call | FlowControl::IndirectCall => {
                let inside = leads_to.filter(|to| self.mapping(*to).is_some() || self.is_text(*to));
                let call = inside.map(|callee| Call { returns_to: instruction.next_ip(), callee });
                Step { next, call, ..Step::default() }
            }
            _ if never_goes_on(&instruction) || instruction.mnemonic() == Mnemonic::Hlt => Step::default(),
            _ => Step { next, ..Step::default() },
        };
        Ok(step)
    }

    /// A jump out of the module, or to where nobody knows, ends in a return to the caller.
    fn jump(&self, to: Option<u64>) -> Step {
        match to {
            Some(to) if self.mapping(to).is_some() => Step { maps: self.mapping(to), ..Step::default() },
            Some(to) if self.is_text(to) => Step { jump: Some(to), ..Step::default() },
            _ => Step { leaves: true, ..Step::default() },
        }
    }

    /// Where a call or jump goes: as it says, or as the word says that it names relative to itself (a linkage table's).
    fn leads_to(&self, instruction: &Instruction) -> Option<u64> {
        if let Some(target) = target(instruction) {
            return Some(target.0);
        }
        let through_word =
            matches!(instruction.flow_control(), FlowControl::IndirectBranch | FlowControl::IndirectCall)
                && instruction.is_ip_rel_memory_operand();
        if !through_word {
            return None;
        }
        let word = (self.code.read)(RemoteAddr(instruction.ip_rel_memory_address()), 8)?;
        Some(u64::from_le_bytes(word.try_into().ok()?))
    }

    fn decode(&mut self, at: u64) -> Option<Instruction> {
        if !self.is_text(at) {
            return None;
        }
        let mut bytes = self.bytes(at).to_vec();
        if bytes.len() < LONGEST {
            bytes.extend_from_slice(self.bytes(at + bytes.len() as u64));
        }
        let bytes = &bytes[..bytes.len().min(LONGEST)];
        let instruction = Decoder::with_ip(64, bytes, at, DecoderOptions::NONE).decode();
        (!instruction.is_invalid()).then_some(instruction)
    }

    /// Some bytes from `at` on: to the end of its page; none where it can't be read.
    fn bytes(&mut self, at: u64) -> &[u8] {
        let start = at & !(PAGE - 1);
        let read = self.code.read;
        let page =
            self.pages.entry(start).or_insert_with(|| read_up_to(read, RemoteAddr(start), PAGE as usize));
        page.get((at - start) as usize..).unwrap_or_default()
    }
}

/// What of a function's code matters: that from which it can still return.
fn summary(function: u64, steps: &HashMap<u64, Step>) -> Body {
    let mut before: HashMap<u64, Vec<u64>> = HashMap::new();
    for (at, step) in steps {
        for to in step.next.iter().chain(&step.jump) {
            before.entry(*to).or_default().push(*at);
        }
    }
    let mut alive: HashSet<u64> = HashSet::new();
    let ends = |step: &Step| step.leaves || step.maps.is_some();
    let mut pending: Vec<u64> = steps.iter().filter(|(_, step)| ends(step)).map(|(at, _)| *at).collect();
    while let Some(at) = pending.pop() {
        if alive.insert(at) {
            pending.extend(before.get(&at).into_iter().flatten());
        }
    }
    let of_alive = || steps.iter().filter(|(at, _)| alive.contains(at)).map(|(_, step)| step);
    Body {
        calls: of_alive().filter_map(|step| step.call).collect(),
        jumps_to: of_alive().filter_map(|step| step.maps).collect(),
        returns: alive.contains(&function),
    }
}

#[cfg(test)]
#[path = "internal_callers_tests.rs"]
mod tests;
