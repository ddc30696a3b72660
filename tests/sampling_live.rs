//! Sampled recordings of a live process against the truth it tells: hundreds of attaches with different seeds to one program that
//! allocates known blocks of mixed sizes in several threads. Estimates have no bias, errors cover the truth as often as they
//! say, and what was freed is never told as live.
//!
//! How the estimates come from samples, without a process: tests/sampling_estimates.rs.

mod common;
mod sampled;

use common::dump::Allocation;
use common::heaptap::Capture;
use common::snapshot::assert_left_no_trace;
use common::{Python, Recording, Snapshot, Target, pythons, soak};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sampled::figures::Figures;
use sampled::{Mode, Run, Truth, interval_word};
use serde_json::Value;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Mean bytes between samples. Small, so that a run is quick; what counts is its ratio to the sizes.
const INTERVAL: u64 = 16 << 10;

/// Whether more runs are wanted: 200 in a soak.
fn wanted(figures: &Figures) -> bool {
    let (good, all) = figures.runs();
    let runs = if soak() { 200 } else { 40 };
    good < runs && all < 2 * runs
}

/// One interpreter stands for all: how Python is read is shown elsewhere. `HEAPTAP_TEST_PYTHON` chooses another.
fn python() -> &'static Python {
    let all = pythons();
    let usual = all.iter().find(|python| python.name.starts_with("pyenv-3.11") && python.root.is_none());
    let chosen = std::env::var_os("HEAPTAP_TEST_PYTHON").is_some();
    usual.filter(|_| !chosen).or(all.first()).expect("there is an interpreter")
}

fn start(arguments: &[&str]) -> Target {
    let builder = Target::builder(python(), "sampled_sites.py").env("PYTHONHASHSEED", "0");
    arguments.iter().fold(builder, |builder, argument| builder.arg(argument)).start()
}

/// Records one "go" and holds what must be true of every single run against it.
fn record(target: &mut Target, arguments: &[&str]) -> (Truth, Run) {
    record_while(target, arguments, |_| |_: &AtomicBool| {})
}

/// The same while something else is done in a thread, until it is told to stop; `prepare` makes that of the recorded process.
fn record_while<M: FnOnce(&AtomicBool) + Send>(
    target: &mut Target,
    arguments: &[&str],
    prepare: impl FnOnce(i32) -> M,
) -> (Truth, Run) {
    let recording = Recording::attach(target, arguments);
    let (stop, meanwhile) = (AtomicBool::new(false), prepare(target.pid()));
    let truth = std::thread::scope(|scope| {
        scope.spawn(|| meanwhile(&stop));
        let truth = target.go();
        stop.store(true, Ordering::Relaxed);
        Truth::from_json(&truth)
    });
    let capture = recording.stop();
    capture.assert_code(0);
    let run = Run::read(&capture.path, &truth);
    run.assert_sound(&truth);
    (truth, run)
}

fn sampled(seed: u64) -> [String; 6] {
    ["--sample", &INTERVAL.to_string(), "--seed", &seed.to_string(), "--max-cpu", "100"].map(str::to_owned)
}

/// The function that the fixture's sizes say is called is called, and nothing else allocates there.
#[test]
fn every_event_recorded_is_what_the_program_says() {
    for arguments in [&["alone"][..], &[]] {
        let mut target = start(arguments);
        let (truth, run) = record(&mut target, &["--exact"]);
        run.assert_exact(&truth);
    }
}

#[test]
fn estimates_of_live_recordings_have_no_bias_and_their_errors_cover_the_truth() {
    let mut target = start(&[]);
    let mut figures = Figures::new(Mode::Fixed(INTERVAL));
    while wanted(&figures) {
        let arguments = sampled(0x5eed_0000 + figures.runs().1);
        let (truth, run) = record(&mut target, &arguments.each_ref().map(String::as_str));
        figures.add(&truth, &run);
    }
    figures.check();
}

