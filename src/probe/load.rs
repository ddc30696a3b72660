//! The first stage of the jump kind: everything that takes time, while at most one thread of the target is stopped, and that
//! one for no longer than a system call at a time. Maps the code, the state and the ring memory by system calls in the target's name
//! and writes them through /proc/PID/mem. Nothing leads there yet; [`super::jump`] plants the jumps.
//!
//! The code is mapped readable and executable from the start and written as ptrace writes: at no time is a page of the
//! target both writable and executable.

use super::agent_image::{AgentImage, Entry};
use super::agent_state::{last_stacks_len, state_bytes};
use super::error::ProbeError;
use super::native_area::{MappedCode, NativeArea};
use super::near::{self, Hook, Hooked, NearRegion, Parts};
use super::place::places;
use super::region::{Controller, HEADER_LEN, Patch, REGION_LEN};
use crate::addr::RemoteAddr;
use crate::agent_abi::{self as abi, PythonFacts, State, function};
use crate::inferior::error::{AttachError, TraceError};
use crate::inferior::remote_call::Call;
use crate::inferior::{Inferior, maps};
use crate::memory::RemoteMemory;
use nix::errno::Errno;
use std::mem::offset_of;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

const PRIVATE: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE) as u64;
const READ_EXECUTE: u64 = (libc::PROT_READ | libc::PROT_EXEC) as u64;
const PAGE: u64 = 4096;
const READ_WRITE: u64 = (libc::PROT_READ | libc::PROT_WRITE) as u64;
/// `<linux/memfd.h>`; kernels before 6.3 do not know it.
const MFD_NOEXEC_SEAL: u64 = 8;

/// One hook that is wanted.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// What it is put on.
    pub hooked: Hooked,
    /// One of [`function`].
    pub function: u8,
    /// A place in the module that the hook must be near to.
    pub near: RemoteAddr,
    /// That module, for messages.
    pub module: String,
}

/// How the agent is to record.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Every event, or samples.
    pub exact: bool,
    /// Mean bytes between samples.
    pub interval: u64,
    /// Seed of the sampling.
    pub seed: u64,
    /// How long one event may wait for room in a full ring (exact).
    pub max_wait: Duration,
    /// Rings, with the shared one.
    pub ring_count: u32,
    /// Bytes of each, a power of two.
    pub ring_len: u64,
    /// How Python stacks are walked.
    pub python: PythonFacts,
    /// Offset of the kernel's thread id from the thread pointer.
    pub tid_offset: u64,
    /// See [`State::internal_callers`].
    pub internal_callers: Vec<[u64; 2]>,
    /// The agent may make system calls.
    pub may_call: bool,
    /// See [`may::PASS_ON_TABLES`].
    pub pass_on_tables: bool,
    /// See [`may::PASS_ON_CALLOC`].
    pub pass_on_calloc: bool,
    /// Ticks of the time stamp counter in a second.
    pub ticks_per_second: u64,
    /// What native stacks are walked by; `None`: they are not.
    pub native: Option<NativeSettings>,
}

/// How native stacks are walked.
#[derive(Debug, Clone)]
pub struct NativeSettings {
    /// The code that is mapped now.
    pub code: Vec<MappedCode>,
    /// Bytes for it, and for what may come.
    pub area_len: u64,
    /// See [`State::stack_end`].
    pub stack_end: u64,
}

/// How long another tracer is waited for when something of ours has to be unmapped.
const TRACER_PATIENCE: Duration = Duration::from_secs(2);

/// The agent in a process: mapped and written, not yet led to.
#[derive(Debug)]
pub struct Loaded {
    /// The process.
    pub pid: i32,
    /// Where everything is.
    pub parts: Parts,
    /// The regions; the first is the first of [`Parts::code`].
    pub regions: Vec<RemoteAddr>,
    /// What is to be planted.
    pub hooks: Vec<Hook>,
    /// The ring memory.
    pub memfd: OwnedFd,
    /// Where native stacks' code lies, and the directory of it.
    pub native: Option<(NativeArea, RemoteAddr)>,
}

