//! The offsets of one version and flavour, as the files and the process state them: tables of named numbers.
//!
//! Table and key names are those of `_Py_DebugOffsets` where it has one. An absent key is an absent field; 0 is an
//! offset. The structs here turn the tables into fields that code can use, and nothing else.

use serde::Deserialize;
use std::collections::BTreeMap;

/// `table.key -> offset`: what files and `_Py_DebugOffsets` are merged into.
pub type Tables = BTreeMap<String, BTreeMap<String, u64>>;

macro_rules! table {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type),* }
    };
}

table! {
    /// `_PyRuntimeState`.
    RuntimeState {
        /// Bytes.
        size: u64,
        /// The thread state that is finalizing the runtime, or NULL.
        finalizing: u64,
        /// First `PyInterpreterState`.
        interpreters_head: u64,
        /// `Py_tss_t` {int is_initialized; pthread_key_t key} of each thread's own state; absent from 3.15.
        auto_tss_key: Option<u64>,
        /// The thread state that holds the GIL (3.8 to 3.11).
        tstate_current: Option<u64>,
        /// The collector's state (3.8).
        gc: Option<u64>,
        /// `PyMemAllocatorEx` of the raw domain (3.12+).
        allocators_raw: Option<u64>,
        /// The mem domain.
        allocators_mem: Option<u64>,
        /// The object domain.
        allocators_obj: Option<u64>,
    }
}

table! {
    /// `PyInterpreterState`.
    InterpreterState {
        /// Bytes.
        size: u64,
        /// Next interpreter.
        next: u64,
        /// Number of the interpreter.
        id: u64,
        /// Back pointer to the runtime (3.9 to 3.12).
        runtime: Option<u64>,
        /// First thread state.
        threads_head: u64,
        /// `sys.modules`.
        imports_modules: u64,
        /// The dict of module `sys`.
        sysdict: u64,
        /// The collector's state (3.9+).
        gc: Option<u64>,
        /// pymalloc's state, or a pointer to it (3.12+).
        obmalloc: Option<u64>,
        /// Pointer to the GIL (3.12+).
        ceval_gil: Option<u64>,
        /// `gil.locked`, from the interpreter (3.13+).
        gil_runtime_state_locked: Option<u64>,
        /// `gil.last_holder`, from the interpreter (3.13+).
        gil_runtime_state_holder: Option<u64>,
    }
}

table! {
    /// `PyThreadState`.
    ThreadState {
        /// Bytes.
        size: u64,
        /// Next thread state of the interpreter.
        next: u64,
        /// The interpreter.
        interp: u64,
        /// `pthread_self()` of the thread: on x86-64 Linux its thread pointer.
        thread_id: u64,
        /// `gettid()` of the thread (3.11+).
        native_thread_id: Option<u64>,
        /// Innermost `PyFrameObject` (to 3.10).
        frame: Option<u64>,
        /// `_PyCFrame` (3.11, 3.12).
        cframe: Option<u64>,
        /// Innermost `_PyInterpreterFrame` (3.13+).
        current_frame: Option<u64>,
    }
}

table! {
    /// `_PyCFrame` (3.11, 3.12).
    CFrame {
        /// Innermost `_PyInterpreterFrame`.
        current_frame: u64,
    }
}

table! {
    /// `PyFrameObject` (to 3.10).
    FrameObject {
        /// Bytes.
        size: u64,
        /// The caller.
        f_back: u64,
        /// Code object.
        f_code: u64,
        /// Index of the instruction being executed.
        f_lasti: u64,
    }
}

table! {
    /// `_PyInterpreterFrame` (3.11+).
    InterpreterFrame {
        /// Bytes.
        size: u64,
        /// The caller.
        previous: u64,
        /// Code object.
        executable: u64,
        /// The instruction being executed.
        instr_ptr: u64,
        /// One byte: who owns the frame.
        owner: u64,
        /// One byte: a call of the interpreter's loop began with it (3.11).
        is_entry: Option<u64>,
        /// `u32`: which copy of the bytecode runs (free-threaded 3.14+).
        tlbc_index: Option<u64>,
    }
}

table! {
    /// `PyCodeObject`.
    CodeObject {
        /// Bytes.
        size: u64,
        /// `str`.
        filename: u64,
        /// `str`.
        name: u64,
        /// `str` (3.11+).
        qualname: Option<u64>,
        /// `bytes`.
        linetable: u64,
        /// `int`.
        firstlineno: u64,
        /// The bytecode itself (3.11+).
        co_code_adaptive: Option<u64>,
        /// `int`: index of the first instruction that counts as execution (3.11+).
        firsttraceable: Option<u64>,
        /// `_PyCodeArray` of the copies of the bytecode (free-threaded 3.14+).
        co_tlbc: Option<u64>,
    }
}

