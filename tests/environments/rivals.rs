//! Others at work on the same target: a second heaptap, debuggers, uprobes; and what a killed heaptap left.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use goblin::elf::Elf;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{a_few, assert_refused, detach, is_root, refusal, said};
use crate::common::heaptap::detach_in_the_end;
use crate::common::snapshot::assert_left_no_trace;
use crate::common::truth::Truth;
use crate::common::{
    Kind, Recording, Snapshot, Target, for_each_kind, for_each_python, missing, pythons, skipped,
};

#[test]
fn a_second_heaptap_is_refused_and_the_first_goes_on() {
    for_each_kind(a_few, |python, kind| {
        let mut target = Target::start(python, "libc_blocks.py");
        let before = Snapshot::take(target.pid());
        let recording = Recording::attach(&target, &kind.with(&[]));
        // While jumps record, nobody traces.
        let why = match kind {
            Kind::Jump => "holds probes",
            Kind::Trap => "already traced",
        };
        for other in Kind::all() {
            assert_refused(
                &refusal(target.pid(), &other.with(&[])),
                &[why, &recording.pid().to_string(), "heaptap"],
            );
        }
        let output = detach(&target);
        assert_eq!(output.status.code(), Some(3), "detach while a heaptap records: {}", said(&output));
        assert!(said(&output).contains(&recording.pid().to_string()), "{}", said(&output));
        let truth = Truth::from_json(target.go());
        let capture = recording.stop();
        truth.assert_matches(&capture.assert_code(0).dump());
        assert_left_no_trace(&before, &mut target);
    });
}

/// A debugger at work; ended by SIGTERM, by pid, when dropped.
struct Debugger(Child);

impl Debugger {
    fn start(command: &mut Command, pid: i32) -> std::io::Result<Debugger> {
        let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let debugger = Debugger(child);
        let started = Instant::now();
        while tracer(pid) == 0 {
            assert!(started.elapsed() < Duration::from_secs(20), "{command:?} never attached");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(debugger)
    }
}

impl Drop for Debugger {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0.id() as i32), Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

fn tracer(pid: i32) -> i32 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the target lives");
    let line = status.lines().find_map(|line| line.strip_prefix("TracerPid:")).expect("a tracer");
    line.trim().parse().expect("a pid")
}

#[test]
fn a_debugger_is_left_alone() {
    for_each_kind(a_few, |python, kind| {
        let mut target = Target::start(python, "libc_blocks.py");
        let before = Snapshot::take(target.pid());
        let pid = target.pid().to_string();
        for (name, words) in
            [("strace", vec!["-o", "/dev/null", "-p", &pid]), ("gdb", vec!["-q", "-nx", "-p", &pid])]
        {
            let debugger = match Debugger::start(Command::new(name).args(words), target.pid()) {
                Ok(debugger) => debugger,
                Err(error) => {
                    missing(&format!("{name}: {error}"));
                    continue;
                }
            };
            let words = ["already traced", name, &tracer(target.pid()).to_string()];
            assert_refused(&refusal(target.pid(), &kind.with(&[])), &words);
            let output = detach(&target);
            assert_eq!(output.status.code(), Some(3), "{}", said(&output));
            drop(debugger);
            assert_left_no_trace(&before, &mut target);
        }
        let recording = Recording::attach(&target, &kind.with(&[]));
        let truth = Truth::from_json(target.go());
        truth.assert_matches(&recording.stop().assert_code(0).dump());
        assert_left_no_trace(&before, &mut target);
    });
}

#[test]
fn detach_finds_nothing_where_nothing_is() {
    for_each_python(
        |python| a_few(python, Kind::Trap),
        |python| {
            let mut target = Target::start(python, "libc_blocks.py");
            let before = Snapshot::take(target.pid());
            let output = detach(&target);
            assert!(output.status.success() && said(&output).contains("nothing"), "{}", said(&output));
            assert_left_no_trace(&before, &mut target);
        },
    );
}

#[test]
fn detach_removes_what_a_killed_heaptap_left() {
    for_each_kind(a_few, |python, kind| {
        for (program, arguments) in [
            ("libc_blocks.py", &[][..]),
            ("small_objects.py", &["--python-allocators"]),
            ("verifying.py", &[]),
        ] {
            for worked in [false, true] {
                let mut target = Target::start(python, program);
                let before = Snapshot::take(target.pid());
                Recording::attach(&target, &kind.with(arguments)).kill();
                if program == "verifying.py" {
                    std::thread::sleep(Duration::from_millis(50 * u64::from(worked)));
                } else if worked {
                    target.go();
                }
                assert!(!before.differences(target.pid()).is_empty(), "the test shows nothing");
                detach_in_the_end(target.pid());
                assert_left_no_trace(&before, &mut target);
                let again = detach(&target);
                assert!(again.status.success() && said(&again).contains("nothing"), "{}", said(&again));
            }
        }
    });
}

/// tracefs, mounted for the test where the machine has it nowhere; unmounted when dropped.
struct Tracefs {
    path: PathBuf,
    mounted: Option<tempfile::TempDir>,
}

