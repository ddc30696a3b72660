//! Feeds the recorder's ledger and the capture writer with a made-up server's allocator calls, as fast as it goes, and
//! tells what that took: `ledger_at_scale CAPTURE EVENTS LIVE_BLOCKS`. With `-` as the capture the calls are made up
//! and thrown away: what that takes is the share of the example itself.
//!
//! `scripts/memory-at-scale` runs both and takes the difference. Knows nothing of live processes: what stopping a
//! thread costs is measured there on a real one.

mod made_up;

use heaptap::capture::{BreakpointKind, CaptureWriter, EndReason, Header, Trailer};
use heaptap::cpython::Location;
use heaptap::probe::calls::Observation;
use heaptap::recorder::ledger::{Ledger, Origin};
use heaptap::recorder::locations::Locations;
use made_up::{Server, Take, peak_rss};
use std::error::Error;
use std::time::Instant;

/// One event takes this long with trap breakpoints, as the capture's clock shall see.
const NS_PER_EVENT: u64 = 35_000;

/// The recording side.
struct Recorder {
    ledger: Ledger,
    locations: Locations,
    stacks: Vec<Vec<Location>>,
}

impl Take for Recorder {
    fn call(
        &mut self,
        at: u64,
        tid: i32,
        call: Observation,
        stack: Option<usize>,
    ) -> Result<(), Box<dyn Error>> {
        self.ledger.time(at * NS_PER_EVENT);
        let frames = stack.map_or(&[][..], |stack| &self.stacks[stack]);
        let stack = self.locations.intern(frames, self.ledger.writer())?;
        Ok(self.ledger.observe(tid, call, Origin { stack, interval: 0 })?)
    }
}

/// Throws calls away.
struct Nobody;

impl Take for Nobody {
    fn call(
        &mut self,
        _: u64,
        _: i32,
        call: Observation,
        stack: Option<usize>,
    ) -> Result<(), Box<dyn Error>> {
        std::hint::black_box((call, stack));
        Ok(())
    }
}

fn run(server: &mut Server, events: u64, take: &mut impl Take) -> Result<f64, Box<dyn Error>> {
    let begin = Instant::now();
    while server.events < events {
        server.step(take)?;
    }
    Ok(begin.elapsed().as_secs_f64())
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [capture, events, live_blocks] = arguments.as_slice() else {
        return Err("usage: ledger_at_scale CAPTURE|- EVENTS LIVE_BLOCKS".into());
    };
    let (events, live_blocks) = (events.parse::<u64>()?, live_blocks.parse::<usize>()?);
    let mut server = Server::new(live_blocks);
    let (mut file_bytes, mut kept) = (0, 0);
    let seconds;
    if capture == "-" {
        seconds = run(&mut server, events, &mut Nobody)?;
    } else {
        let header = Header {
            pid: 4242,
            page_size: 4096,
            breakpoints: BreakpointKind::Trap,
            command_line: vec!["made-up".into(), "server".into()],
            ..Header::default()
        };
        let ledger = Ledger::new(CaptureWriter::create(capture, true, &header)?, 4096);
        let mut recorder =
            Recorder { ledger, locations: Locations::default(), stacks: server.stacks.clone() };
        seconds = run(&mut server, events, &mut recorder)?;
        let mut ledger = recorder.ledger;
        kept = ledger.live().live_blocks();
        let duration_ns = server.events * NS_PER_EVENT;
        let counters = ledger.writer().counters();
        ledger.writer().flush()?;
        let trailer = Trailer { end_unix_ns: 0, duration_ns, reason: EndReason::Duration, counters };
        ledger.into_writer().finish(trailer)?;
        file_bytes = std::fs::metadata(capture)?.len();
    }
    // One line of key=value, for the script.
    println!(
        "events={} seconds={seconds:.3} peak_rss={} file_bytes={file_bytes} live_blocks={kept}",
        server.events,
        peak_rss()?
    );
    Ok(())
}
