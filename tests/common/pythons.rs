//! Which CPython builds there are to test on: pyenv's, Debian's own, and those of `scripts/fetch-interpreters`.
//!
//! `HEAPTAP_TEST_PYTHON=3.11` (or `3.13t`, `3.11.7`, `debian-3.14`, or several with commas) narrows the set.
//! Knows nothing of what is run on them.

use std::any::Any;
use std::env;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

use serde::Deserialize;

use super::Kind;

/// How an interpreter was configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Flavour {
    /// The ordinary build.
    Default,
    /// `--disable-gil`.
    FreeThreaded,
    /// `--with-pydebug`.
    Debug,
}

/// One interpreter that can be started.
#[derive(Clone, Debug)]
pub struct Python {
    /// `pyenv-3.11.7`, `system-3.11`, `debian-3.14`, …
    pub name: String,
    /// Full version, as `sys.version_info` has it.
    pub version: String,
    /// Its configuration.
    pub flavour: Flavour,
    /// `glibc` or `musl`.
    pub libc: String,
    /// What to start; it becomes the interpreter without changing its pid.
    pub command: PathBuf,
    /// The file that holds the interpreter, executable or library.
    pub binary: PathBuf,
    /// The folder it is chrooted into. Files given to it must lie inside.
    pub root: Option<PathBuf>,
    /// A folder with detached debug information.
    pub debug_dir: Option<PathBuf>,
}

/// `about.json` of a fetched interpreter.
#[derive(Deserialize)]
struct About {
    name: String,
    version: String,
    flavour: Flavour,
    libc: String,
    exe: PathBuf,
    root: Option<PathBuf>,
    debug_dir: Option<PathBuf>,
}

/// What a machine that is set up for the tests has.
const EXPECTED: &[&str] = &[
    "pyenv-3.8",
    "pyenv-3.9",
    "pyenv-3.10",
    "pyenv-3.11",
    "pyenv-3.12",
    "pyenv-3.13",
    "debian-3.9",
    "debian-3.11",
    "debian-3.13",
    "debian-3.14",
    "debian-3.15",
    "debian-3.11d",
    "debian-3.13d",
    "embed-3.11",
    "freeze-3.13t",
    "freeze-3.14t",
    "freeze-3.15t",
    "musl-3.14",
    "musl-3.14t",
];

/// The python of an environment with these packages, or why there is none.
pub fn environment(python: &Python, packages: &[&str]) -> Result<PathBuf, String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/test-environment");
    let output =
        Command::new(script).arg(&python.command).args(packages).output().map_err(|e| e.to_string())?;
    if output.status.success() {
        Ok(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
    } else {
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }
}

impl fmt::Display for Python {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} ({} {:?}, {})", self.name, self.version, self.flavour, self.libc)
    }
}

impl Python {
    /// The minor version: 11 for 3.11.7.
    pub fn minor(&self) -> u32 {
        self.version.split('.').nth(1).and_then(|minor| minor.parse().ok()).expect("a version is 3.N.M")
    }

    /// True for the builds that allocation records by this kind of breakpoint are promised for.
    pub fn records_promised(&self, kind: Kind) -> bool {
        promised(self.flavour, &self.libc, kind)
    }

    /// A command that becomes this interpreter, without the caller's Python settings.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.command);
        for name in
            ["PYTHONHOME", "PYTHONPATH", "PYTHONMALLOC", "PYTHONSTARTUP", "LD_PRELOAD", "HEAPTAP_PRELOAD"]
        {
            command.env_remove(name);
        }
        command.env("PYTHONDONTWRITEBYTECODE", "1").env("PYTHONUTF8", "1");
        command
    }

    fn matches(&self, wanted: &str) -> bool {
        let suffix = match self.flavour {
            Flavour::Default => "",
            Flavour::FreeThreaded => "t",
            Flavour::Debug => "d",
        };
        wanted == self.name || wanted == self.version || wanted == format!("3.{}{suffix}", self.minor())
    }
}

/// What README's table of versions says, and the live tests hold.
pub fn promised(flavour: Flavour, libc: &str, kind: Kind) -> bool {
    match kind {
        Kind::Trap => flavour != Flavour::FreeThreaded && libc == "glibc",
        Kind::Jump => true,
    }
}

/// Where `scripts/fetch-interpreters` puts its work.
pub fn cache() -> PathBuf {
    env::var_os("HEAPTAP_PYTHONS").map(PathBuf::from).unwrap_or_else(|| home().join(".cache/heaptap/pythons"))
}