impl Loaded {
    /// Ranges of the target in which a thread executes our code.
    pub fn code(&self) -> Vec<(RemoteAddr, u64)> {
        let others = self.regions.iter().skip(1).map(|r| (*r, REGION_LEN as u64));
        std::iter::once(self.parts.code).chain(others).collect()
    }

    /// Patches, in the order in which they are planted.
    pub fn patches(&self) -> impl Iterator<Item = &Patch> {
        self.hooks.iter().map(|h| &h.patch)
    }
}

/// Maps and writes everything. Whatever fails, what was mapped is unmapped again.
pub fn load(
    inferior: &mut Inferior,
    wanted: &[Wanted],
    settings: &Settings,
    controller: Controller,
) -> Result<Loaded, ProbeError> {
    let mut loader = Loader { inferior, header: None, mapped: Vec::new() };
    loader.run(wanted, settings, controller).inspect_err(|_| loader.undo())
}

/// Unmaps what [`load`] mapped. No thread can be in it any more.
pub fn unload(inferior: &mut Inferior, parts: &Parts, regions: &[RemoteAddr]) -> Result<(), ProbeError> {
    inferior.prepare_calls()?;
    let others = regions.iter().skip(1).map(|r| (*r, REGION_LEN as u64));
    let all = [parts.code].into_iter().chain(others).chain([parts.state, parts.rings]);
    let mapped = all.filter(|(_, len)| *len > 0).collect();
    let header = regions.first().copied();
    let mut loader = Loader { inferior, header, mapped };
    // Where the first region stays, the agent behind it goes.
    let staying = header.filter(|first| *first != parts.code.0);
    if let Some(first) = staying {
        loader.note(near::CODE_AT, (first, REGION_LEN as u64))?;
    }
    loader.unmap()?;
    match staying {
        Some(_) if !loader.inferior.has_ended() => Ok(loader.note(near::STATE_AT, (RemoteAddr::NULL, 0))?),
        _ => Ok(()),
    }
}

/// Seizes a thread to unmap in the name of. Another heaptap that was refused, or a debugger that had a look, is gone soon.
pub fn seize_to_unload(pid: i32) -> Result<Inferior, AttachError> {
    let start = Instant::now();
    loop {
        match Inferior::seize_thread(pid) {
            Err(AttachError::AlreadyTraced { .. }) if start.elapsed() < TRACER_PATIENCE => {
                std::thread::sleep(Duration::from_millis(5));
            }
            other => return other,
        }
    }
}

struct Loader<'a> {
    inferior: &'a mut Inferior,
    /// The first region. A heaptap that is killed leaves what this names.
    header: Option<RemoteAddr>,
    mapped: Vec<(RemoteAddr, u64)>,
}

