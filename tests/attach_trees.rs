//! Attaching to a process with its children: what each allocates once it is recorded is in its own capture and in no other,
//! the index tells what became of each, and whoever goes on carries no trace.

mod common;

use common::heaptap::heaptap_says;
use common::sites::moments;
use common::snapshot::assert_left_no_trace;
use common::{Family, FamilyRecording, Python, Snapshot, Target, for_each_python, pythons, skipped};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::time::{Duration, Instant};

/// The behaviour is the kernel's and multiprocessing's: two interpreters stand for all.
fn a_few(python: &Python) -> bool {
    let chosen = common::soak() || std::env::var_os("HEAPTAP_TEST_PYTHON").is_some();
    // A chrooted one does not see the folder in which members take their orders.
    python.root.is_none()
        && (chosen || ["pyenv-3.11", "pyenv-3.13"].iter().any(|name| python.name.starts_with(name)))
}

/// Members have no pipe to be pinged by: what they look like from outside is compared.
fn assert_member_left_no_trace(before: &Snapshot, pid: i32) {
    let found = before.differences(pid);
    assert!(found.is_empty(), "process {pid} carries traces:\n  {}", found.join("\n  "));
}

fn reason(entry: &Value) -> &str {
    entry["end_reason"]["kind"].as_str().unwrap_or_else(|| panic!("no end: {entry:#}"))
}

#[test]
fn the_children_there_are_are_recorded_each_into_its_own_capture() {
    for_each_python(a_few, |python| {
        let mut family = Family::start(python);
        let root = family.root.pid();
        let child = family.child("fork");
        let grandchild = family.grandchild(child, "subprocess");
        let all = [root, child, grandchild];
        let before = all.map(Snapshot::take);
        let mut recording = FamilyRecording::of(&family.root, &["--children"]);
        recording.wait_for(&all);
        let later = family.child("fork");
        let truths = all.map(|pid| family.work(pid, pid as u32 % 7 + 3));
        family.work(later, 5);
        let captures = recording.stop();
        captures.assert_code(0);
        for (pid, truth) in all.iter().zip(&truths) {
            let entry = captures.entry(*pid);
            truth.assert_matches(&captures.dump(entry));
            assert_eq!((reason(entry), &entry["end_reason"]["signal"]), ("interrupted", &"SIGINT".into()));
            assert_eq!(entry["namespace_pid"], *pid);
        }
        assert_eq!(captures.entry(child)["parent_pid"], root);
        assert_eq!(captures.entry(grandchild)["parent_pid"], child);
        assert!(captures.entries(later).is_empty(), "--children alone follows no forks");
        assert_eq!(captures.index["ended"], "interrupted by SIGINT");
        for (pid, before) in all.iter().zip(&before).skip(1) {
            assert_member_left_no_trace(before, *pid);
        }
        assert_left_no_trace(&before[0], &mut family.root);
    });
}

#[test]
fn children_born_later_are_followed_however_they_are_born() {
    for_each_python(a_few, |python| {
        let mut family = Family::start(python);
        let root = family.root.pid();
        let before = Snapshot::take(root);
        let mut recording = FamilyRecording::of(&family.root, &["--follow-forks"]);
        recording.wait_for(&[root]);
        let mut members = Vec::new();
        for how in ["fork", "thread", "spawn", "forkserver", "subprocess"] {
            let member = family.child(how);
            recording.wait_for(&[member]);
            members.push((member, how));
        }
        let grandchild = family.grandchild(members[0].0, "fork");
        recording.wait_for(&[grandchild]);
        members.push((grandchild, "a fork of a fork"));
        let truths: Vec<_> = members.iter().map(|(pid, _)| family.work(*pid, *pid as u32 % 5 + 2)).collect();
        let captures = recording.stop();
        captures.assert_code(0);
        for ((pid, how), truth) in members.iter().zip(&truths) {
            // One that is attached to between its fork and its exec has an entry for either program.
            let entries = captures.entries(*pid);
            let last = entries.last().unwrap_or_else(|| panic!("{how}: no entry\n{}", captures.said));
            let found = truth.differences(&captures.dump(last));
            assert!(found.is_empty(), "{how}: {}", found.join("\n"));
            let now = Snapshot::take(*pid);
            assert!(now.changed_text().is_empty() && now.is_untraced(), "{how}: {now:#?}");
        }
        // multiprocessing keeps pipes to its children.
        let mut found = before.differences(root);
        found.retain(|difference| {
            !difference.starts_with("new file descriptor") || !difference.contains("pipe:")
        });
        assert!(found.is_empty(), "{found:#?}");
        family.root.ping();
    });
}