/// The interval changes all the time while the program allocates, as `--max-cpu` changes it now and then: each sample is weighted
/// with the interval of its own draw.
#[test]
fn estimates_have_no_bias_when_the_interval_changes_meanwhile() {
    let mut target = start(&[]);
    let mut figures = Figures::new(Mode::Between(INTERVAL, 2 * INTERVAL));
    let mut intervals = std::collections::BTreeSet::new();
    while wanted(&figures) {
        let arguments = sampled(0xc0de_0000 + figures.runs().1);
        let (truth, run) = record_while(&mut target, &arguments.each_ref().map(String::as_str), wobble);
        intervals.extend(run.intervals());
        figures.add(&truth, &run);
    }
    assert!(intervals.len() > 1, "the interval never changed: {intervals:?}");
    figures.check();
}

/// Changes the interval of the agent in the process.
fn wobble(pid: i32) -> impl FnOnce(&AtomicBool) + Send {
    let (word, start) = (interval_word(pid), Instant::now());
    move |stop| {
        for turn in 0.. {
            word.write(INTERVAL << (turn % 2));
            // The limit is for a test that failed.
            if stop.load(Ordering::Relaxed) || start.elapsed() > Duration::from_secs(60) {
                return;
            }
            std::thread::sleep(Duration::from_micros(300));
        }
    }
}

/// The interval that `--max-cpu` is to raise, and how often.
const SMALL: u64 = 4 << 10;
const RAISED: u64 = SMALL << 2;

/// Recording takes more than its share of a processor: the interval is raised while the target runs, until the share is
/// small, and what was drawn with either interval is weighed by its own.
#[test]
fn a_recording_that_costs_too_much_samples_less_and_stays_right() {
    let mut target = Target::start(python(), "steady.py");
    let before = Snapshot::take(target.pid());
    // Where heaptap came to run too late, and samples were dropped, nothing is shown.
    let recorded = (0..5).map(|_| record_until_raised(&mut target)).find(|(capture, _)| capture.drops() == 0);
    let (capture, truth) = recorded.expect("a machine less busy");
    assert_left_no_trace(&before, &mut target);
    assert_steady(&capture, &truth);
}

/// Records `steady.py` until the interval is [`RAISED`]; the capture and what the program says.
fn record_until_raised(target: &mut Target) -> (Capture, Value) {
    // So little that no machine is too fast: each step takes a sample to cost a fifth of what it does.
    let recording = Recording::attach(target, &["--sample", "4KiB", "--max-cpu", "0.01"]);
    let (word, started) = (interval_word(target.pid()), Instant::now());
    assert_eq!(word.read(), SMALL);
    target.send("start");
    target.expect("started");
    while word.read() < RAISED {
        assert!(started.elapsed() < Duration::from_secs(60), "it is still {}", word.read());
        std::thread::sleep(Duration::from_millis(5));
    }
    target.send("end");
    let truth = target.expect("ended")["truth"].clone();
    let capture = recording.stop();
    capture.assert_code(0);
    (capture, truth)
}

