//! The server of the script with native frames: extensions, the C library, the interpreter's own, and code of no file.

use super::{MAIN, NATIVE, Script, WORKER, header, trailer};
use heaptap::capture::{
    AllocatorKind, CaptureWriter, Counters, FrameId, Header, ModuleId, NativeFrame, NativePlace, StackId,
};
use std::path::Path;

const APP: &str = "/srv/shop/server.py";
/// The interpreter of the script.
pub const PYTHON: &str = "/usr/bin/python3.12";
/// An installed extension.
pub const NUMPY: &str = "/srv/shop/venv/lib/python3.12/site-packages/numpy/_core/_multiarray_umath.cpython-312-x86_64-linux-gnu.so";
/// An extension of the application, of which a part has no names.
pub const SOLVER: &str = "/srv/shop/_solver.so";
/// The C library.
pub const LIBC: &str = "/lib/x86_64-linux-gnu/libc.so.6";

/// Header of a run with native stacks.
pub fn native_header() -> Header {
    Header { native: true, ..header() }
}

/// The modules of the script.
struct Code {
    python: ModuleId,
    numpy: ModuleId,
    solver: ModuleId,
    libc: ModuleId,
}

impl Code {
    fn define(writer: &mut CaptureWriter) -> Self {
        let mut module = |path, byte: u8| writer.intern_module(path, &[byte; 20]).unwrap();
        let (python, numpy, libc) = (module(PYTHON, 1), module(NUMPY, 2), module(LIBC, 4));
        Self { python, numpy, libc, solver: writer.intern_module(SOLVER, &[]).unwrap() }
    }

    fn frame(&self, writer: &mut CaptureWriter, module: Option<ModuleId>, address: u64) -> FrameId {
        let interpreter = module == Some(self.python);
        let guessed = module == Some(self.libc);
        writer.intern_native_frame(NativeFrame { module, address, interpreter, guessed }).unwrap()
    }
}

/// The stacks of the script.
pub struct Stacks {
    /// An array of numpy, made by Python code.
    pub array: StackId,
    /// The same line of numpy at another address.
    pub array_again: StackId,
    /// A vector that grows in a thread without Python, within inlined functions.
    pub grid: StackId,
    /// Code without names, in a library and in no file.
    pub nameless: StackId,
    /// Python code whose memory the interpreter itself asked for.
    pub cache: StackId,
}

/// Defines the script's stacks.
pub fn stacks(writer: &mut CaptureWriter) -> Stacks {
    let code = Code::define(writer);
    let (python, numpy, solver, libc) =
        (Some(code.python), Some(code.numpy), Some(code.solver), Some(code.libc));
    let module = writer.intern_frame("<module>", APP, 90).unwrap();
    let serve = writer.intern_frame("Server.serve", APP, 41).unwrap();
    let main = code.frame(writer, python, 0x21_a000);
    let call = code.frame(writer, python, 0x1d_3f10);
    let resize = code.frame(writer, python, 0x1e_0044);
    let mut stack = |innermost: &[(Option<ModuleId>, u64)], callers: &[FrameId]| {
        let mut frames: Vec<FrameId> =
            innermost.iter().map(|(module, address)| code.frame(writer, *module, *address)).collect();
        frames.extend(callers);
        writer.intern_stack(&frames).unwrap()
    };
    let below = [call, serve, module, main];
    Stacks {
        array: stack(&[(numpy, 0x8_1010), (numpy, 0x8_2020)], &below),
        array_again: stack(&[(numpy, 0x8_1018), (numpy, 0x8_2020)], &below),
        grid: stack(&[(solver, 0x1234), (libc, 0x9_4ac0)], &[]),
        nameless: stack(&[(None, 0x7f77_0000_1000), (solver, 0x5678)], &below),
        cache: stack(&[], &[resize, serve, module, main]),
    }
}

/// What the script's frames are called.
pub fn names(frame: &NativeFrame) -> Vec<NativePlace> {
    let place = |function: &str, file: Option<&str>, line: u32| NativePlace {
        function: Some(function.to_owned()),
        file: file.map(str::to_owned),
        line: Some(line).filter(|line| *line > 0),
    };
    let vector = Some("/usr/include/c++/12/bits/stl_vector.h");
    match frame.address {
        0x21_a000 => vec![place("Py_BytesMain", None, 0)],
        0x1d_3f10 => vec![place("_PyObject_Call", None, 0)],
        0x1e_0044 => vec![place("list_resize", Some("Objects/listobject.c"), 70)],
        0x8_1010 | 0x8_1018 => {
            vec![place("PyDataMem_UserNEW", Some("numpy/_core/src/multiarray/alloc.c"), 246)]
        }
        0x8_2020 => vec![place("array_zeros", Some("numpy/_core/src/multiarray/ctors.c"), 3001)],
        0x1234 => vec![
            place("std::vector<double>::push_back(double const&)", vector, 1280),
            place("solver::Grid::refine(unsigned int)", Some("src/grid.cpp"), 58),
        ],
        0x9_4ac0 => vec![place("start_thread", None, 0)],
        _ => Vec::new(),
    }
}

/// The script: arrays that stay, a grid that grows in a thread of its own, and a cache.
pub fn shop_native(path: &Path) {
    let mut script = Script::create(path, &native_header());
    shop_native_events(&mut script);
    let named: Vec<_> =
        script.writer.native_frames().into_iter().map(|frame| (frame, names(&frame))).collect();
    script.writer.symbols(&named).unwrap();
    let mut trailer = trailer(&script.live);
    trailer.counters = Counters { native_stacks: 5, native_cut: 1, ..trailer.counters };
    script.writer.finish(trailer).unwrap();
}

/// The events of [`shop_native`], without names and trailer.
pub fn shop_native_events(script: &mut Script) {
    use AllocatorKind::*;
    script.writer.define_thread(MAIN, "python3", "MainThread").unwrap();
    script.writer.define_thread(NATIVE, "solver", "").unwrap();
    let Stacks { array, array_again, grid, nameless, cache } = stacks(&mut script.writer);
    for n in 0..20u64 {
        script.at_ms(50 * n);
        let stack = if n % 2 == 0 { array } else { array_again };
        script.allocate(Malloc, MAIN, 0x7f10_0000_0000 + 0x10_0000 * n, 80_000, stack);
        script.allocate(Malloc, NATIVE, 0x7f20_0000_0000 + 0x10_0000 * n, 8 << n.min(16), grid);
        if n > 0 {
            script.free(Free, NATIVE, 0x7f20_0000_0000 + 0x10_0000 * (n - 1));
        }
        script.allocate(ObjectMalloc, MAIN, 0x5555_5600_0000 + 0x440 * n, 1024, cache);
        script.allocate(Calloc, MAIN, 0x5555_5700_0000, 4096, nameless);
        if n < 19 {
            script.free(Free, MAIN, 0x5555_5700_0000);
        }
        if n % 8 == 0 {
            script.writer.flush().unwrap();
        }
    }
    script.at_ms(1100);
    script.allocate(Mmap, WORKER, 0x7f30_0000_0000, 1 << 18, StackId::EMPTY);
    script.at_ms(2400);
    script.free(Free, MAIN, 0x7f10_0000_0000);
}
