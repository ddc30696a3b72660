//! The report verbs on a capture with native frames among Python's, in every view of them.

mod script;

use heaptap::capture::{AllocatorKind, Index, IndexEntry, NativeFrame};
use script::native::{LIBC, NUMPY, SOLVER, names, native_header, shop_native, shop_native_events};
use script::{Script, heaptap};
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

fn shop_dir() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("native.heaptap");
    shop_native(&path);
    (dir, path)
}

fn stdout(arguments: &[&str], capture: &Path) -> String {
    let output = heaptap().args(arguments).arg(capture).assert().success().get_output().clone();
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn json(arguments: &[&str], capture: &Path) -> Value {
    serde_json::from_str(&stdout(arguments, capture)).unwrap()
}

#[test]
fn every_report_of_native_frames_is_as_agreed() {
    let (_dir, capture) = shop_dir();
    let cases: &[(&str, &[&str])] = &[
        ("summary", &["summary"]),
        ("summary_json", &["summary", "--json"]),
        ("table", &["table", "--leaks"]),
        ("table_json", &["table", "--json", "--only", "native"]),
        ("tree", &["tree", "--all-frames"]),
        ("tree_with_interpreter", &["tree", "--all-frames", "--hide-interpreter=false"]),
        ("tree_only_native", &["tree", "--all-frames", "--only", "native"]),
        ("tree_json", &["tree", "--json", "--leaks"]),
        ("stats", &["stats"]),
        ("stats_json", &["stats", "--json"]),
        ("leaks", &["leaks"]),
        ("leaks_json", &["leaks", "--json", "--max-rows", "2"]),
        ("diff_by_line", &["diff"]),
        ("diff_by_traceback_json", &["diff", "--by", "traceback", "--json"]),
        ("diff_by_function_csv", &["diff", "--by", "function", "--csv"]),
        ("diff_by_module", &["diff", "--by", "module", "--cumulative"]),
        ("dump", &["dump", "--leaks"]),
    ];
    for (name, arguments) in cases {
        let text = stdout(arguments, &capture);
        insta::assert_snapshot!(*name, text);
        if arguments.contains(&"--json") {
            serde_json::from_str::<Value>(&text).unwrap();
        }
    }
}

/// Python's frames are what the same recording without native ones would show.
#[test]
fn only_python_is_what_a_capture_without_native_frames_would_be() {
    let (_dir, capture) = shop_dir();
    let only = json(&["tree", "--json", "--only", "python"], &capture);
    let nodes = only["nodes"].as_array().unwrap();
    let functions: Vec<_> = nodes.iter().map(|node| node["function"].as_str()).collect();
    // The thread without Python has hidden frames only.
    let expected = [None, Some("<module>"), Some("Server.serve"), Some("<hidden frames>")];
    assert_eq!(functions, expected);
    assert!(!stdout(&["tree", "--json", "--only", "python"], &capture).contains("\"kind\": \"native\""));
    let totals = |document: &Value| document["total_bytes"].as_u64().unwrap();
    for view in [&["--only", "native"][..], &["--hide-interpreter=false"], &[]] {
        let other = json(&[&["tree", "--json"], view].concat(), &capture);
        assert_eq!(totals(&other), totals(&only), "{view:?}");
    }
}

#[test]
fn no_view_loses_or_doubles_bytes_in_any_grouping() {
    let (_dir, capture) = shop_dir();
    let views: [&[&str]; 5] = [
        &[],
        &["--hide-interpreter"],
        &["--hide-interpreter=false"],
        &["--only", "native"],
        &["--only", "python"],
    ];
    let sum = |document: &Value, rows: &str, field: &str| -> u64 {
        document[rows].as_array().unwrap().iter().map(|row| row[field].as_u64().unwrap()).sum()
    };
    for view in views {
        let of = |arguments: &[&str]| json(&[arguments, view].concat(), &capture);
        assert_eq!(sum(&of(&["table", "--json", "--leaks"]), "allocations", "bytes"), 2_331_008, "{view:?}");
        assert_eq!(sum(&of(&["summary", "--json", "--leaks"]), "functions", "own_bytes"), 2_331_008);
        for by in ["lineno", "function", "filename", "module", "traceback", "thread"] {
            assert_eq!(
                sum(&of(&["diff", "--json", "--by", by]), "rows", "bytes"),
                2_331_008,
                "{view:?} {by}"
            );
        }
        let leaks = of(&["leaks", "--json"]);
        let sites = leaks.as_array().unwrap().iter().filter_map(|site| site["bytes"].as_u64());
        assert_eq!(sites.sum::<u64>(), 2_331_008, "{view:?}");
    }
}

#[test]
fn patterns_are_held_against_native_frames_too() {
    let (_dir, capture) = shop_dir();
    let rows = |filter: &str, view: &[&str]| -> BTreeSet<String> {
        let document = json(&[&["diff", "--json", "--include", filter], view].concat(), &capture);
        let rows = document["rows"].as_array().unwrap();
        rows.iter().map(|row| row["function"].as_str().unwrap().to_owned()).collect()
    };
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
    assert_eq!(rows("module=numpy", &[]), set(&["PyDataMem_UserNEW"]));
    assert_eq!(rows("module=_solver.so", &[]), set(&["std::vector<double>::push_back(double const&)"]));
    assert_eq!(rows("module=<no file>", &[]), set(&["0x7f7700001000 in no file"]));
    assert_eq!(rows("module=python3.12", &[]), set(&[]));
    assert_eq!(rows("module=python3.12", &["--hide-interpreter=false"]), set(&["list_resize"]));
    assert_eq!(rows("function=Server.*", &[]), set(&["Server.serve"]));
}

#[test]
fn a_flame_graph_has_another_hue_for_native_frames() {
    let (_dir, capture) = shop_dir();
    let colours = |view: &[&str]| -> Vec<(String, [u32; 3])> {
        let svg = stdout(&[&["flamegraph", "-o", "-"], view].concat(), &capture);
        let boxes =
            regex::Regex::new(r#"<title>([^<]*) \([^<]*</title><rect[^>]*fill="rgb\((\d+),(\d+),(\d+)\)""#);
        let boxes = boxes.unwrap();
        let all = boxes.captures_iter(&svg).map(|found| {
            let part = |n: usize| found[n].parse().unwrap();
            (found[1].to_owned(), [part(2), part(3), part(4)])
        });
        all.collect()
    };
    let is_blue = |[r, g, b]: [u32; 3]| b > r && b > g;
    let shown = colours(&[]);
    let (native, python): (Vec<_>, Vec<_>) =
        shown.iter().partition(|(name, _)| name.contains(" in ") || name.contains('['));
    assert_eq!((native.len(), python.len()), (5, 3), "{shown:?}");
    assert!(native.iter().all(|(_, colour)| is_blue(*colour)), "{native:?}");
    assert!(python.iter().all(|(_, colour)| !is_blue(*colour)), "{python:?}");
    // Python's frames have the colours that they have alone.
    let alone = colours(&["--only", "python"]);
    assert!(python.iter().filter(|(name, _)| name.contains("server.py")).all(|one| alone.contains(one)));
}

#[test]
fn folders_keep_libraries_and_sum_up_what_was_cut_short() {
    let dir = tempfile::tempdir().unwrap();
    let mut index = Index::new("process 100 and its descendants".into(), 1);
    for pid in [100, 101] {
        shop_native(&dir.path().join(format!("{pid}.heaptap")));
        let capture = Some(format!("{pid}.heaptap"));
        index.processes.push(IndexEntry { pid, capture, ..IndexEntry::default() });
    }
    index.write(dir.path()).unwrap();
    let (_other, one) = shop_dir();
    let rows = |document: Value| -> Vec<(Value, Value, u64)> {
        let rows = document["allocations"].as_array().unwrap().clone();
        rows.into_iter()
            .map(|row| (row["function"].clone(), row["module"].clone(), row["bytes"].as_u64().unwrap()))
            .collect()
    };
    let arguments = ["table", "--json", "--leaks", "--only", "native"];
    let doubled: Vec<_> =
        rows(json(&arguments, &one)).into_iter().map(|(f, module, bytes)| (f, module, 2 * bytes)).collect();
    assert_eq!(rows(json(&arguments, dir.path())), doubled);
    let modules: BTreeSet<&str> = doubled.iter().filter_map(|row| row.1.as_str()).collect();
    assert_eq!(modules, BTreeSet::from([NUMPY, SOLVER]));
    assert!(stdout(&["stats"], dir.path()).contains("10 native stacks, 2 (20.0%) cut short"));
    // A folder beside itself: nothing grew.
    let arguments = ["diff", "--json", "--by", "module", "--from", "last"];
    let output = heaptap().args(arguments).args([dir.path(), dir.path()]).assert().success();
    let document: Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
    let rows = document["rows"].as_array().unwrap();
    assert!(rows.len() > 3 && rows.iter().all(|row| row["growth_bytes"] == 0), "{rows:?}");
}

#[test]
fn what_has_no_names_is_told_by_its_place_in_the_library() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("killed.heaptap");
    let mut script = Script::create(&path, &native_header());
    shop_native_events(&mut script);
    script.writer.flush().unwrap();
    drop(script);
    let text = stdout(&["table"], &path);
    let library = NUMPY.rsplit('/').next().unwrap();
    // Two places in one line can't be told to be one.
    assert!(
        text.contains(&format!("0x81010 in {library}")) && text.contains(&format!("0x81018 in {library}"))
    );
    assert!(text.contains("Native stacks were taken; how many is not known"), "{text}");
}

/// The functions of a library, and a capture of it that has no names: its recorder was killed.
fn library_and_capture(folder: &Path) -> (PathBuf, PathBuf, String) {
    let source = "__attribute__((noinline)) int outer(volatile int *at) { return *at * 3; }\n";
    let (code, library) = (folder.join("code.c"), folder.join("lib.so"));
    std::fs::write(&code, source).unwrap();
    let id = "0a0b0c0d0e0f1011";
    let status = std::process::Command::new("cc")
        .args(["-g", "-O1", "-shared", "-fPIC", &format!("-Wl,--build-id=0x{id}"), "-o"])
        .args([&library, &code])
        .status();
    assert!(status.unwrap().success());
    let file = heaptap::image::elf::ElfFile::new(std::fs::File::open(&library).unwrap(), &library).unwrap();
    let address = file.symbol("outer").unwrap().addr.0;
    let capture = folder.join("killed.heaptap");
    let mut script = Script::create(&capture, &native_header());
    let build_id = [10, 11, 12, 13, 14, 15, 16, 17];
    let module = Some(script.writer.intern_module(library.to_str().unwrap(), &build_id).unwrap());
    let frame = NativeFrame { module, address, interpreter: false, guessed: false };
    let frame = script.writer.intern_native_frame(frame).unwrap();
    let stack = script.writer.intern_stack(&[frame]).unwrap();
    script.allocate(AllocatorKind::Malloc, 1, 4096, 1000, stack);
    script.at_ms(1000);
    script.allocate(AllocatorKind::Malloc, 1, 8192, 1000, stack);
    script.writer.flush().unwrap();
    (library, capture, format!("{address:#x} in lib.so"))
}

#[test]
fn names_that_a_capture_lacks_are_looked_up_in_the_files_of_its_libraries() {
    let dir = tempfile::tempdir().unwrap();
    let (library, capture, unknown) = library_and_capture(dir.path());
    for verb in ["table", "tree", "summary", "stats", "leaks", "diff", "dump"] {
        let text = stdout(&[verb], &capture);
        assert!(text.contains("outer") && text.contains("[lib.so]"), "{verb}: {text}");
    }
    assert!(stdout(&["table"], &capture).contains("outer at code.c:1 [lib.so]"));
    std::fs::write(library, "upgraded").unwrap();
    assert!(stdout(&["table"], &capture).contains(&unknown));
}

#[test]
fn names_come_from_the_servers_that_the_environment_names() {
    let dir = tempfile::tempdir().unwrap();
    let (library, capture, unknown) = library_and_capture(dir.path());
    let debug = std::fs::read(&library).unwrap();
    std::fs::remove_file(library).unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = std::thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        let mut request = String::new();
        BufReader::new(stream.try_clone().unwrap()).read_line(&mut request).unwrap();
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", debug.len()).unwrap();
        stream.write_all(&debug).unwrap();
        request
    });
    let cache = dir.path().join("cache");
    let with_server = |verb: &str| {
        let mut heaptap = heaptap();
        heaptap.env("DEBUGINFOD_URLS", &url).env("DEBUGINFOD_CACHE_PATH", &cache);
        let output = heaptap.env("DEBUGINFOD_TIMEOUT", "20").arg(verb).arg(&capture).assert().success();
        String::from_utf8(output.get_output().stdout.clone()).unwrap()
    };
    // diff reads the capture several times; the server answers once.
    assert!(with_server("diff").contains("outer at code.c:1 [lib.so]"));
    assert_eq!(server.join().unwrap(), "GET /buildid/0a0b0c0d0e0f1011/debuginfo HTTP/1.1\r\n");
    assert!(with_server("table").contains("outer at code.c:1 [lib.so]"));
    // Who is told of no server asks none, and uses nothing that one has sent.
    assert!(stdout(&["table"], &capture).contains(&unknown));
}

