//! Targets in containers: namespaces of their own, roots with another libc, overlays, paths that lead to other files there than
//! here. heaptap attaches from the host, as root and with CAP_SYS_PTRACE alone, and from inside.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{a_few, is_root};
use crate::common::snapshot::assert_left_no_trace;
use crate::common::truth::Truth;
use crate::common::{Kind, Python, Recording, Snapshot, Target, for_each_kind, heaptap, skipped};

const EVERY_NAMESPACE: &[&str] = &[
    "unshare",
    "--user",
    "--map-root-user",
    "--pid",
    "--mount",
    "--net",
    "--ipc",
    "--uts",
    "--cgroup",
    "--fork",
    "--kill-child",
];
const MOUNTS: &[&str] = &["unshare", "--pid", "--mount", "--net", "--fork", "--kill-child"];
/// What the documented units run with: no way to `/proc/PID/map_files`.
const PTRACE_ALONE: &[&str] = &["setpriv", "--bounding-set=-all,+sys_ptrace"];
const AS_ROOT: &[&str] = &["env"];

/// True when this kernel gives us such namespaces; says so loudly otherwise.
fn can(command: &[&str]) -> bool {
    let output = Command::new(command[0]).args(&command[1..]).arg("true").output();
    let works = output.as_ref().is_ok_and(|output| output.status.success());
    if !works {
        skipped(&format!("{command:?}: {output:?}"));
    }
    works && is_root("targets in containers")
}

/// One of each libc: pyenv's, a chroot with a newer glibc, one with musl.
fn a_few_libcs(python: &Python, kind: Kind) -> bool {
    a_few(python, kind) || python.name == "musl-3.14" && python.records_promised(kind)
}

/// What a visitor could have left where the target sees it: descriptors, sockets, files beside those of its root.
fn seen_inside(target: &Target) -> BTreeMap<String, Vec<String>> {
    let process = format!("/proc/{}", target.pid());
    let mut seen = BTreeMap::new();
    // In a root and a network that are the host's own, what others put there meanwhile is not ours.
    let inode = |path: &str| fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
    let own_root = inode(&format!("{process}/root")) != inode("/");
    let folders = ["fd", "root", "root/tmp", "root/run", "root/dev/shm"];
    for folder in &folders[..if own_root { folders.len() } else { 1 }] {
        let entries = fs::read_dir(format!("{process}/{folder}")).into_iter().flatten().flatten();
        let mut names: Vec<_> =
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        // Of tests that run beside this one, in the same root.
        names.retain(|name| !name.starts_with("heaptap-fixtures-"));
        names.sort();
        seen.insert((*folder).to_owned(), names);
    }
    let namespace = |who: &str| fs::read_link(format!("{who}/ns/net")).ok();
    let own_network = namespace(&process) != namespace("/proc/self");
    for table in ["net/unix", "net/tcp", "net/netlink"].iter().filter(|_| own_network) {
        let text = fs::read_to_string(format!("{process}/{table}")).unwrap_or_default();
        seen.insert((*table).to_owned(), text.lines().skip(1).map(str::to_owned).collect());
    }
    seen
}

/// Records the target's work by a heaptap that runs under `outer` and calls the target `pid`: all of it and nothing else.
fn assert_records(target: &mut Target, outer: &[&str], pid: i32, kind: Kind) {
    let before = Snapshot::take(target.pid());
    let inside = seen_inside(target);
    let recording = Recording::try_attach_under(outer, pid, &kind.with(&[]))
        .unwrap_or_else(|said| panic!("{outer:?}, {kind}: {said}"));
    assert_eq!(seen_inside(target), inside, "something of ours is inside");
    let truth = Truth::from_json(target.go());
    let capture = recording.stop();
    truth.assert_matches(&capture.assert_code(0).dump());
    assert_left_no_trace(&before, target);
    assert_eq!(seen_inside(target), inside, "something of ours stayed inside");
}

fn assert_records_from_the_host(target: &mut Target, kind: Kind) {
    let pid = target.pid();
    for rights in [AS_ROOT, PTRACE_ALONE] {
        assert_records(target, rights, pid, kind);
    }
}

/// The interpreter as it is called within its root.
fn within_root(python: &Python) -> Python {
    let root = python.root.as_ref().expect("a chrooted interpreter");
    let command = Path::new("/").join(python.binary.strip_prefix(root).expect("the binary is in the root"));
    Python { command, ..python.clone() }
}

fn debian(python: &Python, kind: Kind) -> bool {
    python.name.starts_with("debian-3.14") && python.records_promised(kind)
}

fn pyenv(python: &Python, kind: Kind) -> bool {
    python.name.starts_with("pyenv") && a_few(python, kind)
}

#[test]
fn every_namespace_and_every_libc() {
    if !can(EVERY_NAMESPACE) {
        return;
    }
    for_each_kind(a_few_libcs, |python, kind| {
        for program in ["libc_blocks.py", "threads.py"] {
            let mut target = Target::builder(python, program).under(EVERY_NAMESPACE).start();
            assert_records_from_the_host(&mut target, kind);
        }
    });
}

