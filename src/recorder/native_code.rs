//! [`NativeCode`]: the native frames of a process that is recorded, from addresses to the capture's ids.
//!
//! Knows which files the process has mapped, and looks again when the dynamic linker has another list of what is loaded, when an address is
//! met that lies in none of them, and about once a second. What a frame is called is found out at the end, from the files as they were when they were mapped: a library that was
//! replaced on disk meanwhile is still open here.

use super::RecordError;
use super::look_native::{NativeEyes, root};
use super::trap::DEEPER;
use crate::addr::{ImageAddr, RemoteAddr};
use crate::capture::{CaptureWriter, FrameId, ModuleId, NativeFrame, NativePlace};
use crate::image::{LinkMap, Module, link_map, modules, vdso};
use crate::inferior::maps;
use crate::inferior::memory::ProcessMemory;
use crate::mapping::{Backing, Mapping};
use crate::native::{CodeMap, Merged, Names, merge};
use crate::probe::native_area::{MappedCode, NativeArea};
use crate::probe::ring_record::NativeEnd;
use foldhash::fast::RandomState;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Stands for the callers of a frame whose code does not tell who they are.
pub const CUT: &str = "<truncated here>";
/// Stands before callers that are found by a frame pointer that need not have been one.
pub const GUESSED: &str = "<callers from here on are guessed>";
/// In place of a directory: what is mapped now.
pub const NOW: u64 = 0;
/// Directories that are remembered.
const OLDEST: u64 = 64;
/// How often the mappings are read for an address that lies in none.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How often the dynamic linker's list is looked at.
const WATCH_EVERY: Duration = Duration::from_millis(15);
/// Addresses remembered before the memory of them starts anew.
const MOST_ADDRESSES: usize = 1 << 20;

/// What was counted of native stacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NativeCounts {
    /// Distinct stacks.
    pub stacks: u64,
    /// Of these, cut short.
    pub cut: u64,
}

/// See the module.
#[derive(Debug)]
pub struct NativeCode {
    pid: i32,
    root: PathBuf,
    eyes: NativeEyes,
    /// What could be executed at the last look.
    executable: Vec<Mapping>,
    looked: Instant,
    /// What the dynamic linker had loaded then, and when that was looked at last.
    loaded: Option<LinkMap>,
    loaded_looked: Instant,
    memory: ProcessMemory,
    /// Code came or went, and the agent was not told yet.
    changed: bool,
    /// What was mapped when the agent was told so, by the number of that directory.
    published: HashMap<u64, Arc<CodeMap>>,
    /// By directory, address, and whether the frame is guessed.
    frames: HashMap<(u64, u64, bool), Option<FrameId>, RandomState>,
    module_ids: HashMap<usize, ModuleId>,
    /// Where the frames of the capture are.
    named: HashMap<NativeFrame, (usize, ImageAddr)>,
    counts: NativeCounts,
}

impl NativeCode {
    /// The code that process `pid` has mapped now; reads all its unwind data. `python`: the path of the file that holds the runtime.
    pub fn open(pid: i32, python: &str) -> Result<Self, RecordError> {
        let memory = ProcessMemory::new(pid);
        let (executable, loaded, modules) = look(pid, &memory)?;
        let eyes = NativeEyes::open(modules, python);
        Ok(Self {
            pid,
            root: root(pid),
            eyes,
            executable,
            looked: Instant::now(),
            loaded,
            loaded_looked: Instant::now(),
            memory,
            changed: false,
            published: HashMap::new(),
            frames: HashMap::default(),
            module_ids: HashMap::new(),
            named: HashMap::new(),
            counts: NativeCounts::default(),
        })
    }

    /// What stacks are seen with from outside.
    pub fn eyes(&self) -> &NativeEyes {
        &self.eyes
    }

    /// What was counted.
    pub fn counts(&self) -> NativeCounts {
        self.counts
    }

    /// The code that is mapped, for the agent.
    pub fn mapped(&self) -> Vec<MappedCode> {
        let tables = self.eyes.tables();
        let files = tables.mapped().into_iter().map(|(file, ranges)| {
            let (rows, rule) = tables.rows_of(file);
            let ranges = ranges.into_iter().map(|range| (range.start, range.end)).collect();
            MappedCode { bias: tables.file(file).bias(), ranges, rows: Arc::clone(rows), rule }
        });
        files.collect()
    }

    /// Bytes for it in the target, and for what may be mapped later.
    pub fn area_len(&self) -> u64 {
        NativeArea::len_for(&self.mapped())
    }

