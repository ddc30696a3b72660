//! `storm.py`: eight threads that check themselves under forks, a timer and numbered signals.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::common::{Python, Target};

/// The program, and how far its threads were at the last look.
pub struct Storm {
    pub target: Target,
    rounds: u64,
    forks: u64,
}

impl Storm {
    pub fn start(python: &Python) -> Self {
        Self { target: Target::start(python, "storm.py"), rounds: 0, forks: 0 }
    }

    pub fn pid(&self) -> i32 {
        self.target.pid()
    }

    /// The threads and the forks went on since the last look, and nothing went wrong.
    pub fn assert_right(&mut self) {
        self.target.assert_alive();
        let started = Instant::now();
        loop {
            self.target.send("check");
            let checked = self.target.expect("checked");
            assert_eq!(checked["errors"], json!([]), "a thread computed something wrong");
            assert_eq!(checked["wrong_children"], json!([]), "a child went wrong");
            assert_eq!(checked["alive"], 8, "a thread died");
            let rounds = checked["rounds"].as_array().unwrap().iter().filter_map(|n| n.as_u64()).sum();
            let forks = checked["forks"].as_u64().unwrap();
            if rounds > self.rounds && forks > self.forks {
                (self.rounds, self.forks) = (rounds, forks);
                return;
            }
            assert!(started.elapsed() < Duration::from_secs(30), "no more progress: {checked}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends the sending of signals: each came as often as it was sent.
    pub fn assert_no_signal_lost_or_doubled(&mut self) {
        self.target.send("signals");
        let signals = self.target.expect("signals");
        assert_eq!(signals["wrong"], json!([]), "signals (number, deliveries): {signals}");
        assert!(
            signals["sent"].as_u64().unwrap() > 100 && signals["ticks"].as_u64().unwrap() > 30,
            "{signals}"
        );
    }

    /// Descriptors of the process now, and what is mapped in it that heaptap would have mapped.
    pub fn belongings(&self) -> (usize, Vec<String>) {
        belongings(self.pid())
    }
}

/// See [`Storm::belongings`].
pub fn belongings(pid: i32) -> (usize, Vec<String>) {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let ours = |line: &&str| {
        let mut words = line.split_ascii_whitespace();
        let rights = words.nth(1).unwrap_or_default();
        line.contains("memfd:heaptap") || (rights.starts_with("r-x") && words.nth(3).is_none())
    };
    (descriptors, maps.lines().filter(ours).map(str::to_owned).collect())
}
