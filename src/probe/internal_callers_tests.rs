//! Programs assembled for the search.

use super::*;
use iced_x86::code_asm::{CodeAssembler, CodeLabel, edi, qword_ptr};
use iced_x86::{BlockEncoderOptions, IcedError};

const AT: u64 = 0x40_0000;
const MMAP: u64 = 0x50_0000;
const MUNMAP: u64 = 0x50_1000;
const MAPPINGS: &[(RemoteAddr, Function)] =
    &[(RemoteAddr(MMAP), Function::Mmap), (RemoteAddr(MUNMAP), Function::Munmap)];

type Write<'a> = &'a dyn Fn(&mut CodeAssembler, &mut [CodeLabel]) -> Result<(), IcedError>;

/// Functions one right behind the other; the first is the allocator's entry.
struct Program {
    bytes: Vec<u8>,
    starts: Vec<RemoteAddr>,
}

/// Label `n` is function `n`; one more is free.
fn program(functions: &[Write<'_>]) -> Program {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut labels: Vec<_> = (0..=functions.len()).map(|_| a.create_label()).collect();
    for (n, write) in functions.iter().enumerate() {
        a.set_label(&mut labels[n]).unwrap();
        write(&mut a, &mut labels).unwrap();
    }
    let result = a.assemble_options(AT, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS).unwrap();
    let starts = labels[..functions.len()].iter().map(|l| RemoteAddr(result.label_ip(l).unwrap()));
    Program { starts: starts.collect(), bytes: result.inner.code_buffer }
}

impl Program {
    fn search(&self, starts: &[RemoteAddr]) -> Result<InternalCallers, CallersError> {
        let read = |at: RemoteAddr, len: usize| {
            let from = at.0.checked_sub(AT)? as usize;
            self.bytes.get(from..from.checked_add(len)?).map(<[u8]>::to_vec)
        };
        let text = [(RemoteAddr(AT), self.bytes.len() as u64)];
        internal_callers(&Code { read: &read, text: &text, starts }, &self.starts[..1], MAPPINGS)
    }

    fn found(&self) -> Vec<u64> {
        let found = self.search(&self.starts).unwrap();
        assert!(found.exposed.is_empty());
        found.ranges.iter().map(|[first, last]| (first == last).then_some(*first).unwrap()).collect()
    }

    /// Where the calls of function `of` return to.
    fn returns(&self, of: usize) -> Vec<u64> {
        let end = self.starts.get(of + 1).map_or(AT + self.bytes.len() as u64, |next| next.0);
        let decoder = Decoder::with_ip(64, &self.bytes, AT, DecoderOptions::NONE).into_iter();
        let own = decoder.filter(|i| (self.starts[of].0..end).contains(&i.ip()));
        let is_call =
            |i: &Instruction| matches!(i.flow_control(), FlowControl::Call | FlowControl::IndirectCall);
        own.filter(is_call).map(|i| i.next_ip()).collect()
    }
}

#[test]
fn calls_are_followed_to_the_mapping_functions() {
    let program = program(&[
        &|a, f| {
            a.call(f[1])?;
            a.call(MMAP)?;
            a.ret()
        },
        &|a, f| {
            a.call(f[0])?;
            a.call(MUNMAP)?;
            a.ret()
        },
        // Not reached.
        &|a, _| {
            a.call(MMAP)?;
            a.ret()
        },
    ]);
    assert_eq!(program.found(), [program.returns(0)[1], program.returns(1)[1]]);
}

#[test]
fn a_function_that_ends_in_a_jump_leaves_its_callers_return_address() {
    let program = program(&[
        &|a, f| {
            a.call(f[1])?;
            a.ret()
        },
        &|a, f| {
            a.test(edi, edi)?;
            a.jne(f[2])?;
            a.ret()
        },
        &|a, _| a.jmp(MUNMAP),
    ]);
    assert_eq!(program.found(), program.returns(0));
}

#[test]
fn an_entry_that_leads_there_by_jumps_alone_is_told() {
    let jumping = |to: u64| program(&[&|a, f| a.jmp(f[1]), &|a, _| a.jmp(to)]);
    let program = jumping(MUNMAP);
    let found = program.search(&program.starts).unwrap();
    assert_eq!(found, InternalCallers { ranges: vec![], exposed: vec![Function::Munmap] });
    let program = jumping(MMAP);
    assert_eq!(program.search(&program.starts), Err(CallersError::Exposed(Function::Mmap)));
}

#[test]
fn what_never_returns_is_not_followed() {
    let program = program(&[
        &|a, f| {
            a.test(edi, edi)?;
            a.jne(f[5])?;
            a.call(f[3])?;
            a.call(f[1])?;
            a.ret()?;
            // Heap damaged: no return from here, although the function called would return.
            a.set_label(&mut f[5])?;
            a.call(f[4])?;
            a.hlt()
        },
        // Ends with a call: the compiler knows that it doesn't return.
        &|a, f| {
            a.call(f[4])?;
            a.call(f[2])
        },
        &|a, _| a.ret(),
        &|a, _| a.ret(),
        &|a, _| {
            a.call(MMAP)?;
            a.ret()
        },
    ]);
    assert!(program.found().is_empty());
    // Without the table the first function seems to run on into the next.
    assert_eq!(program.search(&[]).unwrap().ranges.len(), 1);
}

#[test]
fn linkage_tables_are_followed() {
    let program = program(&[
        &|a, f| {
            a.call(f[1])?;
            a.call(qword_ptr(f[2]))?;
            a.ret()
        },
        &|a, f| {
            a.endbr64()?;
            a.jmp(qword_ptr(f[2]))
        },
        &|a, _| a.dq(&[MMAP]),
    ]);
    assert_eq!(program.found(), program.returns(0));
}

#[test]
fn parts_moved_away_belong_to_their_function() {
    let program = program(&[
        &|a, f| {
            a.test(edi, edi)?;
            a.jne(f[1])?;
            a.set_label(&mut f[2])?;
            a.ret()
        },
        &|a, f| {
            a.call(MMAP)?;
            a.jmp(f[2])
        },
    ]);
    assert_eq!(program.found(), program.returns(1));
}

#[test]
fn too_much_is_an_error() {
    let many = program(&[&|a, _| {
        for _ in 0..=INTERNAL_CALLERS {
            a.call(MMAP)?;
        }
        a.ret()
    }]);
    assert_eq!(many.search(&many.starts), Err(CallersError::TooMany(INTERNAL_CALLERS + 1)));
    let long = program(&[&|a, _| a.db(&vec![0x90; MAX_INSTRUCTIONS + 1])]);
    assert_eq!(long.search(&long.starts), Err(CallersError::TooMuchCode));
}