/// Holds samples of `steady.py`, and what is reported of them, against its truth.
fn assert_steady(capture: &Capture, truth: &Value) {
    let sizes: Vec<u64> = truth["sizes"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
    let dump = capture.dump();
    let is_burst = |a: &&Allocation| a.stack.first().is_some_and(|frame| truth["function"] == frame.function);
    let own: Vec<&Allocation> =
        dump.allocations.iter().filter(is_burst).filter(|a| sizes.contains(&a.size)).collect();
    let intervals: BTreeSet<u64> = own.iter().map(|a| a.interval).collect();
    assert!(intervals.contains(&SMALL) && intervals.len() > 1, "drawn with {intervals:?}");
    assert!(intervals.iter().all(|n| n.is_power_of_two()), "drawn with {intervals:?}");
    // What a sample stands for, and the variance that it shows: of Poisson sampling, each draw by itself.
    let (mut bytes, mut count, mut variance) = (0.0, 0.0, 0.0);
    for a in &own {
        let p = -(-(a.size as f64) / a.interval as f64).exp_m1();
        (bytes, count) = (bytes + a.size as f64 / p, count + 1.0 / p);
        variance += (1.0 - p) * (a.size as f64 / p).powi(2);
    }
    let (true_bytes, true_count) = (truth["bytes"].as_f64().unwrap(), truth["count"].as_f64().unwrap());
    let sigma = variance.sqrt();
    eprintln!(
        "{intervals:?}: {bytes:.0} ± {sigma:.0} of {true_bytes} bytes, {count:.0} of {true_count} allocations"
    );
    assert!(sigma < 0.03 * true_bytes, "shows nothing: {sigma} of {true_bytes}");
    assert!((bytes - true_bytes).abs() < 4.0 * sigma, "{bytes} ± {sigma} for {true_bytes}");
    // The report says the same, and its own error covers the truth.
    let stats: Value = serde_json::from_str(&capture.report("stats", &["--json"])).unwrap();
    let sampling = &stats["run"]["sampling"];
    assert_eq!(sampling["least_interval_bytes"], SMALL);
    assert!(sampling["largest_interval_bytes"].as_u64() >= intervals.last().copied(), "{sampling}");
    let is_line = |row: &&Value| row["function"] == truth["function"] && row["line"] == truth["line"];
    let row =
        stats["top_locations_by_size"].as_array().unwrap().iter().find(is_line).expect("the busiest line");
    let (told, error) = (row["bytes"].as_f64().unwrap(), row["bytes_error_95"].as_f64().unwrap());
    assert!((told - bytes).abs() < 1e-3 * bytes, "{told} reported, {bytes} by its records");
    assert!(error < 0.06 * told && (told - true_bytes).abs() < 2.0 * error, "{row} for {true_bytes}");
}

/// Has `lost_frees.py` fill the ring and free what it had allocated before, with heaptap stopped. `None` if that took so long that
/// heaptap may have been taken for dead.
fn fill_while_stopped() -> Option<(Recording, Target, Truth)> {
    let mut target = Target::start(python(), "lost_frees.py");
    let recording = Recording::attach(&target, &["--sample", "512", "--max-cpu", "100"]);
    target.go();
    // All of it is read.
    std::thread::sleep(Duration::from_millis(500));
    let (heaptap, start) = (Pid::from_raw(recording.pid()), Instant::now());
    kill(heaptap, Signal::SIGSTOP).unwrap();
    let truth = target.go();
    kill(heaptap, Signal::SIGCONT).unwrap();
    let was_dead = start.elapsed() > Duration::from_secs(2);
    (!was_dead).then(|| (recording, target, Truth::from_json(&truth)))
}

/// Records `lost_frees.py` and ends the recording so.
fn record_lost_frees(end: impl FnOnce(Recording, Target) -> Capture) {
    let (recording, target, truth) = (0..10).find_map(|_| fill_while_stopped()).expect("a machine less busy");
    let capture = end(recording, target);
    capture.assert_code(0);
    let run = Run::read(&capture.path, &truth);
    assert!(run.drops > 2000, "only {} drops: nothing is shown", run.drops);
    run.assert_sound(&truth);
    // Of 2000, all but one in 350 are sampled.
    let live = run.leaks["kept"];
    assert!((1900..=2000).contains(&live.samples()), "{live:?}");
    assert!((1990..=2010).contains(&live.count()), "{live:?}");
}

#[test]
fn frees_that_the_ring_had_no_room_for_are_found_at_the_end() {
    record_lost_frees(|recording, _target| recording.stop());
}

#[test]
fn frees_that_the_ring_had_no_room_for_are_found_while_the_target_runs() {
    record_lost_frees(|recording, target| {
        std::thread::sleep(Duration::from_secs(4));
        assert!(target.exit().success());
        recording.finish()
    });
}

#[test]
fn one_thread_is_sampled_alike_with_the_same_seed_and_otherwise_with_another() {
    let samples_of = |seed: u64| {
        let mut target = start(&["alone"]);
        let arguments = sampled(seed);
        record(&mut target, &arguments.each_ref().map(String::as_str)).1.sizes()
    };
    let first = samples_of(7);
    assert!(first.len() > 500, "{} samples", first.len());
    assert_eq!(first, samples_of(7));
    assert_ne!(first, samples_of(8));
}
