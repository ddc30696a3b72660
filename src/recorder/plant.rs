//! Planting the jump kind: from an examined process to one whose allocator calls lead to the agent, and that nobody traces.
//!
//! 1. The layout is tried on the running threads.
//! 2. What a killed heaptap left is removed.
//! 3. Code, state and rings are mapped and written, one thread stopped for a system call at a time ([`load`]).
//! 4. The world is stopped, the jumps are written, the world runs on untraced ([`jump`]).

use super::RecordError;
use super::examine::Examined;
use super::native_code::{NativeCode, stack_end};
use super::record::RecordOptions;
use crate::addr::RemoteAddr;
use crate::cpython::Python;
use crate::image::LibcKind;
use crate::inferior::memory::ProcessMemory;
use crate::inferior::{Inferior, maps};
use crate::probe::agent_facts::python_facts;
use crate::probe::error::ProbeError;
use crate::probe::function::Function;
use crate::probe::hooks::wanted;
use crate::probe::internal_callers::of_process;
use crate::probe::jump;
use crate::probe::load::{self, Loaded, NativeSettings, Settings};
use crate::probe::ring::{Heart, Rings, ticks};
use crate::probe::{install, stale};
use crate::python_binary::binaries;
use std::time::{Duration, Instant};

/// How often the layout is tried on the running process before the world is stopped for it.
const LAYOUT_TRIES: u32 = 10;
const LAYOUT_PAUSE: Duration = Duration::from_millis(2);
/// Bytes of a thread's ring (exact) and of the one ring of all threads (sampled).
const EXACT_RING: u64 = 1 << 20;
const SAMPLED_RING: u64 = 512 << 10;
/// Rings in exact mode: twice the threads there are, within these bounds. Threads beyond share one.
const RINGS: std::ops::RangeInclusive<usize> = 17..=257;

/// Bytes of the rings that come to be touched, as far as can be told of a process with so many threads.
pub fn ring_bytes(exact: bool, threads: usize) -> u64 {
    if exact { exact_rings(threads).min(threads + 1) as u64 * EXACT_RING } else { SAMPLED_RING }
}

fn exact_rings(threads: usize) -> usize {
    (2 * threads + 1).clamp(*RINGS.start(), *RINGS.end())
}

/// How the jump kind records.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct JumpOptions {
    /// Every event; otherwise samples.
    pub exact: bool,
    /// Mean bytes between samples.
    pub sample: u64,
    /// Seed of the sampling.
    pub seed: u64,
    /// How long one event may wait for heaptap (exact).
    pub max_wait: Duration,
    /// Share of the target's time that recording may take before the interval is raised (sampled), in percent.
    pub max_cpu: Option<f64>,
}

impl JumpOptions {
    /// Samples, as the command line has them by default.
    pub fn samples() -> Self {
        Self { exact: false, max_cpu: Some(2.0), ..Self::every_event() }
    }

    /// Every event, with waits as the command line has them by default.
    pub fn every_event() -> Self {
        Self { exact: true, sample: 512 << 10, seed: 1, max_wait: Duration::from_millis(50), max_cpu: None }
    }
}

/// A planted agent, and what was measured on the way.
pub struct Planted {
    /// The agent.
    pub loaded: Loaded,
    /// Its rings.
    pub rings: Rings,
    /// Its heartbeat.
    pub heart: Heart,
    /// How it was told to record.
    pub settings: Settings,
    /// How long the world was stopped.
    pub paused: Duration,
}

/// Plants the agent. On failure the target runs on as it was. `writer` is made at the last moment at which that can still be
/// refused.
pub fn plant<W>(
    options: &RecordOptions,
    jump: &JumpOptions,
    examined: &Examined,
    native: Option<&NativeCode>,
    writer: &mut dyn FnMut() -> Result<W, RecordError>,
) -> Result<(Planted, W), RecordError> {
    let pid = options.pid;
    try_layout(pid, &examined.python)?;
    if !examined.stale.is_empty() {
        remove_stale(pid, examined)?;
    }
    let hooks = wanted(&examined.plan, examined.code_dealloc)?;
    let settings = settings(jump, examined, native)?;
    let mut one = Inferior::seize_thread(pid)?;
    let loaded = load_with(&mut one, examined, |one| {
        Ok(load::load(one, &hooks, &settings, install::myself(one.pid())?)?)
    });
    let detached = one.detach();
    let loaded = loaded?;
    let planted = detached.map_err(RecordError::from).and_then(|()| {
        let rings = Rings::map(&loaded.memfd, settings.ring_count as usize, settings.ring_len as usize)?;
        // The agent switches itself off when nobody beats.
        let heart = rings.heart(settings.exact).map_err(|source| RecordError::Thread { source })?;
        let writer = writer()?;
        Ok((rings, heart, stop_and_plant(pid, &loaded)?, writer))
    });
    match planted {
        Ok((rings, heart, paused, writer)) => {
            tracing::info!(
                pid,
                hooks = loaded.hooks.len(),
                ?paused,
                "the jumps are in; nobody traces the process"
            );
            Ok((Planted { loaded, rings, heart, settings, paused }, writer))
        }
        Err(error) => {
            if let Err(e) = unload(examined, &loaded) {
                tracing::error!("undoing a refused attach: {e}");
            }
            Err(error)
        }
    }
}

fn load_with<T>(
    one: &mut Inferior,
    examined: &Examined,
    load: impl FnOnce(&mut Inferior) -> Result<T, RecordError>,
) -> Result<T, RecordError> {
    if examined.seccomp {
        one.stop_to_attach()?;
        one.suspend_filters().map_err(|errno| ProbeError::Seccomp { errno })?;
        one.resume()?;
    }
    load(one)
}

