//! Finding CPython in a process: the runtime, its version and flavour, its layout.
//!
//! A cascade, one log line per step; what is found is evidence that the user can see.

use super::Python;
use super::binary::{Binary, find_symbol};
use super::layout::{Layout, LayoutError, catalog, debug_offsets};
use super::object::Objects;
use super::thread_state::{self, OwnState, pthread_facts};
use super::version::{Evidence, Flavour, PythonVersion};
use crate::addr::RemoteAddr;
use crate::memory::{ReadError, RemoteMemory};

/// Writable data that is searched for the cookie, and read-only data for the version.
const MAX_SCAN: u64 = 256 << 20;
const SCAN_STEP: u64 = 1 << 20;

/// Why no supported CPython could be found.
#[derive(Debug, thiserror::Error)]
pub enum LocateError {
    /// Nothing of Python's is mapped.
    #[error(
        "no CPython was found in the process ({executable}): neither the executable nor a library defines _PyRuntime"
    )]
    NoPython {
        /// The first binary.
        executable: String,
    },
    /// Another implementation.
    #[error(
        "{binary} is PyPy, not CPython; heaptap reads CPython's structures and supports CPython 3.8 to 3.15"
    )]
    PyPy {
        /// The binary.
        binary: String,
    },
    /// A CPython of an unsupported version.
    #[error("{binary} is CPython {found}; heaptap supports CPython 3.8 to 3.15")]
    Version {
        /// The binary.
        binary: String,
        /// The version, as far as it is known.
        found: String,
    },
    /// A CPython of a supported version whose runtime is hidden.
    #[error(
        "{binary} is CPython {version}, but its runtime was not found (no symbol _PyRuntime, no section .PyRuntime, no \
         _Py_DebugOffsets): the file was stripped of what every build exports; use an ordinary build"
    )]
    RuntimeHidden {
        /// The binary.
        binary: String,
        /// The version.
        version: PythonVersion,
    },
    /// A runtime of unknown version.
    #[error("{binary} holds a CPython runtime at {runtime}, but its version could not be learnt ({tried})")]
    VersionUnknown {
        /// The binary.
        binary: String,
        /// `_PyRuntime`.
        runtime: RemoteAddr,
        /// What was tried.
        tried: String,
    },
    /// The interpreter has not begun, or has ended.
    #[error(
        "{binary} holds CPython {version}, but no interpreter is running in it (not yet, or no longer): try again later"
    )]
    NotInitialized {
        /// The binary.
        binary: String,
        /// The version.
        version: PythonVersion,
    },
    /// A build whose every object is different.
    #[error(
        "{binary} is CPython {version} built with Py_TRACE_REFS, which is not supported: use a build without it"
    )]
    TraceRefs {
        /// The binary.
        binary: String,
        /// The version.
        version: PythonVersion,
    },
    /// No layout for it.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Memory could not be read.
    #[error("cannot read CPython's structures")]
    Read(#[from] ReadError),
}

struct Runtime<'a> {
    binary: &'a dyn Binary,
    at: RemoteAddr,
    how: &'static str,
}

/// See [`Python::locate`].
pub fn locate(memory: &dyn RemoteMemory, binaries: &[&dyn Binary]) -> Result<Python, LocateError> {
    if let Some(pypy) = binaries.iter().find(|b| is_pypy(**b)) {
        return Err(LocateError::PyPy { binary: pypy.path() });
    }
    let Some(runtime) = find_runtime(memory, binaries) else { return Err(no_runtime(memory, binaries)) };
    let mut evidence = vec![Evidence {
        fact: "runtime",
        value: format!("_PyRuntime at {} in {}", runtime.at, runtime.binary.path()),
        source: runtime.how.to_owned(),
    }];
    let head = debug_offsets::head(memory, runtime.at)?;
    let (version, how) = match head {
        Some(head) => (head.version, "_Py_DebugOffsets".to_owned()),
        None => find_version(memory, &runtime)?,
    };
    evidence.push(Evidence { fact: "version", value: version.to_string(), source: how });
    let binary = runtime.binary.path();
    if !version.is_supported() {
        return Err(LocateError::Version { binary, found: version.to_string() });
    }
    let (flavour, how) = find_flavour(runtime.binary, head.is_some_and(|h| h.free_threaded), version)?;
    evidence.push(Evidence { fact: "flavour", value: flavour.to_string(), source: how.to_owned() });
    let file = catalog::find(version, flavour)?;
    let published = match head {
        Some(_) => Some(debug_offsets::read(memory, runtime.at, file, version)?),
        None => None,
    };
    let layout = file.build(version, published)?;
    if thread_state::all(memory, &layout, runtime.at)?.is_empty() {
        return Err(LocateError::NotInitialized { binary, version });
    }
    let pthread = pthread_facts(memory, binaries);
    let (own_state, how) = OwnState::find(memory, binaries, &layout, runtime.at, &pthread);
    evidence.push(Evidence { fact: "own thread state", value: how, source: "locate".to_owned() });
    let code_type = runtime.binary.symbol("PyCode_Type");
    tracing::debug!(%version, %flavour, layout = %layout.source, "CPython found");
    let layout_source = layout.source.clone();
    Ok(Python {
        version,
        flavour,
        runtime: runtime.at,
        layout,
        layout_source,
        evidence,
        binary,
        own_state,
        pthread,
        code_type,
    })
}