#[test]
fn a_heaptap_inside_the_container() {
    let own_proc = [EVERY_NAMESPACE, &["--mount-proc"]].concat();
    if !can(&own_proc) {
        return;
    }
    for_each_kind(pyenv, |python, kind| {
        let mut target = Target::builder(python, "threads.py").under(&own_proc).start();
        let pid = target.pid().to_string();
        // In there it is process 1.
        assert_records(&mut target, &["nsenter", "--target", &pid, "--all"], 1, kind);
    });
}

/// The kernel shows a path from the root of the mount namespace, where the folder is another than here.
#[test]
fn a_chroot_that_only_its_mount_namespace_has() {
    if !can(MOUNTS) {
        return;
    }
    for_each_kind(debian, |python, kind| {
        let place = tempfile::tempdir().unwrap();
        let (place, root) = (place.path().to_str().unwrap(), python.root.as_ref().unwrap().to_str().unwrap());
        let script = format!("mount --bind '{root}' '{place}' && exec chroot '{place}' \"$@\"");
        let under = [MOUNTS, &["sh", "-c", &script, "sh"]].concat();
        let mut target = Target::builder(&within_root(python), "libc_blocks.py").under(&under).start();
        assert_records_from_the_host(&mut target, kind);
    });
}

/// As container runtimes do it.
#[test]
fn a_root_that_was_pivoted_to() {
    if !can(MOUNTS) {
        return;
    }
    for_each_kind(debian, |python, kind| {
        let place = tempfile::tempdir().unwrap();
        let (place, root) = (place.path().to_str().unwrap(), python.root.as_ref().unwrap().to_str().unwrap());
        // The old root lies over its /root then, for nothing is needed of that.
        let script =
            format!("mount --bind '{root}' '{place}' && cd '{place}' && pivot_root . root && exec \"$@\"");
        let under = [MOUNTS, &["sh", "-c", &script, "sh"]].concat();
        let mut target = Target::builder(&within_root(python), "libc_blocks.py").under(&under).start();
        assert_records_from_the_host(&mut target, kind);
    });
}

/// Overlays make up inode and device numbers.
#[test]
fn files_on_an_overlay() {
    if !can(MOUNTS) {
        return;
    }
    for_each_kind(pyenv, |python, kind| {
        let upper = tempfile::tempdir().unwrap();
        let upper = upper.path().to_str().unwrap();
        let home = home(python);
        let home = home.to_str().unwrap();
        let script = format!(
            "mount -t tmpfs none '{upper}' && mkdir '{upper}/u' '{upper}/w' && mount -t overlay overlay -o \
             lowerdir='{home}',upperdir='{upper}/u',workdir='{upper}/w' '{home}' && exec \"$@\""
        );
        let under = [MOUNTS, &["sh", "-c", &script, "sh"]].concat();
        let mut target = Target::builder(python, "libc_blocks.py").under(&under).start();
        let maps = fs::read_to_string(format!("/proc/{}/mountinfo", target.pid())).unwrap();
        assert!(maps.contains(&format!(" {home} ")), "no overlay: {maps}");
        assert_records_from_the_host(&mut target, kind);
    });
}

fn home(python: &Python) -> PathBuf {
    python.command.parent().and_then(Path::parent).expect("PREFIX/bin/python").to_owned()
}

/// The library that holds the interpreter, and its copy's place in `folder`.
fn library(python: &Python, folder: &Path) -> Option<(PathBuf, PathBuf)> {
    let shared = python.binary.file_name().is_some_and(|name| name.to_string_lossy().contains(".so"));
    if !shared {
        skipped(&format!("{python}: it has no library"));
    }
    shared.then(|| (python.binary.clone(), folder.join(python.binary.file_name().unwrap())))
}

/// Something else that is a library, and defines malloc.
fn decoy() -> PathBuf {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let libc =
        maps.lines().filter_map(|line| line.split_ascii_whitespace().nth(5)).find(|p| p.contains("libc.so"));
    PathBuf::from(libc.expect("this test runs on a shared libc"))
}

fn assert_maps(target: &Target, file: &Path) {
    let maps = fs::read_to_string(format!("/proc/{}/maps", target.pid())).unwrap();
    assert!(maps.contains(file.to_str().unwrap()), "{} is not mapped: {maps}", file.display());
}

/// The path exists here too, with other content.
#[test]
fn a_path_that_leads_to_another_file_here() {
    if !can(MOUNTS) {
        return;
    }
    for_each_kind(pyenv, |python, kind| {
        let folder = tempfile::tempdir().unwrap();
        let Some((real, copy)) = library(python, folder.path()) else { return };
        fs::copy(decoy(), &copy).unwrap();
        let script = format!("mount --bind '{}' '{}' && exec \"$@\"", real.display(), copy.display());
        let under = [MOUNTS, &["sh", "-c", &script, "sh"]].concat();
        let mut target = Target::builder(python, "libc_blocks.py")
            .env("LD_LIBRARY_PATH", folder.path().to_str().unwrap())
            .under(&under)
            .start();
        assert_maps(&target, &copy);
        assert_records_from_the_host(&mut target, kind);
    });
}

