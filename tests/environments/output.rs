//! Where the capture goes: what is there already, what may not be written, what runs full in mid-recording.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::a_few;
use crate::common::heaptap::report;
use crate::common::sites::{moments, over_all};
use crate::common::snapshot::assert_left_no_trace;
use crate::common::truth::Truth;
use crate::common::{Recording, Snapshot, Target, for_each_kind, pythons, skipped};

/// Attaching with this output must fail (exit 1), name the path and say what to do, and not touch the target.
fn assert_cannot_write(target: &mut Target, path: &Path, arguments: &[&str], words: &[&str]) {
    let before = Snapshot::take(target.pid());
    let said = Recording::try_attach_to(target.pid(), path, arguments).err().expect("no capture can be here");
    assert!(said.contains("exit status: 1"), "{said}");
    for word in words.iter().chain(&["hint", path.to_str().unwrap()]) {
        assert!(said.contains(word), "{word:?} is not in:\n{said}");
    }
    assert_left_no_trace(&before, target);
}

#[test]
fn what_may_not_be_written_over_is_left_alone() {
    let mut target = Target::start(&pythons()[0], "libc_blocks.py");
    let folder = tempfile::tempdir().unwrap();
    let in_folder = |name: &str| folder.path().join(name);
    assert_cannot_write(&mut target, &in_folder("no/such/folder"), &[], &["No such file"]);

    let precious = in_folder("precious");
    fs::write(&precious, "precious").unwrap();
    assert_cannot_write(&mut target, &precious, &[], &["exists", "--force"]);
    symlink(&precious, in_folder("link")).unwrap();
    nix::unistd::mkfifo(&in_folder("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for force in [&[][..], &["--force"]] {
        for (name, what) in [("link", "symbolic link"), ("fifo", "FIFO"), (".", "directory")] {
            assert_cannot_write(&mut target, &in_folder(name), force, &[what]);
        }
        assert_cannot_write(&mut target, Path::new("/dev/zero"), force, &["device"]);
    }
    assert_eq!(fs::read(&precious).unwrap(), b"precious");
    // A refused target costs nothing either: --force writes over the old file only once the target is recordable.
    assert!(Recording::try_attach_to(std::process::id() as i32, &precious, &["--force"]).is_err());
    assert_eq!(fs::read(&precious).unwrap(), b"precious");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3, "nothing was left beside them");
}

#[test]
fn force_writes_over_a_file_and_the_capture_is_the_owners_alone() {
    let mut target = Target::start(&pythons()[0], "libc_blocks.py");
    let before = Snapshot::take(target.pid());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("old.heaptap");
    fs::write(&path, vec![b'x'; 1 << 20]).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    let recording = Recording::try_attach_to(target.pid(), &path, &["--force"]).unwrap();
    let truth = Truth::from_json(target.go());
    let capture = recording.stop();
    truth.assert_matches(&capture.assert_code(0).dump());
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    assert_left_no_trace(&before, &mut target);
}

/// A file system of 64 KiB; unmounted when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Result<SmallDisk, String> {
        let folder = tempfile::tempdir().unwrap();
        let output = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=64k", "heaptap-test"])
            .arg(folder.path())
            .output()
            .map_err(|error| error.to_string())?;
        if output.status.success() {
            Ok(SmallDisk(folder))
        } else {
            Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_disk_that_runs_full_ends_the_recording_and_not_the_target() {
    for_each_kind(a_few, |python, kind| {
        let disk = match SmallDisk::mount() {
            Ok(disk) => disk,
            Err(why) => {
                return skipped(&format!("a disk that runs full: cannot mount a small tmpfs ({why})"));
            }
        };
        let mut target = Target::start(python, "libc_blocks.py");
        let before = Snapshot::take(target.pid());
        let path = disk.path("c.heaptap");
        let recording = Recording::try_attach_to(target.pid(), &path, &kind.with(&[])).unwrap();
        target.go();
        // A flush is due every second: what was recorded until now is on the disk before it runs full.
        std::thread::sleep(Duration::from_millis(1500));
        target.ping();
        let written = fs::metadata(&path).unwrap().len();
        fs::write(disk.path("filler"), vec![0; 1 << 20]).expect_err("the disk is larger than asked for");
        let started = Instant::now();
        while !has_ended(recording.pid()) {
            assert!(started.elapsed() < Duration::from_secs(60), "it never noticed");
            target.go();
        }
        let capture = recording.finish();
        capture.assert_code(1);
        for word in ["No space left", path.to_str().unwrap(), "hint"] {
            assert!(capture.stderr.contains(word), "{word:?} is not in:\n{}", capture.stderr);
        }
        assert_left_no_trace(&before, &mut target);
        // Everything before is there, and a reader is told that it is not all.
        assert!(fs::metadata(&path).unwrap().len() >= written);
        let dump = capture.dump();
        for site in ["temporary", "leaking", "resizing", "large"] {
            assert!(dump.allocations.iter().any(|a| a.stack.iter().any(|f| f.function == site)), "{site}");
        }
        let stats = report(&path, "stats", &[]);
        assert!(
            stats.contains("cut") || stats.contains("no trailer"),
            "stats don't tell of the cut:\n{stats}"
        );
    });
}

#[test]
fn a_disk_that_is_full_for_a_while_costs_snapshots_nothing() {
    let disk = match SmallDisk::mount() {
        Ok(disk) => disk,
        Err(why) => {
            return skipped(&format!("a disk that is full for a while: cannot mount a small tmpfs ({why})"));
        }
    };
    let mut target = Target::start(&pythons()[0], "libc_blocks.py");
    let before = Snapshot::take(target.pid());
    let path = disk.path("c.heaptap");
    let recording =
        Recording::try_attach_to(target.pid(), &path, &["--snapshot-every", "1h", "--exact"]).unwrap();
    fs::write(disk.path("filler"), vec![0; 1 << 20]).expect_err("the disk is larger than asked for");
    target.go();
    let pid = target.pid().to_string();
    let ask = || crate::common::heaptap().args(["snapshot", "--pid", &pid]).output().unwrap();
    // The last page of the file has some room left.
    let mut written = 0;
    let refused = loop {
        let answer = ask();
        if answer.status.code() != Some(0) {
            break answer;
        }
        written += 1;
        assert!(written < 50, "the disk is not full");
    };
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("disk is full"));
    assert_eq!(ask().status.code(), Some(1));
    fs::remove_file(disk.path("filler")).unwrap();
    assert_eq!(ask().status.code(), Some(0));
    let truth = target.go();
    let capture = recording.stop();
    capture.assert_code(0);
    // Said once, and once that it is over.
    let said = |what| capture.stderr.matches(what).count();
    assert_eq!((said("recording goes on in memory"), said("again")), (1, 1), "{}", capture.stderr);
    let found = moments(&path);
    let reasons: Vec<&str> = found.iter().map(|moment| moment.reason.as_str()).collect();
    let asked = vec!["asked"; written + 1];
    assert_eq!(reasons, [&["start"][..], &asked, &["end"]].concat());
    let leaking =
        truth["records"].as_array().unwrap().iter().find(|claim| claim["function"] == "leaking").unwrap();
    let (blocks, size) = (2 * leaking["count"].as_u64().unwrap(), leaking["size"].as_u64().unwrap());
    let [live, allocated, freed] = over_all(&found, "leaking", leaking["line"].as_u64().unwrap());
    assert_eq!((live, allocated, freed), ((blocks * size, blocks), (blocks * size, blocks), (0, 0)));
    assert_left_no_trace(&before, &mut target);
}

fn has_ended(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.is_empty() || stat.contains(") Z ")
}
