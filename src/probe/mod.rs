//! Probes: which allocator entry points ([`plan`]), the thunks that stand behind them ([`region`]), planting
//! ([`install`]) and lifting them ([`lift`], [`stale`]), and what a hit means ([`calls`]).
//!
//! Knows functions and calling conventions. Knows nothing of Python stacks, captures or reports.

pub mod calls;
pub mod detour;
pub mod error;
pub mod function;
mod handler;
pub mod head;
pub mod install;
pub mod internal_callers;
pub mod lift;
pub mod place;
pub mod plan;
pub mod references;
pub mod region;
pub mod stale;
