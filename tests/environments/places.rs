//! Targets whose files and ids are not what they seem from here: other namespaces, executables replaced since the start.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::{a_few, is_root};
use crate::common::heaptap::heaptap_says;
use crate::common::snapshot::assert_left_no_trace;
use crate::common::truth::Truth;
use crate::common::{Python, Recording, Snapshot, Target, for_each_kind, skipped};

const UNSHARE: &[&str] = &["unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"];

/// `heaptap stacks` on the target shows this function.
fn assert_stacks_show(target: &Target, function: &str) {
    let output = heaptap_says(0, &["stacks", "--json", "--pid", &target.pid().to_string()]);
    let look: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert!(look.to_string().contains(&format!("\"{function}\"")), "{look:#}");
}

#[test]
fn a_target_in_its_own_pid_and_mount_namespace() {
    let works = Command::new(UNSHARE[0]).args(&UNSHARE[1..]).arg("true").output();
    if !works.as_ref().is_ok_and(|output| output.status.success()) {
        return skipped(&format!("a target in its own namespaces: {works:?}"));
    }
    for_each_kind(Python::records_promised, |python, kind| {
        for program in ["libc_blocks.py", "threads.py"] {
            // A chroot's mounts are its own affair.
            let under = if python.root.is_some() { &UNSHARE[..5] } else { UNSHARE };
            let mut target = Target::builder(python, program).under(under).start();
            let status = fs::read_to_string(format!("/proc/{}/status", target.pid())).unwrap();
            let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).expect("namespaces");
            assert_eq!(ids.split_ascii_whitespace().last(), Some("1"), "{ids}");
            let before = Snapshot::take(target.pid());
            assert_stacks_show(&target, "commands");
            let recording = Recording::attach(&target, &kind.with(&[]));
            let truth = Truth::from_json(target.go());
            let capture = recording.stop();
            truth.assert_matches(&capture.assert_code(0).dump());
            assert_left_no_trace(&before, &mut target);
        }
    });
}

/// A Python of this machine whose executable is a copy in `folder`, and the settings it needs.
fn copied(python: &Python, folder: &Path) -> (Python, String) {
    let home = python.command.parent().and_then(Path::parent).expect("PREFIX/bin/python");
    let command = folder.join("python");
    crate::common::copy_program(&python.command, &command);
    (Python { command, ..python.clone() }, home.to_str().unwrap().to_owned())
}

#[test]
fn an_executable_that_was_replaced_or_deleted() {
    if !is_root("reading deleted files of another process") {
        return;
    }
    // One that is its executable whole, and one with a library beside it.
    let own =
        |python: &Python, kind| python.name == "system-3.11" || python.root.is_none() && a_few(python, kind);
    for_each_kind(own, |python, kind| {
        for replaced in [true, false] {
            let folder = tempfile::tempdir().unwrap();
            let (copy, home) = copied(python, folder.path());
            let mut target = Target::builder(&copy, "libc_blocks.py").env("PYTHONHOME", &home).start();
            fs::remove_file(&copy.command).unwrap();
            if replaced {
                // Another program under the same name: what is in it must not be believed.
                fs::copy("/bin/true", &copy.command).unwrap();
                fs::set_permissions(&copy.command, fs::Permissions::from_mode(0o755)).unwrap();
            }
            let before = Snapshot::take(target.pid());
            assert_stacks_show(&target, "commands");
            // Here symbols of the executable are needed, too.
            let recording = Recording::attach(&target, &kind.with(&["--python-allocators"]));
            target.go();
            let capture = recording.stop();
            assert!(capture.assert_code(0).dump().allocations.iter().any(|a| a.allocator == "object_malloc"));
            assert_left_no_trace(&before, &mut target);
            let recording = Recording::attach(&target, &kind.with(&[]));
            let truth = Truth::from_json(target.go());
            truth.assert_matches(&recording.stop().assert_code(0).dump());
            assert_left_no_trace(&before, &mut target);
        }
    });
}