#[test]
fn recycled_workers_end_their_captures_and_their_parents_end_does_not_end_the_others() {
    for_each_python(a_few, |python| {
        let mut family = Family::start(python);
        let root = family.root.pid();
        let mut recording = FamilyRecording::of(&family.root, &["--follow-forks"]);
        recording.wait_for(&[root]);
        let mut recycled = Vec::new();
        for number in 0..3 {
            let worker = family.child("fork");
            recording.wait_for(&[worker]);
            let truth = family.work(worker, 4);
            family.order(worker, &format!("exit {number}"));
            recording.wait_for_line(&format!("recorded process {worker} "), 1);
            recycled.push((worker, truth));
        }
        let survivor = family.child("fork");
        recording.wait_for(&[survivor]);
        family.root.send("exit 9");
        recording.wait_for_line(&format!("recorded process {root} "), 1);
        family.order(survivor, "start fork");
        let orphan = family.born();
        recording.wait_for(&[orphan]);
        let truth = family.work(orphan, 6);
        family.order(survivor, "exit 0");
        family.order(orphan, "exit 0");
        let captures = recording.finish();
        captures.assert_code(0);
        for (worker, truth) in &recycled {
            let entry = captures.entry(*worker);
            assert!(["target_exited", "target_gone"].contains(&reason(entry)), "{entry:#}");
            truth.assert_matches(&captures.dump(entry));
        }
        truth.assert_matches(&captures.dump(captures.entry(orphan)));
        assert!(captures.said.contains("every process ended"), "{}", captures.said);
    });
}

#[test]
fn a_program_that_a_member_executes_is_a_capture_of_its_own() {
    for_each_python(a_few, |python| {
        // Another python, where there is one.
        let another = |other: &&Python| other.version != python.version && other.name.starts_with("pyenv-");
        let other = pythons().iter().find(another).unwrap_or(python);
        let mut family = Family::start(python);
        let root = family.root.pid();
        let before = Snapshot::take(root);
        let mut recording = FamilyRecording::of(&family.root, &["--follow-forks"]);
        recording.wait_for(&[root]);
        let member = family.child("fork");
        recording.wait_for(&[member]);
        let first = family.work(member, 3);
        family.order(member, &format!("exec {}", other.command.display()));
        assert_eq!(family.born(), member);
        recording.wait_for_line(&format!("recording process {member}:"), 2);
        let second = family.work(member, 8);
        let captures = recording.stop();
        captures.assert_code(0);
        let entries = captures.entries(member);
        assert_eq!(entries.len(), 2, "{:#}", captures.index);
        assert_eq!(reason(entries[0]), "target_exec");
        first.assert_matches(&captures.dump(entries[0]));
        second.assert_matches(&captures.dump(entries[1]));
        assert_eq!(entries[1]["capture"], format!("{member}-2.heaptap"));
        let now = Snapshot::take(member);
        assert!(now.changed_text().is_empty() && now.is_untraced(), "{now:#?}");
        assert_left_no_trace(&before, &mut family.root);
    });
}