impl Loader<'_> {
    fn run(
        &mut self,
        wanted: &[Wanted],
        settings: &Settings,
        controller: Controller,
    ) -> Result<Loaded, ProbeError> {
        self.inferior.prepare_calls()?;
        let image = AgentImage::new()?;
        let modules = modules(wanted);
        let agent_len = image.bytes.len() as u64;
        let mut regions = self.map_code(&modules, agent_len, controller)?;
        let bases: Vec<_> = regions.iter().map(|r| r.base).collect();
        let code = (bases[0], REGION_LEN as u64 + agent_len);
        let agent = bases[0].offset(REGION_LEN as u64);
        let state = self.map_state(settings)?;
        for hook in wanted {
            let index = modules.iter().position(|(module, _)| *module == hook.module).unwrap_or(0);
            let entry = image.entry(agent, entry_of(hook.function, settings))?;
            regions[index].add(hook.hooked.clone(), hook.function, entry, state.0)?;
        }
        let len = abi::ring_memory_len(settings.ring_count as usize, settings.ring_len as usize) as u64;
        let (rings, memfd) = self.map_rings(bases[0].offset(near::NAME_AT as u64), len)?;
        let parts = Parts { state, rings: (rings, len), code };
        let patches: Vec<Patch> = regions.iter().flat_map(|r| r.hooks.iter().map(|h| h.patch)).collect();
        regions[0].finish_first(&patches, &parts, &bases[1..])?;
        self.inferior.write(agent, &image.bytes)?;
        let native = self.write_native(settings, state.0)?;
        let directory = native.as_ref().map_or(RemoteAddr::NULL, |(_, directory)| *directory);
        let bytes = state_bytes(settings, rings, (state.0, directory), self.inferior.pid());
        self.inferior.write(state.0, &bytes)?;
        for region in &regions {
            self.inferior.write(region.base, &region.image()?)?;
        }
        let hooks = regions.into_iter().flat_map(|r| r.hooks).collect();
        Ok(Loaded { pid: self.inferior.pid(), parts, regions: bases, hooks, memfd, native })
    }

    /// One system call in the target's name; its thread runs on before and after.
    fn call(&mut self, name: &'static str, number: i64, args: &[u64]) -> Result<u64, TraceError> {
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        self.inferior.stop_to_leave()?;
        let tid = super::install::calling_thread(self.inferior)
            .map_err(|_| TraceError::Gone { tid: self.inferior.pid() })?;
        let result = self.inferior.remote_syscall(tid, Call { name, number, args: all });
        self.inferior.resume()?;
        result
    }

    /// A region near each module; the agent lies behind the first. Each gets its header at once, so that what a killed
    /// heaptap leaves can be found.
    fn map_code(
        &mut self,
        modules: &[(String, RemoteAddr)],
        agent_len: u64,
        controller: Controller,
    ) -> Result<Vec<NearRegion>, ProbeError> {
        let mut regions = Vec::new();
        for (module, near) in modules {
            let is_first = regions.is_empty();
            let len = REGION_LEN as u64 + if is_first { agent_len } else { 0 };
            let base = self.map_near(*near, module, len)?;
            let mut region = NearRegion::new(base, controller);
            if is_first {
                region.locate(&Parts { code: (base, len), ..Parts::default() });
                self.header = Some(base);
            }
            self.inferior.write(base, &region.bytes[..HEADER_LEN])?;
            regions.push(region);
        }
        Ok(regions)
    }

    /// Tells in the first region where a part is.
    fn note(&self, at: usize, (addr, len): (RemoteAddr, u64)) -> Result<(), TraceError> {
        let Some(header) = self.header else { return Ok(()) };
        let pair = [addr.0.to_le_bytes(), len.to_le_bytes()].concat();
        self.inferior.write(header.offset(at as u64), &pair)
    }

    fn map_near(&mut self, near: RemoteAddr, module: &str, len: u64) -> Result<RemoteAddr, ProbeError> {
        let maps = maps::mappings(self.inferior.pid()).map_err(proc_error)?;
        let flags = PRIVATE | libc::MAP_FIXED_NOREPLACE as u64;
        for place in places(&maps, near, len) {
            match self.call("mmap", libc::SYS_mmap, &[place.0, len, READ_EXECUTE, flags, u64::MAX, 0]) {
                // A kernel before 4.17 does not know MAP_FIXED_NOREPLACE and takes the address as a hint.
                Ok(at) => {
                    self.mapped.push((RemoteAddr(at), len));
                    if at == place.0 {
                        return Ok(place);
                    }
                }
                // The other threads run: one took the gap.
                Err(TraceError::RemoteCall { errno: Errno::EEXIST | Errno::EPERM, .. }) => {}
                Err(TraceError::RemoteCall { errno: errno @ Errno::EACCES, .. }) => {
                    return Err(ProbeError::NoNewCode { pid: self.inferior.pid(), errno });
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(ProbeError::NoRoom { addr: near, module: module.into() })
    }

    /// Zero in a forked child: it passes everything through. No huge pages: a touch would take 2 MiB.
    fn map_state(&mut self, settings: &Settings) -> Result<(RemoteAddr, u64), ProbeError> {
        let native = settings
            .native
            .as_ref()
            .map(|native| abi::NATIVE_AT as u64 + last_stacks_len(settings) + native.area_len);
        let len = native.unwrap_or(size_of::<State>() as u64);
        let at = self.map_noted(len)?;
        self.note(near::STATE_AT, (at, len))?;
        self.call("madvise", libc::SYS_madvise, &[at.0, len, libc::MADV_WIPEONFORK as u64])?;
        self.no_huge_pages(at.0, len)?;
        Ok((at, len))
    }

    /// The code that native stacks are walked by, behind the state; and where its directory is.
    fn write_native(
        &mut self,
        settings: &Settings,
        state: RemoteAddr,
    ) -> Result<Option<(NativeArea, RemoteAddr)>, ProbeError> {
        let Some(native) = &settings.native else { return Ok(None) };
        let base = state.offset(abi::NATIVE_AT as u64 + last_stacks_len(settings));
        let mut area = NativeArea::new(base, native.area_len);
        let Some(published) = area.publish(&native.code, || true) else { return Ok(None) };
        if let Some(full) = published.left_out {
            return Err(full.into());
        }
        for (at, bytes) in published.writes {
            self.inferior.write(at, &bytes)?;
        }
        Ok(Some((area, published.directory)))
    }

    /// Private memory whose place was noted before it was mapped: a heaptap that is killed in between leaves nothing that can't be
    /// found. A page on either side stays free, lest the kernel shows it as one with its neighbour.
    fn map_noted(&mut self, len: u64) -> Result<RemoteAddr, ProbeError> {
        let maps = maps::mappings(self.inferior.pid()).map_err(proc_error)?;
        let near = self.header.unwrap_or(RemoteAddr::NULL);
        let room = len.next_multiple_of(PAGE) + 2 * PAGE;
        let found = places(&maps, near, room).into_iter().map(|at| at.offset(PAGE));
        // No place near: the kernel's own choice, noted afterwards.
        for place in found.chain([RemoteAddr::NULL]) {
            let fixed = if place == RemoteAddr::NULL { 0 } else { libc::MAP_FIXED_NOREPLACE as u64 };
            if fixed != 0 {
                self.note(near::STATE_AT, (place, len | near::COMING))?;
            }
            match self.call("mmap", libc::SYS_mmap, &[place.0, len, READ_WRITE, PRIVATE | fixed, u64::MAX, 0])
            {
                Ok(at) => {
                    self.mapped.push((RemoteAddr(at), len));
                    return Ok(RemoteAddr(at));
                }
                // The other threads run: one took the gap.
                Err(TraceError::RemoteCall { errno: Errno::EEXIST | Errno::EPERM, .. }) if fixed != 0 => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(ProbeError::NoRoom { addr: near, module: "the agent's state".into() })
    }

    fn no_huge_pages(&mut self, at: u64, len: u64) -> Result<(), TraceError> {
        match self.call("madvise", libc::SYS_madvise, &[at, len, libc::MADV_NOHUGEPAGE as u64]) {
            // A kernel without transparent huge pages.
            Ok(_) | Err(TraceError::RemoteCall { errno: Errno::EINVAL, .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// A memfd made in the target, opened here, mapped there, closed there; not inherited by children.
    fn map_rings(&mut self, name: RemoteAddr, len: u64) -> Result<(RemoteAddr, OwnedFd), ProbeError> {
        let flags = u64::from(libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        let made = self.call("memfd_create", libc::SYS_memfd_create, &[name.0, flags | MFD_NOEXEC_SEAL]);
        let fd = match made {
            Err(TraceError::RemoteCall { errno: Errno::EINVAL, .. }) => {
                self.call("memfd_create", libc::SYS_memfd_create, &[name.0, flags])?
            }
            other => other?,
        };
        let shared = self.share(fd, len);
        self.call("close", libc::SYS_close, &[fd])?;
        let (at, memfd) = shared?;
        self.call("madvise", libc::SYS_madvise, &[at.0, len, libc::MADV_DONTFORK as u64])?;
        Ok((at, memfd))
    }

    fn share(&mut self, fd: u64, len: u64) -> Result<(RemoteAddr, OwnedFd), ProbeError> {
        let path = format!("/proc/{}/fd/{fd}", maps::memory_holder(self.inferior.pid()));
        let io = |source| TraceError::Proc { path: path.clone(), source };
        let file = std::fs::File::options().read(true).write(true).open(&path).map_err(io)?;
        file.set_len(len).map_err(io)?;
        let shared = libc::MAP_SHARED as u64;
        let at = self.call("mmap", libc::SYS_mmap, &[0, len, READ_WRITE, shared, fd, 0])?;
        self.mapped.push((RemoteAddr(at), len));
        Ok((RemoteAddr(at), file.into()))
    }

    /// Notes that the state is about to go. Killed before it is gone, heaptap leaves what the next one finds.
    fn note_leaving(&self) -> Result<(), TraceError> {
        let Some(header) = self.header else { return Ok(()) };
        withdraw_state(self.inferior, header)
    }

    /// Last mapped first: what names the rest goes when the rest is gone.
    fn unmap(&mut self) -> Result<(), ProbeError> {
        let mut first = self.note_leaving().map_err(ProbeError::from);
        for (at, len) in std::mem::take(&mut self.mapped).into_iter().rev() {
            match self.call("munmap", libc::SYS_munmap, &[at.0, len]) {
                Ok(_) => {}
                Err(TraceError::Gone { .. }) if self.inferior.has_ended() => return Ok(()),
                Err(error) => first = first.and(Err(error.into())),
            }
        }
        first
    }

    fn undo(&mut self) {
        if let Err(error) = self.unmap() {
            tracing::error!("undoing a refused attach: {error}");
        }
    }
}

/// Marks the state that the region at `header` names as about to be unmapped: see [`near::LEAVING`].
pub(super) fn withdraw_state(inferior: &Inferior, header: RemoteAddr) -> Result<(), TraceError> {
    let note = header.offset(near::STATE_AT as u64);
    let [state, len] = [note, note.offset(8)].map(|at| inferior.memory().read_u64(at).unwrap_or(0));
    if len == 0 || len & (near::LEAVING | near::COMING) != 0 {
        return Ok(());
    }
    // One that was not filled in yet, or is a forked child's, has none.
    let magic = RemoteAddr(state).offset(offset_of!(State, magic) as u64);
    inferior.write(magic, &abi::STATE_MAGIC.to_le_bytes())?;
    inferior.write(note.offset(8), &(len | near::LEAVING).to_le_bytes())
}

fn proc_error(source: maps::FactError) -> TraceError {
    TraceError::Proc { path: "/proc/PID/maps".into(), source: std::io::Error::other(source) }
}

/// The modules that hooks must be near to, each with a place in it; the first has most hooks.
fn modules(wanted: &[Wanted]) -> Vec<(String, RemoteAddr)> {
    let mut modules: Vec<(String, RemoteAddr)> = Vec::new();
    for hook in wanted {
        if matches!(hook.hooked, Hooked::Body(_)) && modules.iter().all(|(name, _)| *name != hook.module) {
            modules.push((hook.module.clone(), hook.near));
        }
    }
    modules
}

/// The agent's entry for a function.
fn entry_of(which: u8, settings: &Settings) -> Entry {
    let exact = settings.exact;
    let python = |n: u8| which.checked_sub(function::PYTHON).filter(|i| *i < 12 && i & 3 == n);
    match which {
        function::CODE_DEALLOC => Entry::CodeDealloc,
        // Without a record of the call there is nowhere to begin a native stack.
        function::MALLOC if exact && settings.native.is_none() => Entry::MallocExact,
        function::FREE if exact => Entry::FreeExact,
        _ if exact => Entry::Any,
        function::MALLOC => Entry::MallocSampled,
        function::FREE => Entry::FreeSampled,
        function::CALLOC if settings.pass_on_calloc => Entry::CallocSampled,
        // The raw domain leads to libc's malloc, which is hooked too.
        _ if settings.pass_on_tables && python(0).is_some_and(|i| i >= 4) => Entry::TableMallocSampled,
        _ if python(3).is_some() => Entry::TableFreeSampled,
        _ => Entry::Any,
    }
}
