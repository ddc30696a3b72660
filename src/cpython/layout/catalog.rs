//! The layout files that are built in.

use super::LayoutError;
use super::file::LayoutFile;
use crate::cpython::version::{Flavour, PythonVersion};
use std::sync::OnceLock;

macro_rules! embedded {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../../cpython-layouts/", $name)))),*]
    };
}

/// Name and text of every file in `cpython-layouts` (a test compares with the folder).
pub const FILES: &[(&str, &str)] = embedded![
    "3.8.toml",
    "3.9.toml",
    "3.10.toml",
    "3.11.toml",
    "3.11d.toml",
    "3.12.toml",
    "3.13.toml",
    "3.13d.toml",
    "3.13t.toml",
    "3.14.toml",
    "3.14t.toml",
    "3.15.toml",
    "3.15t.toml",
];

/// The parsed files.
pub fn files() -> Result<&'static [LayoutFile], LayoutError> {
    static PARSED: OnceLock<Result<Vec<LayoutFile>, String>> = OnceLock::new();
    let parsed = PARSED.get_or_init(|| {
        FILES.iter().map(|(name, text)| LayoutFile::parse(name, text).map_err(|e| e.to_string())).collect()
    });
    match parsed {
        Ok(files) => Ok(files),
        Err(what) => Err(LayoutError::File { file: "built in".into(), what: what.clone() }),
    }
}

/// The file for a version and flavour. A debug build without a file of its own is refused like any unknown one.
pub fn find(version: PythonVersion, flavour: Flavour) -> Result<&'static LayoutFile, LayoutError> {
    let minor = format!("{}.{}", version.major, version.minor);
    files()?.iter().find(|f| f.minor == minor && f.flavour == flavour).ok_or_else(|| LayoutError::Unknown {
        version,
        flavour,
        supported: supported(),
    })
}

/// What the catalogue has, in words.
pub fn supported() -> String {
    let name = |f: &LayoutFile| match f.flavour {
        Flavour::Default => f.minor.clone(),
        flavour => format!("{} ({flavour})", f.minor),
    };
    files().map(|files| files.iter().map(name).collect::<Vec<_>>().join(", ")).unwrap_or_default()
}
