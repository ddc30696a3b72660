//! What the in-target agent has to know of this CPython, as [`PythonFacts`]: a [`Python`] flattened into numbers.
//!
//! Knows both sides' words and nothing else. The agent's walker reads by these numbers alone; what they mean is told in
//! [`crate::agent_abi`].

use crate::agent_abi::{ABSENT, PythonFacts, chain, own_state};
use crate::cpython::Python;
use crate::cpython::layout::{FrameChain, Layout, StackRefs};
use crate::cpython::thread_state::OwnState;

/// No byte is as large: no frame is a shim.
const NO_SHIMS: u32 = 256;
/// Flags of a `_PyStackRef` (see `cpython::frame`).
const STACK_REF_FLAGS: u32 = 7;

/// The facts of `python`. Where only a search through the interpreters' lists leads to a thread's own state
/// ([`OwnState::Lists`]), the agent, which must not follow lists that other threads change, finds no stacks.
pub fn python_facts(python: &Python) -> PythonFacts {
    let layout = &python.layout;
    let code = &layout.code_object;
    let unicode = &layout.unicode_object;
    let (own_state, a, b, c) = own_state_facts(python.own_state);
    let frames = Frames::of(layout);
    PythonFacts {
        own_state,
        chain: match layout.meaning.frame_chain {
            FrameChain::FrameObject => chain::FRAME_OBJECT,
            FrameChain::Cframe => chain::CFRAME,
            FrameChain::CurrentFrame => chain::CURRENT_FRAME,
        },
        a,
        b,
        c,
        finalizing: python.runtime.offset(layout.runtime_state.finalizing).0,
        code_type: python.code_type.map_or(0, |at| at.0),
        thread_id: offset(layout.thread_state.thread_id),
        first_frame: frames.first,
        cframe_frame: optional(layout.cframe.map(|cframe| cframe.current_frame)),
        previous: frames.previous,
        code: frames.code,
        instruction: frames.instruction,
        lasti_unit: layout.meaning.lasti_unit.map_or(1, offset),
        owner: frames.owner,
        shim_owner: layout.meaning.shim_owner.map_or(NO_SHIMS, u32::from),
        is_entry: frames.is_entry,
        code_mask: match layout.meaning.stack_refs {
            StackRefs::Plain => 0,
            StackRefs::Tagged => STACK_REF_FLAGS,
        },
        ob_type: offset(layout.pyobject.ob_type),
        bytecode: optional(code.co_code_adaptive),
        co_tlbc: optional(code.co_tlbc),
        tlbc_index: frames.tlbc_index,
        co_name: offset(code.qualname.unwrap_or(code.name)),
        co_filename: offset(code.filename),
        co_linetable: offset(code.linetable),
        co_firstlineno: offset(code.firstlineno),
        co_firsttraceable: optional(code.firsttraceable),
        bytes_size: offset(layout.bytes_object.ob_size),
        bytes_data: offset(layout.bytes_object.ob_sval),
        str_state: offset(unicode.state),
        str_length: offset(unicode.length),
        str_ascii_data: offset(unicode.asciiobject_size),
        str_compact_data: offset(unicode.compactunicodeobject_size),
        str_data: offset(unicode.data),
        str_kind_bit: offset(unicode.state_kind_bit),
        str_compact_bit: offset(unicode.state_compact_bit),
        str_ascii_bit: offset(unicode.state_ascii_bit),
    }
}

/// A layout that passed its checks has no offset that does not fit.
fn offset(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(ABSENT)
}

fn optional(value: Option<u64>) -> u32 {
    value.map_or(ABSENT, offset)
}

fn own_state_facts(own: OwnState) -> (u32, u64, u64, u64) {
    match own {
        OwnState::Glibc { key, blocks } => (own_state::GLIBC, key, blocks, 0),
        OwnState::Musl { key, tsd } => (own_state::MUSL, key, tsd, 0),
        OwnState::ThreadLocal { offset } => (own_state::THREAD_LOCAL, offset.cast_unsigned(), 0, 0),
        OwnState::Dynamic { module, offset, entry } => (own_state::DYNAMIC, module, offset, entry),
        OwnState::Lists => (own_state::NONE, 0, 0, 0),
    }
}

/// The fields of a frame, of whichever kind.
struct Frames {
    first: u32,
    previous: u32,
    code: u32,
    instruction: u32,
    owner: u32,
    tlbc_index: u32,
    is_entry: u32,
}

