//! [`Moved`]: which files of one recording are which of another that has the same code in other folders: a new release, another virtual
//! environment, another Python.
//!
//! What is installed is told by its path below `site-packages` or the standard library. Of the application's own files only those are taken
//! for each other that end alike, each more than with any other file, and whose folders differ in the same way for several of them (or that are
//! the only ones): a guess that is wrong would compare two files that have nothing to do with each other.

use super::package::library_path;
use crate::capture::{FrameId, FrameKind, FrameText, StackTable};
use foldhash::fast::RandomState;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// Files of an old recording by the names that a new one has for them.
#[derive(Clone, Debug, Default)]
pub struct Moved {
    files: HashMap<Box<str>, Arc<str>, RandomState>,
    /// The folders that differ: the old one's, the new one's.
    pub folders: BTreeSet<(String, String)>,
}

impl Moved {
    /// From what both recordings know.
    pub fn between(old: &StackTable, new: &StackTable) -> Self {
        let (old, new) = (files(old), files(new));
        let gone: Vec<&str> = old.difference(&new).copied().collect();
        let come: Vec<&str> = new.difference(&old).copied().collect();
        let mut moved = Self::default();
        moved.installed(&gone, &come);
        moved.own(&own_files(&gone), &own_files(&come));
        moved
    }

    /// The name that the new recording has for a file of the old one.
    pub fn name<'a>(&'a self, file: &'a str) -> &'a str {
        self.files.get(file).map_or(file, |new| new)
    }

    fn installed(&mut self, gone: &[&str], come: &[&str]) {
        let mut places: HashMap<_, Vec<&str>> = HashMap::new();
        for file in come {
            if let Some(place) = library_path(file) {
                places.entry(place).or_default().push(file);
            }
        }
        for file in gone {
            if let Some([one]) = library_path(file).and_then(|place| places.get(&place)).map(Vec::as_slice) {
                self.add(file, one);
            }
        }
    }

    fn own(&mut self, gone: &[&str], come: &[&str]) {
        let (there, back) = (best(gone, come), best(come, gone));
        let pairs = there.into_iter().filter(|(old, new)| back.get(new) == Some(old));
        let pairs: Vec<(&str, &str)> = pairs.collect();
        let mut folders: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        for (old, new) in &pairs {
            *folders.entry(apart(old, new)).or_default() += 1;
        }
        let alone = gone.len() == 1 && come.len() == 1;
        for (old, new) in pairs {
            if alone || folders[&apart(old, new)] > 1 {
                self.add(old, new);
            }
        }
    }

    fn add(&mut self, old: &str, new: &str) {
        let (from, to) = apart(old, new);
        self.folders.insert((from.to_owned(), to.to_owned()));
        self.files.insert(old.into(), new.into());
    }
}

fn files<'a>(stacks: &'a StackTable) -> BTreeSet<&'a str> {
    let frames = (0..stacks.frame_count()).map(|frame| stacks.frame(FrameId(frame as u32)));
    let of = |frame: FrameText<'a>| match frame.kind {
        FrameKind::Python => [frame.file, frame.file],
        FrameKind::Native { library } => [frame.file, library],
    };
    frames.flat_map(of).collect()
}

/// Those that are in no library, and in a folder at all.
fn own_files<'a>(files: &[&'a str]) -> Vec<&'a str> {
    files.iter().copied().filter(|file| library_path(file).is_none() && file.contains('/')).collect()
}

/// Of each file the one of the others that ends most alike, if there is one such.
fn best<'a>(files: &[&'a str], others: &[&'a str]) -> HashMap<&'a str, &'a str> {
    let mut by_name: HashMap<&str, Vec<&'a str>> = HashMap::new();
    for other in others {
        by_name.entry(name(other)).or_default().push(other);
    }
    let one = |file: &&'a str| {
        let alike = by_name.get(name(file))?;
        let most = alike.iter().map(|other| common(file, other)).max()?;
        let mut best = alike.iter().filter(|other| common(file, other) == most);
        best.next().filter(|_| best.next().is_none()).map(|best| (*file, *best))
    };
    files.iter().filter_map(one).collect()
}

