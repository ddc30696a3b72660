//! Checks of a layout's shape: what must hold of any offsets, whatever the version.
//!
//! The run-time check, a walk over real threads, is [`super::super::self_test`].

use super::tables::Tables;
use super::{FrameChain, Layout, LayoutError, LineTableFormat};
use crate::cpython::version::PythonVersion;

/// No structure of CPython's is larger.
const MAX_SIZE: u64 = 1 << 20;

/// Every field that is read: its table and width in bytes. Widths of 8 are aligned.
const FIELDS: &[(&str, &[(&str, u64)])] = &[
    (
        "runtime_state",
        &[
            ("finalizing", 8),
            ("interpreters_head", 8),
            ("auto_tss_key", 8),
            ("tstate_current", 8),
            ("gc", 8),
            ("allocators_raw", 40),
            ("allocators_mem", 40),
            ("allocators_obj", 40),
        ],
    ),
    (
        "interpreter_state",
        &[
            ("next", 8),
            ("id", 8),
            ("runtime", 8),
            ("threads_head", 8),
            ("imports_modules", 8),
            ("sysdict", 8),
            ("gc", 8),
            ("obmalloc", 8),
            ("ceval_gil", 8),
            ("gil_runtime_state_holder", 8),
            ("gil_runtime_state_locked", 4),
        ],
    ),
    (
        "thread_state",
        &[
            ("prev", 8),
            ("next", 8),
            ("interp", 8),
            ("thread_id", 8),
            ("native_thread_id", 8),
            ("frame", 8),
            ("cframe", 8),
            ("current_frame", 8),
        ],
    ),
    ("frame_object", &[("f_back", 8), ("f_code", 8), ("f_lasti", 4)]),
    (
        "interpreter_frame",
        &[
            ("previous", 8),
            ("executable", 8),
            ("instr_ptr", 8),
            ("owner", 1),
            ("is_entry", 1),
            ("tlbc_index", 4),
            ("localsplus", 8),
        ],
    ),
    (
        "code_object",
        &[
            ("filename", 8),
            ("name", 8),
            ("qualname", 8),
            ("linetable", 8),
            ("firstlineno", 4),
            ("firsttraceable", 4),
            ("co_tlbc", 8),
            ("co_code_adaptive", 1),
        ],
    ),
    ("pyobject", &[("ob_type", 8)]),
    ("type_object", &[("tp_name", 8), ("tp_basicsize", 8), ("tp_flags", 8), ("tp_dictoffset", 8)]),
    ("heap_type_object", &[("ht_cached_keys", 8)]),
    ("bytes_object", &[("ob_size", 8), ("ob_sval", 1)]),
    ("unicode_object", &[("state", 4), ("length", 8), ("data", 8)]),
    ("dict_object", &[("ma_keys", 8), ("ma_values", 8)]),
    ("collector", &[("collections", 8), ("collecting", 4)]),
    ("obmalloc", &[("arenas", 8), ("maxarenas", 4)]),
    ("arena_object", &[("address", 8), ("pool_address", 8), ("nfreepools", 4), ("ntotalpools", 4)]),
    ("pool_header", &[("ref", 4), ("szidx", 4)]),
];

/// Names that a file may state besides [`FIELDS`].
const OTHERS: &[(&str, &[&str])] = &[
    ("gil_runtime_state", &["last_holder", "locked"]),
    ("cframe", &["current_frame"]),
    ("code_object", &["co_code"]),
    (
        "unicode_object",
        &[
            "asciiobject_size",
            "compactunicodeobject_size",
            "state_kind_bit",
            "state_compact_bit",
            "state_ascii_bit",
        ],
    ),
    ("long_object", &["ob_size", "lv_tag", "ob_digit"]),
    (
        "dict_keys",
        &["dk_size", "dk_log2_size", "dk_log2_index_bytes", "dk_kind", "dk_nentries", "dk_indices"],
    ),
    ("dict_values", &["values"]),
    ("module_object", &["md_dict"]),
    ("collector", &["stats_size"]),
];