impl Frames {
    fn of(layout: &Layout) -> Self {
        let thread = &layout.thread_state;
        if let Some(frame) = &layout.interpreter_frame {
            let cframe = layout.meaning.frame_chain == FrameChain::Cframe;
            return Self {
                first: optional(if cframe { thread.cframe } else { thread.current_frame }),
                previous: offset(frame.previous),
                code: offset(frame.executable),
                instruction: offset(frame.instr_ptr),
                owner: offset(frame.owner),
                tlbc_index: optional(frame.tlbc_index),
                is_entry: optional(frame.is_entry),
            };
        }
        let frame = layout.frame_object.as_ref();
        Self {
            first: optional(thread.frame),
            previous: optional(frame.map(|f| f.f_back)),
            code: optional(frame.map(|f| f.f_code)),
            instruction: optional(frame.map(|f| f.f_lasti)),
            owner: ABSENT,
            tlbc_index: ABSENT,
            is_entry: ABSENT,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::RemoteAddr;
    use crate::cpython::layout::catalog;
    use crate::cpython::thread_state::PthreadFacts;
    use crate::cpython::version::{Flavour, PythonVersion};

    fn python(version: &str, flavour: Flavour, own_state: OwnState) -> Python {
        let version = PythonVersion::parse(version).unwrap();
        let layout = catalog::find(version, flavour).unwrap().build(version, None).unwrap();
        Python {
            version,
            flavour,
            runtime: RemoteAddr(0x60_0000),
            layout_source: layout.source.clone(),
            layout,
            evidence: Vec::new(),
            binary: String::new(),
            own_state,
            pthread: PthreadFacts { glibc: true, tid: 0x2d0, specific: Some(0x310) },
            code_type: Some(RemoteAddr(0x61_0000)),
        }
    }

    const KEY: OwnState = OwnState::Glibc { key: 2, blocks: 0x310 };

    /// From 3.13 the offsets are the process's own: `tests/agent_walk.rs` has those.
    #[test]
    fn each_version_up_to_3_12_walks_by_its_own_offsets() {
        // (version, chain, first, cframe's, previous, code, instruction, unit, owner, least shim)
        let frame_object = |lasti, unit| (chain::FRAME_OBJECT, 24, ABSENT, 24, 32, lasti, unit, ABSENT, 256);
        let expected = [
            ("3.8.18", frame_object(104, 1)),
            ("3.9.18", frame_object(104, 1)),
            ("3.10.13", frame_object(96, 2)),
            ("3.11.7", (chain::CFRAME, 56, 8, 48, 32, 56, 1, 69, 256)),
            ("3.12.1", (chain::CFRAME, 56, 0, 8, 0, 56, 1, 70, 3)),
        ];
        for (version, walk) in expected {
            let f = python_facts(&python(version, Flavour::Default, KEY));
            let found = (
                f.chain,
                f.first_frame,
                f.cframe_frame,
                f.previous,
                f.code,
                f.instruction,
                f.lasti_unit,
                f.owner,
                f.shim_owner,
            );
            assert_eq!(found, walk, "{version}");
            assert_eq!(
                (f.code_mask, f.co_tlbc, f.tlbc_index, f.ob_type),
                (0, ABSENT, ABSENT, 8),
                "{version}"
            );
            assert_eq!((f.code_type, f.own_state, f.a, f.b), (0x61_0000, own_state::GLIBC, 2, 0x310));
        }
    }

    #[test]
    fn each_version_up_to_3_12_reads_code_by_its_own_offsets() {
        // (version, finalizing, name, file, line table, first line, first traceable, bytecode, a str's data)
        let expected = [
            ("3.8.18", 16, (112, 104, 120, 40, ABSENT, ABSENT), (48, 72, 72)),
            ("3.9.18", 16, (112, 104, 120, 40, ABSENT, ABSENT), (48, 72, 72)),
            ("3.10.13", 16, (112, 104, 120, 40, ABSENT, ABSENT), (48, 72, 72)),
            ("3.11.7", 24, (128, 112, 136, 72, 168, 184), (48, 72, 72)),
            ("3.12.1", 24, (128, 112, 136, 68, 176, 192), (40, 56, 56)),
        ];
        for (version, finalizing, code, text) in expected {
            let f = python_facts(&python(version, Flavour::Default, KEY));
            assert_eq!(f.finalizing, 0x60_0000 + finalizing, "{version}");
            let found =
                (f.co_name, f.co_filename, f.co_linetable, f.co_firstlineno, f.co_firsttraceable, f.bytecode);
            assert_eq!(found, code, "{version}");
            assert_eq!((f.str_ascii_data, f.str_compact_data, f.str_data), text, "{version}");
            assert_eq!(
                (f.str_state, f.str_length, f.bytes_size, f.bytes_data),
                (32, 16, 16, 32),
                "{version}"
            );
            assert_eq!((f.str_kind_bit, f.str_compact_bit, f.str_ascii_bit), (2, 5, 6), "{version}");
        }
        let same = python_facts(&python("3.11.2", Flavour::Debug, KEY));
        assert_eq!(same, python_facts(&python("3.11.2", Flavour::Default, KEY)), "a debug build's differ");
    }

    #[test]
    fn every_way_to_the_own_state_is_told() {
        let told = |own| {
            let f = python_facts(&python("3.12.1", Flavour::Default, own));
            (f.own_state, f.a, f.b, f.c)
        };
        assert_eq!(told(OwnState::Musl { key: 3, tsd: 0x80 }), (own_state::MUSL, 3, 0x80, 0));
        let below = u64::MAX - 23;
        assert_eq!(told(OwnState::ThreadLocal { offset: -24 }), (own_state::THREAD_LOCAL, below, 0, 0));
        let dynamic = OwnState::Dynamic { module: 7, offset: 0x40, entry: 16 };
        assert_eq!(told(dynamic), (own_state::DYNAMIC, 7, 0x40, 16));
        assert_eq!(told(OwnState::Lists), (own_state::NONE, 0, 0, 0));
    }
}
