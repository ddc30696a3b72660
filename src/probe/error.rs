//! Why probes could not be planned, planted or lifted.

use crate::addr::RemoteAddr;
use crate::inferior::error::TraceError;

/// A failure of the probes. Where it happens before or while planting, what was planted is lifted again.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The unwind rows of the target's code do not fit.
    #[error("native stacks: {0}")]
    NativeArea(#[from] super::native_area::Full),
    /// No module of the process defines malloc and free.
    #[error("no module of process {pid} defines {name}: no allocator to observe")]
    NoAllocator {
        /// The process.
        pid: i32,
        /// The function missed.
        name: &'static str,
    },
    /// The bytes at an entry point are not those of the file.
    #[error(
        "the bytes of {function} at {addr} are {found:02x?}, but {module} has {expected:02x?} there: another tracer, a uprobe or an \
         inline hook is on this function, or the program itself is changing it (as tracemalloc does CPython's allocator tables); \
         try again if that may pass"
    )]
    EntryChanged {
        /// Which function.
        function: &'static str,
        /// Its address.
        addr: RemoteAddr,
        /// The file it is from.
        module: String,
        /// Bytes in memory.
        found: Vec<u8>,
        /// Bytes in the file.
        expected: Vec<u8>,
    },
    /// The first instruction can't be executed elsewhere.
    #[error("the first instruction of {function} at {addr} can't be moved: {why}")]
    NotRelocatable {
        /// Which function.
        function: &'static str,
        /// Its address.
        addr: RemoteAddr,
        /// Why not.
        why: String,
    },
    /// A function can't take a jump.
    #[error("{function} at {addr} of {module} can't be diverted: {obstacle}")]
    NoDetour {
        /// Which function.
        function: &'static str,
        /// Its address.
        addr: RemoteAddr,
        /// The file it is from.
        module: String,
        /// What is in the way.
        obstacle: super::detour::Obstacle,
    },
    /// The calls that an allocator makes for itself can't be told from the application's.
    #[error("what {module} maps for its own use can't be told from what the application maps: {source}")]
    Callers {
        /// The allocator's file.
        module: String,
        /// Why.
        source: super::internal_callers::CallersError,
    },
    /// There is no room for the thunks near a module.
    #[error("no free address range within 2 GiB of {addr} for the thunks of {module}")]
    NoRoom {
        /// Near where.
        addr: RemoteAddr,
        /// For which module.
        module: String,
    },
    /// The application uses SIGTRAP itself.
    #[error(
        "the target {how} SIGTRAP: breakpoints of the trap kind would change what it sees, and kill it should heaptap be killed"
    )]
    SigtrapInUse {
        /// "handles", "ignores" or "blocks (thread N)".
        how: String,
    },
    /// System calls can't be made in the target's name.
    #[error("the target runs under a seccomp filter, which can't be suspended: {errno}")]
    Seccomp {
        /// What the kernel said.
        errno: nix::errno::Errno,
    },
    /// Another controller is attached.
    #[error("process {pid} holds probes of heaptap process {controller}, which is alive")]
    ControllerAlive {
        /// The target.
        pid: i32,
        /// The other controller.
        controller: i32,
    },
    /// Bytes restored are not what the file has.
    #[error("after lifting, {len} bytes at {addr} differ from what was there before")]
    NotRestored {
        /// Where.
        addr: RemoteAddr,
        /// How many.
        len: usize,
    },
    /// The target may not map new executable memory.
    #[error(
        "process {pid} may not map new executable memory ({errno}): a security policy (SELinux execmem, …) \
         forbids recording this process"
    )]
    NoNewCode {
        /// The target.
        pid: i32,
        /// What the kernel said.
        errno: nix::errno::Errno,
    },
    /// A thread can't be moved out of the bytes that would be overwritten.
    #[error(
        "a signal handler of process {pid} runs on a thread that it interrupted in the first bytes of an allocator function, \
         and does not return: nothing may be written there"
    )]
    HandlerStays {
        /// The target.
        pid: i32,
    },
    /// The agent built into this binary is not what the loader expects.
    #[error("heaptap's own in-target agent can't be loaded: {what}")]
    Agent {
        /// What is wrong with it.
        what: String,
    },
    /// A request to the process failed.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// Its memory could not be read.
    #[error(transparent)]
    Read(#[from] crate::memory::ReadError),
}
