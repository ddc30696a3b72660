//! Where CPython's structures keep their fields, for one version and flavour.
//!
//! A [`Layout`] comes from the catalogue ([`catalog`], up to 3.12 complete, from 3.13 only what the process doesn't
//! publish) and from the process's own `_Py_DebugOffsets` ([`debug_offsets`]), and has passed [`check`]. Says where
//! things are; reading them is the business of the modules beside this one.

pub mod catalog;
pub mod check;
pub mod debug_offsets;
pub mod file;
pub mod tables;

use crate::cpython::version::{Flavour, PythonVersion};
use crate::memory::ReadError;
use serde::Deserialize;
use tables::*;

/// How the frames of a thread hang together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FrameChain {
    /// `tstate.frame`, then `f_back` (to 3.10).
    FrameObject,
    /// `tstate.cframe->current_frame`, then `previous` (3.11, 3.12).
    Cframe,
    /// `tstate.current_frame`, then `previous` (3.13+).
    CurrentFrame,
}

/// Format of a code object's line table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LineTableFormat {
    /// `co_lnotab` (to 3.9).
    Lnotab,
    /// PEP 626 (3.10).
    Linetable,
    /// PEP 657 (3.11+).
    Locations,
}

/// What a frame's pointers to objects look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum StackRefs {
    /// Pointers.
    #[default]
    Plain,
    /// `_PyStackRef`: flags in the low bits (3.14+).
    Tagged,
}

/// Where the attributes of an ordinary instance are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InstanceDict {
    /// A dict at `tp_dictoffset` (to 3.10).
    Dictoffset,
    /// Values and dict before the object (3.11).
    ValuesPointer,
    /// One word before the object, odd for values (3.12).
    TaggedWord,
    /// Values in the object, a dict before it (3.13+).
    InlineValues,
}

/// Where pymalloc keeps its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ObmallocState {
    /// In static variables (to 3.11).
    Static,
    /// In the interpreter (3.12).
    Embedded,
    /// Where the interpreter points to (3.13+).
    Pointer,
}

/// What the offsets alone don't say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Meaning {
    /// How frames hang together.
    pub frame_chain: FrameChain,
    /// Format of line tables.
    pub line_table: LineTableFormat,
    /// Bytes per unit of `f_lasti` (to 3.10).
    pub lasti_unit: Option<u64>,
    /// Least `owner` of a frame that stands for a C call and runs no Python code (3.12+).
    pub shim_owner: Option<u8>,
    /// `owner` of a frame that lives in a generator (3.11+).
    pub generator_owner: Option<u8>,
    /// Shape of pointers in frames.
    #[serde(default)]
    pub stack_refs: StackRefs,
    /// Where instances keep attributes.
    pub instance_dict: InstanceDict,
    /// How many bytes before an object its managed dict is (3.11+).
    pub managed_dict_before: Option<u64>,
    /// Where pymalloc's state is; absent where there is mimalloc in its place.
    pub obmalloc: Option<ObmallocState>,
    /// Bytes of one of its arenas.
    pub arena_bytes: Option<u64>,
    /// Bytes of one of its pools, which lie at multiples of that.
    pub pool_bytes: Option<u64>,
}

/// Everything known of one version and flavour, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Where the offsets come from: `cpython-layouts/3.11.toml`, or `_Py_DebugOffsets` with the file that adds to it.
    pub source: String,
    /// Why the version may be used though it was not measured, if it wasn't.
    pub unmeasured: Option<String>,
    /// What the offsets alone don't say.
    pub meaning: Meaning,
    /// `_PyRuntimeState`.
    pub runtime_state: RuntimeState,
    /// `PyInterpreterState`.
    pub interpreter_state: InterpreterState,
    /// `PyThreadState`.
    pub thread_state: ThreadState,
    /// `_PyCFrame`.
    pub cframe: Option<CFrame>,
    /// `PyFrameObject`.
    pub frame_object: Option<FrameObject>,
    /// `_PyInterpreterFrame`.
    pub interpreter_frame: Option<InterpreterFrame>,
    /// `PyCodeObject`.
    pub code_object: CodeObject,
    /// `PyObject`.
    pub pyobject: Object,
    /// `PyTypeObject`.
    pub type_object: TypeObject,
    /// `PyHeapTypeObject`.
    pub heap_type_object: HeapTypeObject,
    /// `bytes`.
    pub bytes_object: BytesObject,
    /// `str`.
    pub unicode_object: UnicodeObject,
    /// `int`.
    pub long_object: LongObject,
    /// `dict`.
    pub dict_object: DictObject,
    /// Keys of a dict.
    pub dict_keys: DictKeys,
    /// Values of a split dict.
    pub dict_values: Option<DictValues>,
    /// Modules.
    pub module_object: ModuleObject,
    /// The garbage collector.
    pub collector: Option<Collector>,
    /// What the process publishes of it.
    pub gc: Option<Gc>,
    /// pymalloc.
    pub obmalloc: Option<Obmalloc>,
    /// One of its arenas.
    pub arena_object: Option<ArenaObject>,
    /// One of its pools.
    pub pool_header: Option<PoolHeader>,
}

impl Layout {
    /// Offset of the first value behind a dict's or an instance's pointer to values.
    pub fn first_value(&self) -> u64 {
        self.dict_values.map_or(0, |v| v.values)
    }
}

/// A layout that could not be had, or that failed a check.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// No file for this minor version and flavour.
    #[error(
        "there is no layout for CPython {version} ({flavour}); supported are {supported}. A new one is added as \
         cpython-layouts/README.md tells"
    )]
    Unknown {
        /// The version found.
        version: PythonVersion,
        /// The flavour found.
        flavour: Flavour,
        /// What the catalogue has.
        supported: String,
    },
    /// A layout file that can't be used.
    #[error("layout file {file}: {what}")]
    File {
        /// Name of the file.
        file: String,
        /// What is wrong, with line where known.
        what: String,
    },
    /// A field that the version must have is missing or out of bounds.
    #[error("layout {source_name} is wrong for CPython {version}: {what}")]
    Shape {
        /// Where the offsets come from.
        source_name: String,
        /// The version.
        version: PythonVersion,
        /// Which field, and why.
        what: String,
    },
    /// The process's own table contradicts the file's list of its fields.
    #[error(
        "_Py_DebugOffsets of CPython {version} is not the table that {file} knows ({what}): a pre-release or a patched \
         build; add a layout file for it as cpython-layouts/README.md tells"
    )]
    DebugOffsets {
        /// The version.
        version: PythonVersion,
        /// The file.
        file: String,
        /// Which field, and why.
        what: String,
    },
    /// The walk over real threads found something that cannot be.
    #[error(
        "the layout {source_name} does not describe this process (CPython {version}): {what}. Nothing was written to it"
    )]
    SelfTest {
        /// Where the offsets come from.
        source_name: String,
        /// The version.
        version: PythonVersion,
        /// Which invariant failed, with addresses.
        what: String,
    },
    /// Memory could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
}
