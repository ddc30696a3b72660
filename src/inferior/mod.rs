//! The process under ptrace.
//!
//! Knows threads, stops, registers, mappings and remote system calls. Knows nothing of Python.

pub mod maps;
pub mod memory;
