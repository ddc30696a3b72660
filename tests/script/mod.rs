//! A capture made from a fixed script of events, and the tools to run heaptap on files.
//!
//! The scripts are what the golden captures were made from, [`shop`] `v1.heaptap`, [`shop_sampled`] `v2.heaptap`,
//! [`shop_snapshots`] `v4.heaptap` and [`native::shop_native`] `v5.heaptap`: they may not change, only grow siblings.
#![allow(dead_code)] // each test binary uses a part of this

pub mod native;
pub mod use_up;

use assert_cmd::Command;
use heaptap::addr::RemoteAddr;
use heaptap::capture::{
    Allocation, AllocatorKind, BreakpointKind, CaptureWriter, Counters, EndReason, EntryPoint, Free,
    FreeUnknown, Header, Keep, LibcFacts, LiveSet, Module, PythonFacts, SiteState, Snapshot, SnapshotHead,
    SnapshotReason, StackId, Totals, Trailer, Unmap,
};
use std::path::Path;

/// The main thread of the script.
pub const MAIN: u32 = 4242;
/// A worker with a Python name.
pub const WORKER: u32 = 4243;
/// A thread without a Python state.
pub const NATIVE: u32 = 4244;

/// The heaptap under test.
pub fn heaptap() -> Command {
    let mut heaptap = Command::cargo_bin("heaptap").expect("the binary is built with the tests");
    // Tests ask no server that whoever runs them may have named.
    heaptap.env_remove("DEBUGINFOD_URLS");
    heaptap
}

/// Header of the script's run.
pub fn header() -> Header {
    Header {
        heaptap_version: "0.1.0".into(),
        pid: MAIN,
        command_line: vec!["python3".into(), "-m".into(), "shop.server".into()],
        executable: "/usr/bin/python3.12".into(),
        start_unix_ns: 1_700_000_000_000_000_000,
        hostname: "shop-1".into(),
        kernel: "6.1.0".into(),
        architecture: "x86_64".into(),
        page_size: 4096,
        python: PythonFacts {
            version: "3.12.1".into(),
            flavour: "default".into(),
            learnt_from: "Py_Version of libpython".into(),
        },
        libc: LibcFacts { name: "glibc".into(), version: "2.36".into() },
        allocator_library: "/lib/x86_64-linux-gnu/libc.so.6".into(),
        layout_source: "cpython-layouts/3.12.toml".into(),
        breakpoints: BreakpointKind::Trap,
        python_allocators: true,
        sampling_mean_bytes: None,
        sampling_seed: None,
        max_cpu_percent: None,
        aggregated: false,
        native: false,
        snapshot_every_ns: None,
        entry_points: vec![EntryPoint {
            name: "malloc".into(),
            module: "/lib/x86_64-linux-gnu/libc.so.6".into(),
            address: 0x7f00_0009_a000,
            allocator: "malloc".into(),
        }],
        modules: vec![Module {
            path: "/usr/bin/python3.12".into(),
            build_id: Some("00112233445566778899aabbccddeeff00112233".into()),
            ranges: vec![(0x5555_5555_4000, 0x5555_55a0_0000)],
        }],
    }
}

/// Trailer of the script's run, its counters from `live`.
pub fn trailer(live: &LiveSet) -> Trailer {
    Trailer {
        end_unix_ns: 1_700_000_002_500_000_000,
        duration_ns: 2_500_000_000,
        reason: EndReason::Duration,
        counters: Counters {
            failed_allocations: 1,
            peak_live_bytes: live.peak_bytes(),
            live_bytes: live.live_bytes(),
            live_blocks: live.live_blocks() as u64,
            ..Counters::default()
        },
    }
}

/// Writes events and keeps the live set, as a recorder does.
pub struct Script {
    /// The file.
    pub writer: CaptureWriter,
    /// What is live.
    pub live: LiveSet,
    now: u64,
}

impl Script {
    /// Begins a capture.
    pub fn create(path: &Path, header: &Header) -> Self {
        let writer = CaptureWriter::create(path, false, header).unwrap();
        Self { writer, live: LiveSet::new(header.page_size), now: 0 }
    }

    /// Time passes.
    pub fn at_ms(&mut self, ms: u64) {
        self.now = ms * 1_000_000;
        self.writer.time(self.now);
    }

    /// A stack from `function file:line`, outermost first.
    pub fn stack(&mut self, outermost_first: &[(&str, &str, u32)]) -> StackId {
        let mut frames: Vec<_> = outermost_first
            .iter()
            .map(|(function, file, line)| self.writer.intern_frame(function, file, *line).unwrap())
            .collect();
        frames.reverse();
        self.writer.intern_stack(&frames).unwrap()
    }

    /// An allocation.
    pub fn allocate(&mut self, allocator: AllocatorKind, tid: u32, address: u64, size: u64, stack: StackId) {
        self.sample(allocator, tid, address, size, stack, 0);
    }

