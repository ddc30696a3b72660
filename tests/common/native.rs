//! Libraries of `fixtures/native`, compiled.

use std::path::{Path, PathBuf};
use std::process::Command;

/// `allocates.cpp`, into a folder.
pub fn allocates(folder: &Path) -> PathBuf {
    compile("c++", "allocates.cpp", folder)
}

/// A source of `fixtures/native`, into a folder.
pub fn compile(compiler: &str, source: &str, folder: &Path) -> PathBuf {
    compile_with(compiler, &["-O2"], source, folder)
}

/// The same with these flags.
pub fn compile_with(compiler: &str, flags: &[&str], source: &str, folder: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/native").join(source);
    let library = folder.join(source.file_name().expect("a file")).with_extension("so");
    let mut command = Command::new(compiler);
    command.args(["-shared", "-fPIC", "-g", "-pthread"]).args(flags).arg("-o").args([&library, &source]);
    assert!(command.status().unwrap_or_else(|e| panic!("{compiler} is needed: {e}")).success());
    library
}