fn home() -> PathBuf {
    env::var_os("HOME").map(PathBuf::from).unwrap_or_else(|| PathBuf::from("/"))
}

/// Every interpreter to be tested on, found once; missing ones are named.
pub fn pythons() -> &'static [Python] {
    static FOUND: OnceLock<Vec<Python>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let mut found = Vec::new();
        add_pyenv(&mut found);
        add_system(&mut found);
        add_fetched(&mut found);
        if let Some(wanted) = env::var("HEAPTAP_TEST_PYTHON").ok().filter(|wanted| !wanted.is_empty()) {
            found.retain(|python| wanted.split(',').any(|word| python.matches(word.trim())));
            assert!(!found.is_empty(), "HEAPTAP_TEST_PYTHON={wanted} matches no interpreter on this machine");
        } else {
            name_missing(&found);
        }
        found
    })
}

fn name_missing(found: &[Python]) {
    for expected in EXPECTED {
        let there = found.iter().any(|python| {
            python.name == *expected
                || python.name.strip_prefix(expected).is_some_and(|rest| rest.starts_with('.'))
        });
        if !there {
            super::missing(&format!(
                "interpreter {expected}: not on this machine (scripts/fetch-interpreters, pyenv)"
            ));
        }
    }
}

fn add_pyenv(found: &mut Vec<Python>) {
    let root = env::var_os("PYENV_ROOT").map(PathBuf::from).unwrap_or_else(|| home().join(".pyenv"));
    let Ok(versions) = root.join("versions").read_dir() else { return };
    let mut names: Vec<String> =
        versions.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names
        .sort_by_key(|name| name.split('.').map(|part| part.parse::<u32>().unwrap_or(0)).collect::<Vec<_>>());
    for version in names {
        let minor = version.strip_prefix("3.").and_then(|rest| rest.split('.').next()?.parse::<u32>().ok());
        let Some(minor @ 8..=15) = minor else { continue };
        let command = root.join("versions").join(&version).join(format!("bin/python3.{minor}"));
        if command.exists() {
            let name = format!("pyenv-{version}");
            let library = root.join("versions").join(&version).join(format!("lib/libpython3.{minor}.so.1.0"));
            let binary = if library.exists() { library } else { command.clone() };
            found.push(Python {
                name,
                version,
                flavour: Flavour::Default,
                libc: "glibc".into(),
                command,
                binary,
                root: None,
                debug_dir: None,
            });
        }
    }
}

fn add_system(found: &mut Vec<Python>) {
    let command = Path::new("/usr/bin/python3.11");
    let Ok(said) = Command::new(command).arg("--version").output() else { return };
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    if let Some(version) = said.trim().strip_prefix("Python ") {
        found.push(Python {
            name: "system-3.11".into(),
            version: version.into(),
            flavour: Flavour::Default,
            libc: "glibc".into(),
            command: command.into(),
            binary: command.into(),
            root: None,
            debug_dir: None,
        });
    }
}

fn add_fetched(found: &mut Vec<Python>) {
    let Ok(entries) = cache().read_dir() else { return };
    let mut folders: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    folders.sort();
    for folder in folders {
        let Ok(text) = std::fs::read_to_string(folder.join("about.json")) else { continue };
        let About { name, version, flavour, libc, exe, root, debug_dir } = serde_json::from_str(&text)
            .unwrap_or_else(|error| panic!("{}/about.json: {error}", folder.display()));
        let command = folder.join("run");
        found.push(Python { name, version, flavour, libc, command, binary: exe, root, debug_dir });
    }
}

/// Runs `body` on every interpreter that `filter` takes; a failure on one does not hide the others.
///
/// `HEAPTAP_TEST_JOBS` (default 2) interpreters are tested at a time.
pub fn for_each_python(filter: impl Fn(&Python) -> bool, body: impl Fn(&Python) + Sync) {
    for_each(pythons().iter().filter(|python| filter(python)).collect(), |python| body(python));
}

/// Runs `body` on every one, as [`for_each_python`] does.
pub fn for_each<T: fmt::Display + Sync>(chosen: Vec<T>, body: impl Fn(&T) + Sync) {
    let jobs = env::var("HEAPTAP_TEST_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(2);
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(one) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| body(one))) {
                        failed
                            .lock()
                            .expect("no panic while held")
                            .push(format!("== {one}\n{}", message(&*panic)));
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().expect("no panic while held");
    assert!(failed.is_empty(), "failed on {} of them:\n{}", failed.len(), failed.join("\n\n"));
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let owned = panic.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without a message")
}
