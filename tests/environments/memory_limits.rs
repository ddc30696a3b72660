//! Targets in control groups with a memory limit: refused where what recording adds has no room, recorded where it has, and told
//! apart when the kernel's OOM killer ends them.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::{a_few, assert_refused, refusal};
use crate::common::heaptap::heaptap_says;
use crate::common::sites::{moments, over_all};
use crate::common::snapshot::assert_left_no_trace;
use crate::common::truth::Truth;
use crate::common::{Kind, Python, Recording, Snapshot, Target, for_each_kind, skipped};

const KIB: u64 = 1024;

/// A control group of this test's own, version 1 or 2; gone when dropped.
struct Group {
    folder: PathBuf,
    limit: &'static str,
    used: &'static str,
}

impl Group {
    /// `None`, said loudly, where this machine lets us make none.
    fn new() -> Option<Group> {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("heaptap-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let v1 = ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes");
        let v2 = ("/sys/fs/cgroup", "memory.max", "memory.current");
        for (mount, limit, used) in [v1, v2] {
            let group = Group { folder: Path::new(mount).join(&name), limit, used };
            if fs::create_dir(&group.folder).is_ok() {
                if group.folder.join(limit).exists() {
                    return Some(group);
                }
                // No memory controller down here.
                drop(group);
            }
        }
        skipped("a control group with a memory limit: none can be made below /sys/fs/cgroup");
        None
    }

    fn number(&self, file: &str) -> u64 {
        let text = fs::read_to_string(self.folder.join(file)).unwrap();
        text.trim().parse().unwrap_or_else(|_| panic!("{file}: {text}"))
    }

    fn stat(&self, name: &str) -> u64 {
        let text = fs::read_to_string(self.folder.join("memory.stat")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.parse().ok()).unwrap_or(0)
    }

    /// Whether a statistic comes to be larger than that. The kernel gathers what its processors count every two seconds.
    fn has_more(&self, name: &str, than: u64) -> bool {
        let started = Instant::now();
        while self.stat(name) <= than {
            if started.elapsed() > Duration::from_secs(20) {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        true
    }

    fn used(&self) -> u64 {
        self.number(self.used)
    }

    fn set_limit(&self, bytes: u64) {
        fs::write(self.folder.join(self.limit), bytes.to_string()).unwrap();
    }

    /// Limits the group so that this much is left, droppable pages aside.
    fn leave(&self, bytes: u64) {
        self.set_limit(self.used() - self.stat("inactive_file") + bytes);
    }

    fn start(&self, python: &Python, program: &str) -> Target {
        let enter = format!("echo 0 > '{}/cgroup.procs' && exec \"$@\"", self.folder.display());
        Target::builder(python, program).under(&["sh", "-c", &enter, "sh"]).start()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Its processes have been waited for; the kernel may take a moment more.
        for _ in 0..100 {
            match fs::remove_dir(&self.folder) {
                Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                _ => return,
            }
        }
    }
}

#[test]
fn a_target_whose_group_has_no_room_is_refused_and_one_that_has_is_recorded() {
    for_each_kind(
        |python, kind| a_few(python, kind) && kind == Kind::Jump,
        |python, _| {
            let Some(group) = Group::new() else { return };
            let mut target = group.start(python, "hungry.py");
            let pid = target.pid();
            let before = Snapshot::take(pid);
            group.leave(300 * KIB);
            for how in [&["--exact"][..], &["--sample", "64KiB"]] {
                let said = refusal(pid, how);
                assert_refused(&said, &["control group", &pid.to_string(), "KiB left", "limit"]);
            }
            let doctor = heaptap_says(3, &["doctor", "--pid", &pid.to_string()]);
            assert!(String::from_utf8_lossy(&doctor.stdout).contains("control group"));
            assert_left_no_trace(&before, &mut target);

            // Room for it, and little more.
            group.leave(8 << 20);
            let (used, shared) = (group.used(), group.stat("shmem"));
            let recording = Recording::attach(&target, &[]);
            let truth = Truth::from_json(target.go());
            // The target fills its ring: its group is charged for that, whoever made it.
            assert!(group.has_more("shmem", shared), "the ring is not charged to the target's group");
            let added = group.used().saturating_sub(used);
            assert!(added < 4 << 20, "recording added {added} bytes");
            truth.assert_matches(&recording.stop().assert_code(0).dump());
            assert_left_no_trace(&before, &mut target);
        },
    );
}

/// heaptap is outside the group: what was live when the kernel struck is in the file.
#[test]
fn a_target_that_the_oom_killer_ends_has_its_last_snapshot() {
    for_each_kind(a_few, |python, kind| {
        let Some(group) = Group::new() else { return };
        let mut target = group.start(python, "hungry.py");
        group.set_limit(96 << 20);
        let recording = Recording::attach(&target, &kind.with(&["--snapshot-every", "1h"]));
        let truth = target.go();
        target.send("eat");
        let capture = recording.finish();
        assert_eq!(target.wait().signal(), Some(Signal::SIGKILL as i32));
        capture.assert_code(0);
        assert!(capture.stderr.contains("OOM killer"), "{}", capture.stderr);
        let found = moments(&capture.path);
        assert_eq!(found.last().map(|moment| moment.reason.as_str()), Some("end"));
        let claim = &truth["records"][0];
        let [live, ..] = over_all(&found, "working", claim["line"].as_u64().unwrap());
        assert_eq!(live, (9 * 1807, 9));
        // What it choked on is named.
        let table = capture.report("table", &["--leaks"]);
        assert!(table.contains("eating"), "{table}");
    });
}

#[test]
fn the_kernels_oom_killer_is_told_from_another_sigkill() {
    for_each_kind(a_few, |python, kind| {
        let Some(group) = Group::new() else { return };
        let mut target = group.start(python, "hungry.py");
        group.set_limit(96 << 20);
        let recording = Recording::attach(&target, &kind.with(&[]));
        let truth = Truth::from_json(target.go());
        target.send("eat");
        let capture = recording.finish();
        assert_eq!(target.wait().signal(), Some(Signal::SIGKILL as i32));
        truth.assert_matches(&capture.assert_code(0).dump());
        let stats = capture.report("stats", &[]);
        for told in [&stats, &capture.stderr] {
            assert!(told.contains("killed by SIGKILL") && told.contains("OOM killer"), "{told}");
        }

        let mut target = group.start(python, "hungry.py");
        let recording = Recording::attach(&target, &kind.with(&[]));
        target.go();
        target.signal(Signal::SIGKILL);
        let capture = recording.finish();
        target.wait();
        assert!(capture.stderr.contains("killed by SIGKILL"), "{}", capture.stderr);
        assert!(!capture.stderr.contains("OOM killer"), "{}", capture.stderr);
    });
}
