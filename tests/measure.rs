//! Figures of the format: bytes per event, speed, memory. Run by hand:
//! `cargo test --release --test measure -- --ignored --nocapture`

mod script;

use heaptap::addr::RemoteAddr;
use heaptap::analysis::{View, analyse};
use heaptap::capture::{AllocatorKind, CaptureReader, StackId};
use script::{Script, header};
use std::collections::VecDeque;
use std::path::Path;
use std::time::Instant;

/// xorshift: the stream must be the same on every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }

    /// Small numbers often, large ones seldom.
    fn skewed(&mut self, limit: u64) -> u64 {
        let most = self.below(limit) + 1;
        let some = self.below(most) + 1;
        self.below(some)
    }
}

/// A heap with size classes whose freed blocks are given out again, last first, as malloc does.
#[derive(Default)]
struct Heap {
    free: Vec<Vec<u64>>,
    top: u64,
}

impl Heap {
    fn allocate(&mut self, size: u64) -> u64 {
        let class = (size.max(24) + 8).div_ceil(16) as usize;
        self.free.resize(self.free.len().max(class + 1), Vec::new());
        self.free[class].pop().unwrap_or_else(|| {
            self.top += 16 * class as u64;
            0x5555_5600_0000 + self.top
        })
    }

    fn release(&mut self, address: u64, size: u64) {
        self.free[(size.max(24) + 8).div_ceil(16) as usize].push(address);
    }
}

/// A server's stream: 4 threads in bursts, 6,000 stacks of 20 to 40 frames, nine blocks of ten freed soon.
fn write(path: &Path, records: u64) {
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut script = Script::create(path, &header());
    let stacks: Vec<StackId> = (0..6000)
        .map(|n| {
            let depth = 20 + random.below(20);
            let names: Vec<(String, u32)> = (0..depth)
                .map(|level| {
                    (
                        format!("handler_{level}_{}", if level < 12 { level } else { random.below(40) }),
                        10 + n % 90,
                    )
                })
                .collect();
            let frames: Vec<(&str, &str, u32)> =
                names.iter().map(|(name, line)| (name.as_str(), "/srv/shop/handlers.py", *line)).collect();
            script.stack(&frames)
        })
        .collect();
    let mut heap = Heap::default();
    let mut soon: VecDeque<(u64, u64)> = VecDeque::new();
    let mut late: Vec<(u64, u64)> = Vec::new();
    let (mut done, mut tid) = (0, 1);
    while done < records {
        if done % 50 == 0 {
            tid = 4242 + random.below(4) as u32;
            script.at_ms(done / 500);
        }
        let size = 16 + random.skewed(2000);
        let address = heap.allocate(size);
        let stack = stacks[random.skewed(6000) as usize];
        script.allocate(AllocatorKind::Malloc, tid, address, size, stack);
        done += 1;
        if random.below(10) == 0 {
            late.push((address, size))
        } else {
            soon.push_back((address, size))
        }
        while soon.len() as u64 > 1 + random.below(30) {
            let at = random.below(soon.len() as u64) as usize;
            let Some((address, size)) = soon.remove(at) else { break };
            script.free(AllocatorKind::Free, tid, address);
            heap.release(address, size);
            done += 1;
        }
        if late.len() > 200_000 {
            let at = random.below(late.len() as u64) as usize;
            let (address, size) = late.swap_remove(at);
            script.free(AllocatorKind::Free, tid, address);
            heap.release(address, size);
            done += 1;
        }
        assert!(script.live.block(RemoteAddr(address)).is_none_or(|block| block.size == size));
    }
    script.finish();
}

/// Resident kilobytes of this process, now and at most.
fn resident() -> (u64, u64) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    (field("VmRSS:"), field("VmHWM:"))
}

#[test]
#[ignore = "figures, not a check; takes a minute"]
fn figures_of_ten_million_records() {
    let dir = tempfile::tempdir().unwrap();
    for records in [1_000_000u64, 10_000_000] {
        let path = dir.path().join(format!("{records}.heaptap"));
        let begin = Instant::now();
        write(&path, records);
        let wrote = begin.elapsed();
        let bytes = std::fs::metadata(&path).unwrap().len();
        println!("{records} records: {bytes} bytes, {:.2} per record", bytes as f64 / records as f64);
        println!(
            "  written in {wrote:.2?} with the live set and the made-up heap; resident kB {:?}",
            resident()
        );
        let begin = Instant::now();
        let read = CaptureReader::open(&path).unwrap().filter(Result::is_ok).count();
        let took = begin.elapsed();
        println!("  read in {took:.2?}: {:.1} million records/s", read as f64 / took.as_secs_f64() / 1e6);
        let begin = Instant::now();
        let findings = analyse(CaptureReader::open(&path).unwrap(), View::HighWaterMark).unwrap();
        let took = begin.elapsed();
        println!("  analysed in {took:.2?}: {:.1} million records/s", read as f64 / took.as_secs_f64() / 1e6);
        println!("  live {:?}; resident kB now and at most {:?}", findings.live, resident());
        assert_eq!(findings.missing, heaptap::analysis::Missing::default());
    }
}