#[test]
fn a_fork_storm_is_recorded_by_so_many_at_once_as_allowed() {
    for_each_python(a_few, |python| {
        let mut family = Family::start(python);
        let root = family.root.pid();
        let before = Snapshot::take(root);
        let mut recording = FamilyRecording::of(&family.root, &["--follow-forks", "--max-processes", "3"]);
        recording.wait_for(&[root]);
        let members: Vec<i32> = (0..5).map(|_| family.child("fork")).collect();
        // Two fit beside the root; the others wait for their turn.
        recording.wait_for_line("recording process", 3);
        family.root.send("storm 150");
        family.root.expect("calm");
        let recorders = children_of(recording.pid());
        assert!(recorders.len() <= 3, "{recorders:?}");
        let first = *members.iter().find(|pid| recording_has(&recording, **pid)).expect("one is recorded");
        family.order(first, "exit 0");
        recording.wait_for_line("recording process", 4);
        let truth = family.work(root, 10);
        let captures = recording.stop();
        captures.assert_code(0);
        truth.assert_matches(&captures.dump(captures.entry(root)));
        let over_limit =
            members.iter().filter(|pid| captures.entry(**pid)["not_recorded"]["kind"] == "over_limit");
        assert!(over_limit.count() >= 1, "{:#}", captures.index);
        for member in members.iter().filter(|member| **member != first) {
            let now = Snapshot::take(*member);
            assert!(now.changed_text().is_empty() && now.is_untraced(), "{now:#?}");
        }
        assert_left_no_trace(&before, &mut family.root);
    });
}

fn recording_has(recording: &FamilyRecording, pid: i32) -> bool {
    recording.said().iter().any(|line| line.starts_with(&format!("recording process {pid}:")))
}

fn children_of(pid: i32) -> Vec<i32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_ascii_whitespace().map(|word| word.parse().expect("a pid")).collect()
}

#[test]
fn what_is_not_python_is_told_of_and_its_children_are_recorded() {
    for_each_python(a_few, |python| {
        // A shell that waits for its python: not Python itself.
        let shell = ["sh", "-c", "\"$@\"; exit", "sh"];
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut target = Target::builder(python, "family.py")
            .arg(folder.path().to_str().expect("text"))
            .under(&shell)
            .start();
        let shell_pid = parent_of(target.pid());
        let before = Snapshot::take(target.pid());
        let pid = shell_pid.to_string();
        let mut recording = FamilyRecording::start(&["--pid", &pid, "--children"]);
        recording.wait_for(&[target.pid()]);
        recording.wait_for_line(&format!("not recorded: process {pid} "), 1);
        let captures = recording.stop();
        captures.assert_code(0);
        assert_eq!(captures.entry(shell_pid)["not_recorded"]["kind"], "not_python");
        assert_left_no_trace(&before, &mut target);
    });
}

fn parent_of(pid: i32) -> i32 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process lives");
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:")).expect("a parent");
    line.trim().parse().expect("a pid")
}

#[test]
fn the_supervisors_death_ends_every_recording_properly() {
    for_each_python(a_few, |python| {
        let mut family = Family::start(python);
        let root = family.root.pid();
        let child = family.child("fork");
        let before = [root, child].map(Snapshot::take);
        let mut recording = FamilyRecording::of(&family.root, &["--children"]);
        recording.wait_for(&[root, child]);
        let truth = family.work(child, 9);
        let recorders = children_of(recording.pid());
        assert_eq!(recorders.len(), 2);
        let captures = recording.stop_by(Signal::SIGKILL);
        let started = Instant::now();
        while recorders.iter().any(|pid| is_heaptap(*pid)) {
            assert!(started.elapsed() < Duration::from_secs(60), "recorders outlive their supervisor");
            std::thread::sleep(Duration::from_millis(5));
        }
        // The index is that of the moment; the captures are whole.
        let entry = captures.entry(child);
        truth.assert_matches(&captures.dump(entry));
        let stats = common::heaptap::report(&captures.capture(entry), "stats", &[]);
        assert!(stats.contains("ended: interrupted by SIGTERM"), "{stats}");
        assert_member_left_no_trace(&before[1], child);
        assert_left_no_trace(&before[0], &mut family.root);
    });
}

