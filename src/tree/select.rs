//! Which processes a name or a cgroup stands for. Those that run no Python are left out, and heaptap's own.

use super::TreeError;
use super::processes::{Children, all};
use crate::inferior::maps;
use crate::mapping::Backing;
use crate::recorder::header::command_line;
use regex::Regex;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Where cgroups are mounted.
const CGROUPS: &str = "/sys/fs/cgroup";

/// The processes whose command line, its arguments joined by blanks as ps(1) shows it, contains `pattern` or matches it as
/// a regular expression.
pub fn by_name(pattern: &str) -> Result<Vec<i32>, TreeError> {
    let expression = Regex::new(pattern).ok();
    let matches = |pid: i32| {
        let command = command_line(pid).join(" ");
        !command.is_empty()
            && (command.contains(pattern) || expression.as_ref().is_some_and(|e| e.is_match(&command)))
    };
    python_processes(matches, format!("the name '{pattern}'"))
}

/// The processes in a cgroup and those below it. `path` is as in /proc/PID/cgroup or below /sys/fs/cgroup.
pub fn by_cgroup(path: &Path) -> Result<Vec<i32>, TreeError> {
    let wanted = Cgroup::parse(path);
    let is_in = |pid: i32| {
        let lines = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        lines.lines().any(|line| wanted.holds(line))
    };
    python_processes(is_in, format!("the cgroup {}", path.display()))
}

fn python_processes(matches: impl Fn(i32) -> bool, what: String) -> Result<Vec<i32>, TreeError> {
    let found: Vec<i32> = others().into_iter().filter(|pid| matches(*pid)).collect();
    if found.is_empty() {
        return Err(TreeError::NoMatch { what });
    }
    let count = if found.len() == 1 { "1 process".into() } else { format!("{} processes", found.len()) };
    let found: Vec<i32> = found.into_iter().filter(|pid| seems_python(*pid)).collect();
    if found.is_empty() { Err(TreeError::NoPython { count, what }) } else { Ok(found) }
}

/// Every process but us, our descendants, and whoever else runs our executable.
fn others() -> Vec<i32> {
    let us = std::process::id() as i32;
    let ours = Children::new().descendants(&[us]);
    let executable = |pid: i32| fs::metadata(format!("/proc/{pid}/exe")).ok().map(|f| (f.dev(), f.ino()));
    let own = executable(us);
    let mut others = all();
    others.retain(|pid| *pid != us && !ours.contains(pid) && (own.is_none() || executable(*pid) != own));
    others.sort_unstable();
    others
}

/// Whether a process maps a file of some Python's: its executable, libpython, an extension module. What it is exactly is
/// learnt when it is recorded; one that can't be looked at is tried, so that the reason is told.
fn seems_python(pid: i32) -> bool {
    let Ok(maps) = maps::mappings(pid) else { return true };
    maps.iter().any(|mapping| match &mapping.backing {
        Backing::File { path, .. } => path.to_string_lossy().to_ascii_lowercase().contains("python"),
        _ => false,
    })
}

/// A cgroup as asked for.
#[derive(Debug, PartialEq, Eq)]
struct Cgroup {
    /// Its path in any hierarchy.
    path: String,
    /// Where its first part may name a hierarchy of version 1: that, and the path in it.
    in_hierarchy: Option<(String, String)>,
}

impl Cgroup {
    fn parse(path: &Path) -> Self {
        let text = path.to_string_lossy();
        let normal = |path: &str| format!("/{}", path.trim_matches('/'));
        let Some(below) = text.strip_prefix(CGROUPS).filter(|rest| rest.is_empty() || rest.starts_with('/'))
        else {
            return Self { path: normal(&text), in_hierarchy: None };
        };
        let below = below.trim_matches('/');
        let (hierarchy, rest) = below.split_once('/').unwrap_or((below, ""));
        let in_hierarchy = (!hierarchy.is_empty()).then(|| (hierarchy.to_owned(), normal(rest)));
        Self { path: normal(below), in_hierarchy }
    }

    /// Whether a line of /proc/PID/cgroup (cgroups(7)), `ID:CONTROLLERS:PATH`, is of this cgroup or one below it.
    fn holds(&self, line: &str) -> bool {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { return false };
        let below = |wanted: &str| {
            let rest = path.strip_prefix(wanted.trim_end_matches('/'));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        match &self.in_hierarchy {
            // Mounted as `cpu,cpuacct` or by one of the names; a named one without its `name=`; version 2 beside as `unified`.
            Some((hierarchy, rest)) if !controllers.is_empty() => {
                let is_it = controllers == hierarchy
                    || controllers
                        .split(',')
                        .any(|c| c == hierarchy || c.strip_prefix("name=") == Some(hierarchy));
                is_it && below(rest)
            }
            Some((hierarchy, rest)) if hierarchy == "unified" => below(rest),
            _ => below(&self.path),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(path: &str, line: &str) -> bool {
        Cgroup::parse(Path::new(path)).holds(line)
    }

    #[test]
    fn a_cgroup_is_named_as_the_kernel_or_the_file_system_does() {
        let v2 = "0::/system.slice/shop.service";
        for path in [
            "/system.slice/shop.service",
            "system.slice/shop.service/",
            "/sys/fs/cgroup/system.slice/shop.service",
            "/sys/fs/cgroup/system.slice/",
            "/system.slice",
            "/",
            "/sys/fs/cgroup",
        ] {
            assert!(holds(path, v2), "{path}");
        }
        for path in
            ["/system.slice/shop", "/shop.service", "/sys/fs/cgroup/memory/system.slice", "/sys/fs/cgroupx"]
        {
            assert!(!holds(path, v2), "{path}");
        }
        assert!(holds("/sys/fs/cgroup/unified/system.slice", v2));
    }

    #[test]
    fn a_hierarchy_of_version_1_is_told_from_the_others() {
        let line = "4:cpu,cpuacct:/docker/abc";
        for path in
            ["/docker/abc", "/docker", "/sys/fs/cgroup/cpu,cpuacct/docker/abc", "/sys/fs/cgroup/cpu/docker"]
        {
            assert!(holds(path, line), "{path}");
        }
        assert!(holds("/sys/fs/cgroup/systemd/user.slice", "1:name=systemd:/user.slice/x:y"));
        for path in ["/sys/fs/cgroup/memory/docker/abc", "/docker/ab", "/sys/fs/cgroup/cpu/docker/abcd"] {
            assert!(!holds(path, line), "{path}");
        }
        assert!(!holds("/docker", "nonsense"));
    }

    #[test]
    fn we_never_select_ourselves() {
        let us = std::process::id() as i32;
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let others = others();
        assert!(!others.contains(&us) && !others.contains(&(child.id() as i32)));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