fn unload(examined: &Examined, loaded: &Loaded) -> Result<(), RecordError> {
    let mut one = load::seize_to_unload(loaded.pid)?;
    let unloaded =
        load_with(&mut one, examined, |one| Ok(load::unload(one, &loaded.parts, &loaded.regions)?));
    one.detach()?;
    unloaded
}

fn stop_and_plant(pid: i32, loaded: &Loaded) -> Result<Duration, RecordError> {
    let mut all = Inferior::seize(pid)?;
    let planted = all.prepare_calls().map_err(RecordError::from).and_then(|()| {
        let start = Instant::now();
        all.stop_to_attach()?;
        jump::plant(&mut all, loaded)?;
        Ok(start)
    });
    let detached = all.detach();
    let start = planted?;
    // The jumps are in: failing to let go of a thread now is not for undoing.
    if let Err(error) = detached {
        tracing::warn!("letting go of process {pid}: {error}");
    }
    Ok(start.elapsed())
}

/// Tries the layout while the threads run: what fits once is right, what never fits is tried on a stopped world, where it must.
fn try_layout(pid: i32, python: &Python) -> Result<(), RecordError> {
    let memory = ProcessMemory::new(pid);
    for _ in 0..LAYOUT_TRIES {
        let tids: Vec<i32> = maps::namespaced_tasks(pid)?.iter().map(|(_, inner)| *inner).collect();
        match python.self_test(&memory, &tids) {
            Ok(_) => return Ok(()),
            Err(error) => tracing::debug!("the layout does not fit this moment: {error}"),
        }
        std::thread::sleep(LAYOUT_PAUSE);
    }
    let mut inferior = Inferior::seize(pid)?;
    let tested = inferior
        .stop_to_attach()
        .map_err(RecordError::from)
        .and_then(|()| super::record::test_layout(&mut inferior, python));
    inferior.detach()?;
    tested
}

fn remove_stale(pid: i32, examined: &Examined) -> Result<(), RecordError> {
    let mut inferior = Inferior::seize(pid)?;
    let removed = inferior
        .stop_to_attach()
        .map_err(RecordError::from)
        .and_then(|()| Ok(stale::remove(&mut inferior, &examined.stale)?));
    inferior.detach()?;
    let left = removed?;
    match left.why.first().filter(|_| left.busy) {
        Some(why) => Err(RecordError::NotRecordable {
            pid,
            why: format!("what a killed heaptap left can't be removed yet: {why}; try again"),
        }),
        None => Ok(()),
    }
}

fn settings(
    jump: &JumpOptions,
    examined: &Examined,
    native: Option<&NativeCode>,
) -> Result<Settings, RecordError> {
    let threads = maps::tasks(examined.pid)?.len();
    Ok(Settings {
        exact: jump.exact,
        interval: jump.sample,
        seed: jump.seed,
        max_wait: jump.max_wait,
        ring_count: if jump.exact { exact_rings(threads) as u32 } else { 1 },
        ring_len: if jump.exact { EXACT_RING } else { SAMPLED_RING },
        python: python_facts(&examined.python),
        tid_offset: examined.python.pthread.tid,
        internal_callers: internal_callers(examined, jump.exact)?,
        may_call: !examined.seccomp,
        pass_on_tables: examined.pass_on_tables,
        pass_on_calloc: calloc_is_alone(examined),
        ticks_per_second: ticks_per_second(),
        native: native.map(|native| NativeSettings {
            code: native.mapped(),
            area_len: native.area_len(),
            stack_end: stack_end(&examined.maps),
        }),
    })
}

/// Whether calloc is that of a glibc without `__malloc_hook` (up to 2.33: somebody's hook may call malloc).
fn calloc_is_alone(examined: &Examined) -> bool {
    let Some(libc) = examined.libc.as_ref().filter(|libc| libc.kind == LibcKind::Glibc) else { return false };
    let minor = libc.version.as_deref().and_then(|v| v.strip_prefix("2.")?.split('.').next()?.parse().ok());
    let mut callocs = examined.plan.entries.iter().filter(|entry| entry.function == Function::Calloc);
    minor.is_some_and(|minor: u32| minor >= 34)
        && callocs.all(|entry| examined.modules[libc.module].contains(entry.address))
}

/// Calls to the mmap family that are an allocator's own. CPython's allocators are seen on the stack when every event is recorded, or
/// somebody has wrapped them, and what else takes memory of the same functions (frame stacks) is then told from them.
fn internal_callers(examined: &Examined, exact: bool) -> Result<Vec<[u64; 2]>, RecordError> {
    let memory = ProcessMemory::new(examined.pid);
    let Examined { modules, python, plan, .. } = examined;
    let mut of_python: Vec<RemoteAddr> = Vec::new();
    if !exact && examined.pass_on_tables {
        of_python.extend(plan.words.iter().map(|word| word.value));
        match python.arena_allocator(&memory, &binaries(modules)) {
            Ok(arenas) => of_python.extend([arenas.alloc, arenas.free]),
            // The application's own: what they map is as much the application's as anything.
            Err(error) => tracing::debug!("{error}"),
        }
    }
    Ok(of_process(&memory, modules, plan, &of_python)?.ranges)
}

/// The time stamp counter's frequency, measured over a few milliseconds: good enough for patience.
fn ticks_per_second() -> u64 {
    let (start, from) = (Instant::now(), ticks());
    std::thread::sleep(Duration::from_millis(3));
    let (elapsed, ticks) = (start.elapsed(), ticks() - from);
    (u128::from(ticks) * 1_000_000_000 / elapsed.as_nanos().max(1)) as u64
}