fn is_heaptap(pid: i32) -> bool {
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    command.starts_with(b"heaptap")
}

#[test]
fn a_killed_recorder_costs_its_own_capture() {
    for_each_python(a_few, |python| {
        let mut family = Family::start(python);
        let root = family.root.pid();
        let child = family.child("fork");
        let before = Snapshot::take(root);
        let mut recording = FamilyRecording::of(&family.root, &["--children"]);
        recording.wait_for(&[root, child]);
        let of_child = |pid: &&i32| {
            let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&command).contains(&format!("--worker-pid\0{child}\0"))
        };
        let recorder = *children_of(recording.pid()).iter().find(of_child).expect("it has a recorder");
        kill(Pid::from_raw(recorder), Signal::SIGKILL).expect("it runs");
        recording.wait_for_line(&format!("recorded process {child} "), 1);
        let truth = family.work(root, 4);
        let captures = recording.stop();
        captures.assert_code(1);
        assert_eq!(reason(captures.entry(child)), "controller_error");
        truth.assert_matches(&captures.dump(captures.entry(root)));
        common::heaptap::detach_in_the_end(child);
        assert_left_no_trace(&before, &mut family.root);
    });
}

#[test]
fn a_duration_ends_all_and_reports_take_the_folder() {
    for_each_python(a_few, |python| {
        let mut family = Family::start(python);
        let root = family.root.pid();
        let child = family.child("fork");
        let before = Snapshot::take(root);
        let mut recording = FamilyRecording::of(&family.root, &["--children", "--duration", "10s"]);
        recording.wait_for(&[root, child]);
        family.work(root, 10);
        family.work(child, 20);
        let captures = recording.finish();
        captures.assert_code(0);
        assert!(
            [root, child].iter().all(|pid| reason(captures.entry(*pid)) == "duration"),
            "{:#}",
            captures.index
        );
        for verb in ["summary", "table", "tree", "stats"] {
            let document: Value =
                serde_json::from_str(&captures.report(verb, &["--leaks", "--json"])).unwrap();
            assert_eq!(document["run"]["merged"]["captures"].as_array().unwrap().len(), 2, "{verb}");
        }
        // What both kept at one line is one row; kept apart, it is below its process.
        let kept = |arguments: &[&str]| {
            let document: Value = serde_json::from_str(&captures.report("table", arguments)).unwrap();
            let rows = document["allocations"].as_array().unwrap().clone();
            let mut kept: Vec<(Option<i64>, i64, i64)> = (rows.iter())
                .filter(|row| row["function"] == "keep")
                .map(|row| {
                    (row["pid"].as_i64(), row["count"].as_i64().unwrap(), row["bytes"].as_i64().unwrap())
                })
                .collect();
            kept.sort_unstable();
            kept
        };
        assert_eq!(kept(&["--leaks", "--json"]), [(None, 30, 30 * 2029)]);
        let mut apart = [(Some(root.into()), 10, 10 * 2029), (Some(child.into()), 20, 20 * 2029)];
        apart.sort_unstable();
        assert_eq!(kept(&["--leaks", "--json", "--split-processes"]), apart);
        assert_left_no_trace(&before, &mut family.root);
    });
}

