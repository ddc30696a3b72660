//! Words of a program's data that point to code, and memory of the agent's kind: what jump breakpoints change beside text.
//!
//! CPython's allocator tables and `PyCode_Type` lie in writable data of the interpreter's file. Which words they are is not
//! asked: no word there that pointed into a file's code before may point elsewhere afterwards.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};

use super::snapshot::Mapping;

/// Words in writable data of executables and libraries that point into code of a file: by address.
pub type Pointers = BTreeMap<u64, u64>;

/// All such words of a process.
pub fn pointers(pid: i32, mappings: &[Mapping]) -> Pointers {
    let memory = fs::File::open(format!("/proc/{pid}/mem")).expect("/proc/PID/mem of an own child");
    let code = code(mappings);
    let mut found = Pointers::new();
    for mapping in data(pid, mappings) {
        let mut bytes = vec![0; (mapping.end - mapping.start) as usize];
        if memory.read_exact_at(&mut bytes, mapping.start).is_err() {
            continue; // mapped beyond the end of its file
        }
        let words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")));
        let words = words.enumerate().map(|(i, word)| (mapping.start + 8 * i as u64, word));
        found.extend(words.filter(|(_, word)| is_in(&code, *word)));
    }
    found
}

/// Words that pointed to a file's code and now hold what may be the address of a function elsewhere.
pub fn led_astray(pid: i32, before: &Pointers, mappings: &[Mapping]) -> Vec<String> {
    let memory = fs::File::open(format!("/proc/{pid}/mem")).expect("/proc/PID/mem of an own child");
    let code = code(mappings);
    let mut found = Vec::new();
    for (at, was) in before {
        let mut word = [0; 8];
        if memory.read_exact_at(&mut word, *at).is_err() {
            continue; // a library was unloaded
        }
        let is = u64::from_le_bytes(word);
        // Small numbers, packed ones and odd ones are no functions.
        let is_function = (0x1_0000..1 << 47).contains(&is) && is % 16 == 0;
        // Data is called by nobody: a number that looked like an address of an executable that lies low.
        let is_data = mappings.iter().any(|m| (m.start..m.end).contains(&is) && !m.is_executable());
        if is != *was && is_function && !is_data && !is_in(&code, is) {
            found.push(format!("the word at {at:#x} pointed to code at {was:#x}, now to {is:#x}"));
        }
    }
    found
}

/// Sorted ranges of files' code.
fn code(mappings: &[Mapping]) -> Vec<(u64, u64)> {
    let mut ranges: Vec<_> =
        mappings.iter().filter(|m| m.is_file() && m.is_executable()).map(|m| (m.start, m.end)).collect();
    ranges.sort_unstable();
    ranges
}

fn is_in(ranges: &[(u64, u64)], address: u64) -> bool {
    let behind = ranges.partition_point(|(start, _)| *start <= address);
    behind > 0 && address < ranges[behind - 1].1
}

/// Writable private data of the executable and of whatever calls itself Python. (The C library counts bytes in its own: numbers
/// that look like addresses of an executable that lies low.)
fn data(pid: i32, mappings: &[Mapping]) -> Vec<&Mapping> {
    let executable = fs::metadata(format!("/proc/{pid}/exe")).map(|file| file.ino()).unwrap_or_default();
    let is_python = |m: &&Mapping| m.inode == executable || m.file_name().contains("python");
    let is_data = |m: &&Mapping| m.permissions.starts_with("rw") && m.permissions.ends_with('p');
    mappings.iter().filter(|m| m.is_file()).filter(is_python).filter(is_data).collect()
}

/// Ranges that are wiped in a child (`wf`) or not inherited at all (`dc`), as the agent's state and rings are:
/// `/proc/PID/smaps` has the flags (proc_pid_smaps(5)). Code of a JIT and the like has none of them.
pub fn not_inherited(pid: i32) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let mut found = Vec::new();
    let mut range = "";
    for line in text.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            // io: memory of devices, as vvar is.
            let flags: Vec<&str> = flags.split_ascii_whitespace().collect();
            if flags.iter().any(|f| ["wf", "dc"].contains(f)) && !flags.contains(&"io") {
                found.push(format!("{range} [{}]", flags.join(" ")));
            }
        } else if line.split_ascii_whitespace().next().is_some_and(|word| !word.ends_with(':')) {
            range = line;
        }
    }
    found
}