    /// An allocation that was sampled with this interval.
    pub fn sample(
        &mut self,
        allocator: AllocatorKind,
        tid: u32,
        address: u64,
        size: u64,
        stack: StackId,
        interval: u64,
    ) {
        let event = Allocation { allocator, tid, address: RemoteAddr(address), size, stack, interval };
        self.live.allocate(&event, self.now);
        self.writer.allocation(event).unwrap();
    }

    /// A free, of a block from before if it is not live.
    pub fn free(&mut self, deallocator: AllocatorKind, tid: u32, address: u64) {
        let address = RemoteAddr(address);
        match self.live.free(address) {
            Some(_) => self.writer.free(Free { deallocator, tid, address }),
            None => self.writer.free_unknown(FreeUnknown { deallocator, tid, address }),
        }
        .unwrap();
    }

    /// An unmap.
    pub fn unmap(&mut self, tid: u32, address: u64, len: u64) {
        let event = Unmap { tid, address: RemoteAddr(address), len };
        self.live.unmap(&event);
        self.writer.unmap(event).unwrap();
    }

    /// Ends the capture.
    pub fn finish(self) {
        let trailer = trailer(&self.live);
        self.writer.finish(trailer).unwrap();
    }
}

const APP: &str = "/srv/shop/server.py";
const CACHE: &str = "/srv/shop/cache.py";
const JSON: &str = "/usr/lib/python3.12/json/decoder.py";

/// The script: a server that leaks cache entries, parses recursively, maps and unmaps memory.
pub fn shop(path: &Path) {
    let mut script = Script::create(path, &header());
    shop_events(&mut script);
    script.finish();
}

/// The events of [`shop`], without the trailer.
pub fn shop_events(script: &mut Script) {
    use AllocatorKind::*;
    script.writer.define_thread(MAIN, "python3", "MainThread").unwrap();
    script.writer.define_thread(WORKER, "python3", "worker-1").unwrap();
    script.writer.define_thread(NATIVE, "io_uring", "").unwrap();
    let module = ("<module>", APP, 90);
    let serve = ("Server.serve", APP, 41);
    let put = script.stack(&[module, serve, ("Cache.put", CACHE, 17)]);
    let nested =
        [("JSONDecoder.decode", JSON, 337), ("parse", JSON, 60), ("parse", JSON, 61), ("parse", JSON, 61)];
    let parse = script.stack(&[&[module, serve][..], &nested].concat());
    let worker = script.stack(&[("Thread.run", "/usr/lib/python3.12/threading.py", 1010), ("load", APP, 12)]);
    for n in 0..40u64 {
        script.at_ms(10 * n);
        let entry = 0x5555_5600_0000 + 0x440 * n;
        script.allocate(ObjectMalloc, MAIN, entry, 1024, put);
        script.allocate(Malloc, MAIN, 0x5555_5700_0000 + 0x2010 * (n % 4), 8000 + n, parse);
        script.allocate(Calloc, NATIVE, 0x7f10_0000_0000 + 64 * n, 48, StackId::EMPTY);
        script.free(Free, NATIVE, 0x7f10_0000_0000 + 64 * n);
        script.free(Free, MAIN, 0x5555_5700_0000 + 0x2010 * (n % 4));
        if n % 10 == 0 {
            script.free(ObjectFree, MAIN, 0x5555_5000_0000 + 16 * n);
            script.writer.flush().unwrap();
        }
    }
    script.at_ms(900);
    script.allocate(Mmap, WORKER, 0x7f20_0000_0000, 1 << 20, worker);
    script.allocate(Realloc, WORKER, 0x5555_5800_0000, 300_000, worker);
    script.at_ms(1200);
    script.unmap(WORKER, 0x7f20_0004_0000, 0xc_0000);
    script.free(Realloc, WORKER, 0x5555_5800_0000);
    script.allocate(Realloc, WORKER, 0x5555_5900_0000, 400_000, worker);
    script.at_ms(2000);
    script.free(Free, WORKER, 0x5555_5900_0000);
    script.free(ObjectFree, MAIN, 0x5555_5600_0000);
}

/// Header of a sampled run.
pub fn sampled_header() -> Header {
    Header {
        breakpoints: BreakpointKind::Jump,
        python_allocators: false,
        sampling_mean_bytes: Some(512 << 10),
        sampling_seed: Some(42),
        max_cpu_percent: Some(1.5),
        ..header()
    }
}

/// The same server, sampled: mappings are recorded for certain, of the rest one allocation in 512 KiB, and in 1 MiB from
/// the second half on.
pub fn shop_sampled(path: &Path) {
    let mut script = Script::create(path, &sampled_header());
    shop_sampled_events(&mut script);
    let mut trailer = trailer(&script.live);
    trailer.counters = Counters {
        interval_at_end: 1 << 20,
        agent_passed_through: 3,
        threads_without_slot: 0,
        target_extra_bytes: 2_310_144,
        controller_peak_bytes: 9_437_184,
        ..trailer.counters
    };
    script.writer.finish(trailer).unwrap();
}