fn is_pypy(binary: &dyn Binary) -> bool {
    binary.symbol("pypy_main_startup").is_some() || binary.symbol("pypy_execute_source").is_some()
}

/// Symbol, section, cookie. The symbol counts only where it is defined: extension modules import it.
fn find_runtime<'a>(memory: &dyn RemoteMemory, binaries: &[&'a dyn Binary]) -> Option<Runtime<'a>> {
    if let Some((binary, at)) = find_symbol(binaries, "_PyRuntime") {
        return Some(Runtime { binary, at, how: "symbol _PyRuntime" });
    }
    tracing::debug!("no symbol _PyRuntime");
    if let Some((binary, span)) = binaries.iter().find_map(|b| Some((*b, b.section(".PyRuntime")?))) {
        return Some(Runtime { binary, at: span.start, how: "section .PyRuntime" });
    }
    tracing::debug!("no section .PyRuntime");
    binaries.iter().find_map(|binary| {
        let at = scan(memory, *binary, |_, bytes| {
            // Aligned as the structure is.
            bytes.chunks_exact(8).position(|w| w == debug_offsets::COOKIE).map(|i| i * 8)
        })?;
        // Code that compares with the cookie may hold it too; only the table has a version behind it.
        let head = debug_offsets::head(memory, at).ok()??;
        (head.version.major == 3).then_some(Runtime {
            binary: *binary,
            at,
            how: "search for the cookie xdebugpy",
        })
    })
}

fn scan(
    memory: &dyn RemoteMemory,
    binary: &dyn Binary,
    find: impl Fn(RemoteAddr, &[u8]) -> Option<usize>,
) -> Option<RemoteAddr> {
    for span in binary.writable() {
        let start = RemoteAddr(span.start.0.next_multiple_of(8));
        let end = span.start.offset(span.len.min(MAX_SCAN));
        let mut at = start;
        while at < end {
            let len = end.since(at).min(SCAN_STEP);
            if let Ok(bytes) = memory.read_vec(at, len as usize)
                && let Some(found) = find(at, &bytes)
            {
                return Some(at.offset(found as u64));
            }
            at = at.offset(len);
        }
    }
    None
}

fn no_runtime(memory: &dyn RemoteMemory, binaries: &[&dyn Binary]) -> LocateError {
    let executable = binaries.first().map_or_else(|| "no executable".to_owned(), |b| b.path());
    // Before 3.7 there is no _PyRuntime, but the API is there.
    let api = find_symbol(binaries, "PyEval_EvalFrameEx").or_else(|| find_symbol(binaries, "Py_GetVersion"));
    let Some((binary, _)) = api else { return LocateError::NoPython { executable } };
    let word = binary.symbol("Py_Version").and_then(|at| memory.read_u64(at).ok());
    let version = word.map(|hex| PythonVersion::from_hex(hex as u32));
    let binary_path = binary.path();
    match version.or_else(|| version_literals(memory, binary).first().copied()) {
        Some(version) if version.is_supported() => {
            LocateError::RuntimeHidden { binary: binary_path, version }
        }
        Some(version) => LocateError::Version { binary: binary_path, found: version.to_string() },
        None => LocateError::Version { binary: binary_path, found: "of a version before 3.7".to_owned() },
    }
}

