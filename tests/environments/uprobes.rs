//! uprobes (perf, bpftrace, eBPF profilers) on the functions that heaptap observes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use goblin::elf::Elf;

use super::{assert_refused, is_root, refusal, said};
use crate::common::snapshot::assert_left_no_trace;
use crate::common::truth::Truth;
use crate::common::{Kind, Recording, Snapshot, Target, pythons, skipped};

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
    fn plant(tracefs: &'a Tracefs, file: &Path, function: &str) -> std::io::Result<Uprobe<'a>> {
        let name = format!("heaptap_test_{}_{function}", std::process::id());
        let offset = offset_of(&fs::read(file)?, function);
        tracefs.write("uprobe_events", &format!("p:{name}/hit {}:{offset:#x}\n", file.display()))?;
        let probe = Uprobe { tracefs, name };
        tracefs.write(&format!("events/{}/enable", probe.name), "1")?;
        Ok(probe)
    }
}

impl Drop for Uprobe<'_> {
    fn drop(&mut self) {
        let _ = self.tracefs.write(&format!("events/{}/enable", self.name), "0");
        let _ = self.tracefs.write("uprobe_events", &format!("-:{}/hit\n", self.name));
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
    let probe = match Uprobe::plant(&tracefs, &libc, "malloc") {
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
    // Some that come while heaptap records, and are still there when it leaves. munmap's jump is at its very entry.
    let plant_all = || {
        ["malloc", "free", "realloc", "munmap"]
            .map(|function| Uprobe::plant(&tracefs, &libc, function).expect("one could be planted before"))
    };
    // The kernel maps a page for the instructions under uprobes, and keeps it.
    let probes = plant_all();
    target.go();
    drop(probes);
    let bare = Snapshot::take(target.pid());
    for killed in [false, true] {
        let recording = Recording::attach(&target, &Kind::Jump.with(&[]));
        let probes = plant_all();
        let truth = Truth::from_json(target.go());
        if killed {
            recording.kill();
            crate::common::heaptap::detach_in_the_end(target.pid());
        } else {
            truth.assert_matches(&recording.stop().assert_code(0).dump());
        }
        target.go();
        let text = Snapshot::take(target.pid());
        assert_eq!(text.changed_text().len(), 4, "only the uprobes are in: {:?}", text.changed_text());
        drop(probes);
        target.go();
        assert_left_no_trace(&bare, &mut target);
    }
}
