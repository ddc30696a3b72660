//! What the tests of the jump kind's hard cases share: the library of native misbehaviour, a thread led by single steps to a
//! place of the test's choice, and what heaptap says in its log.
#![allow(dead_code, reason = "every test binary compiles this module and uses a part of it")]

pub mod storm;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use heaptap::inferior::maps;
use heaptap::probe::detour::Detour;
use heaptap::recorder::examine::{Kind, examine};
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::common::{Python, Target};

/// The default of `heaptap attach`.
pub const SAMPLED: &[&str] = &["--sample", "512KiB"];

/// Interpreters of this machine: a library compiled here is not one for another root. 3.11, or those that `HEAPTAP_TEST_PYTHON`
/// names.
pub fn of_this_machine(python: &Python) -> bool {
    let named = std::env::var_os("HEAPTAP_TEST_PYTHON").is_some_and(|names| !names.is_empty());
    python.records_promised(crate::common::Kind::Jump)
        && python.root.is_none()
        && (named || python.name.starts_with("pyenv-3.11"))
}

/// `fixtures/native/hostile.c`, compiled into `folder`.
fn native(folder: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/native/hostile.c");
    let library = folder.join("hostile.so");
    let compiled = Command::new("cc")
        .args(["-O1", "-shared", "-fPIC", "-pthread", "-o"])
        .arg(&library)
        .arg(source)
        .status()
        .expect("cc is needed");
    assert!(compiled.success());
    library
}

/// `hostile.py` with its library.
pub fn start(python: &Python, folder: &Path) -> Target {
    let library = native(folder);
    Target::builder(python, "hostile.py").env("HEAPTAP_NATIVE", library.to_str().unwrap()).start()
}

/// Calls a function of the library and answers what it returned.
pub fn call(target: &mut Target, words: &str) -> i64 {
    target.send(&format!("call {words}"));
    target.expect("called")["result"].as_i64().unwrap()
}

/// The plan for malloc: where the jump is (to be), and the bytes that it covers.
pub struct MallocJump {
    /// Where the jump is written.
    pub at: u64,
    /// The first byte that is executed in place again.
    pub rest: u64,
}

/// As heaptap plans it.
pub fn malloc_jump(target: &Target) -> MallocJump {
    let examined = examine(target.pid(), Kind::Jump, false).unwrap();
    let malloc = examined.plan.entries.iter().find(|e| e.names.contains(&"malloc")).unwrap();
    let detour = Detour::plan(malloc).unwrap();
    MallocJump { at: detour.patch_at().0, rest: detour.rest().0 }
}

/// The executable region of heaptap's in a target, from its header on.
pub fn region(target: &Target) -> std::ops::Range<u64> {
    let memory = heaptap::inferior::memory::ProcessMemory::new(target.pid());
    let found = heaptap::probe::stale::find_in(target.pid(), &memory, &maps::mappings(target.pid()).unwrap());
    let base = found.first().expect("heaptap is in the target").base.0;
    base..base + heaptap::probe::region::REGION_LEN as u64
}

/// A thread under the test's own trace.
pub struct Stepped(Pid);

impl Stepped {
    pub fn seize(tid: i64) -> Self {
        let tid = Pid::from_raw(tid as i32);
        ptrace::seize(tid, ptrace::Options::empty()).unwrap();
        ptrace::interrupt(tid).unwrap();
        let stepped = Self(tid);
        stepped.wait();
        stepped
    }

    fn wait(&self) -> WaitStatus {
        waitpid(self.0, Some(WaitPidFlag::__WALL)).unwrap()
    }

    pub fn rip(&self) -> u64 {
        ptrace::getregs(self.0).unwrap().rip
    }

    pub fn step(&self) -> u64 {
        ptrace::step(self.0, None).unwrap();
        let status = self.wait();
        assert!(matches!(status, WaitStatus::Stopped(_, Signal::SIGTRAP)), "{status:?}");
        self.rip()
    }

    /// Steps until `there` holds of the instruction pointer, the one before it given first.
    pub fn step_until(&self, mut there: impl FnMut(u64, u64) -> bool) -> u64 {
        let mut before = self.rip();
        for _ in 0..200_000 {
            let now = self.step();
            if there(before, now) {
                return now;
            }
            before = now;
        }
        panic!("the thread never comes there; it is at {before:#x}");
    }

    /// Lets it go on as if nobody had been there.
    pub fn let_go_on(self) {
        ptrace::detach(self.0, None).unwrap();
    }

    /// Lets it go where it stands with this signal: SIGSTOP stops the process right there.
    pub fn let_go(self, signal: Signal) {
        ptrace::detach(self.0, Some(signal)).unwrap();
    }
}

/// Waits until a file of /proc says so.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < Duration::from_secs(20), "{what} never comes");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until job control has stopped the process.
pub fn wait_until_stopped(pid: i32) {
    wait_until("the stop", || {
        std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|stat| stat.rsplit_once(')').is_some_and(|(_, rest)| rest.starts_with(" T")))
    });
}