table! {
    /// `PyObject`.
    Object {
        /// Bytes.
        size: u64,
        /// The type.
        ob_type: u64,
    }
}

table! {
    /// `PyTypeObject`.
    TypeObject {
        /// Bytes.
        size: u64,
        /// C string.
        tp_name: u64,
        /// Bytes of an instance.
        tp_basicsize: u64,
        /// Flags.
        tp_flags: u64,
        /// Where an instance keeps its dict; signed.
        tp_dictoffset: u64,
    }
}

table! {
    /// `PyHeapTypeObject`.
    HeapTypeObject {
        /// Keys that instances share.
        ht_cached_keys: u64,
    }
}

table! {
    /// `PyBytesObject`.
    BytesObject {
        /// Bytes in it.
        ob_size: u64,
        /// The bytes.
        ob_sval: u64,
    }
}

table! {
    /// The three shapes of `str`.
    UnicodeObject {
        /// Flags, `u32`.
        state: u64,
        /// Characters.
        length: u64,
        /// Where the data of a compact ASCII string begins.
        asciiobject_size: u64,
        /// Where the data of another compact string begins.
        compactunicodeobject_size: u64,
        /// Pointer to the data of a string that is not compact.
        data: u64,
        /// First of the 3 bits that give the bytes per character.
        state_kind_bit: u64,
        /// Bit: data follow the header.
        state_compact_bit: u64,
        /// Bit: ASCII only.
        state_ascii_bit: u64,
    }
}

table! {
    /// `PyLongObject`.
    LongObject {
        /// Signed number of digits (to 3.11).
        ob_size: Option<u64>,
        /// Number of digits and sign (3.12+).
        lv_tag: Option<u64>,
        /// Digits of 30 bits, `u32` each.
        ob_digit: u64,
    }
}

table! {
    /// `PyDictObject`.
    DictObject {
        /// Keys.
        ma_keys: u64,
        /// Values of a split table, or NULL.
        ma_values: u64,
    }
}

table! {
    /// `PyDictKeysObject`.
    DictKeys {
        /// Slots of the index (to 3.10).
        dk_size: Option<u64>,
        /// Its logarithm (3.11+), `u8`.
        dk_log2_size: Option<u64>,
        /// Logarithm of the bytes of the index (3.11+), `u8`.
        dk_log2_index_bytes: Option<u64>,
        /// 0: entries carry a hash (3.11+), `u8`.
        dk_kind: Option<u64>,
        /// Entries used.
        dk_nentries: u64,
        /// The index; entries follow it.
        dk_indices: u64,
    }
}

table! {
    /// `PyDictValues` (3.11+; before, a bare array).
    DictValues {
        /// First value.
        values: u64,
    }
}

table! {
    /// `PyModuleObject`.
    ModuleObject {
        /// The module's dict.
        md_dict: u64,
    }
}

table! {
    /// `struct _gc_runtime_state`, where it holds `struct gc_generation_stats` in an array (to 3.14).
    Collector {
        /// Collections of the youngest generation.
        collections: u64,
        /// `int`: whether it is at work. Published from 3.13 on, by which this table is checked.
        collecting: u64,
        /// From one generation to the next.
        stats_size: u64,
    }
}

table! {
    /// What a process publishes of `struct _gc_runtime_state` (3.13+).
    Gc {
        /// `int`: whether the collector is at work.
        collecting: u64,
    }
}

table! {
    /// `struct _obmalloc_state` (3.12+).
    Obmalloc {
        /// Pointer to the array of arenas.
        arenas: u64,
        /// `uint`: its length.
        maxarenas: u64,
    }
}

table! {
    /// `struct arena_object`.
    ArenaObject {
        /// Bytes.
        size: u64,
        /// The arena; 0 where there is none.
        address: u64,
        /// The first pool of it that was never used.
        pool_address: u64,
        /// `uint`: pools of it that are free.
        nfreepools: u64,
        /// `uint`: pools of it.
        ntotalpools: u64,
    }
}

table! {
    /// `struct pool_header`.
    PoolHeader {
        /// Bytes.
        size: u64,
        /// `uint`: blocks of it that are in use.
        r#ref: u64,
        /// `uint`: class of the size of its blocks.
        szidx: u64,
    }
}
