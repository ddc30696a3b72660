//! Who may use whom, read from the `crate::` paths of the sources.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Module → the modules it may use besides itself. `cli` and `lib.rs` may use everything.
fn allowed() -> BTreeMap<&'static str, &'static [&'static str]> {
    BTreeMap::from([
        ("addr", &[][..]),
        ("agent_abi", &[]),
        ("memory", &["addr"]),
        ("capture", &["addr"]),
        ("analysis", &["capture", "addr"]),
        ("report", &["analysis", "capture", "addr"]),
        ("mapping", &["addr"]),
        ("inferior", &["mapping", "memory", "addr"]),
        ("unwind_abi", &[]),
        ("image", &["unwind_abi", "mapping", "memory", "addr"]),
        ("native", &["image", "unwind_abi", "memory", "addr"]),
        ("cpython", &["memory", "addr"]),
        // The one place that knows both layers: an ELF file as CPython's layer wants to see it.
        ("python_binary", &["image", "cpython", "memory", "addr"]),
        ("probe", &["inferior", "image", "unwind_abi", "cpython", "agent_abi", "mapping", "memory", "addr"]),
        (
            "recorder",
            &[
                "probe",
                "agent_abi",
                "python_binary",
                "native",
                "unwind_abi",
                "cpython",
                "inferior",
                "image",
                "capture",
                "mapping",
                "memory",
                "addr",
            ],
        ),
        // Who else is recorded, by whom of ours; knows the capture for its index alone.
        ("tree", &["recorder", "probe", "cpython", "inferior", "capture", "mapping"]),
        (
            "error",
            &[
                "tree", "capture", "analysis", "report", "inferior", "image", "cpython", "probe", "recorder",
                "memory", "addr",
            ],
        ),
    ])
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Every source with the module it belongs to, its comments taken out.
fn modules() -> Vec<(String, PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    let module_of = |path: &Path| {
        let inside = path.strip_prefix(&root).unwrap();
        inside.iter().next().unwrap().to_string_lossy().trim_end_matches(".rs").to_owned()
    };
    let code = |path: &Path| -> String {
        let text = fs::read_to_string(path).unwrap();
        let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default());
        lines.collect::<Vec<_>>().join("\n")
    };
    files.into_iter().map(|path| (module_of(&path), code(&path), path)).map(|(m, c, p)| (m, p, c)).collect()
}

/// First segments of `crate::…` paths, also of `use crate::{a, b::c}`.
fn used(code: &str) -> Vec<String> {
    let mut names = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        if code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$') {
            continue;
        }
        let rest = &code[at + "crate::".len()..];
        if let Some(group) = rest.strip_prefix('{') {
            names.extend(group_heads(group));
        } else {
            names.push(head(rest));
        }
    }
    names
}

fn head(path: &str) -> String {
    path.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// First segments inside `{…}`, nested groups left out.
fn group_heads(group: &str) -> Vec<String> {
    let (mut depth, mut item, mut heads) = (0, String::new(), Vec::new());
    for c in group.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => heads.push(head(std::mem::take(&mut item).trim())),
            c if depth == 0 => item.push(c),
            _ => {}
        }
    }
    heads.push(head(item.trim()));
    heads.retain(|head| !head.is_empty());
    heads
}

#[test]
fn modules_use_only_what_they_may() {
    let allowed = allowed();
    let mut seen = 0;
    let mut wrong = Vec::new();
    for (module, path, code) in modules() {
        if matches!(module.as_str(), "cli" | "lib" | "main" | "agent") {
            continue;
        }
        let may =
            allowed.get(module.as_str()).unwrap_or_else(|| panic!("{module} has no rule: add one here"));
        for name in used(&code) {
            seen += 1;
            if name != module && !may.contains(&name.as_str()) {
                wrong.push(format!("{} uses crate::{name}; {module} may use {may:?}", path.display()));
            }
        }
    }
    assert!(seen > 20, "the search for `crate::` finds nothing any more");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn clap_is_known_to_the_command_line_only() {
    for (module, path, code) in modules() {
        let uses = code.contains("clap::") || code.contains("use clap");
        assert!(!uses || module == "cli", "{} uses clap", path.display());
    }
}

#[test]
fn unsafe_code_is_where_it_may_be() {
    for (_, path, code) in modules() {
        let may = ["src/inferior/sys.rs", "src/probe/ring.rs"].iter().any(|place| path.ends_with(place))
            || path.components().any(|part| part.as_os_str() == "agent");
        let uses = code.contains("unsafe {") || code.contains("unsafe fn") || code.contains("unsafe impl");
        assert!(!uses || may, "{} has unsafe code", path.display());
    }
}

#[test]
fn the_search_finds_every_form() {
    assert_eq!(used("use crate::addr::RemoteAddr; crate::report::x()"), ["addr", "report"]);
    assert_eq!(used("use crate::{addr::{A, B}, memory, report::{c::{D}, E}};"), ["addr", "memory", "report"]);
    assert!(used("use supercrate::x; $crate::y").is_empty());
}