/// Before 3.13: the exported word `Py_Version` (3.11+), else `sys.hexversion` as read with each layout that could be right, else
/// the version's literal in the file.
fn find_version(
    memory: &dyn RemoteMemory,
    runtime: &Runtime<'_>,
) -> Result<(PythonVersion, String), LocateError> {
    if let Some(at) = runtime.binary.symbol("Py_Version") {
        let hex = memory.read_u64(at)?;
        return Ok((PythonVersion::from_hex(hex as u32), "symbol Py_Version".to_owned()));
    }
    for minor in PythonVersion::OLDEST..=12 {
        let text = format!("3.{minor}.0");
        let Some(assumed) = PythonVersion::parse(&text) else { continue };
        let Ok(layout) = catalog::find(assumed, Flavour::Default).and_then(|file| file.build(assumed, None))
        else {
            continue;
        };
        match hexversion(memory, &layout, runtime.at) {
            Some(found) if (found.major, found.minor) == (3, minor) => {
                return Ok((found, "sys.hexversion".to_owned()));
            }
            found => tracing::debug!(minor, ?found, "sys.hexversion does not confirm the layout"),
        }
    }
    let literals = version_literals(memory, runtime.binary);
    if let [version] = literals.as_slice() {
        return Ok((*version, "version literal in the file".to_owned()));
    }
    let literals: Vec<_> = literals.iter().map(PythonVersion::to_string).collect();
    let literals = literals.join(", ");
    Err(LocateError::VersionUnknown {
        binary: runtime.binary.path(),
        runtime: runtime.at,
        tried: format!("no _Py_DebugOffsets, no Py_Version, no sys.hexversion; literals: [{literals}]"),
    })
}

fn hexversion(memory: &dyn RemoteMemory, layout: &Layout, runtime: RemoteAddr) -> Option<PythonVersion> {
    let objects = Objects::new(memory, layout);
    let interpreters = thread_state::interpreters(memory, layout, runtime).ok()?;
    let sysdict = memory.read_ptr(interpreters.last()?.offset(layout.interpreter_state.sysdict)).ok()?;
    let hex = objects.int(objects.dict_get(sysdict, "hexversion").ok()??).ok()?;
    Some(PythonVersion::from_hex(u32::try_from(hex).ok()?))
}

/// NUL-terminated `3.X.Y` literals of versions that have no better source (`PY_VERSION`, which `Py_GetVersion` prints).
fn version_literals(memory: &dyn RemoteMemory, binary: &dyn Binary) -> Vec<PythonVersion> {
    let mut found = Vec::new();
    for span in binary.read_only().into_iter().chain(binary.executable()) {
        let Ok(bytes) = memory.read_vec(span.start, span.len.min(MAX_SCAN) as usize) else { continue };
        for word in bytes.split(|b| *b == 0).filter(|w| (5..=64).contains(&w.len())) {
            // The linker merges literals by their ends, so one may stand at the end of another.
            let digits = word
                .iter()
                .rev()
                .take_while(|b| b.is_ascii_alphanumeric() || **b == b'.' || **b == b'+')
                .count();
            let Ok(text) = std::str::from_utf8(&word[word.len() - digits..]) else { continue };
            if let Some(version) = PythonVersion::parse(text)
                && (version.major == 3 && (6..=10).contains(&version.minor)
                    || version.major == 2 && version.minor == 7)
                && !found.contains(&version)
            {
                found.push(version);
            }
        }
    }
    found
}

/// Debug builds export functions that others lack (`Include/object.h`: `Py_REF_DEBUG`, `Py_TRACE_REFS`).
fn find_flavour(
    binary: &dyn Binary,
    free_threaded: bool,
    version: PythonVersion,
) -> Result<(Flavour, &'static str), LocateError> {
    // From 3.13 traced objects are in a table beside, and their header is the usual one.
    if version.minor < 13 && binary.symbol("_Py_PrintReferences").is_some() {
        return Err(LocateError::TraceRefs { binary: binary.path(), version });
    }
    let debug = ["_Py_NegativeRefcount", "_Py_RefTotal"].iter().any(|name| binary.symbol(name).is_some());
    match (free_threaded, debug) {
        (true, false) => Ok((Flavour::FreeThreaded, "_Py_DebugOffsets")),
        (false, true) => Ok((Flavour::Debug, "symbol _Py_NegativeRefcount")),
        (false, false) => Ok((Flavour::Default, "no symbol of a debug build")),
        (true, true) => Err(LocateError::Version {
            binary: binary.path(),
            found: format!("{version}, a free-threaded debug build (of which no layout is known)"),
        }),
    }
}