/// Options hold for every process of a tree; a signal to the one that was started reaches those that record.
#[test]
fn a_signal_takes_a_snapshot_of_every_process() {
    for_each_python(a_few, |python| {
        let mut family = Family::start(python);
        let root = family.root.pid();
        let child = family.child("fork");
        let before = Snapshot::take(child);
        let mut recording = FamilyRecording::of(&family.root, &["--children", "--snapshot-every", "1h"]);
        recording.wait_for(&[root, child]);
        family.work(child, 3);
        kill(Pid::from_raw(recording.pid()), Signal::SIGUSR1).unwrap();
        let started = Instant::now();
        let has = |pid: i32| {
            let found = moments(&recording.folder().join(format!("{pid}.heaptap")));
            found.iter().any(|moment| moment.reason == "signal")
        };
        while !(has(root) && has(child)) {
            assert!(started.elapsed() < Duration::from_secs(60), "no snapshot was taken");
            std::thread::sleep(Duration::from_millis(50));
        }
        let captures = recording.stop();
        captures.assert_code(0);
        let summary = captures.report("summary", &["--leaks"]);
        assert!(summary.contains("each process's last snapshot"), "{summary}");
        assert_member_left_no_trace(&before, child);
        family.root.ping();
    });
}

#[test]
fn processes_are_selected_by_name() {
    for_each_python(a_few, |python| {
        let mut family = Family::start(python);
        let root = family.root.pid();
        let folder = family.folder_name();
        let before = Snapshot::take(root);
        // One match is recorded into a file; a regular expression and plain text do alike.
        for pattern in [folder.clone(), format!("family[.]py .*{folder}$")] {
            let mut recording = FamilyRecording::start(&["--name-match", &pattern]);
            recording.wait_for(&[root]);
            let truth = family.work(root, 3);
            let captures = recording.stop();
            captures.assert_code(0);
            truth.assert_matches(&common::dump::Dump::parse(&captures.report("dump", &["--json"])));
        }
        let child = family.child("fork");
        let mut recording = FamilyRecording::start(&["--name-match", &folder]);
        recording.wait_for(&[root, child]);
        let truth = family.work(child, 3);
        let captures = recording.stop();
        captures.assert_code(0);
        truth.assert_matches(&captures.dump(captures.entry(child)));
        assert_eq!(captures.index["processes"].as_array().unwrap().len(), 2, "heaptap selects itself");
        assert_left_no_trace(&before, &mut family.root);
    });
    let nobody = heaptap_says(3, &["attach", "--name-match", "no process is called so, surely"]);
    let said = String::from_utf8_lossy(&nobody.stderr).into_owned();
    assert!(said.contains("no process matches the name"), "{said}");
    heaptap_says(2, &["attach", "--name-match", "x", "--pid", "1"]);
    heaptap_says(2, &["attach"]);
}

#[test]
fn processes_are_selected_by_cgroup() {
    for_each_python(a_few, |python| {
        // Interpreters take turns side by side.
        let name = format!("heaptap-test-{}-{}", std::process::id(), python.name);
        let Some(cgroup) = Cgroup::new(&name) else { return skipped("no cgroup can be made here") };
        let mut family = Family::start(python);
        let child = family.child("fork");
        let before = Snapshot::take(child);
        cgroup.take(child);
        let mut recording =
            FamilyRecording::start(&["--cgroup", cgroup.path.to_str().unwrap(), "--children"]);
        recording.wait_for(&[child]);
        let truth = family.work(child, 3);
        let captures = recording.stop();
        captures.assert_code(0);
        truth.assert_matches(&captures.dump(captures.entry(child)));
        assert_eq!(captures.index["processes"].as_array().unwrap().len(), 1, "{:#}", captures.index);
        assert_member_left_no_trace(&before, child);
    });
}

/// A cgroup of our own, of whichever version. Removed in the end.
struct Cgroup {
    path: std::path::PathBuf,
}

impl Cgroup {
    fn new(name: &str) -> Option<Self> {
        let places =
            ["/sys/fs/cgroup", "/sys/fs/cgroup/pids", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/unified"];
        places.iter().map(|place| std::path::Path::new(place).join(name)).find_map(|path| {
            std::fs::create_dir(&path).ok()?;
            let made = Self { path };
            made.path.join("cgroup.procs").exists().then_some(made)
        })
    }

    fn take(&self, pid: i32) {
        std::fs::write(self.path.join("cgroup.procs"), pid.to_string()).expect("it takes processes");
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.path);
    }
}