/// The first name in a file's tables that nothing knows: a misspelt field must not pass for an absent one.
pub fn unknown_name(tables: &Tables) -> Option<String> {
    let known = |table: &str, key: &str| {
        let field = FIELDS
            .iter()
            .any(|(t, keys)| *t == table && (key == "size" || keys.iter().any(|(k, _)| *k == key)));
        field || OTHERS.iter().any(|(t, keys)| *t == table && (key == "size" || keys.contains(&key)))
    };
    let mut names = tables.iter().flat_map(|(table, keys)| keys.keys().map(move |key| (table, key)));
    names.find(|(table, key)| !known(table, key)).map(|(table, key)| format!("{table}.{key}"))
}

/// Fails with the first field that lies outside its structure, overlaps another, or is missing though the layout's
/// meaning requires it.
pub fn shape(layout: &Layout, tables: &Tables, version: PythonVersion) -> Result<(), LayoutError> {
    let wrong = |what: String| LayoutError::Shape { source_name: layout.source.clone(), version, what };
    for (table, fields) in FIELDS {
        let Some(keys) = tables.get(*table) else { continue };
        let size = keys.get("size").copied().unwrap_or(MAX_SIZE);
        if size == 0 || size > MAX_SIZE {
            return Err(wrong(format!("{table} has {size} bytes")));
        }
        let mut taken: Vec<(u64, u64, &str)> = Vec::new();
        for (key, width) in *fields {
            let Some(offset) = keys.get(*key).copied() else { continue };
            let end = offset.checked_add(*width).filter(|end| *end <= size);
            let Some(end) = end else {
                return Err(wrong(format!("{table}.{key} = {offset} lies outside {size} bytes")));
            };
            if offset % (*width).min(8) != 0 {
                return Err(wrong(format!("{table}.{key} = {offset} is not aligned")));
            }
            if let Some((_, _, other)) = taken.iter().find(|(from, to, _)| *from < end && offset < *to) {
                return Err(wrong(format!("{table}.{key} overlaps {table}.{other}")));
            }
            taken.push((offset, end, key));
        }
    }
    match missing(layout) {
        Some(what) => Err(wrong(format!("{what} is missing"))),
        None => Ok(()),
    }
}

/// The first thing that the layout's meaning requires and that isn't there.
fn missing(layout: &Layout) -> Option<&'static str> {
    let thread = &layout.thread_state;
    let absent = |present: bool, what: &'static str| (!present).then_some(what);
    let chain = match layout.meaning.frame_chain {
        FrameChain::FrameObject => absent(thread.frame.is_some(), "thread_state.frame")
            .or(absent(layout.frame_object.is_some(), "frame_object"))
            .or(absent(layout.meaning.lasti_unit.is_some_and(|u| u == 1 || u == 2), "meaning.lasti_unit")),
        FrameChain::Cframe => absent(thread.cframe.is_some(), "thread_state.cframe")
            .or(absent(layout.cframe.is_some(), "cframe"))
            .or(absent(layout.interpreter_frame.is_some(), "interpreter_frame")),
        FrameChain::CurrentFrame => absent(thread.current_frame.is_some(), "thread_state.current_frame")
            .or(absent(layout.interpreter_frame.is_some(), "interpreter_frame")),
    };
    let newer = layout.meaning.frame_chain != FrameChain::FrameObject;
    chain
        .or(absent(!newer || layout.code_object.co_code_adaptive.is_some(), "code_object.co_code_adaptive"))
        .or(absent(!newer || layout.code_object.firsttraceable.is_some(), "code_object.firsttraceable"))
        .or(absent(!newer || layout.meaning.generator_owner.is_some(), "meaning.generator_owner"))
        .or(absent(!newer || layout.meaning.managed_dict_before.is_some(), "meaning.managed_dict_before"))
        .or(absent(
            layout.meaning.line_table != LineTableFormat::Locations || layout.code_object.qualname.is_some(),
            "code_object.qualname",
        ))
        .or(absent(
            layout.long_object.lv_tag.is_some() != layout.long_object.ob_size.is_some(),
            "one of long_object.lv_tag and ob_size",
        ))
        .or(absent(
            layout.dict_keys.dk_size.is_some()
                != (layout.dict_keys.dk_log2_index_bytes.is_some() && layout.dict_keys.dk_kind.is_some()),
            "one of dict_keys.dk_size and dk_log2_index_bytes with dk_kind",
        ))
}
