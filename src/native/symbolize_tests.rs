//! Names from files as distributions and servers have them: stripped, with debugging information elsewhere, shared, or none.

use super::*;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const SOURCE: &str = r"
static inline __attribute__((always_inline)) int inner(volatile int *at) { return *at += 7; }
__attribute__((noinline)) int outer(volatile int *at) { return inner(at) * 3; }
";

struct Library {
    folder: tempfile::TempDir,
    build_id: Vec<u8>,
    /// An address within `inner` that is within `outer`.
    address: u64,
}

fn run(program: &str, arguments: &[&str], folder: &Path) {
    let status = Command::new(program).args(arguments).current_dir(folder).status();
    assert!(status.unwrap_or_else(|error| panic!("{program}: {error}")).success(), "{program} {arguments:?}");
}

impl Library {
    /// `whole.so`, `stripped.so` (also without a symbol table) and `debug`.
    fn build(id: u8) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("code.c"), SOURCE).unwrap();
        let id = format!("-Wl,--build-id=0x{:02x}aabbccddeeff", id);
        run("cc", &["-g", "-O2", "-shared", "-fPIC", &id, "-o", "whole.so", "code.c"], folder.path());
        run("objcopy", &["--only-keep-debug", "whole.so", "debug"], folder.path());
        run("objcopy", &["--strip-all", "whole.so", "stripped.so"], folder.path());
        let path = folder.path().join("whole.so");
        let file = ElfFile::new(std::fs::File::open(&path).unwrap(), &path).unwrap();
        let build_id = file.build_id().unwrap();
        let bytes = (0..build_id.len()).step_by(2).map(|at| &build_id[at..at + 2]);
        let build_id = bytes.map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
        let outer = file.symbol("outer").unwrap();
        let file = Rc::new(file);
        let local = Symbolizer::with(Vec::new(), None);
        let inlined = |at: &u64| local.places_in(&file, &[], *at).len() == 2;
        let address = (outer.addr.0..outer.addr.0 + outer.size).find(inlined).expect("inner is inlined");
        Self { folder, build_id, address }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn functions(&self, symbolizer: &Symbolizer, name: &str) -> Vec<(Option<String>, Option<u32>)> {
        let places = symbolizer.places(&self.path(name), &self.build_id, self.address);
        places.into_iter().map(|place| (place.function, place.line)).collect()
    }

    /// Where debugging information of this build id belongs in a folder.
    fn in_folder(&self, folder: &Path) -> PathBuf {
        let id = hex(&self.build_id);
        folder.join(".build-id").join(&id[..2]).join(format!("{}.debug", &id[2..]))
    }
}

fn both() -> Vec<(Option<String>, Option<u32>)> {
    vec![(Some("inner".to_owned()), Some(2)), (Some("outer".to_owned()), Some(3))]
}

fn only_outer() -> Vec<(Option<String>, Option<u32>)> {
    vec![(Some("outer".to_owned()), None)]
}

#[test]
fn a_file_names_its_code_if_it_is_the_one_that_is_meant() {
    let (library, other) = (Library::build(1), Library::build(2));
    let symbolizer = Symbolizer::with(Vec::new(), None);
    assert_eq!(library.functions(&symbolizer, "whole.so"), both());
    // What is known of a build id is so wherever the file lies.
    assert_eq!(library.functions(&symbolizer, "no such file"), both());
    let symbolizer = Symbolizer::with(Vec::new(), None);
    assert_eq!(library.functions(&symbolizer, "stripped.so"), only_outer());
    assert_eq!(symbolizer.places(&library.path("whole.so"), &other.build_id, library.address), []);
    assert_eq!(symbolizer.places(&library.path("whole.so"), &[], library.address), []);
    assert_eq!(symbolizer.places(&library.path("whole.so"), &library.build_id, 1 << 40), []);
}

#[test]
fn an_open_file_names_its_code_also_without_a_build_id_and_after_it_is_gone() {
    let library = Library::build(1);
    run(
        "objcopy",
        &["--remove-section", ".note.gnu.build-id", "whole.so", "nameless.so"],
        library.folder.path(),
    );
    let path = library.folder.path().join("nameless.so");
    let file = Rc::new(ElfFile::new(std::fs::File::open(&path).unwrap(), &path).unwrap());
    std::fs::remove_file(&path).unwrap();
    let symbolizer = Symbolizer::with(Vec::new(), None);
    for _ in 0..2 {
        let places = symbolizer.places_in(&file, &[], library.address);
        assert_eq!(places.into_iter().map(|place| (place.function, place.line)).collect::<Vec<_>>(), both());
    }
    assert_eq!(symbolizer.files.borrow().len(), 1);
}

