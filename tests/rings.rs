//! The order of events from many rings: made-up histories of threads that hand blocks to each other, published late, seen
//! late, with clocks that are wrong, and with threads that die. The ledger must see every block given out and given back
//! once, whatever the threads' luck.

#[path = "rings/history.rs"]
mod history;
#[path = "rings/writer.rs"]
mod writer;

use heaptap::addr::RemoteAddr;
use heaptap::agent_abi::{function, record};
use heaptap::capture::{CaptureWriter, Header, StackId};
use heaptap::probe::ring_record::{CodePiece, Definitions, NativeEnd, ToldFrame, What};
use heaptap::recorder::ledger::{Ledger, Origin};
use heaptap::recorder::merge::{GIVEN_UP_AFTER, MARGIN, Merger};
use heaptap::recorder::translate::Translator;
use history::{History, Plan};
use proptest::prelude::*;
use writer::{RingFile, head};

/// Nobody: these histories define nothing.
struct Nothing;

impl Definitions for Nothing {
    fn stack(&mut self, _: u64, _: impl ExactSizeIterator<Item = ToldFrame>, _: bool) {}
    fn native(&mut self, _: u64, _: u64, _: impl ExactSizeIterator<Item = u64>, _: NativeEnd) {}
    fn code(&mut self, _: CodePiece<'_>) {}
}

/// The recording side.
struct Recorder {
    merger: Merger<Nothing>,
    ledger: Ledger,
    translator: Translator,
    told: u64,
    _folder: tempfile::TempDir,
}

impl Recorder {
    fn new(file: &RingFile, numbered: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let sampling_mean_bytes = (!numbered).then_some(4096);
        let header = Header { sampling_mean_bytes, ..Header::default() };
        let capture = CaptureWriter::create(folder.path().join("c"), false, &header).unwrap();
        let merger = Merger::new(file.rings(), Nothing, numbered);
        let ledger = Ledger::new(capture, 4096);
        Self { merger, ledger, translator: Translator::default(), told: 0, _folder: folder }
    }

