//! Builds the in-target agent (`src/agent/`) with the compiler that builds heaptap, and checks that the image is what the
//! loader can map: no library, no thread-local storage, only relative relocations, a bounded size.

use goblin::elf::Elf;
use goblin::elf::program_header::{PF_W, PT_INTERP, PT_LOAD, PT_TLS};
use goblin::elf::reloc::R_X86_64_RELATIVE;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The most an image may take in the target, in bytes.
const MAX_IMAGE: u64 = 64 << 10;

fn main() {
    println!("cargo::rerun-if-changed=src/agent");
    println!("cargo::rerun-if-changed=src/agent_abi.rs");
    println!("cargo::rerun-if-changed=src/agent_abi");
    println!("cargo::rerun-if-changed=src/unwind_abi.rs");
    println!("cargo::rerun-if-changed=build.rs");
    let target = env::var("TARGET").unwrap_or_default();
    assert!(
        target.starts_with("x86_64-") && target.contains("linux"),
        "heaptap runs on x86_64 Linux; this is a build for {target}"
    );
    let image = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("agent.so");
    build(&image, &target);
    check(&image);
}

fn build(image: &Path, target: &str) {
    let rustc = env::var_os("RUSTC").expect("cargo sets RUSTC");
    let mut command = Command::new(rustc);
    command
        .args(["--edition", "2024", "--crate-name", "heaptap_agent", "--crate-type", "cdylib"])
        .args(["--target", target, "--cap-lints", "warn"])
        .args(["-C", "opt-level=3", "-C", "panic=abort", "-C", "codegen-units=1", "-C", "debuginfo=0"])
        .args(["-C", "relocation-model=pic", "-C", "overflow-checks=off", "-C", "debug-assertions=off"])
        // No vector register is to be touched: see src/agent/lib.rs.
        .args(["-C", "no-vectorize-loops", "-C", "no-vectorize-slp", "-C", "target-feature=-sse,-sse2"])
        .args(["-C", "force-frame-pointers=no", "-C", "force-unwind-tables=no", "-C", "strip=debuginfo"]);
    if let Some(linker) = env::var_os("RUSTC_LINKER") {
        command.arg("-C").arg([std::ffi::OsStr::new("linker="), &linker].concat_os());
    }
    for arg in [
        "-nostdlib",
        "-nostartfiles",
        "-Wl,-z,defs,-z,norelro,-z,noseparate-code,-Bsymbolic,--gc-sections,--build-id=none,--no-eh-frame-hdr",
    ] {
        command.arg("-C").arg(format!("link-arg={arg}"));
    }
    command.arg("-o").arg(image).arg("src/agent/lib.rs");
    let status = command.status().expect("rustc runs");
    assert!(status.success(), "the agent does not build: {command:?}");
}

trait ConcatOs {
    fn concat_os(&self) -> std::ffi::OsString;
}

impl ConcatOs for [&std::ffi::OsStr; 2] {
    fn concat_os(&self) -> std::ffi::OsString {
        let mut whole = self[0].to_os_string();
        whole.push(self[1]);
        whole
    }
}

fn check(image: &Path) {
    let bytes = std::fs::read(image).expect("the agent was linked");
    let elf = Elf::parse(&bytes).expect("the agent is an ELF file");
    assert!(elf.libraries.is_empty(), "the agent needs {:?}", elf.libraries);
    for header in &elf.program_headers {
        assert!(header.p_type != PT_TLS && header.p_type != PT_INTERP, "the agent has {header:?}");
        // What the linker itself keeps there (the dynamic section) is relocated and never used.
        let writable = header.p_type == PT_LOAD && header.p_flags & PF_W != 0;
        assert!(!writable || header.p_memsz < 1024, "the agent has statics: {header:?}");
    }
    let relocations = elf.dynrelas.iter().chain(elf.dynrels.iter()).chain(elf.pltrelocs.iter());
    for relocation in relocations {
        assert_eq!(relocation.r_type, R_X86_64_RELATIVE, "the agent has {relocation:?}");
    }
    let end = elf.program_headers.iter().filter(|h| h.p_type == PT_LOAD).map(|h| h.p_vaddr + h.p_memsz).max();
    let len = end.expect("the agent has segments");
    assert!(len <= MAX_IMAGE, "the agent takes {len} bytes in the target, more than {MAX_IMAGE}");
}