/// An upgrade under a running process: root reads the mapped file, who can't is told why, and nothing is guessed from the new.
#[test]
fn a_library_that_was_replaced_by_an_upgrade() {
    if !can(AS_ROOT) {
        return;
    }
    for_each_kind(pyenv, |python, kind| {
        let folder = tempfile::tempdir().unwrap();
        let Some((real, copy)) = library(python, folder.path()) else { return };
        fs::copy(real, &copy).unwrap();
        let mut target = Target::builder(python, "libc_blocks.py")
            .env("LD_LIBRARY_PATH", folder.path().to_str().unwrap())
            .start();
        assert_maps(&target, &copy);
        fs::remove_file(&copy).unwrap();
        fs::copy(decoy(), &copy).unwrap();
        let pid = target.pid();
        assert_records(&mut target, AS_ROOT, pid, kind);
        let before = Snapshot::take(pid);
        let said = match Recording::try_attach_under(PTRACE_ALONE, pid, &kind.with(&[])) {
            Ok(_) => panic!("recorded by a file that is not the mapped one"),
            Err(said) => said,
        };
        assert!(said.contains("exit status: 3") && said.contains("CAP_CHECKPOINT_RESTORE"), "{said}");
        assert!(said.contains(copy.to_str().unwrap()), "{said}");
        assert_left_no_trace(&before, &mut target);
    });
}

/// A user's own processes, as in rootless containers: no capability at all.
#[test]
fn a_user_and_its_own_user_namespace() {
    const USER: &[&str] = &["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    let container =
        [USER, &EVERY_NAMESPACE[..EVERY_NAMESPACE.len() - 3], &["--fork", "--kill-child"]].concat();
    if !can(&container) {
        return;
    }
    let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    if !["", "0"].contains(&scope.trim()) {
        return skipped(&format!("a user's own processes: kernel.yama.ptrace_scope is {scope}"));
    }
    // The binary and the fixtures have to be reachable for that user.
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let binary = folder.path().join("heaptap");
    crate::common::copy_program(heaptap().get_program(), &binary);
    let reachable = [USER, &["test", "-r", env!("CARGO_MANIFEST_DIR")]].concat();
    if !Command::new(reachable[0]).args(&reachable[1..]).status().is_ok_and(|status| status.success()) {
        return skipped("a user's own processes: the repository is not readable for others");
    }
    for_each_kind(
        |python, _| python.name == "system-3.11",
        |python, kind| {
            let mut target = Target::builder(python, "libc_blocks.py").under(&container).start();
            let before = Snapshot::take(target.pid());
            let capture = folder.path().join(format!("{kind}.heaptap"));
            let mut command = Command::new(USER[0]);
            command.args(&USER[1..]).arg(&binary);
            let recording = Recording::try_attach_by(command, target.pid(), &capture, &kind.with(&[]));
            let recording = recording.unwrap_or_else(|said| panic!("{kind}: {said}"));
            let truth = Truth::from_json(target.go());
            truth.assert_matches(&recording.stop().assert_code(0).dump());
            assert_left_no_trace(&before, &mut target);
        },
    );
}

/// What heaptap reads everything from may be missing, hide the process, or tell of other processes.
#[test]
fn a_proc_that_tells_nothing() {
    if !can(MOUNTS) {
        return;
    }
    for_each_kind(pyenv, |python, kind| {
        let mut target = Target::start(python, "libc_blocks.py");
        let before = Snapshot::take(target.pid());
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let binary = folder.path().join("heaptap");
        crate::common::copy_program(heaptap().get_program(), &binary);
        let refused = |outer: &str, words: &[&str]| {
            let script = format!("{outer} \"$@\"");
            let mut command = Command::new("unshare");
            command.args(["--mount", "sh", "-ec", &script, "sh"]).arg(&binary);
            match Recording::try_attach_by(command, target.pid(), &folder.path().join("c"), &kind.with(&[])) {
                Ok(_) => panic!("{outer}: attached"),
                Err(said) => super::assert_refused(&said, words),
            }
        };
        refused("umount -l /proc; exec", &["/proc is not mounted", "mount -t proc"]);
        refused("exec unshare --pid --fork", &["another pid namespace", "--mount-proc"]);
        let nobody = "exec setpriv --reuid=65534 --regid=65534 --clear-groups";
        for how in ["noaccess", "invisible"] {
            refused(&format!("mount -t proc -o hidepid={how} proc /proc; {nobody}"), &["hidepid", "root"]);
        }
        assert_left_no_trace(&before, &mut target);
    });
}