    /// Bytes that the code takes which is mapped now.
    pub fn needed(&self) -> u64 {
        NativeArea::needed(&self.mapped())
    }

    /// The agent finds frames by what is mapped now, and names it so.
    pub fn published(&mut self, directory: u64) {
        self.published.insert(directory, Arc::clone(self.eyes.tables().code()));
        self.changed = false;
        // No stack waits for its name that long.
        self.published.retain(|number, _| number + OLDEST > directory);
        self.frames.retain(|(number, ..), _| *number == NOW || number + OLDEST > directory);
    }

    /// Whether code came or went since the agent was told.
    pub fn has_changed(&self) -> bool {
        self.changed
    }

    /// Looks which code is mapped, if the dynamic linker has loaded or unloaded something: an address may mean other code by now.
    pub fn watch(&mut self) {
        if self.loaded_looked.elapsed() < WATCH_EVERY {
            return;
        }
        self.loaded_looked = Instant::now();
        if self.loaded.as_ref().is_some_and(|loaded| loaded.has_changed(&self.memory)) {
            self.refresh();
        }
    }

    /// Looks which code is mapped. A process that is gone has the code it had.
    pub fn refresh(&mut self) {
        self.looked = Instant::now();
        let executable = match maps::mappings(self.pid) {
            Ok(maps) => executable(maps),
            Err(error) => return tracing::debug!("{error}"),
        };
        if !self.is_same_program(&executable) {
            return;
        }
        // What a JIT compiles comes and goes, and has no rules.
        let of_files =
            |maps: &[Mapping]| maps.iter().filter(|map| map.is_file()).cloned().collect::<Vec<_>>();
        if of_files(&executable) == of_files(&self.executable) {
            self.executable = executable;
            self.loaded = link_map(self.eyes.tables().modules(), &self.memory);
            return;
        }
        match look(self.pid, &self.memory) {
            Ok((executable, loaded, modules)) => {
                (self.executable, self.loaded) = (executable, loaded);
                self.eyes.update(modules);
                // What is told of what is mapped now is of other code.
                self.frames.retain(|(directory, ..), _| *directory != NOW);
                self.changed = true;
            }
            Err(error) => tracing::debug!("the code of process {} cannot be looked at: {error}", self.pid),
        }
    }

    /// Whether Python is where it was: a process that has executed another program is not told of by that one's code.
    fn is_same_program(&self, executable: &[Mapping]) -> bool {
        let python = self.executable.iter().filter(|map| {
            self.eyes.tables().place(map.start).is_some_and(|(file, _)| self.eyes.is_python(file))
        });
        !executable.is_empty() && python.clone().all(|map| executable.contains(map))
    }

    /// Appends the frames of a stack to `out`, innermost first. `native` are addresses within the instructions that its native frames
    /// execute, and how they end, `calls` Python's frames by call of the interpreter's loop. The addresses are of the code that was mapped
    /// when the agent got this `directory`, or [`NOW`].
    pub fn stack(
        &mut self,
        (native, end): (&[u64], NativeEnd),
        directory: u64,
        calls: Vec<Vec<FrameId>>,
        writer: &mut CaptureWriter,
        out: &mut Vec<FrameId>,
    ) -> Result<(), RecordError> {
        let is_known = |at: &u64| self.place(directory, RemoteAddr(*at)).is_some();
        if !native.iter().all(is_known) && self.looked.elapsed() >= LOOK_EVERY {
            self.refresh();
        }
        let (mut ids, mut is_loop, mut guessed) = (Vec::new(), Vec::new(), false);
        for (number, at) in native.iter().map(|at| RemoteAddr(*at)).enumerate() {
            // Where no code is, none was called from: the frame before it was no frame either, but that was seen to be code.
            let Some(id) = self.frame(at, directory, (guessed, number == 0), writer)? else { break };
            ids.push(id);
            is_loop.push(self.eyes.is_loop(at));
            if !guessed && self.is_guessed(directory, at) {
                guessed = true;
                ids.push(writer.intern_frame(GUESSED, "", 0)?);
                is_loop.push(false);
            }
        }
        let marker = match end {
            NativeEnd::Whole => None,
            NativeEnd::Cut => Some(CUT),
            NativeEnd::Deeper => Some(DEEPER),
        };
        self.counts.stacks += 1;
        self.counts.cut += u64::from(end == NativeEnd::Cut);
        if let Some(marker) = marker {
            ids.push(writer.intern_frame(marker, "", 0)?);
            is_loop.push(false);
        }
        out.extend(merge(&is_loop, calls).into_iter().map(|merged| match merged {
            Merged::Native(number) => ids[number],
            Merged::Python(id) => id,
        }));
        Ok(())
    }