/// The events of [`shop_sampled`], without the trailer.
pub fn shop_sampled_events(script: &mut Script) {
    use AllocatorKind::*;
    script.writer.define_thread(MAIN, "python3", "MainThread").unwrap();
    script.writer.define_thread(WORKER, "python3", "worker-1").unwrap();
    let module = ("<module>", APP, 90);
    let serve = ("Server.serve", APP, 41);
    let put = script.stack(&[module, serve, ("Cache.put", CACHE, 17)]);
    let parse = script.stack(&[module, serve, ("JSONDecoder.decode", JSON, 337), ("parse", JSON, 60)]);
    let worker = script.stack(&[("Thread.run", "/usr/lib/python3.12/threading.py", 1010), ("load", APP, 12)]);
    script.allocate(Mmap, MAIN, 0x7f30_0000_0000, 1 << 20, put);
    for n in 0..60u64 {
        script.at_ms(20 * n);
        let interval = if n < 30 { 512 << 10 } else { 1 << 20 };
        script.sample(Malloc, MAIN, 0x5555_5600_0000 + 0x1_1000 * n, 600 + 1000 * (n % 5), put, interval);
        let parsed = 0x5555_5700_0000 + 0x1010 * (n % 4);
        script.sample(Malloc, MAIN, parsed, 32 + n, parse, interval);
        script.free(Free, MAIN, parsed);
        if n % 20 == 10 {
            // Arrays: nearly certain to be sampled.
            script.sample(Calloc, WORKER, 0x7f20_0000_0000 + 0x100_0000 * n, 3 << 20, worker, interval);
            script.allocate(Mmap, WORKER, 0x7f40_0000_0000 + 0x100_0000 * n, 256 << 10, worker);
            script.writer.flush().unwrap();
        }
        if n % 3 == 2 {
            script.free(Free, MAIN, 0x5555_5600_0000 + 0x1_1000 * n);
        }
    }
    script.at_ms(1900);
    script.unmap(WORKER, 0x7f40_0a00_0000, 64 << 10);
    script.free(Free, WORKER, 0x7f20_0a00_0000);
}

/// The same server for five hours, in snapshots alone: the cache grows by 8 MiB an hour and the parser lets go of all. Only three
/// are kept, so what came by those that were thinned out is with the others.
pub fn shop_snapshots(path: &Path) {
    const HOUR: u64 = 3600;
    let header =
        Header { aggregated: true, snapshot_every_ns: Some(HOUR * 1_000_000_000), ..sampled_header() };
    let mut script = Script::create(path, &header);
    script.writer.keep(Keep { snapshots: 3, max_bytes: 4 << 20 }).unwrap();
    script.writer.define_thread(MAIN, "python3", "MainThread").unwrap();
    script.writer.define_thread(WORKER, "python3", "worker-1").unwrap();
    let serve = [("<module>", APP, 90), ("Server.serve", APP, 41)];
    let put = script.stack(&[&serve[..], &[("Cache.put", CACHE, 17)]].concat());
    let parse = script.stack(&[&serve[..], &[("JSONDecoder.decode", JSON, 337)]].concat());
    let interval = 512 << 10;
    let (mut entries, mut blocks) = (Totals::default(), 0);
    for hour in 0..6 {
        script.at_ms(hour * HOUR * 1000);
        let (mut cached, mut parsed) = (Totals::default(), Totals::default());
        for _ in 0..if hour == 0 { 0 } else { 16 } {
            cached.add(Totals::one(1024, interval));
            parsed.add(Totals::one(4000, interval));
            blocks += 1;
        }
        entries.add(cached);
        let mut cache =
            SiteState { stack: put, tid: MAIN, live: entries, allocated: cached, ..SiteState::default() };
        cache.ages[6].bytes = entries.bytes();
        cache.ages[6].blocks = entries.count();
        let parser =
            SiteState { stack: parse, tid: MAIN, allocated: parsed, freed: parsed, ..SiteState::default() };
        let arena = Totals::certain(1 << 20, 1);
        let mut arenas =
            SiteState { allocator: AllocatorKind::Mmap, tid: WORKER, live: arena, ..SiteState::default() };
        arenas.allocated = if hour == 0 { arena } else { Totals::default() };
        let reason = match hour {
            0 => SnapshotReason::Start,
            3 => SnapshotReason::Asked,
            5 => SnapshotReason::End,
            _ => SnapshotReason::Tick,
        };
        let time_ns = hour * HOUR * 1_000_000_000;
        let head =
            SnapshotHead { index: hour as u32, time_ns, unix_ns: header.start_unix_ns + time_ns, reason };
        let rows = if hour == 0 { vec![arenas] } else { vec![arenas, cache, parser] };
        assert!(script.writer.keep_snapshot(Snapshot { head, rows }).unwrap());
    }
    assert_eq!(blocks, 80);
    let counters = Counters {
        live_bytes: (1 << 20) + entries.bytes(),
        live_blocks: 1 + entries.count(),
        ..Counters::default()
    };
    let end = trailer(&script.live);
    let peak_live_bytes = counters.live_bytes;
    script
        .writer
        .finish(Trailer {
            duration_ns: 5 * HOUR * 1_000_000_000,
            counters: Counters { peak_live_bytes, ..counters },
            ..end
        })
        .unwrap();
}
