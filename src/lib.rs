//! heaptap attaches to a running CPython process by pid, records where its memory is allocated,
//! and lets go without a trace.

pub mod addr;
pub mod analysis;
pub mod capture;
pub mod cli;
pub mod error;
pub mod inferior;
pub mod memory;
pub mod report;