    /// The names of all frames that the capture has.
    pub fn names(&self) -> Vec<(NativeFrame, Vec<NativePlace>)> {
        let mut names = Names::new(&self.root);
        let tables = self.eyes.tables();
        let mut named: Vec<_> = self.named.iter().collect();
        // File by file, ascending: the same for every recording of the same stacks.
        named.sort_by_key(|(_, place)| **place);
        let named = named.into_iter().map(|(frame, (file, at))| {
            let places = names.places(*file, tables.file(*file), *at).into_iter();
            let place =
                |p: crate::native::Place| NativePlace { function: p.function, file: p.file, line: p.line };
            (*frame, places.map(place).collect())
        });
        named.collect()
    }

    /// The file, and where in it, of an address that was found by a directory. What that does not have is newer.
    fn place(&self, directory: u64, at: RemoteAddr) -> Option<(usize, ImageAddr)> {
        let tables = self.eyes.tables();
        let then = self.published.get(&directory).and_then(|code| tables.place_in(code, at));
        then.or_else(|| tables.place(at))
    }

    fn is_guessed(&self, directory: u64, at: RemoteAddr) -> bool {
        let rows = |(file, _)| self.eyes.tables().rows_of(file).0.is_empty();
        self.place(directory, at).is_some_and(rows)
    }

    /// The id of the frame at an address; `None` where no code is. `innermost`: it is a frame whatever is there.
    fn frame(
        &mut self,
        at: RemoteAddr,
        directory: u64,
        (guessed, innermost): (bool, bool),
        writer: &mut CaptureWriter,
    ) -> Result<Option<FrameId>, RecordError> {
        if let Some(known) = self.frames.get(&(directory, at.0, guessed)) {
            return Ok(*known);
        }
        let frame = match self.place(directory, at) {
            Some((file, image)) => {
                let module = Some(self.module(file, writer)?);
                let interpreter = self.eyes.is_python(file);
                let frame = NativeFrame { module, address: image.0, interpreter, guessed };
                self.named.insert(frame, (file, image));
                Some(frame)
            }
            // Code that no file holds: somebody compiles it while the process runs.
            None if innermost || self.executable.iter().any(|map| map.contains(at)) => {
                Some(NativeFrame { module: None, address: at.0, interpreter: false, guessed })
            }
            None => None,
        };
        let id = frame.map(|frame| writer.intern_native_frame(frame)).transpose()?;
        if self.frames.len() >= MOST_ADDRESSES {
            self.frames.clear();
        }
        // Code that is not known may be by the next time.
        if id.is_some() {
            self.frames.insert((directory, at.0, guessed), id);
        }
        Ok(id)
    }

    fn module(&mut self, file: usize, writer: &mut CaptureWriter) -> Result<ModuleId, RecordError> {
        if let Some(id) = self.module_ids.get(&file) {
            return Ok(*id);
        }
        let module = self.eyes.tables().file(file);
        let build_id = module.build_id().unwrap_or_default();
        let byte = |at: usize| u8::from_str_radix(build_id.get(at..at + 2)?, 16).ok();
        let bytes: Vec<u8> = (0..build_id.len()).step_by(2).map_while(byte).collect();
        let id = writer.intern_module(&module.path().display().to_string(), &bytes)?;
        self.module_ids.insert(file, id);
        Ok(id)
    }
}

/// What can be executed, what is loaded, and the files.
type Code = (Vec<Mapping>, Option<LinkMap>, Vec<Module>);

fn look(pid: i32, memory: &ProcessMemory) -> Result<Code, RecordError> {
    let maps = maps::mappings(pid)?;
    let mut modules = modules(maps::memory_holder(pid), &maps, memory)?;
    let loaded = link_map(modules.iter(), memory);
    modules.extend(vdso(&maps, memory));
    Ok((executable(maps), loaded, modules))
}

fn executable(maps: Vec<Mapping>) -> Vec<Mapping> {
    maps.into_iter().filter(|map| map.perms.execute).collect()
}

/// Where the main thread's stack ends; 0 where the kernel doesn't say.
pub fn stack_end(maps: &[Mapping]) -> u64 {
    let stack = maps.iter().find(|map| map.backing == Backing::Named("[stack]".into()));
    stack.map_or(0, |map| map.end.0)
}
