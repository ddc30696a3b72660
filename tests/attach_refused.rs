//! What heaptap cannot attach to: refused before anything is written, with exit code 3 (the target) and a message
//! that says what was found and what to do.

mod common;

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{Kind, Recording, Snapshot, Target, heaptap};

const NOBODY: u32 = 65534;

/// A child that is killed by pid and reaped at the end of a test.
struct Reaped(Child);

impl Reaped {
    fn spawn(command: &mut Command) -> std::io::Result<Reaped> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().map(Reaped)
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap()
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// By each kind of breakpoint, which must come to the same.
fn attach(pid: i32) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let told = |kind: Kind| {
        let mut command = heaptap();
        command
            .args(["attach", "--duration", "1s", "--pid", &pid.to_string(), "-o"])
            .arg(folder.path().join("c.heaptap"))
            .args(kind.with(&[]));
        command.output().expect("heaptap starts")
    };
    let (jump, trap) = (told(Kind::Jump), told(Kind::Trap));
    assert_eq!(
        (jump.status, String::from_utf8_lossy(&jump.stderr)),
        (trap.status, String::from_utf8_lossy(&trap.stderr)),
        "the kind of breakpoint is no matter here"
    );
    jump
}

/// Exit code 3, and every one of `words` somewhere in what was said (in any case).
fn assert_refused(output: &Output, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr).to_lowercase();
    assert_eq!(output.status.code(), Some(3), "{said}");
    for word in words {
        assert!(said.contains(&word.to_lowercase()), "{word:?} is not in:\n{said}");
    }
    assert!(said.contains("hint"), "no word of what to do:\n{said}");
}

fn wait_for_state(pid: i32, wanted: char) {
    let started = Instant::now();
    while !fs::read_to_string(format!("/proc/{pid}/stat"))
        .unwrap_or_default()
        .contains(&format!(") {wanted} "))
    {
        assert!(started.elapsed() < Duration::from_secs(10), "{pid} never came into state {wanted}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_pid_that_is_gone() {
    let mut child = Command::new("true").spawn().unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    child.wait().unwrap();
    assert_refused(&attach(pid), &[&pid.to_string(), "no such process"]);
}

#[test]
fn a_zombie() {
    let child = Reaped::spawn(&mut Command::new("true")).unwrap();
    wait_for_state(child.pid(), 'Z');
    assert_refused(&attach(child.pid()), &[&child.pid().to_string(), "zombie"]);
}

#[test]
fn a_kernel_thread() {
    if fs::read_to_string("/proc/2/comm").unwrap_or_default().trim() != "kthreadd" {
        return common::skipped("attaching to a kernel thread: none is visible here");
    }
    assert_refused(&attach(2), &["2", "kernel thread"]);
}

#[test]
fn a_process_without_python() {
    let child = Reaped::spawn(Command::new("sleep").arg("60")).unwrap();
    wait_for_state(child.pid(), 'S');
    let before = Snapshot::take(child.pid());
    assert_refused(&attach(child.pid()), &["python"]);
    assert!(before.differences(child.pid()).is_empty());
}

#[test]
fn a_python_that_is_too_old() {
    let pyenv =
        std::env::var("PYENV_ROOT").unwrap_or_else(|_| format!("{}/.pyenv", std::env::var("HOME").unwrap()));
    let old =
        fs::read_dir(format!("{pyenv}/versions")).into_iter().flatten().flatten().map(|entry| entry.path());
    let old: Vec<PathBuf> = old
        .filter(|path| {
            ["2.7.", "3.6.", "3.7."]
                .iter()
                .any(|minor| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(minor)))
        })
        .collect();
    if old.is_empty() {
        return common::skipped("attaching to a Python older than 3.8: pyenv has none");
    }
    for python in old {
        let minor =
            python.file_name().unwrap().to_string_lossy().split('.').take(2).collect::<Vec<_>>().join(".");
        let mut command = Command::new(python.join("bin/python"));
        let mut child = command
            .args(["-c", "import sys; sys.stdout.write('r'); sys.stdout.flush(); sys.stdin.read()"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        let child = Reaped(child);
        let before = Snapshot::take(child.pid());
        assert_refused(&attach(child.pid()), &[&minor, "3.8"]);
        assert!(before.differences(child.pid()).is_empty());
    }
}

/// A program of 32 bits without libc: `for (;;) pause();`, as the i386 Linux ABI has it.
fn elf32() -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    let code = [0xb8, 29, 0, 0, 0, 0xcd, 0x80, 0xeb, 0xf7]; // mov eax, 29 (pause); int 0x80; jmp back
    let size = 52 + 32 + code.len() as u32;
    let mut file = vec![0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for half in [2_u16, 3] {
        file.extend(half.to_le_bytes()); // ET_EXEC, EM_386
    }
    for word in [1, BASE + 84, 52, 0, 0] {
        file.extend(u32::to_le_bytes(word)); // version, entry, program headers at, no sections, flags
    }
    for half in [52_u16, 32, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    for word in [1, 0, BASE, BASE, size, size, 5, 0x1000] {
        file.extend(u32::to_le_bytes(word)); // PT_LOAD, read and execute
    }
    file.extend(code);
    file
}

#[test]
fn a_process_of_32_bits() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("thirty-two");
    let mut file = fs::File::create(&path).unwrap();
    file.write_all(&elf32()).unwrap();
    file.set_permissions(fs::Permissions::from_mode(0o755)).unwrap();
    drop(file);
    let child = match Reaped::spawn(&mut Command::new(&path)) {
        Ok(child) => child,
        Err(error) => {
            return common::skipped(&format!("a 32-bit process: this kernel does not run one ({error})"));
        }
    };
    wait_for_state(child.pid(), 'S');
    assert_refused(&attach(child.pid()), &["32-bit"]);
}

#[test]
fn a_process_that_is_already_traced() {
    let mut target = Target::start(&common::pythons()[0], "libc_blocks.py");
    let recording = Recording::attach(&target, &Kind::Trap.with(&[]));
    assert_refused(&attach(target.pid()), &["traced", &recording.pid().to_string()]);
    target.go();
    recording.stop().assert_code(0);
    target.ping();
}

#[test]
fn a_process_of_another_user() {
    if !nix::unistd::Uid::effective().is_root() {
        return common::skipped("attaching without rights: the test must be root to become somebody without");
    }
    // The binary and the output must be reachable for that user, wherever the build folder is.
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let binary = folder.path().join("heaptap");
    common::copy_program(assert_cmd::cargo::cargo_bin!("heaptap"), &binary);
    let mut target = Target::start(&common::pythons()[0], "libc_blocks.py");
    let before = Snapshot::take(target.pid());
    for kind in [Kind::Jump, Kind::Trap] {
        let output = Command::new(&binary)
            .args(["attach", "--duration", "1s", "--pid", &target.pid().to_string(), "-o", "c.heaptap"])
            .args(kind.with(&[]))
            .current_dir(folder.path())
            .uid(NOBODY)
            .gid(NOBODY)
            .output()
            .unwrap();
        assert_refused(&output, &["ptrace_scope", "CAP_SYS_PTRACE"]);
    }
    common::snapshot::assert_left_no_trace(&before, &mut target);
}
