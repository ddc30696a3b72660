//! Interpreters for the tests of `cpython`: which are there, and a program running on one.
//!
//! Interpreters come from `$PYENV_ROOT/versions`, from the host, and from the folder that `scripts/fetch-interpreters` fills.
//! `HEAPTAP_TEST_PYTHON=3.11` narrows to names that contain it; `HEAPTAP_REQUIRE_PYTHONS=1` makes a missing one a failure.
#![allow(dead_code)]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// An interpreter to test with.
#[derive(Debug, Clone)]
pub struct Interpreter {
    pub name: String,
    /// What to start.
    pub run: PathBuf,
    /// The file that holds the interpreter, for debug information.
    pub binary: PathBuf,
    pub flavour: String,
    /// Folder it is chrooted to.
    pub root: Option<PathBuf>,
    /// Folder with detached debug information.
    pub debug_dir: Option<PathBuf>,
    pub musl: bool,
}

/// What the full set consists of: a prefix of the name must be found for each.
const EXPECTED: &[&str] = &[
    "pyenv-3.8",
    "pyenv-3.9",
    "pyenv-3.10",
    "pyenv-3.11",
    "pyenv-3.12",
    "pyenv-3.13",
    "debian-3.9",
    "debian-3.11",
    "debian-3.11d",
    "debian-3.13",
    "debian-3.13d",
    "debian-3.14",
    "debian-3.15",
    "embed-3.11",
    "freeze-3.12",
    "freeze-3.13t",
    "freeze-3.14t",
    "freeze-3.15t",
    "musl-3.14",
    "musl-3.14t",
];

/// Every interpreter there is, and a loud word about every one there isn't.
pub fn interpreters() -> Vec<Interpreter> {
    let mut found = pyenv();
    found.extend(fetched());
    let missing: Vec<_> =
        EXPECTED.iter().filter(|e| !found.iter().any(|i| i.name.starts_with(**e))).collect();
    for name in &missing {
        eprintln!("SKIPPED: no interpreter {name}");
    }
    if !missing.is_empty() {
        eprintln!(
            "SKIPPED: {} of {} interpreters (see scripts/fetch-interpreters)",
            missing.len(),
            EXPECTED.len()
        );
        assert!(std::env::var_os("HEAPTAP_REQUIRE_PYTHONS").is_none(), "missing: {missing:?}");
    }
    if let Ok(wanted) = std::env::var("HEAPTAP_TEST_PYTHON") {
        found.retain(|i| i.name.contains(&wanted));
    }
    assert!(!found.is_empty(), "there is no interpreter at all to test with");
    found
}

fn home() -> PathBuf {
    PathBuf::from(std::env::var_os("HOME").unwrap_or_default())
}

fn folders(of: &Path) -> Vec<PathBuf> {
    let mut found: Vec<_> = std::fs::read_dir(of).into_iter().flatten().flatten().map(|e| e.path()).collect();
    found.sort();
    found
}

fn pyenv() -> Vec<Interpreter> {
    let root = std::env::var_os("PYENV_ROOT").map_or_else(|| home().join(".pyenv"), PathBuf::from);
    let minor = |version: &str| version.strip_prefix("3.")?.split('.').next()?.parse::<u32>().ok();
    folders(&root.join("versions"))
        .into_iter()
        .filter_map(|folder| {
            let version = folder.file_name()?.to_str()?.to_owned();
            let minor = minor(&version).filter(|m| (8..=15).contains(m))?;
            let library = folder.join(format!("lib/libpython3.{minor}.so.1.0"));
            let run = folder.join("bin/python");
            let binary = if library.exists() { library } else { run.clone() };
            run.exists().then_some(Interpreter {
                name: format!("pyenv-{version}"),
                run,
                binary,
                flavour: "default".into(),
                root: None,
                debug_dir: None,
                musl: false,
            })
        })
        .collect()
}

fn fetched() -> Vec<Interpreter> {
    let cache = std::env::var_os("HEAPTAP_PYTHONS")
        .map_or_else(|| home().join(".cache/heaptap/pythons"), PathBuf::from);
    folders(&cache)
        .into_iter()
        .filter_map(|folder| {
            let about = std::fs::read(folder.join("about.json")).ok()?;
            let about: serde_json::Value = serde_json::from_slice(&about).expect("about.json is JSON");
            let text = |key: &str| about[key].as_str().map(str::to_owned);
            Some(Interpreter {
                name: text("name")?,
                run: folder.join("run"),
                binary: text("exe")?.into(),
                flavour: text("flavour")?,
                root: text("root").map(PathBuf::from),
                debug_dir: text("debug_dir").map(PathBuf::from),
                musl: text("libc").as_deref() == Some("musl"),
            })
        })
        .collect()
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
    pub fn start(interpreter: &Interpreter, name: &str) -> Self {
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
        let mut child = Command::new(&interpreter.run)
            .arg(script)
            .env("PYTHONIOENCODING", "utf-8")
            .env("PYTHONUTF8", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{}: {e}", interpreter.run.display()));
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
