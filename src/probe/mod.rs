//! Probes: which allocator entry points ([`plan`]), the thunks that stand behind them ([`region`]), planting
//! ([`install`]) and lifting them ([`lift`], [`stale`]), what a hit means ([`calls`]), and the
//! controller's end of the agent's rings ([`ring`]).
//!
//! Knows functions and calling conventions. Knows nothing of Python stacks, captures or reports.

pub mod calls;
pub mod error;
pub mod function;
mod handler;
pub mod install;
pub mod lift;
pub mod place;
pub mod plan;
pub mod references;
pub mod region;
pub mod ring;
pub mod ring_record;
pub mod stale;
