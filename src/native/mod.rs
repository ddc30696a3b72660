//! The C stack of a thread that stands still, read from outside: which frames there are, in which files, and what they are called.
//!
//! [`Tables`] has the rules of every mapped file, [`walk`] follows them up a stack, [`Names`] turns addresses into functions and lines,
//! [`merge`] puts Python's frames where its interpreter's are. Knows files, memory and registers; who stopped the thread, and what CPython's
//! structures look like, it is told.
//!
//! [`Symbolizer`] names addresses where no process is: in files known by path and build id, from what this machine or a server has of them.

mod closure;
mod debug_info;
mod debuginfod;
mod merge;
mod names;
mod parts;
mod symbolize;
mod tables;
mod walk;

pub use merge::{Merged, merge};
pub use names::{Names, Place};
pub use parts::parts;
pub use symbolize::Symbolizer;
pub use tables::{CodeMap, Tables};
pub use walk::{Ended, Stack, walk};
