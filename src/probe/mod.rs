//! Probes: which allocator entry points ([`plan`]), the thunks that stand behind them ([`region`]), planting
//! ([`install`]) and lifting them ([`lift`], [`stale`]), and what a hit means ([`calls`]);
//! what the in-target agent is told of the process's CPython ([`agent_facts`]).
//!
//! Knows functions and calling conventions. Knows nothing of Python stacks, captures or reports.

pub mod agent_image;
pub mod agent_facts;
pub mod calls;
pub mod detour;
pub mod error;
pub mod function;
mod handler;
pub mod head;
pub mod hooks;
pub mod install;
pub mod jump;
pub mod lift;
pub mod load;
pub mod near;
pub mod place;
pub mod plan;
pub mod references;
pub mod region;
pub mod signal_frames;
pub mod stale;