impl Tracefs {
    fn find() -> Result<Tracefs, String> {
        for path in ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"] {
            if Path::new(path).join("uprobe_events").exists() {
                return Ok(Tracefs { path: path.into(), mounted: None });
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        let output = mount.args(["-t", "tracefs", "heaptap-test"]).arg(folder.path()).output();
        let output = output.map_err(|error| error.to_string())?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
        }
        let tracefs = Tracefs { path: folder.path().to_owned(), mounted: Some(folder) };
        if tracefs.path.join("uprobe_events").exists() {
            Ok(tracefs)
        } else {
            Err("the kernel has no uprobes".into())
        }
    }

    fn write(&self, file: &str, text: &str) -> std::io::Result<()> {
        use std::io::Write;
        fs::File::options().append(true).open(self.path.join(file))?.write_all(text.as_bytes())
    }
}

impl Drop for Tracefs {
    fn drop(&mut self) {
        if let Some(folder) = &self.mounted {
            let _ = Command::new("umount").arg(folder.path()).status();
        }
    }
}

/// A uprobe in force; taken out when dropped.
struct Uprobe<'a> {
    tracefs: &'a Tracefs,
    name: String,
}

impl<'a> Uprobe<'a> {
    fn plant(tracefs: &'a Tracefs, file: &Path, offset: u64) -> std::io::Result<Uprobe<'a>> {
        let name = format!("heaptap_test_{}", std::process::id());
        tracefs.write("uprobe_events", &format!("p:{name}/malloc {}:{offset:#x}\n", file.display()))?;
        let probe = Uprobe { tracefs, name };
        tracefs.write(&format!("events/{}/enable", probe.name), "1")?;
        Ok(probe)
    }
}

impl Drop for Uprobe<'_> {
    fn drop(&mut self) {
        let _ = self.tracefs.write(&format!("events/{}/enable", self.name), "0");
        let _ = self.tracefs.write("uprobe_events", &format!("-:{}/malloc\n", self.name));
    }
}

/// Where in the file an exported function begins.
fn offset_of(file: &[u8], function: &str) -> u64 {
    let elf = Elf::parse(file).expect("an ELF file");
    let symbol =
        elf.dynsyms.iter().find(|s| elf.dynstrtab.get_at(s.st_name) == Some(function) && s.st_value != 0);
    let address = symbol.expect("libc exports it").st_value;
    let segment = elf.program_headers.iter().find(|p| p.vm_range().contains(&(address as usize)));
    let segment = segment.expect("a segment holds it");
    address - segment.p_vaddr + segment.p_offset
}

fn libc_of(pid: i32) -> PathBuf {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let line = maps.lines().find(|line| line.ends_with("/libc.so.6")).expect("glibc");
    line[line.find('/').unwrap()..].into()
}

#[test]
fn a_uprobe_on_malloc_is_respected() {
    if !is_root("planting a uprobe") {
        return;
    }
    let tracefs = match Tracefs::find() {
        Ok(tracefs) => tracefs,
        Err(why) => return skipped(&format!("a uprobe on malloc: no tracefs ({why})")),
    };
    let python = pythons()
        .iter()
        .find(|p| p.records_promised(Kind::Jump) && p.root.is_none())
        .expect("a Python of this machine");
    // A copy of libc: a uprobe is on a file, in every process that maps it.
    let folder = tempfile::tempdir().unwrap();
    let libc = folder.path().join("libc.so.6");
    fs::copy(libc_of(Target::start(python, "libc_blocks.py").pid()), &libc).unwrap();
    let with_copy = || {
        Target::builder(python, "libc_blocks.py")
            .env("LD_LIBRARY_PATH", folder.path().to_str().unwrap())
            .start()
    };
    let mut target = with_copy();
    assert_eq!(libc_of(target.pid()), libc);
    let offset = offset_of(&fs::read(&libc).unwrap(), "malloc");
    let probe = match Uprobe::plant(&tracefs, &libc, offset) {
        Ok(probe) => probe,
        Err(error) => return skipped(&format!("a uprobe on malloc: {error}")),
    };
    let before = Snapshot::take(target.pid());
    assert_eq!(before.changed_text().len(), 1, "the uprobe is in: {:?}", before.changed_text());
    for kind in Kind::all() {
        assert_refused(&refusal(target.pid(), &kind.with(&[])), &["malloc", "uprobe", "perf"]);
    }
    let output =
        crate::common::heaptap().args(["doctor", "--pid", &target.pid().to_string()]).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "doctor: {}", said(&output));
    assert_eq!(Snapshot::take(target.pid()).changed_text(), before.changed_text());
    assert_left_no_trace(&before, &mut target);
    target.go();
    // Gone, it is no obstacle.
    drop(probe);
    let bare = Snapshot::take(target.pid());
    for kind in Kind::all() {
        let recording = Recording::attach(&target, &kind.with(&[]));
        let truth = Truth::from_json(target.go());
        truth.assert_matches(&recording.stop().assert_code(0).dump());
        assert_left_no_trace(&bare, &mut target);
    }
}