#[test]
fn a_path_that_leads_to_no_regular_file_is_left_alone() {
    let library = Library::build(1);
    run("mkfifo", &["pipe"], library.folder.path());
    let (sender, receiver) = std::sync::mpsc::channel();
    let paths = [library.path("pipe"), "/dev/zero".to_owned(), "/".to_owned(), String::new()];
    let build_id = library.build_id.clone();
    std::thread::spawn(move || {
        let symbolizer = Symbolizer::with(Vec::new(), None);
        let found = paths.map(|path| symbolizer.places(&path, &build_id, 7));
        sender.send(found.iter().all(Vec::is_empty)).unwrap();
    });
    assert_eq!(receiver.recv_timeout(Duration::from_secs(20)), Ok(true), "it waits for a pipe");
}

#[test]
fn separate_debugging_information_is_found_by_build_id() {
    let (library, other) = (Library::build(1), Library::build(2));
    let folder = tempfile::tempdir().unwrap();
    let there = library.in_folder(folder.path());
    std::fs::create_dir_all(there.parent().unwrap()).unwrap();
    // One of another build does not count.
    std::fs::copy(other.path("debug"), &there).unwrap();
    let symbolizer = || Symbolizer::with(vec![folder.path().to_owned()], None);
    assert_eq!(library.functions(&symbolizer(), "stripped.so"), only_outer());
    std::fs::copy(library.path("debug"), &there).unwrap();
    assert_eq!(library.functions(&symbolizer(), "stripped.so"), both());
    assert_eq!(library.functions(&symbolizer(), "no such file"), both());
}

#[test]
fn what_several_share_by_dwz_is_found_by_its_build_id() {
    let library = Library::build(1);
    let folder = library.folder.path();
    // Two files with much in common: dwz moves that into a third.
    let filler: String =
        (0..400).map(|n| format!("struct s{n} {{ int field_{n}; struct s{n} *next; }} v{n};\n")).collect();
    std::fs::write(folder.join("code.c"), format!("{filler}{SOURCE}")).unwrap();
    for (name, id) in [("a", "0x01aabbccddeeff"), ("b", "0x02aabbccddeeff")] {
        let id = format!("-Wl,--build-id={id}");
        run("cc", &["-g", "-gdwarf-4", "-O2", "-shared", "-fPIC", &id, "-o", name, "code.c"], folder);
    }
    run("dwz", &["-m", "shared", "a", "b"], folder);
    let path = folder.join("a");
    let elf = |path: &Path| ElfFile::new(std::fs::File::open(path).unwrap(), path).unwrap();
    assert!(elf(&path).section(".gnu_debugaltlink").is_some());
    let shared_id = elf(&folder.join("shared")).build_id().unwrap();
    let there = folder.join("folder/.build-id").join(&shared_id[..2]);
    std::fs::create_dir_all(&there).unwrap();
    std::fs::copy(folder.join("shared"), there.join(format!("{}.debug", &shared_id[2..]))).unwrap();
    let names = |folders: Vec<PathBuf>| {
        let symbolizer = Symbolizer::with(folders, None);
        let (path, build_id) = (path.to_str().unwrap().to_owned(), library.build_id.clone());
        move |address: u64| -> Vec<Option<String>> {
            let places = symbolizer.places(&path, &build_id, address);
            places.into_iter().map(|place| place.function).collect()
        }
    };
    let outer = elf(&path).symbol("outer").unwrap();
    let (with, without) = (names(vec![folder.join("folder")]), names(Vec::new()));
    let both = [Some("inner".to_owned()), Some("outer".to_owned())];
    let address =
        (outer.addr.0..outer.addr.0 + outer.size).find(|at| with(*at) == both).expect("inner is inlined");
    // The name that is in the third file is unknown without it; that of the function is a symbol, too.
    assert_eq!(without(address), [None, Some("outer".to_owned())]);
}

/// A server that has files by the path of the request; others get 404. It remembers the requests.
struct Server {
    url: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn start(files: Vec<(String, Vec<u8>)>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let requests = asked.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                serve(stream.unwrap(), &files, &requests);
            }
        });
        Self { url, asked }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

