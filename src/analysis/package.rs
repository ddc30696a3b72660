//! Which package a file belongs to, told by its path: the same in every process that runs the same code, wherever its
//! environment is. Knows paths only.

use crate::capture::{FrameKind, FrameText};

/// What stands for all that was installed, where its path is told.
const INSTALLED: &str = "<installed>";
/// What stands for Python's own library.
pub const STDLIB: &str = "<stdlib>";
/// What stands for everything that was not installed: the application's own code.
pub const APPLICATION: &str = "<application>";

/// What stands for code that lies in no file.
pub const NO_FILE: &str = "<no file>";

/// The package of a frame. Native code that was not installed and is none of Python's library is known by its file: `libc.so.6`.
pub fn package_of<'a>(frame: &FrameText<'a>) -> &'a str {
    let FrameKind::Native { library } = frame.kind else { return package(frame.file) };
    match library_path(library) {
        // Libraries that a package brings along lie beside it (auditwheel).
        Some((INSTALLED, inside)) => {
            let name = installed(inside);
            name.strip_suffix(".libs").unwrap_or(name)
        }
        Some(_) => STDLIB,
        None => library.rsplit('/').next().filter(|name| !name.is_empty()).unwrap_or(NO_FILE),
    }
}

/// The package of a file: `NAME` below `site-packages` or `dist-packages`, else [`STDLIB`] or [`APPLICATION`].
pub fn package(file: &str) -> &str {
    match library_path(file) {
        Some((INSTALLED, inside)) => installed(inside),
        Some(_) => STDLIB,
        None if file.starts_with("<frozen ") || in_archive(file) => STDLIB,
        None => APPLICATION,
    }
}

/// The first part of a path below `site-packages`; of an egg, what is in it.
fn installed(inside: &str) -> &str {
    let mut parts = inside.split('/').filter(|part| !part.is_empty());
    let first = parts.next().unwrap_or(inside);
    let name = if first.ends_with(".egg") { parts.next().unwrap_or(first) } else { first };
    // `six.py`, `_cffi_backend.cpython-311-x86_64-linux-gnu.so`.
    match name.split_once('.') {
        Some((stem, rest)) if !stem.is_empty() && (rest == "py" || rest == "pyc" || rest.ends_with("so")) => {
            stem
        }
        _ => name,
    }
}

/// The path of a file below `site-packages` or `dist-packages`, or below the standard library (`lib/python3.N/`, also `lib64`, `python3.13t`): where it is in
/// any environment, and in which of the two. `None` of others.
pub fn library_path(file: &str) -> Option<(&'static str, &str)> {
    for folder in ["/site-packages/", "/dist-packages/"] {
        if let Some((_, inside)) = file.rsplit_once(folder) {
            return Some((INSTALLED, inside));
        }
    }
    let (mut before, mut at) = ("", 0);
    for part in file.split('/') {
        at += part.len() + 1;
        let version = part.strip_prefix("python3");
        if before.starts_with("lib") && version.is_some_and(|rest| rest.starts_with('.')) {
            return file.get(at..).map(|inside| (STDLIB, inside));
        }
        before = part;
    }
    None
}

/// True in `python3N.zip`.
fn in_archive(file: &str) -> bool {
    file.split('/').any(|part| part.strip_prefix("python3").is_some_and(|rest| rest.ends_with(".zip")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn native_code_belongs_to_what_brought_its_library() {
        let cases = [
            (
                "/v/lib/python3.12/site-packages/numpy/_core/_multiarray_umath.cpython-312-x86_64-linux-gnu.so",
                "numpy",
            ),
            ("/v/lib/python3.12/site-packages/numpy.libs/libopenblas64_p-r0-0cf96a72.3.23.dev.so", "numpy"),
            ("/v/lib/python3.9/site-packages/_cffi_backend.cpython-39-x86_64-linux-gnu.so", "_cffi_backend"),
            ("/usr/lib/python3.12/lib-dynload/_ctypes.cpython-312-x86_64-linux-gnu.so", STDLIB),
            ("/lib/x86_64-linux-gnu/libc.so.6", "libc.so.6"),
            ("/srv/shop/_solver.so", "_solver.so"),
            ("[vdso]", "[vdso]"),
            ("", NO_FILE),
        ];
        for (library, expected) in cases {
            let kind = FrameKind::Native { library };
            let frame = FrameText { function: "f", file: "src/f.c", line: 1, kind };
            assert_eq!(package_of(&frame), expected, "{library}");
        }
        let frame = FrameText { function: "f", file: "/srv/f.py", line: 1, kind: FrameKind::Python };
        assert_eq!(package_of(&frame), APPLICATION);
    }

    #[test]
    fn a_path_tells_its_package() {
        let cases = [
            ("/srv/app/venv/lib/python3.11/site-packages/django/db/models.py", "django"),
            ("/usr/lib/python3/dist-packages/six.py", "six"),
            ("/v/lib/python3.9/site-packages/_cffi_backend.cpython-39-x86_64-linux-gnu.so", "_cffi_backend"),
            ("/v/lib/python3.9/site-packages/zope.interface/a.py", "zope.interface"),
            ("/v/lib/python3.9/site-packages/foo-1.0-py3.9.egg/foo/a.py", "foo"),
            ("/usr/lib/python3.11/threading.py", STDLIB),
            ("/opt/python/lib/python3.13t/json/decoder.py", STDLIB),
            ("/opt/embedded/python311.zip/json/decoder.py", STDLIB),
            ("<frozen importlib._bootstrap>", STDLIB),
            ("/srv/app/shop.py", APPLICATION),
            ("/srv/python3.d/shop.py", APPLICATION),
            ("<string>", APPLICATION),
            ("", APPLICATION),
        ];
        for (file, expected) in cases {
            assert_eq!(package(file), expected, "{file}");
        }
    }
}
