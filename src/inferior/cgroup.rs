//! The control groups that count a process's memory, version 2 or 1 (cgroups(7)): their limits, what is left, and how many
//! processes of them the kernel's OOM killer has killed.
//!
//! Reads only. Where the groups are is learnt once: a process that is moved meanwhile shows its first ones. Groups that our own
//! mounts do not show (above the root of a container) are not known.

use procfs::process::{MountInfo, Process};
use std::fs;
use std::path::{Component, Path, PathBuf};

/// Version 1 says "no limit" by the largest number of pages.
const NO_LIMIT: u64 = 1 << 62;

/// How a version names things.
#[derive(Debug, PartialEq, Eq)]
struct Files {
    limit: &'static str,
    used: &'static str,
    /// In `memory.stat`: file pages that nobody has used lately, the group's descendants' with them.
    inactive_file: &'static str,
    /// Where `oom_kill` counts.
    events: &'static str,
}

static V2: Files = Files {
    limit: "memory.max",
    used: "memory.current",
    inactive_file: "inactive_file",
    events: "memory.events",
};
static V1: Files = Files {
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    inactive_file: "total_inactive_file",
    events: "memory.oom_control",
};

/// The control groups of a process, from its own to the root of the mount.
#[derive(Debug, PartialEq, Eq)]
pub struct MemoryGroups {
    folders: Vec<PathBuf>,
    files: &'static Files,
}

/// What a group with a limit has left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// The group's folder.
    pub group: PathBuf,
    /// Its limit in bytes.
    pub limit: u64,
    /// What it uses, without what the kernel can drop at once.
    pub used: u64,
}

impl Room {
    /// Bytes that can still be charged before somebody is killed.
    pub fn left(&self) -> u64 {
        self.limit.saturating_sub(self.used)
    }
}

impl MemoryGroups {
    /// Those of `pid`; `None` where nobody counts its memory, or not within our sight.
    pub fn of(pid: i32) -> Option<Self> {
        let groups = Process::new(pid).ok()?.cgroups().ok()?;
        let mounts = Process::myself().ok()?.mountinfo().ok()?;
        // Where both versions are mounted, the memory controller belongs to one of them.
        let v1 = groups.0.iter().find(|group| group.controllers.iter().any(|name| name == "memory"));
        let v2 = groups.0.iter().find(|group| group.hierarchy == 0);
        let counts = |m: &MountInfo| m.fs_type == "cgroup" && m.super_options.contains_key("memory");
        let (path, mounts, files): (_, Vec<&MountInfo>, _) = match (v1, v2) {
            (Some(group), _) => (&group.pathname, mounts.iter().filter(|m| counts(m)).collect(), &V1),
            (None, Some(group)) => {
                (&group.pathname, mounts.iter().filter(|m| m.fs_type == "cgroup2").collect(), &V2)
            }
            (None, None) => return None,
        };
        let seen = |m: &&MountInfo| Some((m.mount_point.clone(), below(path, &m.root)?));
        let (mount, below) = mounts.iter().find_map(seen)?;
        Some(Self { folders: below.ancestors().map(|folder| mount.join(folder)).collect(), files })
    }

    /// What the groups that have a limit have left, innermost first.
    pub fn rooms(&self) -> Vec<Room> {
        self.folders.iter().filter_map(|folder| self.room(folder)).collect()
    }

    fn room(&self, folder: &Path) -> Option<Room> {
        let limit = number(&folder.join(self.files.limit)).filter(|limit| *limit < NO_LIMIT)?;
        let used = number(&folder.join(self.files.used))?;
        let droppable = entry(&folder.join("memory.stat"), self.files.inactive_file).unwrap_or(0);
        Some(Room { group: folder.to_owned(), limit, used: used.saturating_sub(droppable) })
    }

    /// Whether a process of these groups is charged to this one.
    pub fn are_within(&self, group: &Path) -> bool {
        self.folders.iter().any(|folder| folder == group)
    }

    /// Processes of the innermost group that the kernel's OOM killer has killed; `None` where the kernel doesn't say (before
    /// 4.13).
    pub fn oom_kills(&self) -> Option<u64> {
        entry(&self.folders.first()?.join(self.files.events), "oom_kill")
    }
}

/// `path` as seen from a mount whose root is `root` of the hierarchy; `None` if it lies outside.
fn below(path: &str, root: &str) -> Option<PathBuf> {
    // What lies above our own namespace's root begins with `/..`.
    let below = Path::new(path).strip_prefix(root).ok()?;
    (!below.components().any(|part| part == Component::ParentDir)).then(|| below.to_owned())
}

/// A number alone in a file; `max` is none.
fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// A number behind its name, one pair in a line.
fn entry(path: &Path, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(folder: &Path, files: &Files, [limit, used, droppable, kills]: [&str; 4]) {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join(files.limit), limit).unwrap();
        fs::write(folder.join(files.used), used).unwrap();
        let stat = format!("anon 5\n{} {droppable}\nactive_file 7\n", files.inactive_file);
        fs::write(folder.join("memory.stat"), stat).unwrap();
        fs::write(folder.join(files.events), format!("oom 9\noom_kill {kills}\noom_group_kill 0\n")).unwrap();
    }

    fn groups(root: &Path, files: &'static Files) -> MemoryGroups {
        let folders = Path::new("a/b").ancestors().map(|folder| root.join(folder)).collect();
        MemoryGroups { folders, files }
    }

    #[test]
    fn every_limit_on_the_way_up_is_told_without_what_can_be_dropped() {
        for (files, none) in [(&V2, "max\n"), (&V1, "9223372036854771712\n")] {
            let root = tempfile::tempdir().unwrap();
            group(&root.path().join("a/b"), files, ["4000\n", "900\n", "300", "2"]);
            group(&root.path().join("a"), files, ["1000\n", "1100\n", "50", "7"]);
            group(root.path(), files, [none, "5000\n", "0", "8"]);
            let groups = groups(root.path(), files);
            let rooms = groups.rooms();
            let told: Vec<_> = rooms.iter().map(|r| (r.limit, r.used, r.left())).collect();
            assert_eq!(told, [(4000, 600, 3400), (1000, 1050, 0)]);
            assert_eq!(groups.oom_kills(), Some(2));
            assert!(groups.are_within(&rooms[1].group) && !groups.are_within(Path::new("/elsewhere")));
        }
    }

    #[test]
    fn what_the_kernel_does_not_say_is_not_known() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(groups(root.path(), &V2).rooms(), []);
        assert_eq!(groups(root.path(), &V2).oom_kills(), None);
    }

    #[test]
    fn paths_are_seen_from_the_mount() {
        assert_eq!(below("/docker/x/y", "/docker/x"), Some("y".into()));
        assert_eq!(below("/docker/x", "/"), Some("docker/x".into()));
        assert_eq!(below("/other", "/docker/x"), None);
        assert_eq!(below("/../other", "/"), None);
    }

    #[test]
    fn the_kernel_shows_our_own_groups() {
        // Nowhere promised; but where it finds groups, this process is in the first of them.
        if let Some(groups) = MemoryGroups::of(std::process::id() as i32) {
            assert!(groups.folders[0].is_dir(), "{groups:?}");
        }
    }
}