fn serve(mut stream: TcpStream, files: &[(String, Vec<u8>)], requests: &Mutex<Vec<String>>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let request = lines.next().unwrap_or_default();
    lines.take_while(|line| !line.is_empty()).for_each(drop);
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let found = files.iter().find(|(name, _)| *name == path);
    requests.lock().unwrap().push(path);
    let (status, body) = found.map_or(("404 Not Found", &[][..]), |(_, body)| ("200 OK", body));
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
}

fn client(urls: &str, cache: &Path) -> Symbolizer {
    let servers = Debuginfod::new(urls, cache.to_owned(), Some(Duration::from_secs(20)));
    Symbolizer::with(Vec::new(), servers)
}

fn request(build_id: &[u8]) -> String {
    format!("/buildid/{}/debuginfo", hex(build_id))
}

#[test]
fn a_server_is_asked_once_and_the_cache_is_as_its_other_clients_have_it() {
    let library = Library::build(1);
    let cache = tempfile::tempdir().unwrap();
    let debug = std::fs::read(library.path("debug")).unwrap();
    let (empty, server) =
        (Server::start(Vec::new()), Server::start(vec![(request(&library.build_id), debug.clone())]));
    let urls = format!("ima:enforcing {} {}/", empty.url, server.url);
    assert_eq!(library.functions(&client(&urls, cache.path()), "stripped.so"), both());
    assert_eq!(library.functions(&client(&urls, cache.path()), "no such file"), both());
    assert_eq!((empty.asked().len(), server.asked()), (1, vec![request(&library.build_id)]));
    let kept = cache.path().join(hex(&library.build_id)).join("debuginfo");
    assert_eq!(std::fs::read(&kept).unwrap(), debug);
    assert_eq!(std::fs::read_dir(kept.parent().unwrap()).unwrap().count(), 1, "a part of a file is left");
    // Who has the information already asks nobody.
    let fresh = tempfile::tempdir().unwrap();
    assert_eq!(library.functions(&client(&urls, fresh.path()), "whole.so"), both());
    assert_eq!(server.asked().len(), 1);
}

#[test]
fn what_no_server_has_is_not_asked_for_again_soon() {
    let library = Library::build(1);
    let cache = tempfile::tempdir().unwrap();
    let empty = Server::start(Vec::new());
    for _ in 0..3 {
        assert_eq!(library.functions(&client(&empty.url, cache.path()), "stripped.so"), only_outer());
    }
    assert_eq!(empty.asked().len(), 1);
    let miss = cache.path().join(hex(&library.build_id)).join("debuginfo");
    let old = std::time::SystemTime::now() - Duration::from_secs(3600);
    std::fs::File::options().append(true).open(&miss).unwrap().set_modified(old).unwrap();
    library.functions(&client(&empty.url, cache.path()), "stripped.so");
    assert_eq!(empty.asked().len(), 2);
}

#[test]
fn what_a_server_sends_is_believed_only_with_the_right_build_id() {
    let (library, other) = (Library::build(1), Library::build(2));
    let cache = tempfile::tempdir().unwrap();
    for wrong in [std::fs::read(other.path("debug")).unwrap(), b"<html>".to_vec(), Vec::new()] {
        let server = Server::start(vec![(request(&library.build_id), wrong)]);
        assert_eq!(library.functions(&client(&server.url, cache.path()), "stripped.so"), only_outer());
        assert_eq!(server.asked().len(), 1);
    }
    assert!(!cache.path().join(hex(&library.build_id)).join("debuginfo").exists());
}

#[test]
fn a_server_that_does_not_answer_costs_its_time_once() {
    let (one, two) = (Library::build(1), Library::build(2));
    let cache = tempfile::tempdir().unwrap();
    // It takes connections, and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    let servers = Debuginfod::new(&url, cache.path().to_owned(), Some(Duration::from_millis(500)));
    let symbolizer = Symbolizer::with(Vec::new(), servers);
    let started = Instant::now();
    assert_eq!(one.functions(&symbolizer, "stripped.so"), only_outer());
    let first = started.elapsed();
    assert!((Duration::from_millis(500)..Duration::from_secs(10)).contains(&first), "{first:?}");
    assert_eq!(two.functions(&symbolizer, "stripped.so"), only_outer());
    assert!(started.elapsed() - first < Duration::from_millis(400), "it was asked again");
    // It may have it: that is not remembered for others.
    assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 0);
}

#[test]
fn a_list_without_a_url_asks_nobody() {
    for list in ["", "  ", "ima:enforcing", "file:///etc/passwd", "/tmp"] {
        assert!(Debuginfod::new(list, PathBuf::from("/nowhere"), None).is_none(), "{list}");
    }
}