    /// Takes what may be told.
    fn drain(&mut self) -> usize {
        let mut told = 0;
        while let Some(event) = self.merger.peek().copied() {
            if let Some(call) = self.translator.translate(&event) {
                let origin = Origin { stack: StackId::EMPTY, interval: call.interval };
                self.ledger.observe(event.tid as i32, call.observation, origin).unwrap();
            }
            self.translator.recorded(&event);
            self.merger.accept();
            told += 1;
        }
        self.told += told as u64;
        told
    }
}

/// Plays a history and holds what the ledger made of it against the truth.
fn play(plan: Plan) {
    let file = RingFile::new(plan.threads + 1, 32 << 10);
    let mut recorder = Recorder::new(&file, true);
    let mut history = History::new(plan, &file);
    while history.goes_on() {
        history.step();
        if history.is_look_due() {
            history.show_heads();
            recorder.merger.look(history.now());
            recorder.drain();
        }
    }
    while !history.end() {
        recorder.merger.look(history.now());
        recorder.drain();
    }
    recorder.merger.look_last(history.now());
    recorder.drain();

    let (truth, tally) = (history.truth(), recorder.ledger.tally());
    let counters = recorder.ledger.writer().counters();
    assert_eq!((tally.missed_frees, tally.unmatched, tally.freed_again), (0, 0, 0), "{plan:?}");
    assert_eq!(counters.frees_from_before, 0, "{plan:?}");
    assert_eq!((counters.allocations, counters.frees), (truth.given_out, truth.given_back), "{plan:?}");
    for address in history.addresses() {
        let live = recorder.ledger.live().block(RemoteAddr(address)).map(|block| block.size);
        assert_eq!(live, truth.live.get(&address).copied(), "{address:#x} at the end of {plan:?}");
    }
    assert_eq!(recorder.merger.take_missing(), Default::default(), "{plan:?}");
    assert_eq!(recorder.told, history.records(), "{plan:?}");
}

/// The agent takes a controller that it never heard of for a dead one, and its first event may be the next thing that happens.
#[test]
fn a_heart_has_beaten_when_it_is_there() {
    // Often: on an idle machine a new thread's first turn comes soon.
    for _ in 0..200 {
        let file = RingFile::new(1, 32 << 10);
        let rings = file.rings();
        let _heart = rings.heart(true).unwrap();
        assert_ne!(file.heartbeat(), 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_block_is_given_out_and_back_once(
        seed in 1_u64..u64::MAX,
        threads in 1_usize..6,
        steps in 100_usize..4000,
        look_every in 1_usize..400,
        within_look in 1_u64..60,
        blocks in 2_u64..30,
        deaths in prop_oneof![Just(0_u64), 1_u64..4],
    ) {
        play(Plan { seed, threads, steps, look_every, within_look, blocks, deaths });
    }
}

fn free(number: u32, address: u64) -> [u64; 2] {
    [head(record::FREE, function::FREE, number), address]
}

/// Addresses of what is told now.
fn told(merger: &mut Merger<Nothing>) -> Vec<u64> {
    let mut addresses = Vec::new();
    while let Some(event) = merger.peek() {
        if let What::Freed { address, .. } = event.what {
            addresses.push(address.0);
        }
        merger.accept();
    }
    addresses
}

#[test]
fn a_number_that_never_comes_holds_nobody_up() {
    let file = RingFile::new(3, 32 << 10);
    let mut merger = Merger::new(file.rings(), Nothing, true);
    let (mut one, mut two) = (file.writer(1), file.writer(2));
    // Number 1 is nobody's.
    one.write(&free(0, 0x10));
    one.write(&free(2, 0x20));
    one.publish(one.end);
    let mut now = 10 * MARGIN;
    merger.look(now);
    // 1 may have been published after its ring was looked at.
    assert_eq!(told(&mut merger), [0x10]);
    merger.look(now);
    assert_eq!(told(&mut merger), [0x20]);
    // As long as it may come: what is behind it is told once settled, and in order.
    two.write(&free(3, 0x30));
    two.publish(two.end);
    merger.look(now);
    assert!(told(&mut merger).is_empty());
    one.write(&free(1, 0x40));
    one.publish(one.end);
    merger.look(now);
    assert!(told(&mut merger).is_empty());
    merger.look(now);
    assert_eq!(told(&mut merger), [0x40, 0x30]);
    // All have come: numbers count again, at once.
    one.write(&free(4, 0x50));
    one.publish(one.end);
    merger.look(now);
    assert_eq!(told(&mut merger), [0x50]);
    // 5 does not come for long: it is not reckoned with any more.
    one.write(&free(6, 0x60));
    one.publish(one.end);
    merger.look(now);
    merger.look(now);
    assert_eq!(told(&mut merger), [0x60]);
    now += 2 * GIVEN_UP_AFTER;
    merger.look(now);
    one.write(&free(7, 0x70));
    one.publish(one.end);
    merger.look(now);
    assert_eq!(told(&mut merger), [0x70]);
    two.write(&free(5, 0x80));
    two.publish(two.end);
    merger.look(now);
    assert_eq!(told(&mut merger), [0x80]);
}

#[test]
fn what_is_younger_than_the_look_waits_for_the_next() {
    let file = RingFile::new(3, 32 << 10);
    let mut merger = Merger::new(file.rings(), Nothing, true);
    let (mut one, mut two) = (file.writer(1), file.writer(2));
    let now = 100 * MARGIN;
    // Threads that take turns: two's turn came first, but its ring was looked at too early.
    one.write(&[u64::from(record::TIME), now - 10]);
    one.write(&free(0, 0x10));
    one.publish(one.end);
    merger.look(now);
    assert!(told(&mut merger).is_empty());
    two.write(&[u64::from(record::TIME), now - 20]);
    two.write(&free(0, 0x4_0000));
    two.publish(two.end);
    merger.look(now + 2 * MARGIN);
    assert_eq!(told(&mut merger), [0x4_0000, 0x10]);
}

#[test]
fn corrupt_rings_stop_nobody_else() {
    let file = RingFile::new(4, 32 << 10);
    let mut merger = Merger::new(file.rings(), Nothing, true);
    let (mut good, mut bad, mut circle) = (file.writer(1), file.writer(2), file.writer(3));
    bad.write(&[u64::from(record::STACK), 1, 5000]);
    bad.publish(bad.end);
    // Each waits for the other, which no agent can write.
    circle.write(&free(1, 0x7_0010));
    circle.write(&free(0, 0x8_0010));
    circle.publish(circle.end);
    good.write(&free(1, 0x8_0010));
    good.write(&free(0, 0x7_0010));
    good.publish(good.end);
    let mut now = 10 * MARGIN;
    merger.look(now);
    merger.look(now);
    assert!(told(&mut merger).is_empty());
    assert_eq!(merger.take_missing().unreadable, 1);
    now += 2 * GIVEN_UP_AFTER;
    merger.look(now);
    assert_eq!(told(&mut merger).len(), 4);
    // An end that goes back, one beyond the ring, one within a word.
    for end in [8, 1 << 40, good.end + 4] {
        bad.publish(end);
        merger.look(now);
        assert_eq!(merger.take_missing().unreadable, 1, "{end:#x}");
    }
    good.write(&free(1, 0x9_0010));
    good.publish(good.end);
    merger.look_last(now);
    assert_eq!(told(&mut merger), [0x9_0010]);
}

#[test]
fn samples_go_by_their_one_ring() {
    let file = RingFile::new(1, 32 << 10);
    let mut recorder = Recorder::new(&file, false);
    let mut ring = file.writer(0);
    for turn in 0..5_u64 {
        for tid in [7, 8] {
            ring.write(&[head(record::THREAD, 0, 0), tid]);
            ring.write(&[head(record::TIME, 0, 0), 1000 * turn]);
            ring.write(&[head(record::SAMPLE, function::MALLOC, 0), 0x1000 * tid, 64, 0, 4096]);
            if turn < 4 {
                ring.write(&[head(record::FREE, function::FREE, 0), 0x1000 * tid]);
            }
        }
    }
    ring.publish(ring.end);
    recorder.merger.look(10 * MARGIN);
    recorder.drain();
    let counters = recorder.ledger.writer().counters();
    assert_eq!((counters.allocations, counters.frees), (10, 8));
    let live = recorder.ledger.live().block(RemoteAddr(0x8000)).unwrap();
    assert_eq!((live.tid, live.size, live.interval), (8, 64, 4096));
}

proptest! {
    #[test]
    fn any_bytes_are_survived(
        words in proptest::collection::vec(prop_oneof![any::<u64>(), 0_u64..16, (0_u64..64).prop_map(|n| (n << 8) | (n % 12))], 1..400),
        heads in proptest::collection::vec(any::<u16>(), 1..6),
    ) {
        let file = RingFile::new(3, 32 << 10);
        let mut merger = Merger::new(file.rings(), Nothing, true);
        let mut writers = [file.writer(0), file.writer(1), file.writer(2)];
        for (n, word) in words.iter().enumerate() {
            writers[n % 3].write(&[*word]);
        }
        for (n, end) in heads.iter().enumerate() {
            writers[n % 3].publish(u64::from(*end));
            merger.look(n as u64 * MARGIN);
            told(&mut merger);
        }
        for writer in &writers {
            writer.publish(writer.end);
        }
        merger.look_last(1 << 40);
        told(&mut merger);
        prop_assert!(merger.peek().is_none());
    }
}