#[test]
fn names_of_another_run_are_no_names_of_a_library_that_moved() {
    // Another virtual environment, and another address of the same line: the same code for a diff.
    let dir = tempfile::tempdir().unwrap();
    let [old, new] = ["old", "new"].map(|name| dir.path().join(name));
    for (path, version) in [(&old, "v1"), (&new, "v2")] {
        let mut script = Script::create(path, &native_header());
        let library = format!("/srv/{version}/lib/python3.12/site-packages/numpy/_core/umath.so");
        let module = script.writer.intern_module(&library, version.as_bytes()).unwrap();
        let libc = script.writer.intern_module(LIBC, &[4; 20]).unwrap();
        let frame = |module, address| NativeFrame {
            module: Some(module),
            address,
            interpreter: false,
            guessed: false,
        };
        let at = if version == "v1" { 0x8_1010 } else { 0x8_1018 };
        let named = [frame(module, at), frame(libc, 0x9_4ac0)];
        let frames = named.map(|frame| script.writer.intern_native_frame(frame).unwrap());
        let stack = script.writer.intern_stack(&frames).unwrap();
        script.allocate(AllocatorKind::Malloc, 1, 4096, 1000, stack);
        script.writer.symbols(&named.map(|frame| (frame, names(&frame)))).unwrap();
        script.finish();
    }
    for by in ["lineno", "traceback", "function", "module"] {
        let output = heaptap().args(["diff", "--json", "--by", by]).args([&old, &new]).assert().success();
        let document: Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
        let rows = document["rows"].as_array().unwrap();
        assert!(
            rows.len() == 1 && rows[0]["growth_bytes"] == 0 && rows[0]["bytes"] == 1000,
            "{by}: {rows:?}"
        );
    }
}

#[test]
fn what_can_not_be_shown_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("python.heaptap");
    script::shop(&path);
    for verb in ["summary", "table", "tree", "stats", "leaks", "diff", "dump"] {
        let output = heaptap().args([verb, "--only", "native"]).arg(&path).assert().failure();
        let said = String::from_utf8_lossy(&output.get_output().stderr).into_owned();
        assert!(said.contains("has no native frames") && said.contains("hint:"), "{verb}: {said}");
        let plain = stdout(&[verb], &path);
        assert_eq!(stdout(&[verb, "--only", "python", "--hide-interpreter=false"], &path), plain);
    }
    let output = heaptap().args(["stacks", "--pid", "1", "--only", "native"]).assert().failure().code(2);
    assert!(String::from_utf8_lossy(&output.get_output().stderr).contains("--only goes with --native"));
}
