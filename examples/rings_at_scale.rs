//! Feeds the controller's end of the agent's rings with a made-up server's allocator calls, as fast as it goes, and tells what
//! each stage of the recording took: `rings_at_scale EVENTS LIVE_BLOCKS [STAGE]`. The stages are `merge` (the events in one order),
//! `translate` (what they come to), `stacks` (their stacks' ids) and `ledger` (all of it, into /dev/null); without one, each
//! in turn.
//!
//! Filling the rings is not counted, and time is the thread's own: others may use the processor, too. Knows nothing of live processes.

#[path = "made_up/mod.rs"]
mod made_up;
#[path = "../tests/rings/writer.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod writer;

use heaptap::addr::RemoteAddr;
use heaptap::agent_abi::{function, part, record};
use heaptap::capture::{CaptureWriter, Header, StackId};
use heaptap::cpython::Location;
use heaptap::cpython::layout::LineTableFormat;
use heaptap::probe::calls::Observation;
use heaptap::probe::function::{Answer, Request};
use heaptap::probe::ring::ticks;
use heaptap::recorder::ledger::{Ledger, Origin};
use heaptap::recorder::merge::Merger;
use heaptap::recorder::source::gives_out;
use heaptap::recorder::told::Told;
use heaptap::recorder::translate::Translator;
use made_up::{Server, Take, peak_rss};
use nix::time::ClockId;
use std::collections::HashMap;
use std::error::Error;
use std::time::Duration;
use writer::{Numbers, RingFile, Writer, head};

const RING_LEN: usize = 1 << 20;
const RINGS: usize = 17;
/// Records are drained when a ring has less room than this many words.
const ROOM: usize = 4096;
const STAGES: [&str; 4] = ["merge", "translate", "stacks", "ledger"];

/// The agent of the made-up server.
struct Agent {
    writers: HashMap<i32, Writer>,
    file: RingFile,
    numbers: Numbers,
    stacks: Vec<Vec<Location>>,
    told_stacks: Vec<bool>,
    codes: HashMap<String, u64>,
    last: i32,
    full: bool,
}

