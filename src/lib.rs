//! heaptap attaches to a running CPython process by pid, records where its memory is allocated,
//! and lets go without a trace.

pub mod addr;
pub mod analysis;
pub mod capture;
pub mod cli;
pub mod cpython;
pub mod error;
pub mod image;
pub mod inferior;
pub mod mapping;
pub mod memory;
pub mod probe;
pub mod python_binary;
pub mod recorder;
pub mod report;