fn name(file: &str) -> &str {
    file.rsplit('/').next().unwrap_or(file)
}

/// How many parts of two paths are the same at their ends.
fn common(a: &str, b: &str) -> usize {
    a.rsplit('/').zip(b.rsplit('/')).take_while(|(a, b)| a == b).count()
}

/// What is left of two paths without what is the same at their ends.
fn apart<'a>(a: &'a str, b: &'a str) -> (&'a str, &'a str) {
    let same: usize = a.rsplit('/').take(common(a, b)).map(|part| part.len() + 1).sum();
    let rest = |path: &'a str| &path[..path.len().saturating_sub(same)];
    (rest(a), rest(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn between(old: &[&'static str], new: &[&'static str]) -> Moved {
        let table = |files: &[&'static str]| {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("c");
            let mut writer =
                crate::capture::CaptureWriter::create(&path, true, &crate::capture::Header::default())
                    .unwrap();
            for file in files {
                let frame = writer.intern_frame("f", file, 1).unwrap();
                writer.intern_stack(&[frame]).unwrap();
            }
            writer.finish(crate::capture::Trailer::default()).unwrap();
            let mut reader = crate::capture::CaptureReader::open(&path).unwrap();
            while reader.next().is_some() {}
            reader.into_stacks()
        };
        Moved::between(&table(old), &table(new))
    }

    #[test]
    fn what_is_installed_is_told_by_its_path_in_the_library() {
        let moved = between(
            &["/v1/lib/python3.11/site-packages/django/db/models.py", "/usr/lib/python3.11/json/decoder.py"],
            &["/v2/lib/python3.12/site-packages/django/db/models.py", "/opt/lib/python3.12/json/decoder.py"],
        );
        assert_eq!(
            moved.name("/v1/lib/python3.11/site-packages/django/db/models.py"),
            "/v2/lib/python3.12/site-packages/django/db/models.py"
        );
        assert_eq!(moved.name("/usr/lib/python3.11/json/decoder.py"), "/opt/lib/python3.12/json/decoder.py");
    }

    #[test]
    fn a_release_in_another_folder_is_the_same_code() {
        let moved = between(
            &["/srv/r1/shop/app.py", "/srv/r1/shop/db.py", "/srv/r1/gone.py", "/etc/same.py"],
            &["/srv/r2/shop/app.py", "/srv/r2/shop/db.py", "/srv/r2/new.py", "/etc/same.py"],
        );
        assert_eq!(moved.name("/srv/r1/shop/app.py"), "/srv/r2/shop/app.py");
        assert_eq!(moved.name("/srv/r1/shop/db.py"), "/srv/r2/shop/db.py");
        assert_eq!(moved.name("/srv/r1/gone.py"), "/srv/r1/gone.py");
        let folders: Vec<_> = moved.folders.iter().map(|(old, new)| (&**old, &**new)).collect();
        assert_eq!(folders, [("/srv/r1", "/srv/r2")]);
    }

    #[test]
    fn files_that_only_happen_to_have_a_name_are_not() {
        // Two of them could be meant, and folders that differ in a way of their own.
        let moved = between(
            &["/a/utils.py", "/a/x/views.py", "/a/one.py"],
            &["/b/utils.py", "/c/utils.py", "/d/y/views.py", "/e/two.py"],
        );
        assert!(moved.folders.is_empty() && moved.name("/a/utils.py") == "/a/utils.py", "{moved:?}");
    }

    #[test]
    fn the_only_file_of_a_script_may_lie_anywhere() {
        assert_eq!(between(&["/tmp/a/job.py"], &["/tmp/b/job.py"]).name("/tmp/a/job.py"), "/tmp/b/job.py");
        assert_eq!(between(&["/tmp/a/job.py"], &["/tmp/b/other.py"]).name("/tmp/a/job.py"), "/tmp/a/job.py");
    }
}
