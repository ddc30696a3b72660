//! Which package a file belongs to, told by its path: the same in every process that runs the same code, wherever its
//! environment is. Knows paths only.

/// What stands for all that was installed, where its path is told.
const INSTALLED: &str = "<installed>";
/// What stands for Python's own library.
pub const STDLIB: &str = "<stdlib>";
/// What stands for everything that was not installed: the application's own code.
pub const APPLICATION: &str = "<application>";

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
