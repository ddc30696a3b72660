//! A program of `fixtures/stacks` running on an interpreter, for the tests of what is read of CPython.
#![allow(dead_code)] // each test binary uses a part of this

pub mod library_files;

use crate::common::{Python, pythons};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// Every interpreter to test with.
pub fn interpreters() -> Vec<Python> {
    assert!(!pythons().is_empty(), "there is no interpreter at all to test with");
    pythons().to_vec()
}

/// A program running on an interpreter; killed when dropped.
pub struct Program {
    child: Child,
    pub stdin: Option<ChildStdin>,
    pub stdout: BufReader<ChildStdout>,
    copied: Option<PathBuf>,
}

impl Program {
    /// Starts `fixtures/stacks/NAME` on `interpreter`.
    pub fn start(interpreter: &Python, name: &str) -> Self {
        Self::start_with(interpreter, name, &[])
    }

    /// The same with environment variables.
    pub fn start_with(interpreter: &Python, name: &str, settings: &[(&str, &str)]) -> Self {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/stacks").join(name);
        let (script, copied) = match &interpreter.root {
            None => (fixture, None),
            // A chrooted interpreter sees only what lies in its root.
            Some(root) => {
                static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
                let unique = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let inside = format!("tmp/heaptap-{}-{unique}-{name}", std::process::id());
                std::fs::create_dir_all(root.join("tmp")).expect("a tmp folder in the root");
                std::fs::copy(fixture, root.join(&inside)).expect("copy of the fixture");
                (Path::new("/").join(&inside), Some(root.join(inside)))
            }
        };
        let mut child = Command::new(&interpreter.command)
            .arg(script)
            .env("PYTHONIOENCODING", "utf-8")
            .env("PYTHONUTF8", "1")
            .envs(settings.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{}: {e}", interpreter.command.display()));
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        Self { child, stdin, stdout, copied }
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// The next line it prints; it must print one.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("readable");
        assert!(!line.is_empty(), "the program ended without a word");
        line
    }

    pub fn say(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().expect("still open");
        writeln!(stdin, "{line}").and_then(|()| stdin.flush()).expect("the program listens");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Whether it is still there does not matter; that it is reaped does.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(copied) = &self.copied {
            let _ = std::fs::remove_file(copied);
        }
    }
}