/// A hash is as good as any other that is not 0.
fn hash(stack: usize) -> u64 {
    (stack as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl Agent {
    fn new(stacks: Vec<Vec<Location>>) -> Self {
        let told_stacks = vec![false; stacks.len()];
        Self {
            writers: HashMap::new(),
            file: RingFile::new(RINGS, RING_LEN),
            numbers: Numbers::default(),
            stacks,
            told_stacks,
            codes: HashMap::new(),
            last: 0,
            full: false,
        }
    }

    fn tell_stack(&mut self, tid: i32, stack: usize) {
        if std::mem::replace(&mut self.told_stacks[stack], true) {
            return;
        }
        let frames = self.stacks[stack].clone();
        let mut words = vec![head(record::STACK, 0, 0), hash(stack), frames.len() as u64];
        for frame in frames {
            let known = self.codes.len() as u64;
            let code = *self.codes.entry(frame.function.to_string()).or_insert(0x7000 + 256 * known);
            if code == 0x7000 + 256 * known {
                self.tell_code(tid, code, &frame);
            }
            words.extend([code, 2 * u64::from(frame.line.unwrap_or(0))]);
        }
        self.writers.get_mut(&tid).expect("a ring").write(&words);
    }

    fn tell_code(&mut self, tid: i32, code: u64, frame: &Location) {
        // A hundred instructions, one on each line from 1 on.
        let lines: Vec<u8> = (0..100).flat_map(|_| [0x80 | 11 << 3, 1, 2]).collect();
        let parts = [
            (part::NUMBERS, vec![0; 8]),
            (part::NAME_1, frame.function.as_bytes().to_vec()),
            (part::FILE_1, frame.file.as_bytes().to_vec()),
            (part::LINES, lines),
        ];
        for (part, mut bytes) in parts {
            let len = bytes.len() as u64;
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            let mut words = vec![head(record::CODE, 0, 0), code, u64::from(part) << 32, len, len << 32];
            let tail = bytes.chunks_exact(8);
            words.extend(tail.map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes"))));
            self.writers.get_mut(&tid).expect("a ring").write(&words);
        }
    }
}

impl Take for Agent {
    fn call(
        &mut self,
        _: u64,
        tid: i32,
        call: Observation,
        stack: Option<usize>,
    ) -> Result<(), Box<dyn Error>> {
        let ring = self.writers.len() + 1;
        let file = &self.file;
        let writer = self.writers.entry(tid).or_insert_with(|| file.writer(ring));
        if writer.end == 0 {
            writer.write(&[head(record::THREAD, 0, 0), tid as u64]);
        }
        // As threads that take turns tell it.
        if std::mem::replace(&mut self.last, tid) != tid {
            writer.write(&[head(record::TIME, 0, 0), ticks()]);
        }
        if let Some(stack) = stack {
            self.tell_stack(tid, stack);
        }
        let writer = self.writers.get_mut(&tid).ok_or("no ring")?;
        match call {
            Observation::Freed { address: RemoteAddr(address), .. } => {
                let number = self.numbers.take(function::FREE, address);
                writer.write(&[head(record::FREE, function::FREE, number), address]);
            }
            Observation::Ended {
                request: Request::Allocate { size },
                answer: Answer::Address(RemoteAddr(address)),
                ..
            } => {
                let number = self.numbers.take(function::MALLOC, address);
                let first = head(record::ALLOC, function::MALLOC, number);
                writer.write(&[first, address, size.unwrap_or(0), stack.map_or(0, hash)]);
            }
            other => return Err(format!("not made up: {other:?}").into()),
        }
        self.full |= !writer.has_room(ROOM);
        Ok(())
    }
}

/// The recording side, as [`heaptap::recorder::agent`] has it.
struct Recorder {
    merger: Merger<Told>,
    translator: Translator,
    ledger: Ledger,
}

impl Recorder {
    /// Takes what is in the rings as far as `stage`; how many events that were.
    fn drain(&mut self, stage: &str) -> Result<u64, Box<dyn Error>> {
        let mut events = 0;
        // The second look sees nothing new: what was told last is settled then.
        for _ in 0..2 {
            self.merger.look(ticks() + 1_000_000);
            while let Some(event) = self.merger.peek().copied() {
                events += 1;
                if stage != "merge" {
                    self.take(&event, stage)?;
                }
                self.merger.accept();
            }
        }
        Ok(events)
    }

    #[inline]
    fn take(
        &mut self,
        event: &heaptap::probe::ring_record::Event,
        stage: &str,
    ) -> Result<(), Box<dyn Error>> {
        let Some(call) = self.translator.translate(event) else { return Ok(()) };
        self.translator.recorded(event);
        let mut origin = Origin { stack: StackId::EMPTY, interval: call.interval };
        if stage != "translate" && gives_out(&call.observation) {
            let id = self.merger.told().stack_id(call.stack, false, self.ledger.writer())?;
            origin.stack = id.ok_or("a stack that was not told")?;
        }
        if stage == "ledger" {
            self.ledger.time(event.stamp / 2);
            self.ledger.observe(event.tid as i32, call.observation, origin)?;
        } else {
            std::hint::black_box((call, origin));
        }
        Ok(())
    }
}

fn own_time() -> Result<Duration, Box<dyn Error>> {
    Ok(ClockId::CLOCK_THREAD_CPUTIME_ID.now()?.into())
}

fn run(events: u64, live_blocks: usize, stage: &str) -> Result<(), Box<dyn Error>> {
    let mut server = Server::new(live_blocks);
    let mut agent = Agent::new(server.stacks.clone());
    let header = Header { pid: 4242, page_size: 4096, ..Header::default() };
    let mut recorder = Recorder {
        merger: Merger::new(agent.file.rings(), Told::new(LineTableFormat::Locations, None), true),
        translator: Translator::default(),
        ledger: Ledger::new(CaptureWriter::create("/dev/null", true, &header)?, 4096),
    };
    let (mut spent, mut drained) = (Duration::ZERO, 0);
    while server.events < events {
        agent.full = false;
        while !agent.full && server.events < events {
            server.step(&mut agent)?;
        }
        for writer in agent.writers.values() {
            writer.publish(writer.end);
        }
        let begin = own_time()?;
        drained += recorder.drain(stage)?;
        spent += own_time()? - begin;
    }
    let ns = spent.as_nanos() as f64 / drained as f64;
    let (counters, missing) = (recorder.ledger.writer().counters(), recorder.merger.take_missing());
    // One line of key=value, for scripts.
    println!(
        "stage={stage} events={drained} ns_per_event={ns:.1} events_per_second={:.0} recorded={} unknown_frees={} \
         missing={} peak_rss={}",
        1e9 / ns,
        counters.events,
        counters.frees_from_before,
        missing.full + missing.unreadable,
        peak_rss()?
    );
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let usage = || format!("usage: rings_at_scale EVENTS LIVE_BLOCKS [{}]", STAGES.join("|"));
    let (events, live_blocks, stages) = match arguments.as_slice() {
        [events, blocks] => (events, blocks, &STAGES[..]),
        [events, blocks, stage] => {
            let at = STAGES.iter().position(|known| known == stage).ok_or_else(usage)?;
            (events, blocks, &STAGES[at..=at])
        }
        _ => return Err(usage().into()),
    };
    let (events, live_blocks) = (events.parse::<u64>()?, live_blocks.parse::<usize>()?);
    stages.iter().try_for_each(|stage| run(events, live_blocks, stage))
}
