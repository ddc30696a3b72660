//! Opens the very file that is mapped into a process, which may live in another mount namespace, in a chroot, on an overlay, or
//! have files that were replaced since it started.
//!
//! By identity where the kernel lets us (`/proc/PID/map_files` takes CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE, `/proc/PID/exe` does
//! not). Else by path below the target's own root, and then the target's memory must show that file: a path may lead to
//! another file than the mapped one, and inode numbers are unique within one file system alone (and overlays make up their own).

use super::elf::{ElfFile, ImageError};
use crate::mapping::{Backing, Mapping};
use crate::memory::RemoteMemory;
use std::fs::File;
use std::path::{Path, PathBuf};

/// What is compared of a file without a build id.
const FIRST_PAGE: u64 = 4096;

/// The process's executable as the kernel names it: path, and whether it is deleted.
pub fn executable(pid: i32) -> Option<(PathBuf, bool)> {
    let link = std::fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    let shown = link.to_string_lossy();
    match shown.strip_suffix(" (deleted)") {
        Some(path) => Some((PathBuf::from(path), true)),
        None => Some((link, false)),
    }
}

/// Opens the file that `group` (mappings of one file, the first of them first) shows.
pub fn open(
    pid: i32,
    group: &[&Mapping],
    is_exe: bool,
    memory: &dyn RemoteMemory,
) -> Result<ElfFile, ImageError> {
    let first = group[0];
    let Backing::File { path, .. } = &first.backing else {
        return Err(ImageError::NotElf { path: PathBuf::new() });
    };
    let by_mapping = format!("/proc/{pid}/map_files/{:x}-{:x}", first.start.0, first.end.0);
    let mut refused = match File::open(by_mapping) {
        Ok(file) => return ElfFile::new(file, path),
        Err(error) => error,
    };
    if is_exe && let Ok(file) = File::open(format!("/proc/{pid}/exe")) {
        return ElfFile::new(file, path);
    }
    let mut replaced = false;
    for candidate in candidates(pid, path) {
        match File::open(&candidate) {
            Ok(file) => match ElfFile::new(file, path) {
                Ok(file) if is_shown(&file, group, memory) => return Ok(file),
                _ => replaced = true,
            },
            Err(error) => refused = error,
        }
    }
    if replaced {
        return Err(ImageError::Replaced { pid, path: path.clone() });
    }
    Err(ImageError::Open { pid, path: path.clone(), source: refused })
}

/// Where a mapped file may be. The kernel shows its path from our root if that leads there, else from the root of the target's
/// mount namespace; the target's own root may be deeper still.
fn candidates(pid: i32, path: &Path) -> Vec<PathBuf> {
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let below = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
    let mut found = vec![below(path)];
    if let Ok(shown) = std::fs::read_link(&root)
        && shown != Path::new("/")
        && let Ok(inside) = path.strip_prefix(shown)
    {
        found.push(root.join(inside));
    }
    // In another mount namespace our file of this name has nothing to do with it.
    let namespace = |who: &str| std::fs::read_link(format!("/proc/{who}/ns/mnt")).ok();
    if namespace("self").is_some_and(|own| Some(own) == namespace(&pid.to_string())) {
        found.push(path.to_owned());
    }
    found
}

/// Whether the target's memory shows this file: its headers and its build id; without a build id, its first page and its
/// inode.
fn is_shown(file: &ElfFile, group: &[&Mapping], memory: &dyn RemoteMemory) -> bool {
    let same = |(offset, len): (u64, u64)| {
        let holds = |m: &&&Mapping| m.perms.read && m.offset <= offset && offset + len <= m.offset + m.len();
        let Some(mapping) = group.iter().find(holds) else { return false };
        let shown = memory.read_vec(mapping.start.offset(offset - mapping.offset), len as usize);
        shown.is_ok_and(|shown| file.read(offset, len).is_ok_and(|held| held == shown))
    };
    let headers = file.header_parts().into_iter().all(same);
    match file.build_id_part() {
        Some(part) => headers && same(part),
        None => headers && same((0, FIRST_PAGE.min(file.len()))) && file.inode() == Some(group[0].inode),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::RemoteAddr;
    use crate::mapping::Perms;
    use crate::memory::BytesMemory;
    use std::os::unix::fs::MetadataExt;

    const AT: RemoteAddr = RemoteAddr(0x7000_0000);
    const NOTE_AT: usize = 120;

    /// Headers of an ELF file with one segment and, at [`NOTE_AT`], a build id.
    fn elf(build_id: Option<u8>, text: u8) -> Vec<u8> {
        let mut bytes = vec![0_u8; 8192];
        bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(16, &[3, 0, 62, 0, 1]); // ET_DYN, EM_X86_64, version
        put(32, &64_u64.to_le_bytes()); // program headers at
        put(52, &[64, 0, 56, 0, 1]); // sizes, one program header
        put(64, &4_u32.to_le_bytes()); // PT_NOTE
        let len = if build_id.is_some() { 36_u64 } else { 0 };
        put(64 + 8, &(NOTE_AT as u64).to_le_bytes());
        put(64 + 32, &len.to_le_bytes());
        if let Some(id) = build_id {
            put(NOTE_AT, &[4, 0, 0, 0, 20, 0, 0, 0, 3, 0, 0, 0]);
            put(NOTE_AT + 12, b"GNU\0");
            put(NOTE_AT + 16, &[id; 20]);
        }
        put(4000, &[text]);
        bytes
    }

    fn opened(bytes: &[u8]) -> (tempfile::TempDir, PathBuf, u64) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lib.so");
        std::fs::write(&path, bytes).unwrap();
        let inode = std::fs::metadata(&path).unwrap().ino();
        (folder, path, inode)
    }

    fn mapped(inode: u64) -> Mapping {
        Mapping {
            start: AT,
            end: AT.offset(8192),
            perms: Perms { read: true, ..Perms::default() },
            offset: 0,
            device: (0, 0),
            inode,
            backing: Backing::File { path: "/lib.so".into(), deleted: false },
        }
    }

    fn shows(mapped_bytes: &[u8], file_bytes: &[u8], same_inode: bool) -> bool {
        let (_folder, path, inode) = opened(file_bytes);
        let file = ElfFile::new(File::open(&path).unwrap(), &path).unwrap();
        let mut memory = BytesMemory::new();
        memory.map(AT, mapped_bytes.to_vec());
        is_shown(&file, &[&mapped(if same_inode { inode } else { inode + 1 })], &memory)
    }

    #[test]
    fn a_file_with_the_same_path_and_inode_and_another_build_id_is_another() {
        assert!(shows(&elf(Some(7), 1), &elf(Some(7), 1), true));
        assert!(!shows(&elf(Some(7), 1), &elf(Some(8), 1), true));
    }

    #[test]
    fn an_overlays_inode_is_no_matter_where_there_is_a_build_id() {
        assert!(shows(&elf(Some(7), 1), &elf(Some(7), 1), false));
    }

    #[test]
    fn without_a_build_id_first_page_and_inode_must_agree() {
        assert!(shows(&elf(None, 1), &elf(None, 1), true));
        assert!(!shows(&elf(None, 1), &elf(None, 2), true));
        assert!(!shows(&elf(None, 1), &elf(None, 1), false));
    }
}
