//! heaptap attaches to a running CPython process by pid, records where its memory is allocated,
//! and lets go without a trace.
//!
//! # One attach, in order
//!
//! 1. [`recorder::examine`] reads /proc, the process's ELF files ([`image`]) and its memory ([`memory`]): which CPython it
//!    is and by which layout its structures are read ([`cpython`]), which functions hand out memory, and whatever
//!    speaks against recording it. Nothing is stopped yet.
//! 2. The layout is tried on the real threads; only when that succeeds is anything written. Then by either kind of breakpoint:
//!    * **jump**: [`probe::load`] maps code near each library, the in-target agent (`src/agent/`, built by `build.rs`), its
//!      state and its rings, with one thread stopped for a system call at a time; [`probe::jump`] stops the world once and
//!      plants the jumps; then [`inferior`] lets go of the process.
//!    * **trap**: [`probe::install`] maps thunks, installs a SIGTRAP handler and plants int3s in a stopped world that
//!      stays traced.
//! 3. A [`recorder::source`] tells of calls: [`recorder::agent`] drains the agent's rings ([`probe::ring`]), merges them
//!    ([`recorder::merge`]) and resolves the stacks it was told ([`recorder::told`]); [`recorder::trap`] stops the allocating
//!    thread at each call and reads arguments, result and Python stack from outside.
//! 4. The [`recorder::ledger`] turns that into records in an order that replays right, and [`capture`] writes them.
//! 5. At the end everything is taken back in reverse order and compared.
//! 6. [`analysis`] and [`report`] read the file, on any machine, and know nothing of processes.
//!
//! Of several processes, [`tree`] has each recorded by a heaptap of its own and keeps an index of their captures; reports take
//! the folder.
//!
//! Data goes one way: `inferior → probe → recorder → capture → analysis → report`; live and offline code meet in
//! [`capture`] alone. `tests/architecture.rs` holds this.
//!
//! # What the caller owes, and what we do
//!
//! The caller has the right to trace the process, and tells which one. We leave it as we found it, whatever happens to it
//! or to us: see README, "What is written into the target, and how it is undone".

pub mod addr;
pub mod agent_abi;
pub mod analysis;
pub mod capture;
pub mod cli;
pub mod cpython;
pub mod error;
pub mod image;
pub mod inferior;
pub mod mapping;
pub mod memory;
pub mod native;
pub mod probe;
pub mod python_binary;
pub mod recorder;
pub mod report;
pub mod tree;
pub mod unwind_abi;
