//! Libraries of `fixtures/native`, compiled.

use std::path::{Path, PathBuf};
use std::process::Command;

/// `allocates.cpp`, into a folder.
pub fn allocates(folder: &Path) -> PathBuf {
    let library = folder.join("allocates.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/native/allocates.cpp");
    let mut compiler = Command::new("c++");
    compiler
        .args(["-shared", "-fPIC", "-O2", "-g", "-std=c++17", "-pthread", "-o"])
        .arg(&library)
        .arg(source);
    assert!(compiler.status().expect("c++ is needed").success());
    library
}
