//! [`Symbolizer`]: what addresses are called in files that are known by path and build id, with no process at hand.
//!
//! From the file at the path if it has that build id, from its debugging information (in it, below `/usr/lib/debug`, or on a server), else
//! from its symbols. A file with another build id is another file, and one without any may be: neither names anything.

use super::debug_info::hex;
use super::debuginfod::Debuginfod;
use super::names::{OfFile, Place, separate};
use crate::addr::ImageAddr;
use crate::image::elf::ElfFile;
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// What a file is known by.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Key {
    BuildId(Box<[u8]>),
    /// Of an opened file without a build id: path, inode and length.
    File(PathBuf, Option<u64>, u64),
}

/// See the module. What was read of a file is kept.
pub struct Symbolizer {
    folders: Vec<PathBuf>,
    servers: Option<Debuginfod>,
    files: RefCell<HashMap<Key, Rc<OfFile>>>,
}

impl Symbolizer {
    /// Asks nobody: names from what is on this machine.
    pub fn local() -> Self {
        Self::with(vec![PathBuf::from("/usr/lib/debug")], None)
    }

    /// The same, and from the servers that `DEBUGINFOD_URLS` names, if it is set (`debuginfod(7)`).
    pub fn from_environment() -> Self {
        Self { servers: Debuginfod::from_environment(), ..Self::local() }
    }

    /// Looks for debugging information below these folders and on these servers.
    pub(super) fn with(folders: Vec<PathBuf>, servers: Option<Debuginfod>) -> Self {
        Self { folders, servers, files: RefCell::default() }
    }

    /// What is at an address of the file at `path`, innermost first; nothing if that is not known.
    pub fn places(&self, path: &str, build_id: &[u8], address: u64) -> Vec<Place> {
        if build_id.is_empty() {
            return Vec::new();
        }
        let open = || open(Path::new(path)).filter(|file| file.build_id() == Some(hex(build_id)));
        self.known(Key::BuildId(build_id.into()), build_id, || open().map(Rc::new), address)
    }

    /// The same for a file that is open: it is the one, whatever lies at its path by now.
    pub fn places_in(&self, file: &Rc<ElfFile>, build_id: &[u8], address: u64) -> Vec<Place> {
        let key = match build_id {
            [] => Key::File(file.path().to_owned(), file.inode(), file.len()),
            id => Key::BuildId(id.into()),
        };
        self.known(key, build_id, || Some(file.clone()), address)
    }

    fn known(
        &self,
        key: Key,
        build_id: &[u8],
        file: impl FnOnce() -> Option<Rc<ElfFile>>,
        address: u64,
    ) -> Vec<Place> {
        let known = self.files.borrow().get(&key).cloned();
        let names = known.unwrap_or_else(|| {
            let names = Rc::new(self.read(file().as_deref(), &hex(build_id)));
            self.files.borrow_mut().insert(key, names.clone());
            names
        });
        let places = names.places(ImageAddr(address));
        // That there is code is no name for it.
        if places.iter().all(|place| *place == Place::default()) { Vec::new() } else { places }
    }

    /// What is known of a file.
    pub(super) fn read(&self, file: Option<&ElfFile>, build_id: &str) -> OfFile {
        let has_debug = |file: &ElfFile| file.section(".debug_info").is_some_and(|section| section.in_file);
        let separate = if file.is_some_and(has_debug) { None } else { self.find(build_id) };
        OfFile::of_files(file, separate.as_ref(), |id| self.find(id))
    }

    /// The file with the debugging information of a build id.
    fn find(&self, build_id: &str) -> Option<ElfFile> {
        separate(build_id, &self.folders).or_else(|| self.servers.as_ref()?.find(build_id))
    }
}

/// Opens what may be anything: a path out of a capture can lead to a pipe, which would be waited for.
fn open(path: &Path) -> Option<ElfFile> {
    let file =
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path).ok()?;
    file.metadata().ok().filter(|metadata| metadata.is_file())?;
    ElfFile::new(file, path).ok()
}

#[cfg(test)]
#[path = "symbolize_tests.rs"]
mod tests;
