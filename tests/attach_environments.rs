//! Targets in difficult environments: full disks, seccomp filters, wrapped allocators, other tracers, namespaces,
//! foreign schedulers, crowds of threads, sudden ends. After each: no trace, and the program noticed nothing.

mod common;
mod environments;
