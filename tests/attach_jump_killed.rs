//! SIGKILL of a heaptap that records by jumps, at any instant: the target goes on, is back at its own speed soon, and what is left in it
//! can be taken over and removed.

mod common;
mod hostile;

use ::heaptap::agent_abi::State;
use ::heaptap::probe::near;
use common::heaptap::detach_in_the_end;
use common::snapshot::assert_left_no_trace;
use common::{Recording, Snapshot, Target, for_each_python, heaptap};
use hostile::storm::{Storm, belongings};
use hostile::{SAMPLED, call, of_this_machine};
use std::mem::offset_of;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// Rounds; a soak makes ten times as many.
const ROUNDS: u64 = 100;

/// Where the state of the agent in `pid` is, if one is there.
fn state_of(pid: i32) -> Option<u64> {
    let memory = std::fs::File::open(format!("/proc/{pid}/mem")).ok()?;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
    let starts = maps.lines().filter(|l| l.contains("rw-p")).filter_map(|l| l.split_once('-'));
    let magic = |at: &u64| {
        let mut bytes = [0; 8];
        memory.read_exact_at(&mut bytes, at + offset_of!(State, magic) as u64).is_ok()
            && u64::from_le_bytes(bytes) == ::heaptap::agent_abi::STATE_MAGIC
    };
    starts.filter_map(|(start, _)| u64::from_str_radix(start, 16).ok()).find(magic)
}

/// Where the first region of the jumps in `pid` is.
fn header_of(pid: i32) -> Option<u64> {
    let memory = std::fs::File::open(format!("/proc/{pid}/mem")).ok()?;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
    let starts = maps.lines().filter(|l| l.contains("r-xp")).filter_map(|l| l.split_once('-'));
    let is_first = |at: &u64| {
        let mut head = [0; near::STATE_AT + 16];
        let read = memory.read_exact_at(&mut head, *at);
        // Only the first names a state.
        read.is_ok() && head.starts_with(&near::MAGIC) && head[near::STATE_AT..] != [0; 16]
    };
    starts.filter_map(|(start, _)| u64::from_str_radix(start, 16).ok()).find(is_first)
}

fn is_enabled(pid: i32, state: u64) -> bool {
    let mut bytes = [0; 4];
    let memory = std::fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    memory.read_exact_at(&mut bytes, state + offset_of!(State, enabled) as u64).unwrap();
    u32::from_le_bytes(bytes) != 0
}

/// How long the attach takes from its start to the line that says that it records.
fn time_to_record(pid: i32, arguments: &[&str]) -> Duration {
    let started = Instant::now();
    let recording = Recording::try_attach(pid, arguments).unwrap();
    let took = started.elapsed();
    recording.stop().assert_code(0);
    took
}

#[test]
fn killing_at_any_instant_spares_the_target() {
    for_each_python(of_this_machine, |python| {
        let mut storm = Storm::start(python);
        storm.assert_right();
        let (descriptors, nothing) = storm.belongings();
        assert_eq!(nothing, Vec::<String>::new());
        let folder = tempfile::tempdir().unwrap();
        let long = time_to_record(storm.pid(), SAMPLED).max(Duration::from_millis(60));
        let rounds = if common::soak() { ROUNDS * 10 } else { ROUNDS };
        let (mut before, mut during, mut refused) = (0, 0, 0);
        for round in 0..rounds {
            let how: &[&str] = if round % 2 == 0 { SAMPLED } else { &["--exact"] };
            let mut child = heaptap()
                .args(["attach", "--pid", &storm.pid().to_string(), "-o"])
                .arg(folder.path().join(format!("{round}.heaptap")))
                .args(how)
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null())
                .spawn()
                .unwrap();
            // Most of the rounds are spread over the attach; some come later, a few as it leaves.
            let part = (round * 61 % 100) as f64 / 100.0;
            std::thread::sleep(long.mul_f64(part * 2.5));
            if round % 5 == 4 {
                let recorder = nix::unistd::Pid::from_raw(child.id() as i32);
                let _ = nix::sys::signal::kill(recorder, nix::sys::signal::Signal::SIGINT);
                std::thread::sleep(Duration::from_micros(round * 997 % 20_000));
            }
            refused += u32::from(matches!(child.try_wait(), Ok(Some(status)) if !status.success()));
            child.kill().unwrap();
            child.wait().unwrap();
            if Snapshot::take(storm.pid()).changed_text().is_empty() {
                before += 1;
            } else {
                during += 1;
            }
            storm.assert_right();
        }
        assert!(before > 5 && during > 5, "killed {before} times without jumps in, {during} times with");
        // What one that was killed left may be busy for a moment, then the next one says so; it must not be the rule.
        assert!(u64::from(refused) * 10 < rounds, "{refused} of {rounds} were refused");
        detach_in_the_end(storm.pid());
        storm.assert_no_signal_lost_or_doubled();
        assert!(Snapshot::take(storm.pid()).changed_text().is_empty());
        assert_eq!(storm.belongings(), (descriptors, vec![]), "left in the target");
        assert_eq!(belongings(storm.pid()).1, Vec::<String>::new());
        storm.assert_right();
    });
}

