//! Which C library a process uses, its version, and who serves its `malloc`.
//!
//! Learnt from the files alone: glibc carries its version in a banner, musl in `libc.so`'s. Knows nothing of Python.

use super::Module;

/// Family of C library.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LibcKind {
    /// GNU.
    Glibc,
    /// musl.
    Musl,
}

/// The C library of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Libc {
    /// Family.
    pub kind: LibcKind,
    /// Version as its banner states it, such as `2.36`; `None` if it can't be found.
    pub version: Option<String>,
    /// Index into the modules of the library itself.
    pub module: usize,
    /// Index into the modules of the first that exports `malloc`: the one the process calls. Differs from `module`
    /// with a preloaded or linked allocator.
    pub malloc: Option<usize>,
}

/// The C library among `modules` (in lookup order); `None` for a process linked statically.
pub fn libc_of(modules: &[Module]) -> Option<Libc> {
    let malloc = modules.iter().position(|m| m.exported_symbol("malloc").is_some());
    let glibc = modules.iter().position(|m| m.exported_symbol("gnu_get_libc_version").is_some());
    let (kind, module) = match glibc {
        Some(index) => (LibcKind::Glibc, index),
        // musl's only library defines the C library and the dynamic linker both.
        None => {
            let musl = |m: &Module| {
                m.exported_symbol("__libc_start_main").is_some() && m.exported_symbol("__dls3").is_some()
                    || m.name().starts_with("ld-musl-")
                    || (m.name() == "libc.so" && m.exported_symbol("malloc").is_some())
            };
            (LibcKind::Musl, modules.iter().position(musl)?)
        }
    };
    let version = version_of(&modules[module], kind);
    Some(Libc { kind, version, module, malloc })
}

/// glibc: `GNU C Library (Debian GLIBC 2.36-9) stable release version 2.36.`; musl prints `musl libc (x86_64)\nVersion %s`
/// with the version as a literal of its own, which stands alone in its read-only data.
fn version_of(module: &Module, kind: LibcKind) -> Option<String> {
    for (start, len, segment) in module.segments() {
        if segment.writable || segment.executable && kind == LibcKind::Musl {
            continue;
        }
        let Some(bytes) = module.file_bytes(start, len.min(16 << 20) as usize) else { continue };
        let found = match kind {
            LibcKind::Glibc => glibc_version(&bytes),
            LibcKind::Musl => musl_version(&bytes),
        };
        if found.is_some() {
            return found;
        }
    }
    None
}

fn glibc_version(bytes: &[u8]) -> Option<String> {
    let banner = after(bytes, b"GNU C Library ")?;
    let line = &banner[..banner.iter().position(|b| *b == b'\n')?];
    let version = after(line, b" version ")?;
    let end = version.iter().position(|b| !b.is_ascii_digit() && *b != b'.').unwrap_or(version.len());
    let version = std::str::from_utf8(&version[..end]).ok()?.trim_end_matches('.');
    (!version.is_empty()).then(|| version.to_owned())
}

fn musl_version(bytes: &[u8]) -> Option<String> {
    bytes.split(|b| *b == 0).find_map(|word| {
        let text = std::str::from_utf8(word).ok()?;
        let mut parts = text.split('.');
        let numeric =
            |p: Option<&str>| p.is_some_and(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()));
        let is_version = parts.next() == Some("1") && numeric(parts.next()) && numeric(parts.next());
        (is_version && parts.next().is_none()).then(|| text.to_owned())
    })
}

fn after<'a>(bytes: &'a [u8], needle: &[u8]) -> Option<&'a [u8]> {
    let at = bytes.windows(needle.len()).position(|w| w == needle)?;
    Some(&bytes[at + needle.len()..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_the_banners() {
        let banner =
            b"\0GNU C Library (Debian GLIBC 2.36-9+deb12u14) stable release version 2.36.\nCopyright";
        assert_eq!(glibc_version(banner).as_deref(), Some("2.36"));
        assert_eq!(glibc_version(b"GNU C Library version \n"), None);
        assert_eq!(musl_version(b"abc\x001.2.5\x00").as_deref(), Some("1.2.5"));
        assert_eq!(musl_version(b"abc\x001.2\x001.a.3\x00"), None);
    }
}