#[test]
fn a_dead_heaptap_is_noticed_and_its_agent_switches_itself_off() {
    for_each_python(of_this_machine, |python| {
        let folder = tempfile::tempdir().unwrap();
        for how in [SAMPLED, &["--exact"]] {
            let mut target = hostile::start(python, folder.path());
            let before = Snapshot::take(target.pid());
            call(&mut target, "start_churning");
            let bare = turns_in(&mut target);
            Recording::attach(&target, how).kill();
            let killed = Instant::now();
            let state = state_of(target.pid()).expect("the agent is there");
            assert!(is_enabled(target.pid(), state));
            while is_enabled(target.pid(), state) {
                assert!(killed.elapsed() < Duration::from_secs(6), "{how:?}: it never switches itself off");
                std::thread::sleep(Duration::from_millis(5));
            }
            eprintln!("{how:?}: off after {:?}", killed.elapsed());
            assert!(killed.elapsed() > Duration::from_secs(2), "{how:?}: {:?}", killed.elapsed());
            let off = turns_in(&mut target);
            eprintln!("{how:?}: {bare} turns in 0.3 s bare, {off} switched off");
            assert!(off * 2 > bare, "{how:?}: {bare} turns bare, {off} with a switched-off agent");
            call(&mut target, "end_churning");
            detach_in_the_end(target.pid());
            assert_left_no_trace(&before, &mut target);
        }
    });
}

/// Rounds of malloc and free in 0.3 s.
fn turns_in(target: &mut Target) -> i64 {
    let from = call(target, "turns");
    std::thread::sleep(Duration::from_millis(300));
    call(target, "turns") - from
}

/// Killed while it leaves, between the note that the agent's memory is about to go and its going: the next one finds it. Where
/// it has gone, and something else has its place, that is left alone.
#[test]
fn what_was_about_to_be_unmapped_is_found() {
    for_each_python(of_this_machine, |python| {
        let mut target = Target::start(python, "libc_blocks.py");
        let before = Snapshot::take(target.pid());
        for other_has_its_place in [false, true] {
            Recording::attach(&target, SAMPLED).kill();
            let pid = target.pid();
            let (state, header) = (state_of(pid).expect("a state"), header_of(pid).expect("a first region"));
            let memory =
                std::fs::File::options().read(true).write(true).open(format!("/proc/{pid}/mem")).unwrap();
            let note = header + near::STATE_AT as u64;
            let mut pair = [0; 16];
            memory.read_exact_at(&mut pair, note).unwrap();
            let [noted, len] = [0, 8].map(|at| u64::from_le_bytes(pair[at..at + 8].try_into().unwrap()));
            assert_eq!(noted, state);
            memory.write_all_at(&(len | near::LEAVING).to_le_bytes(), note + 8).unwrap();
            if other_has_its_place {
                let magic = state + offset_of!(State, magic) as u64;
                memory.write_all_at(&[0; 8], magic).unwrap();
                detach_in_the_end(pid);
                let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
                assert!(maps.contains(&format!("{state:x}-")), "what is not ours was unmapped:\n{maps}");
                assert!(Snapshot::take(pid).changed_text().is_empty());
            } else {
                detach_in_the_end(pid);
                assert_left_no_trace(&before, &mut target);
            }
        }
    });
}

/// Each kind takes over what the other left.
#[test]
fn one_kind_takes_over_from_the_other() {
    for_each_python(of_this_machine, |python| {
        let mut target = Target::start(python, "libc_blocks.py");
        let before = Snapshot::take(target.pid());
        let kinds: [&[&str]; 3] = [&["--breakpoints", "trap"], &["--exact"], SAMPLED];
        for first in kinds {
            for second in kinds {
                Recording::attach(&target, first).kill();
                assert!(!before.differences(target.pid()).is_empty());
                let recording = Recording::attach(&target, second);
                target.go();
                recording.stop().assert_code(0);
                assert_left_no_trace(&before, &mut target);
            }
        }
    });
}
